"""Pictures to a depth network's input, its prediction to depth maps: bit for bit the same on the CPU and on a card.

An array in a card's memory is worked on there by ``kernels/depth.cu``, on CuPy's current stream, without waiting; any
other by Numba, without the interpreter's lock. The arithmetic is fp32, each operation rounded to nearest in one fixed
order, on coordinates that are exact integers; a picture's result depends on that picture alone. Judge: plain NumPy in
``tests/test_depth_processing.py``.

The formulas are those of DenseDepth (Alhashim and Wonka 2018, arXiv 1812.11941) as the original data set used them.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.backends.cuda import as_array
from gpufgbg.compiling import compiled
from gpufgbg.depth.options import MEANINGS
from gpufgbg.exceptions import OptionError
from gpufgbg.recipe import MAX_FRAME

__all__ = ["NORMALISATIONS", "Maps", "are_clipped", "postprocess", "preprocess"]

Triple = tuple[float, float, float]

#: Scale and bias of red, green and blue, by what a network takes: 0 to 1; that less ImageNet's mean, over its std;
#: 0 to 255.
NORMALISATIONS: dict[str, tuple[Triple, Triple]] = {
    "unit": ((1 / 255, 1 / 255, 1 / 255), (0.0, 0.0, 0.0)),
    "imagenet": (
        (1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225)),
        (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
    ),
    "255": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
}

_PRE_THREADS, _POST_THREADS = 256, 1024  # as in kernels/depth.cu
_PLAIN, _INVERSE, _DISPARITY = 0, 1, 2  # meanings, as in kernels/depth.cu
_MEANINGS = {"inverse": _INVERSE, "disparity": _DISPARITY}  # the others are plain
_f32 = np.float32
_ZERO, _TEN, _THOUSAND, _LEVELS = _f32(0), _f32(10), _f32(1000), _f32(256)
_INFINITY, _NAN = _f32(np.inf), _f32(np.nan)


@dataclass(frozen=True)
class Maps:
    """Depth maps of N pictures, all in the memory that the prediction is in.

    Attributes
    ----------
    grey : (N, H, W) uint8
        A picture's own range of depth over 0 (nearest) to 255 (farthest); 0 where depth is unknown, and everywhere if
        it is the same everywhere.
    range : (N, 2) float32
        Least and most depth in metres; NaN where no depth of the picture is known.
    faults : (N,) int32
        How many values of the prediction are infinite or NaN. Depth is unknown wherever one of them has a say.
    metres : (N, H, W) float32, optional
        Depth in metres; NaN where it is unknown.
    """

    grey: Any
    range: Any
    faults: Any
    metres: Any = None


# -------------------------------------------------------------------------------------------------------------------
# The CPU's side


# NumPy's error model: a division by zero is infinite, as it is on the card.
_compiled = partial(compiled, error_model="numpy")


@_compiled
def _between(first, second, weight):  # type: ignore[no-untyped-def]
    return first + (second - first) * weight


@_compiled
def _resize_picture(  # type: ignore[no-untyped-def]
    image, above, below, row_weight, left, right, column_weight, scale, bias, result
):
    """image (H, W, 3) uint8 -> result (h, w, 3) float32, normalised.

    above, below (h) and left, right (w): the two pixels of an axis that make one; row_weight, column_weight: of the
    second of them, float32.
    """
    lines = np.empty((image.shape[1], 3), np.float32)
    for row in range(result.shape[0]):
        upper, lower, weight = image[above[row]], image[below[row]], row_weight[row]
        for x in range(lines.shape[0]):
            for c in range(3):
                lines[x, c] = _between(_f32(upper[x, c]), _f32(lower[x, c]), weight)
        for x in range(result.shape[1]):
            for c in range(3):
                value = _between(lines[left[x], c], lines[right[x], c], column_weight[x])
                result[row, x, c] = value * scale[c] + bias[c]


@_compiled
def _resize_value(prediction, column, above, below, weight):  # type: ignore[no-untyped-def]
    # A pixel of weight 0 is not looked at, so that the same size gives the same.
    value = prediction[above, column]
    return _between(value, prediction[below, column], weight) if weight != _ZERO else value


@_compiled
def _depth_of(value, meaning):  # type: ignore[no-untyped-def]
    if not np.isfinite(value):
        return _NAN
    if meaning != _INVERSE:
        return (-value if meaning == _DISPARITY else value) + _ZERO  # -0 becomes 0
    distance = _THOUSAND / value
    if distance < _TEN:
        distance = _TEN
    if distance > _THOUSAND:
        distance = _THOUSAND
    return distance / _THOUSAND


@_compiled
def _map_picture(  # type: ignore[no-untyped-def]
    prediction, above, below, row_weight, left, right, column_weight, meaning, scale, depth, grey, span, metres
):
    """prediction (h, w) float32 -> grey (H, W) uint8, span (2) float32, metres (H, W) or (0, 0) float32; its faults.

    depth (H, W) float32 is scratch; the rest is as in `_resize_picture`.
    """
    faults = 0
    for value in prediction.flat:
        faults += not np.isfinite(value)
    low, high = _INFINITY, -_INFINITY
    for row in range(grey.shape[0]):
        a, b, weight = above[row], below[row], row_weight[row]
        for x in range(grey.shape[1]):
            value = _resize_value(prediction, left[x], a, b, weight)
            if column_weight[x] != _ZERO:
                value = _between(value, _resize_value(prediction, right[x], a, b, weight), column_weight[x])
            d = _depth_of(value, meaning)
            depth[row, x] = d
            if d < low:
                low = d
            if d > high:
                high = d
    known = low <= high
    span[0], span[1] = (low * scale, high * scale) if known else (_NAN, _NAN)
    for row in range(grey.shape[0]):
        for x in range(grey.shape[1]):
            share = (depth[row, x] - low) / (high - low)
            grey[row, x] = min(255, int(share * _LEVELS)) if share > _ZERO else 0
    if metres.size:
        for row in range(grey.shape[0]):
            for x in range(grey.shape[1]):
                d = depth[row, x]
                metres[row, x] = d * scale if d == d else _NAN
    return faults


def _taps(source: int, size: int, mirror: bool) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """The two pixels that make each of an axis resized from ``source`` to ``size``, and the weight of the second.

    Pixel i lies at ((2 i + 1) source - size) / (2 size), between centres -1 and ``source``.
    """
    at, rest = np.divmod((2 * np.arange(size, dtype=np.int64) + 1) * source - size, 2 * size)
    taps = np.stack([at, at + 1])
    if mirror:
        taps = np.abs(taps)
        taps = np.where(taps >= source, 2 * source - 2 - taps, taps)
    taps = taps.clip(0, source - 1)  # one pixel is its own mirror image
    return taps[0], taps[1], rest.astype(np.float32) / _f32(2 * size)


# -------------------------------------------------------------------------------------------------------------------
# Checks


def _on_card(array: Any) -> bool:
    return hasattr(array, "__cuda_array_interface__")


def _size(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and 1 <= side <= MAX_FRAME for side in sides):
        raise OptionError("size", f"got {size!r}, expected (height, width), 1 to {MAX_FRAME:,} pixels a side")
    return int(sides[0]), int(sides[1])


def _batch(name: str, array: Any, dtypes: tuple[str, ...], shape: str, channels: tuple[int, ...] = ()) -> Any:
    """The array as NumPy's or CuPy's, C-contiguous, or `OptionError`."""
    array = as_array(array)
    fits = array.dtype.name in dtypes and array.ndim == 3 + len(channels) and array.shape[3:] == channels
    if not fits or not all(1 <= side <= MAX_FRAME for side in array.shape[1:3]):
        expected = f"{' or '.join(dtypes)} {shape}, 1 to {MAX_FRAME:,} pixels a side"
        raise OptionError(name, f"got {array.dtype} {array.shape}, expected {expected}")
    if _on_card(array):
        import cupy

        with array.device:
            return cupy.ascontiguousarray(array)
    return np.ascontiguousarray(array)


def _result(name: str, given: Any, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The array to write to: the caller's if it fits, else a new one where ``like`` is."""
    dtype = np.dtype(dtype)
    if given is None:
        if not _on_card(like):
            return np.empty(shape, dtype)
        import cupy

        with like.device:
            return cupy.empty(shape, dtype)
    expected = (
        f"C-contiguous {dtype} {shape} in {f'the memory of {like.device}' if _on_card(like) else 'host memory'}"
    )
    if type(given) is not type(like):
        raise OptionError(name, f"got {type(given).__name__}, expected {expected}")
    if given.dtype != dtype or given.shape != shape or not given.flags.c_contiguous:
        raise OptionError(name, f"got {given.dtype} {given.shape}, expected {expected}")
    if _on_card(like) and given.device != like.device:
        raise OptionError(name, f"got an array in the memory of {given.device}, expected {expected}")
    return given


