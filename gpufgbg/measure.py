"""Exact mean and std of pictures wherever they are: in arrays, in folders, in data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gpufgbg.arrays import Pictures, read_arrays
from gpufgbg.backends import check_device, cuda
from gpufgbg.backends.cpu import moments
from gpufgbg.compositor import check_workers
from gpufgbg.decoding import as_colour
from gpufgbg.exceptions import DatasetError, DeviceError, InputError, OptionError, printable
from gpufgbg.layout import KINDS
from gpufgbg.moments import Moments
from gpufgbg.pictures import FORMATS, PictureError, quiet_decoding, raise_all, read_picture, walk_pictures
from gpufgbg.statistics import MEASURED, statistics

__all__ = ["mean_std"]


def mean_std(
    pictures: Any, kind: str | None = None, workers: int | None = None, device: str = "auto", layout: str = "auto"
) -> Moments:
    """Exact mean and standard deviation of pictures, over all their pixels.

    Parameters
    ----------
    pictures : array, list or tuple of arrays, or path
        - (N, H, W) grey, (N, H, W, 3) or (N, 3, H, W) RGB, uint8: NumPy's, CuPy's, or anything with
          ``__cuda_array_interface__`` or DLPack. On a card it is counted there, on CuPy's current stream, which is
          waited for. Of a list, each is one picture of any size: (H, W), (H, W, 3) or (3, H, W); where one has
          colours, grey ones count as RGB.
        - A folder: every picture in it and below it, of any sizes. Where one has colours, grey ones count as RGB;
          transparency is not looked at.
        - With ``kind``, a data set: a folder tree, a zip file or tar shards, not only ours.
    kind : {"background", "composite", "composite_mask", "depth"}, optional
        Whose pictures to take of a data set.
    workers : int, optional
        Threads that decode files, by default one a core.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where a data set's pictures are decoded and counted, see `gpufgbg.statistics.statistics`; arrays are counted
        where they are, the pictures of a folder on the CPU.
    layout : {"auto", "HWC", "CHW", "HW"}
        The axes of a picture in arrays, as `gpufgbg.JpegEncoder.encode` takes it.

    Returns
    -------
    Moments
        ``mean`` and ``std`` a channel, over values scaled to 0..1, and the integer sums that they come from; results
        of several calls add up. Both are empty where there are no pixels.

    Raises
    ------
    InputError
        Another shape or dtype; or there are no pictures in the folder, or some can't be decoded: all are named.
    DatasetError
        There is no such data set, none of the kind in it, or a picture of it can't be decoded.
    OptionError, DeviceError
        A parameter is out of range; or the array is on a card and CuPy or the kernels are missing; or the device is
        not there, or DALI is not.

    Examples
    --------
    >>> import numpy as np
    >>> found = mean_std(np.arange(256, dtype=np.uint8).reshape(1, 16, 16))
    >>> found.mean, found.images
    ((0.5,), 1)
    """
    threads = check_workers(workers)
    if kind is not None and kind not in MEASURED:
        raise OptionError("kind", f"got {kind!r}, expected one of {', '.join(MEASURED)}")
    if kind is None and check_device(device).startswith("cuda"):
        raise OptionError("device", f"got {device!r} without kind, expected it for a data set's pictures of a kind")
    if isinstance(pictures, (str, os.PathLike)):
        if layout != "auto":
            raise OptionError("layout", f"got {layout!r} with a path, expected it with arrays")
        return _of_folder(Path(pictures), threads) if kind is None else _of_dataset(pictures, kind, threads, device)
    if kind is not None:
        raise OptionError("kind", f"got {kind!r} with an array, expected it with a data set's path")
    return _of_arrays(read_arrays("pictures", pictures, layout))


def _of_arrays(given: Sequence[Pictures]) -> Moments:
    under_way = {3: [_counting(one.pixels) for one in given if one.pixels.ndim == 3 and one.pixels.size]}
    under_way[4] = [_counting(one.pixels) for one in given if one.pixels.ndim == 4 and one.pixels.size]
    grey, colour = (Moments.total(get() for get in under_way[axes]) for axes in (3, 4))
    if not colour.images:
        return grey
    return colour + as_colour(grey)


def _counting(pixels: Any) -> Callable[[], Moments]:
    """Count pictures where they are; what it returns gives their moments."""
    if not cuda.is_on_card(pixels):
        found = moments(pixels)
        return lambda: found
    reason = cuda.why_not(pixels.device.id)
    if reason is not None:
        raise DeviceError(f"pictures: got an array in the memory of a card: {reason}")
    import cupy

    with pixels.device:
        return cuda.start_moments(cupy.ascontiguousarray(pixels)).get


def _of_dataset(path: str | os.PathLike[str], kind: str, threads: int, device: str) -> Moments:
    found = statistics(path, threads, kinds=(kind,), device=device)
    if kind not in found:
        raise DatasetError(f"{printable(path)}: no pictures of kind {kind} in it")
    return found[kind].moments


def _of_folder(folder: Path, threads: int) -> Moments:
    if not folder.is_dir():
        raise InputError(
            f"{printable(folder)}: no such folder: expected a folder of pictures, or a data set with kind"
        )
    if any((folder / name).is_dir() for name in KINDS.values()):
        raise OptionError("kind", f"{printable(folder)} is a data set: expected one of {', '.join(MEASURED)}")
    problems: list[str] = []
    grey, colour = Moments(), Moments()
    paths = walk_pictures(folder, problems)
    with quiet_decoding, ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(paths, 16 * threads)):
            for found in pool.map(_measured, chunk):
                if isinstance(found, str):
                    problems.append(found)
                elif len(found.sum) == 1:
                    grey += found
                else:
                    colour += found
    raise_all(problems)
    if not grey.images + colour.images:
        raise InputError(f"{printable(folder)}: no pictures in it: expected {', '.join(sorted(FORMATS))}")
    if not colour.images:
        return grey
    return colour + as_colour(grey)


def _measured(path: Path) -> Moments | str:
    """A picture's moments, or what is wrong with it. Call it inside `quiet_decoding`."""
    try:
        image = read_picture(path).image
    except PictureError as error:
        return f"{printable(path)}: {error}"
    return moments(np.asarray(image.convert("L" if image.mode == "L" else "RGB"))[None])
