"""Batches of composites and masks as arrays: the library's front door."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from gpufgbg import backends
from gpufgbg.assets import Assets
from gpufgbg.backends.cuda import as_array, is_on_card
from gpufgbg.checks import whole
from gpufgbg.exceptions import InputError, OptionError
from gpufgbg.moments import Moments
from gpufgbg.recipe import Placements, Plan, Recipe

if TYPE_CHECKING:
    from gpufgbg.blend import Blend

__all__ = ["Batch", "Compositor", "default_workers"]


def default_workers() -> int:
    """The number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(workers: int | None) -> int:
    """``workers``, or the number of cores for None; `OptionError` where out of range."""
    return default_workers() if workers is None else whole("workers", workers, 1, 1024)


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
        Index, background, foreground, repetition, flip, x, y of each sample; NumPy, but CuPy of placements that
        `Compositor.render_placed` was given in a card's memory.
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
    """Renders any samples of a recipe over given assets, and any placements of the caller's own.

    Parameters
    ----------
    assets : Assets
        Kept by reference; must not change.
    recipe : Recipe, optional
        Its frame is the backgrounds' size.
    device : {"auto", "cpu", "cuda", "cuda:N"}
    workers : int, optional
        Threads that render, by default one a core.
    blend : Blend or callable, optional
        ``blend(fg, bg, alpha, x, y) -> value`` in place of the foreground's alpha, which masks keep; see
        `gpufgbg.blend`. On a card it needs the extra ``blend``.

    Attributes
    ----------
    blend : Blend or None
        The user's, compiled; None where it is the foreground's alpha.

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
        blend: Blend | Callable[..., Any] | None = None,
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
        if blend is not None:
            from gpufgbg.blend import Blend

            blend = blend if isinstance(blend, Blend) else Blend(blend)
        self.blend: Blend | None = blend
        self.backend = backends.select(device, assets, self.recipe, blend)

    def __len__(self) -> int:
        """Number of samples in the whole data set."""
        return len(self.plan)

    def render(self, indices: npt.ArrayLike) -> Batch:
        """The samples ``indices``, in that order, as new arrays.

        Parameters
        ----------
        indices : (N,) integers
            Any samples from 0 to ``len(compositor) - 1``, in any order, also twice; on the host or on a card. Or one.

        Raises
        ------
        OptionError
            Not integers, of another shape, or an index is outside the data set.
        """
        given = _as_array("indices", indices)
        return self._batch(self.plan.placements(given.get() if is_on_card(given) else given), self.backend.render)

    def render_placed(self, *, background: Any, foreground: Any, flip: Any, x: Any, y: Any) -> Batch:
        """Samples of the caller's own placements, as new arrays: what goes where is decided outside.

        Parameters
        ----------
        background, foreground : (N,) integers
            Numbers of the assets' pictures, in any order, also twice.
        flip : (N,) bool
            Foreground and mask are flipped left to right where it is true, or not 0.
        x, y : (N,) integers
            Top-left corner of the foreground in the frame, in pixels. The whole foreground lies inside the frame, x
            from 0 to W - w and y from 0 to H - h; nothing is cut off at the frame's edge.

        A single number stands for N of them. The arrays are on the host or on the compositor's card, CuPy's or
        anything with ``__cuda_array_interface__`` or DLPack. Those don't visit the host: a few small kernels
        check them, and one wait for CuPy's current stream tells whether all are in range. Where some are on the card,
        the others are copied to it; where the compositor's device is the CPU, all are copied to the host.

        Returns
        -------
        Batch
            Its ``labels`` have the placements, copied; their ``index`` counts from 0, their ``repetition`` is 0.

        Raises
        ------
        OptionError
            A placement is out of range; the message names the first such sample. Or an array has another shape or
            dtype.
        """
        given = {"background": background, "foreground": foreground, "flip": flip, "x": x, "y": y}
        placements = self._placements(given)
        return self._batch(placements, self.backend.render_placed)

    def _batch(
        self, placements: Placements, render: Callable[[Placements, Any, Any], backends.PendingMoments]
    ) -> Batch:
        composites, masks = self.backend.frames(len(placements))
        if self.backend.name != "cpu":
            return Batch(composites, masks, placements, (render(placements, composites, masks),))
        step = max(1, -(-len(placements) // self.workers))
        parts = [slice(at, at + step) for at in range(0, len(placements), step)]

        def work(part: slice) -> backends.PendingMoments:
            return render(placements[part], composites[part], masks[part])

        if len(parts) > 1:
            with ThreadPoolExecutor(self.workers) as pool:
                pending = tuple(pool.map(work, parts))
        else:
            pending = tuple(map(work, parts))
        return Batch(composites, masks, placements, pending)

    def _placements(self, given: dict[str, Any]) -> Placements:
        """The caller's arrays, checked, all on the host or all on the card."""
        arrays: dict[str, Any] = {name: _as_array(name, values) for name, values in given.items()}
        count = max((len(v) for v in arrays.values() if v.ndim == 1), default=1)
        for name, values in arrays.items():
            whole = values.dtype.kind in ("biu" if name == "flip" else "iu") or not values.size
            if not whole or values.shape not in ((), (count,)):
                expected = "bool" if name == "flip" else "integers"
                raise OptionError(name, f"got {values.dtype} {values.shape}, expected {expected} ({count},)")
        if not any(map(is_on_card, arrays.values())):
            return self._in_range(np, arrays, count)
        if self.backend.name == "cpu":
            return self._in_range(np, {n: v.get() if is_on_card(v) else v for n, v in arrays.items()}, count)
        import cupy

        with cupy.cuda.Device(int(self.backend.name.partition(":")[2])):
            return self._in_range(cupy, {name: cupy.asarray(values) for name, values in arrays.items()}, count)

    def _in_range(self, xp: Any, given: dict[str, Any], count: int) -> Placements:
        """Placements of integers in arrays of ``xp``, NumPy or CuPy; `OptionError` where one is out of range."""
        sizes = {"x": (self.recipe.width, self.assets.widths), "y": (self.recipe.height, self.assets.heights)}
        counts = {"background": self.assets.n_backgrounds, "foreground": self.assets.n_foregrounds}
        wide = {name: values.astype(np.int64) for name, values in given.items()}
        wrong = xp.zeros(count, np.bool_)
        for name, most in counts.items():
            wrong |= (wide[name] < 0) | (wide[name] >= most)
        known = xp.where(wrong, 0, wide["foreground"])
        for name, (side, taken) in sizes.items():
            wrong |= (wide[name] < 0) | (wide[name] > side - xp.asarray(taken)[known])
        if wrong.any():
            self._refuse(int(wrong.argmax()), given)
        fields = {
            name: xp.broadcast_to(values, (count,)).astype(np.bool_ if name == "flip" else np.int32)
            for name, values in given.items()
        }
        return Placements(index=xp.arange(count, dtype=np.int64), repetition=xp.zeros(count, np.int32), **fields)

    def _refuse(self, n: int, given: dict[str, Any]) -> NoReturn:
        """`OptionError` about sample n, of which something is out of range."""
        at = {name: int(values if values.ndim == 0 else values[n]) for name, values in given.items()}
        f = at["foreground"]
        for name, count in (("background", self.assets.n_backgrounds), ("foreground", self.assets.n_foregrounds)):
            if not 0 <= at[name] < count:
                raise OptionError(name, f"sample {n}: got {at[name]}, expected 0 to {count - 1}")
        (frame_width, frame_height), width, height = self.recipe.size, self.assets.widths[f], self.assets.heights[f]
        name, most = "x", frame_width - width
        if 0 <= at["x"] <= most:
            name, most = "y", frame_height - height
        raise OptionError(
            name,
            f"sample {n}: got {at[name]}, expected 0 to {most}: foreground {f} is {width}x{height}, the frame "
            f"{frame_width}x{frame_height}, and nothing is cut off at its edge",
        )


def _as_array(name: str, values: Any) -> Any:
    """Numbers of any kind as NumPy's array or, where they lie in a card's memory, as CuPy's."""
    try:
        return as_array(values)
    except (TypeError, ValueError) as error:  # rows of several lengths, arrays on a card in a list
        said = str(error).partition("\n")[0]
        raise OptionError(name, f"got {type(values).__name__} that makes no array of integers: {said}") from None
