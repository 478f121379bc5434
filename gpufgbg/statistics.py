"""Exact statistics of a data set as it is on disk: counts, sizes, mean and std by kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from gpufgbg import decoding
from gpufgbg.exceptions import DatasetError
from gpufgbg.layout import KINDS
from gpufgbg.moments import Moments
from gpufgbg.readers import StoredPicture, scan

__all__ = ["KindStatistics", "statistics"]

#: kinds whose mean and std the original gives; of cut-outs and their masks it gives count and size alone
MEASURED = ("background", "composite", "composite_mask", "depth")


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
    device: str = "auto",
) -> dict[str, KindStatistics]:
    """Decode everything that is on disk of a data set and count it.

    On the CPU, pixels are Pillow's own. On a card, DALI decodes baseline JPEG files, whose pixels may be a grey level
    off here and there; mean and std are within 0.0005 of the CPU's. What else there is, the CPU decodes.

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
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where pictures are decoded and counted; ``auto`` takes a card where there is one and DALI is installed.

    Returns
    -------
    dict of str to KindStatistics
        The kinds that are there, in the order of the original's table.

    Raises
    ------
    DatasetError
        There is no data set, or a picture can't be read or decoded; the message names it.
    OptionError, DeviceError
        No such device's name; or the device is not there, or DALI is not.
    """
    decoder = decoding.select(device, workers)
    totals: dict[str, KindStatistics] = {}

    def measured() -> Iterator[StoredPicture]:
        for picture in scan(path):
            if picture.kind in MEASURED and picture.kind in kinds:
                yield picture
            elif picture.kind in kinds:
                add(picture.kind, KindStatistics(1, len(picture.load())))

    def add(kind: str, part: KindStatistics) -> None:
        totals.setdefault(kind, KindStatistics()).add(part)
        if progress:
            progress(sum(total.images for total in totals.values()))

    with closing(decoder.decode(measured())) as batches:
        for batch in batches:
            if batch.faults:
                raise DatasetError(batch.faults[0])
            forms = {form for form in batch.forms if form}
            add(batch.kind, KindStatistics(len(batch.pictures), batch.size_bytes, batch.moments, forms))
    return {kind: totals[kind] for kind in KINDS if kind in totals}
