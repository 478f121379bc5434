"""Exact statistics of a data set as it is on disk: counts, sizes, mean and std by kind."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import imagecodecs
import numpy as np
import numpy.typing as npt

from gpufgbg.backends.cpu import moments as count
from gpufgbg.compositor import check_workers
from gpufgbg.exceptions import DatasetError, printable
from gpufgbg.layout import KINDS
from gpufgbg.moments import Moments
from gpufgbg.readers import StoredPicture, decode, scan

__all__ = ["KindStatistics", "statistics"]

#: kinds whose mean and std the original gives; of cut-outs and their masks it gives count and size alone
MEASURED = ("background", "composite", "composite_mask", "depth")
_GREY = ("foreground_mask", "composite_mask", "depth")
_CHUNK = 64  # pictures a worker takes at a time


@dataclass
class KindStatistics:
    """What is on disk of one kind.

    Attributes
    ----------
    images, size_bytes : int
    moments : Moments
        Exact sums over the decoded pixels; empty for foregrounds and their masks.
    forms : set of (int, int, str, str)
        Width, height, mode and format of the pictures met; sizes of cut-outs are left out.
    """

    images: int = 0
    size_bytes: int = 0
    moments: Moments = field(default_factory=Moments)
    forms: set[tuple[int, int, str, str]] = field(default_factory=set)

    def add(self, other: KindStatistics) -> None:
        """Merge another part of the same kind."""
        self.images += other.images
        self.size_bytes += other.size_bytes
        self.moments = self.moments + other.moments
        self.forms |= other.forms


def statistics(
    path: str | os.PathLike[str],
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    kinds: Collection[str] = tuple(KINDS),
) -> dict[str, KindStatistics]:
    """Decode everything that is on disk of a data set and count it.

    Parameters
    ----------
    path : path
        A folder tree, a zip or tar shards; ours, the original, or any with its folder names.
    workers : int, optional
        Threads that decode, by default one a core.
    progress : callable, optional
        Called with the number of pictures done so far.
    kinds : collection of str
        Pictures of other kinds are passed over.

    Returns
    -------
    dict of str to KindStatistics
        The kinds that are there, in the order of the original's table.

    Raises
    ------
    DatasetError
        There is no data set, or a picture can't be decoded; the message names it.
    """
    threads = check_workers(workers)
    pictures = (picture for picture in scan(path) if picture.kind in kinds)
    totals: dict[str, KindStatistics] = {}
    pending: deque[tuple[int, Future[dict[str, KindStatistics]]]] = deque()
    done = 0

    def take() -> None:
        nonlocal done
        size, future = pending.popleft()
        for kind, part in future.result().items():
            totals.setdefault(kind, KindStatistics()).add(part)
        done += size
        if progress:
            progress(done)

    with ThreadPoolExecutor(threads) as pool:
        try:
            while chunk := list(islice(pictures, _CHUNK)):
                pending.append((len(chunk), pool.submit(_measure, chunk)))
                if len(pending) > 2 * threads:
                    take()
            while pending:
                take()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def _measure(chunk: list[StoredPicture]) -> dict[str, KindStatistics]:
    totals: dict[str, KindStatistics] = {}
    for picture in chunk:
        total = totals.setdefault(picture.kind, KindStatistics())
        moments, form = Moments(), None
        if picture.kind in MEASURED:
            pixels, form = _decode(picture)
            moments = count(pixels[None])
        forms = {form} if form else set()
        try:
            total.add(KindStatistics(1, picture.size_bytes, moments, forms))
        except ValueError as error:
            raise DatasetError(f"{printable(picture.name)}: {error}") from None
    return totals


def _decode(
    picture: StoredPicture,
) -> tuple[npt.NDArray[np.uint8], tuple[int, int, str, str]]:
    """Pixels (H, W, 3) or (H, W), and the form; JPEG by the decoder that Pillow uses, without its lock."""
    data = picture.read()
    wanted = "L" if picture.kind in _GREY else "RGB"
    if data[:2] == b"\xff\xd8":
        try:
            pixels = imagecodecs.jpeg8_decode(data)
        except (imagecodecs.Jpeg8Error, ValueError) as error:
            raise DatasetError(f"{printable(picture.name)}: can't be decoded: {error}") from None
        if pixels.ndim == (2 if wanted == "L" else 3) and pixels.shape[2:] in ((), (3,)):
            return pixels, (pixels.shape[1], pixels.shape[0], wanted, "JPEG")
    image = decode(StoredPicture(picture.kind, picture.name, len(data), lambda: data))
    form = (image.width, image.height, image.mode, image.format or "")
    return np.asarray(image.convert(wanted)), form
