"""The samples as a Ray Data source: blocks are made in the tasks that need them, on the machines that use them.

::

    samples = gpufgbg.integrations.ray.read_samples("DATASET")
    for batch in samples.map_batches(augment).iter_torch_batches(batch_size=64):
        train(batch["image"], batch["mask"])

Nothing is read from a disk or a store but, once, the prepared pictures; these go into Ray's object store.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from gpufgbg.assets import Assets
from gpufgbg.checks import whole
from gpufgbg.compositor import Compositor
from gpufgbg.dataset import load_assets
from gpufgbg.exceptions import DeviceError, OptionError
from gpufgbg.manifest import open_dataset
from gpufgbg.recipe import Plan, Recipe
from gpufgbg.shuffle import Permutation

try:
    from ray.data import Datasource as _Datasource
except ImportError:  # told when a source is made
    _Datasource = object

__all__ = ["SampleSource", "read_samples"]

_BLOCK_BYTES = 32 << 20  # of a block: a quarter of what Ray Data takes as the most
_LABELS = ("index", "background", "foreground", "flip", "x", "y")


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise DeviceError("gpufgbg.integrations.ray: Ray is not installed: pip install 'gpufgbg[ray]'") from None
    return ray


class SampleSource(_Datasource):  # type: ignore[misc]
    """Composites, masks and placements of a data set's samples; what `read_samples` reads.

    Parameters
    ----------
    assets : Assets
    recipe : Recipe
    samples : (start, stop), optional
        These alone; None leaves an end open.
    shuffle : bool
        In a shuffled order, the same each time.
    seed : int
        Of the order.
    device : {"auto", "cpu", "cuda"}
        Where tasks render. A task has a card where it asks Ray for one (``ray_remote_args={"num_gpus": 1}``); the
        block's arrays are copied to the host's memory in any case, where Ray's blocks are.

    Raises
    ------
    OptionError, DeviceError
        An option is out of range; or Ray is missing.
    """

    def __init__(
        self,
        assets: Assets,
        recipe: Recipe,
        samples: tuple[int | None, int | None] | None = None,
        shuffle: bool = False,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        ray = _ray()
        super().__init__()
        plan = Plan(recipe, assets.n_backgrounds, assets.widths, assets.heights)
        start, stop = samples or (None, None)
        self._start = whole("samples", start or 0, 0, len(plan) - 1)
        self._stop = whole("samples", len(plan) if stop is None else stop, self._start + 1, len(plan))
        self._seed = whole("seed", seed, 0, 2**64 - 1)
        self._shuffle = bool(shuffle)
        self._device = device
        self._recipe = recipe
        self._assets = ray.put(assets)
        self._sample_bytes = 4 * recipe.width * recipe.height + 37

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all blocks together."""
        return self._sample_bytes * (self._stop - self._start)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[Any]:
        """Tasks (`ray.data.ReadTask`) that make the samples, an equal share each, in blocks of a few hundred."""
        from ray.data import ReadTask
        from ray.data.block import BlockMetadata

        count = self._stop - self._start
        edges = [count * n // parallelism for n in range(parallelism + 1)]
        limit = {} if per_task_row_limit is None else {"per_task_row_limit": per_task_row_limit}
        tasks = []
        for first, last in itertools.pairwise(edges):
            if first == last:
                continue
            metadata = BlockMetadata(
                num_rows=last - first,
                size_bytes=self._sample_bytes * (last - first),
                exec_stats=None,
                input_files=None,
            )
            tasks.append(ReadTask(self._reader(first, last), metadata, **limit))
        return tasks

    def _reader(self, first: int, last: int) -> Callable[[], Iterator[Any]]:
        """What makes the blocks of positions ``first`` to ``last - 1`` of the order."""
        recipe, device, reference = self._recipe, self._device, self._assets
        base, count = self._start, self._stop - self._start
        order = (count, self._seed) if self._shuffle else None
        step = max(1, _BLOCK_BYTES // self._sample_bytes)

        def read() -> Iterator[Any]:
            from ray.data.block import BlockAccessor

            compositor = _compositor(reference, recipe, device)
            permutation = None if order is None else Permutation(*order, 0)
            for start in range(first, last, step):
                positions = np.arange(start, min(start + step, last), dtype=np.int64)
                indices = positions if permutation is None else permutation(positions)
                batch = compositor.render(indices + base)
                columns = {"image": _on_host(batch.image), "mask": _on_host(batch.mask)}
                columns |= {name: getattr(batch.labels, name) for name in _LABELS}
                yield BlockAccessor.batch_to_block(columns)

        return read


@lru_cache(maxsize=4)
def _compositor(reference: Any, recipe: Recipe, device: str) -> Compositor:
    """Loaded once in each of Ray's processes."""
    return Compositor(_ray().get(reference), recipe, device, workers=1)


def _on_host(array: Any) -> Any:
    return array if isinstance(array, np.ndarray) else array.get()


def read_samples(
    source: Assets | str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    samples: tuple[int | None, int | None] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    device: str = "auto",
    override_num_blocks: int | None = None,
    ray_remote_args: dict[str, Any] | None = None,
) -> Any:
    """A Ray data set of a recipe's samples, none of which is made before it is used.

    Parameters
    ----------
    source : path, URL or Assets
        A data set made by gpufgbg, whose recipe is taken, or prepared pictures.
    recipe : Recipe, optional
        With assets alone.
    samples, shuffle, seed, device
        As for `SampleSource`.
    override_num_blocks, ray_remote_args
        As for ``ray.data.read_datasource``.

    Returns
    -------
    ray.data.Dataset
        Rows have image (H, W, 3) and mask (H, W), uint8, index, background, foreground, flip, x and y. Ray Data gives
        blocks as they come; in order where its ``DataContext`` asks for it (``execution_options.preserve_order``).

    Raises
    ------
    DatasetError
        There is no data set of ours at the path.
    OptionError, DeviceError
        An option is out of range, or a recipe was given with a data set, which has its own; or Ray is missing.
    """
    ray = _ray()
    if isinstance(source, Assets):
        assets, recipe = source, recipe or Recipe()
    else:
        if recipe is not None:
            raise OptionError("recipe", "a data set has its own: leave it out")
        manifest, content, recipe = open_dataset(source)
        assets = load_assets(manifest.out, content)
    made = SampleSource(assets, recipe, samples, shuffle, seed, device)
    return ray.data.read_datasource(made, override_num_blocks=override_num_blocks, ray_remote_args=ray_remote_args)
