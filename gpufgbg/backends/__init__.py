"""Where samples are made: the same small set of operations on every device, chosen once.

A backend has pixels in its own memory and gives the same bytes as every other. `select` is the only place that
knows which there are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from gpufgbg.exceptions import OptionError

if TYPE_CHECKING:
    from gpufgbg.assets import Assets
    from gpufgbg.blend import Blend
    from gpufgbg.moments import Moments
    from gpufgbg.recipe import Placements, Recipe

__all__ = ["Backend", "select"]


class Backend(Protocol):
    """What every device can do. Arrays live in the device's memory."""

    name: str

    def frames(self, count: int) -> tuple[Any, Any]:
        """Uninitialised composites (count, H, W, 3) and masks (count, H, W), uint8, for `render` to fill."""

    def render(self, placements: Placements, composites: Any, masks: Any) -> PendingMoments:
        """Fill composites and masks of N placements of the recipe's plan; the result gives their moments."""

    def render_placed(self, placements: Placements, composites: Any, masks: Any) -> PendingMoments:
        """Like `render`, of any placements that lie inside the frame; their index and repetition have no say."""


class PendingMoments(Protocol):
    """Moments that may still be under way."""

    def get(self) -> dict[str, Moments]:
        """The moments by kind; waits for them."""


def check_device(device: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or `OptionError`."""
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        listed = isinstance(device, str) and re.match(r"cuda.*,|cuda:all", device)
        several = ": several cards, where they can share the work, are cuda:0,2 or cuda:all" if listed else ""
        raise OptionError("device", f"got {device!r}, expected auto, cpu, cuda or cuda:N{several}")
    return device


def blended_masks(assets: Assets) -> npt.NDArray[np.uint16]:
    """The foregrounds' masks, packed as they are, pasted through themselves onto black: composite masks' values."""
    blended = assets.masks.astype(np.uint16) ** 2 + np.uint16(128)
    return (blended + (blended >> 8)) >> 8


def blended_mask_sums(assets: Assets) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(F,) sums and sums of squares of each foreground's composite mask.

    A mask lies inside the frame as a whole, so they don't depend on where it lies.
    """
    blended = blended_masks(assets)
    starts = assets.offsets[:-1]
    squares = np.add.reduceat(blended.astype(np.uint32) ** 2, starts, dtype=np.int64)
    return np.add.reduceat(blended, starts, dtype=np.int64), squares


def select(device: str, assets: Assets, recipe: Recipe, blend: Blend | None = None) -> Backend:
    """The backend for ``device``, loaded with the assets.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:N"}
        ``auto`` takes the first CUDA device where there is one, and the CPU elsewhere.
    blend : Blend, optional
        In place of the foreground's alpha.

    Raises
    ------
    OptionError
        No such name.
    DeviceError
        The device is not there.
    """
    kind, _, number = check_device(device).partition(":")
    if kind == "cuda" or (kind == "auto" and why_cpu(device) is None):
        from gpufgbg.backends.cuda import CudaBackend

        return CudaBackend(assets, recipe, int(number or 0), blend)
    from gpufgbg.backends.cpu import CpuBackend

    return CpuBackend(assets, recipe, blend)


def warm(device: str) -> None:
    """Load what a backend for ``device`` needs whatever its assets are; what is amiss is `select`'s to tell."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        from gpufgbg.backends import cpu  # noqa: F401  # Numba, and the compiled functions in its cache

        return
    from gpufgbg.backends import cuda

    cuda.warm(int(number or 0))


def why_cpu(device: str) -> str | None:
    """Why ``auto`` means the CPU on this machine; None where it does not, or where another device is named."""
    if check_device(device) != "auto":
        return None
    from gpufgbg.backends.cuda import why_not

    return why_not()
