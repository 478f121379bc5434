"""Batches of pictures as a network's input: floating point, less a mean, over a std; the same bits on every device.

An array in a card's memory is worked on there by ``kernels/normalise.cu``, in one pass, on CuPy's current stream,
without waiting; any other by Numba, without the interpreter's lock and so by as many threads as are asked for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.checks import whole
from gpufgbg.compiling import compiled
from gpufgbg.depth.processing import Triple, _batch, _channel_values, _on_card, _result
from gpufgbg.exceptions import OptionError

__all__ = ["DTYPES", "LAYOUTS", "normalise"]

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("NCHW", "NHWC")
_THREADS, _PIXELS = 256, 2048  # as in kernels/normalise.cu
_SHARE = 1 << 22  # values that are worth a thread: a millisecond


@compiled
def _planes(images, table, out):  # type: ignore[no-untyped-def]
    """images (N, pixels * 3) uint8, table (3, 256) -> out (N, 3, pixels) of the table's type."""
    reds, greens, blues = table[0], table[1], table[2]
    for n in range(images.shape[0]):
        image, red, green, blue = images[n], out[n, 0], out[n, 1], out[n, 2]
        for i in range(red.size):
            red[i] = reds[image[3 * i]]
            green[i] = greens[image[3 * i + 1]]
            blue[i] = blues[image[3 * i + 2]]


@compiled
def _pixels(images, table, out):  # type: ignore[no-untyped-def]
    """images (N, pixels * 3) uint8, table (3, 256) -> out (N, pixels * 3) of the table's type."""
    reds, greens, blues = table[0], table[1], table[2]
    for n in range(images.shape[0]):
        image, to = images[n], out[n]
        for i in range(to.size // 3):
            to[3 * i] = reds[image[3 * i]]
            to[3 * i + 1] = greens[image[3 * i + 1]]
            to[3 * i + 2] = blues[image[3 * i + 2]]


def normalise(
    images: Any,
    mean: float | Triple = 0.0,
    std: float | Triple = 1.0,
    *,
    dtype: str = "float32",
    layout: str = "NCHW",
    out: Any = None,
    workers: int = 1,
) -> Any:
    """Pictures as ``(value / 255 - mean) / std``.

    Computed as value * scale + bias in fp32, with scale = 1 / (255 std) and bias = -mean / std rounded from fp64; a
    product and a sum, each rounded to nearest. float16 and bfloat16 are that, rounded to nearest even.

    Parameters
    ----------
    images : (N, H, W, 3) uint8
        RGB, in host memory or, as CuPy's or with ``__cuda_array_interface__`` or DLPack, a card's. Copied first if
        not C-contiguous.
    mean, std : float or (float, float, float)
        Of all channels, or of red, green and blue, over values scaled to 0..1, as `Moments.mean` and `Moments.std`
        give them. The std is above 0.
    dtype : {"float32", "float16", "bfloat16"}
    layout : {"NCHW", "NHWC"}
        Shape of the result: (N, 3, H, W) or (N, H, W, 3).
    out : array, optional
        Where to write: of the result's shape and dtype, C-contiguous, and where the images are.
    workers : int
        Threads, for images in host memory; fewer where these are few.

    Returns
    -------
    array
        ``out``, or a new array that belongs to the caller, NumPy's or CuPy's as the images are. bfloat16, which
        neither has, is its bits as uint16: ``torch.from_dlpack(...).view(torch.bfloat16)``. On a card it is written
        by CuPy's current stream, which is not waited for.

    Raises
    ------
    OptionError
        An argument is not as told above.
    DeviceError
        The images are on a card and this build has no kernels.
    """
    images = _batch("images", images, ("uint8",), "(N, H, W, 3)", (3,))
    scale, bias = check(mean, std, dtype, layout)
    n, height, width = images.shape[:3]
    pixels = height * width
    workers = whole("workers", workers, 1, 1024)
    kept = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    out = _result("out", out, images, (n, 3, height, width) if layout == "NCHW" else images.shape, kept)
    if not n:
        return out
    if _on_card(images):
        from gpufgbg.backends.cuda import kernel

        grid = (-(-pixels // _PIXELS), min(65_535, n))
        with images.device:
            arguments = (images, np.int32(n), np.int32(pixels), *scale, *bias, out)
            kernel("normalise", f"normalise_{layout.lower()}_{dtype}")(grid, (_THREADS,), arguments)
        return out
    table = _table(scale, bias, dtype)
    bits = out.view(table.dtype)
    images = images.reshape(n, -1)
    fill, bits = (_planes, bits.reshape(n, 3, -1)) if layout == "NCHW" else (_pixels, bits.reshape(n, -1))
    threads = min(workers, images.size // _SHARE)
    if threads <= 1:
        fill(images, table, bits)
        return out
    step = -(-n // (4 * threads))  # a thread that is kept from its core leaves its parts to the others
    with ThreadPoolExecutor(threads, "gpufgbg-normalise") as pool:
        for part in [
            pool.submit(fill, images[at : at + step], table, bits[at : at + step]) for at in range(0, n, step)
        ]:
            part.result()
    return out


def check(
    mean: float | Triple, std: float | Triple, dtype: str, layout: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scale and bias of red, green and blue, (3,) float32 each, or `OptionError`."""
    if dtype not in DTYPES:
        raise OptionError("dtype", f"got {dtype!r}, expected {', '.join(DTYPES)}")
    if layout not in LAYOUTS:
        raise OptionError("layout", f"got {layout!r}, expected {' or '.join(LAYOUTS)}")
    for name, values in (("mean", mean), ("std", std)):
        _channel_values(name, values)
    means, stds = (np.broadcast_to(np.asarray(values, np.float64), 3) for values in (mean, std))
    with np.errstate(all="ignore"):
        scale, bias = (1 / (255 * stds)).astype(np.float32), (-means / stds).astype(np.float32)
    if not (stds > 0).all() or not np.isfinite([scale, bias]).all():
        raise OptionError("std", f"got {std!r}, expected above 0 and not next to it: a number, or three")
    return scale, bias


def _table(
    scale: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], dtype: str
) -> npt.NDArray[np.uint32] | npt.NDArray[np.uint16]:
    """(3, 256): what a byte becomes, as bits."""
    with np.errstate(over="ignore"):
        values = np.arange(256, dtype=np.float32) * scale[:, None] + bias[:, None]
        if dtype == "float16":
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    if dtype == "float32":
        return bits
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
