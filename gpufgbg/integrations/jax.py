"""The stream as JAX arrays, by DLPack.

::

    for batch in JaxStream("DATASET", batch_size=64, epochs=10):
        state = step(state, batch["image"], batch["mask"])
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpufgbg.assets import Assets
from gpufgbg.compositor import Compositor
from gpufgbg.depth.processing import Triple
from gpufgbg.exceptions import DeviceError, OptionError
from gpufgbg.integrations.convert import Conversion
from gpufgbg.recipe import Recipe
from gpufgbg.streaming import StrPath, stream

__all__ = ["JaxStream"]


def _jax() -> Any:
    try:
        import jax
    except ImportError:
        raise DeviceError("gpufgbg.integrations.jax: JAX is not installed: pip install 'gpufgbg[jax]'") from None
    return jax


class JaxStream:
    """An iterator over batches of `gpufgbg.stream` as JAX arrays.

    Pixels are handed over by DLPack and share the stream's memory: on a card where they are, on the CPU as arrays of
    JAX's CPU device. JAX never writes to them. Normalising may as well be left to the jitted step, on uint8.

    Parameters
    ----------
    source, foregrounds, masks, recipe
        As for `gpufgbg.stream`.
    layout : {"uint8 NHWC", "float NCHW", "float NHWC"}
        Of the images: as they are rendered, or normalised in one pass: ``(value / 255 - mean) / std``.
    mean, std : float or (float, float, float), optional
        Over values scaled to 0..1. Default: those of the composites, where ``source`` is a data set on disk.
    dtype : {"float32", "float16", "bfloat16"}
        Of float images. bfloat16 is copied once more by JAX.
    labels : bool
        Give background, foreground, repetition, flip, x, y and boxes too.
    rank, world : int, optional
        Default: ``jax.process_index()`` and ``jax.process_count()``.
    options
        The rest of `gpufgbg.stream`'s but ``reuse``: JAX's arrays never change.

    Yields
    ------
    dict
        ``image``, ``mask``, with depth ``depth``, ``depth_range`` and ``metres``, with labels their names, as JAX
        arrays on the stream's device; ``index`` as a NumPy array, as JAX has no 64 bits by default. Shapes and dtypes
        as in `gpufgbg.integrations.torch.StreamDataset`.

    Raises
    ------
    DeviceError
        JAX is not installed, or the device can't be used.
    OptionError, InputError, DatasetError
        As for `gpufgbg.stream`; or ``mean`` and ``std`` are missing.
    """

    def __init__(
        self,
        source: Compositor | Assets | StrPath,
        foregrounds: StrPath | None = None,
        masks: StrPath | None = None,
        recipe: Recipe | None = None,
        *,
        layout: str = "uint8 NHWC",
        mean: float | Triple | None = None,
        std: float | Triple | None = None,
        dtype: str = "float32",
        labels: bool = False,
        rank: int | None = None,
        world: int | None = None,
        **options: Any,
    ) -> None:
        self._jax = _jax()
        if rank is None and world is None:
            rank, world = self._jax.process_index(), self._jax.process_count()
        if "reuse" in options:
            raise OptionError("reuse", "JAX's arrays never change: leave it out")
        self.stream = stream(
            source, foregrounds, masks, recipe, rank=rank or 0, world=1 if world is None else world, **options
        )
        known = self.stream.statistics.get("composite")
        self.conversion = Conversion.of(layout, mean, std, dtype, labels, known)

    def __len__(self) -> int:
        """Batches of one whole epoch, of this process."""
        return len(self.stream)

    def __iter__(self) -> JaxStream:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch."""
        arrays = self.conversion.arrays(next(self.stream))
        batch = {name: array if name == "index" else self._array(array) for name, array in arrays.items()}
        if self.conversion.is_bfloat16:
            batch["image"] = batch["image"].view(self._jax.numpy.bfloat16)
        return batch

    def _array(self, array: Any) -> Any:
        """An array's memory as JAX's; a copy of truth values, which not every speaker of DLPack knows."""
        if array.dtype == np.bool_:
            return self._array(array.view(np.uint8)).astype(np.bool_)
        return self._jax.dlpack.from_dlpack(array)

    def state_dict(self) -> dict[str, Any]:
        """As `SampleStream.state_dict`."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `SampleStream.load_state_dict`."""
        self.stream.load_state_dict(state)

    def set_epoch(self, epoch: int) -> None:
        """As `SampleStream.set_epoch`."""
        self.stream.set_epoch(epoch)

    def close(self) -> None:
        """End it, and its threads."""
        self.stream.close()

    def __enter__(self) -> JaxStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
