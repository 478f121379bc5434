"""Where samples are made: the same small set of operations on every device, chosen once.

A backend has pixels in its own memory and gives the same bytes as every other. `select` is the only place that
knows which there are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from gpufgbg.exceptions import DeviceError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpufgbg.assets import Assets
    from gpufgbg.moments import Moments
    from gpufgbg.recipe import Placements, Recipe

__all__ = ["Backend", "select"]


class Backend(Protocol):
    """What a device can do. Arrays live in the device's memory; see `gpufgbg.backends.cpu` for the CPU's."""

    name: str

    def frames(self, count: int) -> tuple[Any, Any]:
        """Uninitialised composites (count, H, W, 3) and masks (count, H, W), uint8, for `render` to fill."""

    def render(self, placements: Placements, composites: Any, masks: Any) -> dict[str, Moments]:
        """Fill composites and masks of N placements; their moments by kind."""

    def render_reusing(self, placements: Placements, capacity: int) -> tuple[Any, Any, dict[str, Moments]]:
        """Composites, masks and moments, in frames that the backend keeps: valid until this thread's next call."""

    def encode(self, pictures: Any, quality: int, subsampling: str, optimize: bool) -> Sequence[bytes]:
        """Pictures (N, H, W, 3) or (N, H, W) as JPEG files."""


def check_device(device: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``, or `OptionError`."""
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise OptionError("device", f"got {device!r}, expected auto, cpu, cuda or cuda:N")
    return device


def select(device: str, assets: Assets, recipe: Recipe) -> Backend:
    """The backend for ``device``, loaded with the assets.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:N"}

    Raises
    ------
    OptionError
        No such name.
    DeviceError
        The device is not there.
    """
    if check_device(device).startswith("cuda"):
        raise DeviceError(f"device {device}: this version has no CUDA engine yet: use --device cpu or auto")
    from gpufgbg.backends.cpu import CpuBackend

    return CpuBackend(assets, recipe)