def _channel_values(name: str, values: Any) -> npt.NDArray[np.float32]:
    """A number, or one a channel, as three float32."""
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.shape not in ((), (3,)) or not (np.abs(found) <= np.finfo(np.float32).max).all():
        raise OptionError(name, f"got {values!r}, expected a number that fp32 can hold, or three (red, green, blue)")
    return np.ascontiguousarray(np.broadcast_to(found, 3), np.float32)


# -------------------------------------------------------------------------------------------------------------------
# What callers use


def preprocess(
    images: Any,
    size: tuple[int, int],
    *,
    layout: str = "NCHW",
    channels: int = 3,
    dtype: npt.DTypeLike = np.float32,
    scale: float | Triple = 1 / 255,
    bias: float | Triple = 0.0,
    out: Any = None,
) -> Any:
    """Pictures as a network's input: resized, then ``value * scale + bias``.

    Bilinear between pixel centres, mirrored at the border without repeating the edge's pixel, never smoothed:
    ``skimage.transform.resize(order=1, anti_aliasing=False)``, by which the original data set doubled its pictures.

    Parameters
    ----------
    images : (N, H, W, 3) uint8
        RGB, 1 to 16,384 pixels a side, in host memory or, as CuPy's or with ``__cuda_array_interface__`` or DLPack, a
        card's. Copied first if not C-contiguous.
    size : (int, int)
        Height h and width w of the input in pixels, 1 to 16,384.
    layout : {"NCHW", "NHWC"}
        Shape of the result: (N, 3, h, w) or (N, h, w, channels).
    channels : int
        3; of NHWC also 4 or 8, of which the last are 0.
    dtype : {float32, float16}
        float16 is the float32 result rounded to nearest even; beyond 65,504 it is infinite.
    scale, bias : float or (float, float, float)
        Of all channels, or of red, green and blue; see `NORMALISATIONS`.
    out : array, optional
        Where to write: of the result's shape and dtype, C-contiguous, and where the images are.

    Returns
    -------
    array
        ``out``, or a new array that belongs to the caller, NumPy's or CuPy's as the images are. On a card it is
        written by CuPy's current stream, which is not waited for.

    Raises
    ------
    OptionError
        An argument is not as told above.
    DeviceError
        The images are on a card and this build has no kernels.
    """
    images = _batch("images", images, ("uint8",), "(N, H, W, 3)", (3,))
    h, w = _size(size)
    if layout not in ("NCHW", "NHWC"):
        raise OptionError("layout", f"got {layout!r}, expected NCHW or NHWC")
    if channels not in ((3,) if layout == "NCHW" else (3, 4, 8)):
        raise OptionError("channels", f"got {channels!r}, expected 3, or 4 or 8 with layout NHWC")
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        raise OptionError("dtype", f"got {dtype!r}, expected float32 or float16") from None
    if dtype not in (np.float32, np.float16):
        raise OptionError("dtype", f"got {dtype}, expected float32 or float16")
    scales, biases = _channel_values("scale", scale), _channel_values("bias", bias)
    n, height, width = images.shape[:3]
    out = _result("out", out, images, (n, 3, h, w) if layout == "NCHW" else (n, h, w, channels), dtype)

    if _on_card(images):
        if n:
            from gpufgbg.backends.cuda import kernel

            name = f"depth_preprocess_{layout.lower()}_{'half' if dtype == np.float16 else 'float'}"
            sizes = [height, width, h, w] + ([channels] if layout == "NHWC" else [])
            rows = _PRE_THREADS // 32
            with images.device:
                kernel("depth", name)(
                    (n, -(-h // rows)), (_PRE_THREADS,), (images, *map(np.int32, sizes), *scales, *biases, out)
                )
        return out

    taps = (*_taps(height, h, mirror=True), *_taps(width, w, mirror=True))
    result = np.empty((h, w, 3), np.float32)
    with np.errstate(over="ignore"):
        for image, to in zip(images, out, strict=True):
            _resize_picture(image, *taps, scales, biases, result)
            if layout == "NCHW":
                to[...] = result.transpose(2, 0, 1)
            else:
                to[..., :3], to[..., 3:] = result, 0
    return out


def postprocess(
    prediction: Any,
    size: tuple[int, int],
    *,
    meaning: str,
    scale: float = 1.0,
    metres: bool = False,
    out: Maps | None = None,
) -> Maps:
    """A network's prediction p as depth maps.

    Where its size is another, p is resized first: bilinear between pixel centres, clamped at the border. Then depth
    is d = clip(1000 / p, 10, 1000) / 1000 for ``"inverse"``, where p = 0 gives 1 and p < 0 gives 0.01, d = -p for
    ``"disparity"``, else d = p. Of each picture, q = (d - min) / (max - min) and grey = min(255, floor(256 q));
    metres are d * scale.

    A value that is infinite or NaN counts as a fault whatever the meaning, for it is what an overflow in the network
    gives; depth is unknown there, and where it would weigh in when resized. A range of depth that overflows fp32
    gives grey 0.

    Parameters
    ----------
    prediction : (N, h, w) float32 or float16
        1 to 16,384 pixels a side, in host memory or, as CuPy's or with ``__cuda_array_interface__`` or DLPack, a
        card's. Copied first if not C-contiguous.
    size : (int, int)
        Height H and width W of the maps in pixels, 1 to 16,384.
    meaning : {"inverse", "metres", "relative", "disparity"}
        What p is: DenseDepth's inverse depth, depth in metres, depth without a unit (larger is farther), which is
        treated as metres are, or inverse depth without a unit (larger is nearer).
    scale : float
        Metres of one unit of d: 10 for DenseDepth's nyu.h5. Positive.
    metres : bool
        Give depth in metres too.
    out : Maps, optional
        Where to write: as `Maps` tells, C-contiguous, and where the prediction is; with ``metres`` only if they are
        wanted. What else is None is made.

    Returns
    -------
    Maps
        Arrays of ``out``, or new ones that belong to the caller, NumPy's or CuPy's as the prediction is. On a card
        they are written by CuPy's current stream, which is not waited for.

    Raises
    ------
    OptionError
        An argument is not as told above.
    DeviceError
        The prediction is on a card and this build has no kernels.
    """
    prediction = _batch("prediction", prediction, ("float32", "float16"), "(N, h, w)")
    height, width = _size(size)
    if meaning not in MEANINGS:
        raise OptionError("meaning", f"got {meaning!r}, expected one of {', '.join(MEANINGS)}")
    limits = np.finfo(np.float32)
    if not isinstance(scale, numbers.Real) or not float(limits.tiny) <= float(scale) <= float(limits.max):
        raise OptionError("scale", f"got {scale!r}, expected a positive number of metres")
    if out is not None and (out.metres is not None) != metres:
        raise OptionError("out", f"got Maps {'without' if metres else 'with'} metres, with metres={metres}")
    n, h, w = prediction.shape
    given = Maps(None, None, None) if out is None else out
    shape = (n, height, width)
    out = Maps(
        _result("out.grey", given.grey, prediction, shape, np.uint8),
        _result("out.range", given.range, prediction, (n, 2), np.float32),
        _result("out.faults", given.faults, prediction, (n,), np.int32),
        _result("out.metres", given.metres, prediction, shape, np.float32) if metres else None,
    )
    code = _MEANINGS.get(meaning, _PLAIN)

    if _on_card(prediction):
        if n:
            from gpufgbg.backends.cuda import kernel

            name = f"depth_postprocess_{'half' if prediction.dtype == np.float16 else 'float'}"
            sizes = map(np.int32, (h, w, height, width, code))
            length = np.uint64(0) if out.metres is None else out.metres
            with prediction.device:
                kernel("depth", name)(
                    (n,), (_POST_THREADS,),
                    (prediction, *sizes, _f32(scale), out.grey, length, out.range, out.faults),
                )  # fmt: skip
        return out

    taps = (*_taps(h, height, mirror=False), *_taps(w, width, mirror=False))
    depth, nothing = np.empty((height, width), np.float32), np.empty((0, 0), np.float32)
    for i in range(n):
        out.faults[i] = _map_picture(
            prediction[i].astype(np.float32, copy=False), *taps, code, _f32(scale), depth,
            out.grey[i], out.range[i], nothing if out.metres is None else out.metres[i],
        )  # fmt: skip
    return out


def are_clipped(ranges: npt.NDArray[np.float32], scale: float) -> bool:
    """Whether all maps of meaning ``"inverse"`` are flat at an end of its clip: no value of theirs lay within.

    Parameters
    ----------
    ranges : (N, 2) float32
        As `Maps` has them, in host memory.
    scale : float
        What `postprocess` was given.
    """
    ends = np.array([_TEN / _THOUSAND, _THOUSAND / _THOUSAND]) * _f32(scale)
    near, far = ranges[:, 0], ranges[:, 1]
    return len(ranges) > 0 and bool(((near == far) & np.isin(near, ends)).all())
