"""Batches of composites and masks as arrays: the library's front door."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg import backends
from gpufgbg.assets import Assets
from gpufgbg.exceptions import InputError, OptionError
from gpufgbg.moments import Moments
from gpufgbg.recipe import Placements, Plan, Recipe

__all__ = ["Batch", "Compositor", "default_workers"]


def default_workers() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """``workers``, or the number of cores for None; `OptionError` where out of range."""
    if workers is None:
        return default_workers()
    if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= 1024:
        raise OptionError("workers", f"got {workers!r}, expected 1 to 1024")
    return workers


@dataclass(frozen=True)
class Batch:
    """A batch of N samples, owned by the caller.

    Attributes
    ----------
    image : (N, H, W, 3) uint8
        Composites, RGB; NumPy on the CPU, CuPy on a card.
    mask : (N, H, W) uint8
        Their masks.
    labels : Placements
        Index, background, foreground, repetition, flip, x, y of each sample.
    """

    image: Any
    mask: Any
    labels: Placements
    _pending: tuple[backends.PendingMoments, ...] = field(repr=False)

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Exact sums of this batch, under ``composite`` and ``composite_mask``; waits for the device."""
        parts = [pending.get() for pending in self._pending]
        kinds = ("composite", "composite_mask")
        return {kind: Moments.total(part[kind] for part in parts) for kind in kinds}


class Compositor:
    """Renders any samples of a recipe over given assets.

    Parameters
    ----------
    assets : Assets
        Kept by reference; must not change.
    recipe : Recipe, optional
        Its frame is the backgrounds' size.
    device : {"auto", "cpu", "cuda", "cuda:N"}
    workers : int, optional
        Threads that render, by default one a core.

    Raises
    ------
    InputError
        The backgrounds have another size than the recipe's frame, or a foreground does not fit it.
    OptionError, DeviceError
        An option is out of range, or the device is not there.

    Examples
    --------
    >>> compositor = Compositor(assets, Recipe(seed=7))   # doctest: +SKIP
    >>> batch = compositor.render(range(8))               # doctest: +SKIP
    >>> batch.image.shape                                 # doctest: +SKIP
    (8, 224, 224, 3)
    """

    def __init__(
        self,
        assets: Assets,
        recipe: Recipe | None = None,
        device: str = "auto",
        workers: int | None = None,
    ) -> None:
        self.assets = assets
        self.recipe = recipe or Recipe()
        height, width = assets.backgrounds.shape[1:3]
        if (width, height) != self.recipe.size:
            raise InputError(
                f"backgrounds are {width}x{height}, the recipe's frame is "
                f"{self.recipe.width}x{self.recipe.height}: prepare them with this recipe"
            )
        self.plan = Plan(self.recipe, assets.n_backgrounds, assets.widths, assets.heights)
        self.workers = check_workers(workers)
        self.backend = backends.select(device, assets, self.recipe)

    def __len__(self) -> int:
        """Number of samples in the whole data set."""
        return len(self.plan)

    def render(self, indices: npt.ArrayLike) -> Batch:
        """The samples ``indices``, in that order, as new arrays.

        Parameters
        ----------
        indices : (N,) integers
            Any samples from 0 to ``len(compositor) - 1``, in any order, also twice; on the host or on a card.

        Raises
        ------
        OptionError
            An index is outside the data set.
        """
        if hasattr(indices, "__cuda_array_interface__"):
            import cupy

            indices = cupy.asnumpy(cupy.asarray(indices))
        placements = self.plan.placements(np.asarray(indices))
        composites, masks = self.backend.frames(len(placements))
        if self.backend.name != "cpu":
            return Batch(composites, masks, placements, (self.backend.render(placements, composites, masks),))
        step = max(1, -(-len(placements) // self.workers))
        parts = [slice(at, at + step) for at in range(0, len(placements), step)]

        def render(part: slice) -> backends.PendingMoments:
            return self.backend.render(placements[part], composites[part], masks[part])

        if len(parts) > 1:
            with ThreadPoolExecutor(self.workers) as pool:
                pending = tuple(pool.map(render, parts))
        else:
            pending = tuple(map(render, parts))
        return Batch(composites, masks, placements, pending)
