"""The compositing kernels with a blend of the user's own, on one card; see ``gpufgbg/blend.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpufgbg.blend import Blend

__all__ = ["CardBlend"]


class CardBlend:
    """The kernels of ``kernels/composite.cu`` with a blend, loaded on a card.

    Parameters
    ----------
    blend : Blend
    device : cupy.cuda.Device

    Raises
    ------
    DeviceError, OptionError
        The blend can't be linked; see `Blend.link`.
    """

    def __init__(self, blend: Blend, device: Any) -> None:
        import cupy

        cubin = blend.link(int(device.compute_capability))
        self._module = cupy.cuda.function.Module()
        with device:
            self._module.load(cubin)

    def kernel(self, name: str) -> Any:
        """``composite`` or ``composite_placed``, for launches on the card."""
        return self._module.get_function(name)
