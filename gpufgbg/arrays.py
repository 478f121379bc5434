"""Pictures that callers hand in as arrays, of any library and on any device: which forms are taken, said once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpufgbg.backends.cuda import as_array
from gpufgbg.exceptions import InputError, OptionError

__all__ = ["LAYOUTS", "Pictures", "is_sequence", "read_arrays"]

LAYOUTS = ("auto", "HWC", "CHW", "HW")


@dataclass(frozen=True)
class Pictures:
    """The pictures of one array that was handed in.

    Attributes
    ----------
    pixels : (N, H, W, 3) or (N, H, W) uint8
        RGB or grey; NumPy's or CuPy's, a view of what was handed in, contiguous or not. N is 1 for one picture.
    form : str
        The axes that were handed in, for example ``NCHW``.
    shape : tuple of int
        Their lengths.
    """

    pixels: Any
    form: str
    shape: tuple[int, ...]

    def in_form(self, pixels: Any) -> Any:
        """Other pixels of the shape of ``pixels``, C-contiguous, with the axes that were handed in, C-contiguous."""
        if pixels.ndim == 4 and self.form.endswith("CHW"):
            pixels = pixels.transpose(0, 3, 1, 2).copy()
        return pixels.reshape(self.shape)


def is_sequence(images: Any) -> bool:
    """Whether pictures were handed in one by one, and not in one array."""
    return isinstance(images, (list, tuple))


def read_arrays(name: str, images: Any, layout: str = "auto", largest: int | None = None) -> list[Pictures]:
    """Pictures of one array, or of each array of a list, where they are and without a copy.

    Parameters
    ----------
    name : str
        Of the argument, for messages.
    images : array, or list or tuple of arrays
        uint8; NumPy's, CuPy's, or anything with ``__cuda_array_interface__`` or DLPack. Those of a list may have any
        sizes and be on any devices.
    layout : {"auto", "HWC", "CHW", "HW"}
        The axes of a picture, where C is 3, or 1 for grey. An array with one axis more is a batch; of a list, (H, W)
        is grey whatever the layout. ``auto`` tells by the shapes: of an array (N, H, W, C), (N, C, H, W) or
        (N, H, W), of a list's arrays (H, W, C), (C, H, W) or (H, W).
    largest : int, optional
        Pixels that a side may have; it has 1 at least then.

    Returns
    -------
    list of Pictures
        One an array.

    Raises
    ------
    InputError
        Another shape, size or dtype; or ``auto`` can't tell by the shape.
    OptionError
        No such layout.
    """
    if layout not in LAYOUTS:
        raise OptionError("layout", f"got {layout!r}, expected {', '.join(LAYOUTS)}")
    forms: tuple[str, ...]
    if not is_sequence(images):
        forms = ("NHWC", "NHW", "NCHW") if layout == "auto" else (f"N{layout}", layout)
        expected = _expected(forms) + (", or a list of pictures" if layout == "auto" else f" with layout {layout!r}")
        # One picture (H, W, C) looks like a batch of grey ones, which are C pixels wide.
        return [_read(name, images, forms, ("HWC",) if layout == "auto" else (), expected, largest)]
    forms = ("HWC", "CHW", "HW") if layout == "auto" else ("HW",) if layout == "HW" else (layout, "HW")
    expected = _expected(forms) + ("" if layout == "auto" else f" with layout {layout!r}")
    return [_read(name, image, forms, (), expected, largest, f" as picture {i}") for i, image in enumerate(images)]


def _expected(forms: tuple[str, ...]) -> str:
    """``uint8 (N, H, W, 3) or (N, H, W)``."""
    return "uint8 " + " or ".join(_spelled(form).replace("C", "3") for form in forms)


def _spelled(form: str) -> str:
    return f"({', '.join(form)})"


def _read(
    name: str, given: Any, forms: tuple[str, ...], lookalikes: tuple[str, ...], expected: str, largest: int | None,
    where: str = "",
) -> Pictures:  # fmt: skip
    """One array in one of ``forms``, which must not look like another of them, nor like one of ``lookalikes``."""
    try:
        array = as_array(given)
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # rows of several lengths, arrays on a card in a list of lists
        said = str(error).partition("\n")[0]
        raise InputError(f"{name}: got {type(given).__name__}{where}, expected {expected}: {said}") from None
    shape = tuple(array.shape)
    found = [form for form in (*forms, *lookalikes) if _fits(form, shape)]
    if array.dtype != np.uint8 or not set(found) & set(forms):
        raise InputError(f"{name}: got {array.dtype} {shape}{where}, expected {expected}")
    if len(found) > 1 and array.size > 1:  # one pixel is the same either way
        looks = " and ".join(map(_spelled, found))
        layouts = " or ".join(repr(form.removeprefix("N")) for form in found)
        raise InputError(f"{name}: got uint8 {shape}{where}, which fits both {looks}: say which by layout={layouts}")
    form = found[0]
    pixels = array if form[0] == "N" else array[None]
    channel = f"N{form.removeprefix('N')}".find("C")
    if channel > 0 and pixels.shape[channel] == 1:
        pixels = pixels.squeeze(channel)
    elif channel == 1:
        pixels = pixels.transpose(0, 2, 3, 1)
    height, width = pixels.shape[1:3]
    if largest is not None and not (1 <= height <= largest and 1 <= width <= largest):
        raise InputError(f"{name}: got {width}x{height}{where}, expected 1 to {largest:,} pixels a side")
    return Pictures(pixels, form, shape)


def _fits(form: str, shape: tuple[int, ...]) -> bool:
    return len(form) == len(shape) and ("C" not in form or shape[form.index("C")] in (1, 3))
