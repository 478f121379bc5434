"""Depth maps of shards that are not whole yet, kept so that a killed run need not predict them again.

On a CPU a network takes seconds a picture and a shard takes hours, while rendering takes nothing. So depth files go
to a journal as they are made, and a run that continues takes them from there::

    OUT/.gpufgbg/journal/START-STOP.depth    of the shard START-STOP; removed once the shard is committed

It is a row of entries: a header (see `_HEADER`) and the file's bytes. An entry that a kill or a power failure cut
off fails its checksum; it is removed and predicted again, with what may be behind it.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gpufgbg.moments import Moments
from gpufgbg.recipe import Shard

__all__ = ["DepthJournal", "KeptDepth"]

#: CRC-32 of all that follows; sample, bytes of the file, pixels, sum, sum of squares, least and greatest depth
_HEADER = struct.Struct("<I QQQQQ ff")
_CHECKED = 4  # bytes of the header that the checksum leaves out: its own


@dataclass(frozen=True)
class KeptDepth:
    """A sample's depth map.

    Attributes
    ----------
    sample : int
    file : bytes
        The JPEG file.
    range : (float, float)
        Least and greatest depth, float32 values.
    moments : Moments
        Of the map before JPEG.
    """

    sample: int
    file: bytes
    range: tuple[float, float]
    moments: Moments

    def pack(self) -> bytes:
        """As an entry of the journal."""
        m = self.moments
        header = _HEADER.pack(0, self.sample, len(self.file), m.pixels, m.sum[0], m.sum_of_squares[0], *self.range)
        rest = header[_CHECKED:] + self.file
        return struct.pack("<I", zlib.crc32(rest)) + rest

    @classmethod
    def read(cls, file: BinaryIO) -> KeptDepth | None:
        """The next entry of a journal, or None where there is no whole one."""
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        checksum, sample, size_bytes, pixels, total, squares, near, far = _HEADER.unpack(header)
        data = file.read(size_bytes) if size_bytes < 1 << 32 else b""
        if zlib.crc32(header[_CHECKED:] + data) != checksum:
            return None
        return cls(sample, data, (near, far), Moments(1, pixels, (total,), (squares,)))


class DepthJournal:
    """The journal of a data set; safe to use from many threads.

    Parameters
    ----------
    folder : Path
        Where it lies; made when there is something to keep.
    gaps : iterable of Shard
        The samples that this run makes, which no other process does: those of them that the journal has are found.
    """

    def __init__(self, folder: Path, gaps: Iterable[Shard]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._where: dict[int, tuple[Path, int]] = {}
        wanted = list(gaps)
        for path in _files(folder):
            kept = Shard.from_name(path.stem)
            if any(kept.start < part.stop and part.start < kept.stop for part in wanted):
                for sample, offset in _checked(path):
                    if any(part.start <= sample < part.stop for part in wanted):
                        self._where[sample] = (path, offset)

    def __len__(self) -> int:
        """Number of depth maps that it has of this run's samples, but for those added since."""
        return len(self._where)

    def find(self, sample: int) -> KeptDepth | None:
        """A sample's depth map, where an earlier run made it."""
        path, offset = self._where.get(sample, (None, 0))
        if path is None:
            return None
        with path.open("rb") as file:
            file.seek(offset)
            return KeptDepth.read(file)

    def add(self, shard: Shard, made: Iterable[KeptDepth]) -> None:
        """Keep depth maps of samples of ``shard``."""
        data = b"".join(entry.pack() for entry in made)
        with self._lock:
            self._folder.mkdir(exist_ok=True)
            with (self._folder / f"{shard.name}.depth").open("ab") as file:
                file.write(data)

    def forget(self, shard: Shard) -> None:
        """``shard`` is committed: nothing of it is needed any more."""
        with self._lock:
            for path in _files(self._folder):
                part = Shard.from_name(path.stem)
                if shard.start <= part.start and part.stop <= shard.stop:
                    path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.depth"))


def _checked(path: Path) -> Iterator[tuple[int, int]]:
    """(sample, offset) of a file's whole entries; what is behind them is cut off."""
    with path.open("rb+") as file:
        offset = 0
        while entry := KeptDepth.read(file):
            yield entry.sample, offset
            offset = file.tell()
        file.truncate(offset)
