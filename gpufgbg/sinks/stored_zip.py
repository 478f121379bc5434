"""One stored zip, ``dataset.zip``, with the names of the folder tree; over 4 GiB and over 65,535 files too.

Shards are kept as runs of zip entries below ``.gpufgbg/parts/``. When a run ends, the parts that are there are put
one after the other, in order, behind the assets and the labels, and a directory is written behind them; the parts
go once the data set is complete. So the zip is the same whoever made its parts, and nothing of it is kept in memory.
"""

from __future__ import annotations

import itertools
import os
import shutil
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gpufgbg.exceptions import DatasetError, printable
from gpufgbg.files import fsync_folder, remove_tree, sync_file_system
from gpufgbg.layout import KINDS, Layout
from gpufgbg.manifest import STATE, tiling
from gpufgbg.recipe import Plan, Shard
from gpufgbg.sinks import EncodedSamples, FileShard

__all__ = ["ZipSink"]

# Formats: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its end).
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_VERSION, _UTF8, _STORED = 45, 0x800, 0
_DATE = (1 << 5) | 1  # 1 January 1980, the format's first day: the same bytes whenever it is made
_REGULAR_FILE = 0o100644 << 16
_BIG = 0xFFFFFFFF
_UNFINISHED = "shard.part"  # in the shard's folder
_LONGEST = _CENTRAL.size + 3 * 0xFFFF  # of a record in the directory: name, extra field, comment
_READ_BYTES = 1 << 20  # at a time
_MARK = 4096  # samples
_FARTHEST = 1 << 63


def entry(name: str, data: bytes) -> bytes:
    """A stored file with its local header."""
    encoded = name.encode()
    header = _LOCAL.pack(
        b"PK\3\4", _VERSION, _UTF8, _STORED, 0, _DATE, zlib.crc32(data), len(data), len(data),
        len(encoded), 0,
    )  # fmt: skip
    return b"".join((header, encoded, data))


def entries(file: BinaryIO) -> Iterator[tuple[str, bytes, bytes]]:
    """(name, bytes, local header) of the entries that `entry` made."""
    while header := file.read(_LOCAL.size):
        fields = _LOCAL.unpack(header)
        yield file.read(fields[9]).decode(), file.read(fields[7]), header


class _ZipFile:
    """Writes a zip front to back; its directory is collected in a second file."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.file = temporary.open("wb")
        self.directory = temporary.with_suffix(".directory").open("w+b")
        self.count = 0

    def add(self, name: str, data: bytes, header: bytes) -> None:
        offset, encoded = self.file.tell(), name.encode()
        extra = struct.pack("<HHQ", 1, 8, offset) if offset >= _BIG else b""
        fields = _LOCAL.unpack(header)
        self.directory.write(
            _CENTRAL.pack(
                b"PK\1\2", 3 << 8 | _VERSION, *fields[1:10], len(extra), 0, 0, 0, _REGULAR_FILE,
                min(offset, _BIG),
            )
            + encoded + extra
        )  # fmt: skip
        self.file.writelines((header, encoded, data))
        self.count += 1

    def close(self, target: Path) -> None:
        start, size = self.file.tell(), self.directory.tell()
        self.directory.seek(0)
        shutil.copyfileobj(self.directory, self.file, 1 << 20)
        if self.count > 0xFFFF or start + size >= _BIG:
            at = self.file.tell()
            self.file.write(
                _END64.pack(b"PK\6\6", _END64.size - 12, 3 << 8 | _VERSION, _VERSION, 0, 0,
                            self.count, self.count, size, start)
            )  # fmt: skip
            self.file.write(_LOCATOR64.pack(b"PK\6\7", 0, at, 1))
        count = min(self.count, 0xFFFF)
        self.file.write(_END.pack(b"PK\5\6", 0, 0, count, count, min(size, _BIG), min(start, _BIG), 0))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.abandon()
        self.temporary.replace(target)
        fsync_folder(target.parent)

    def abandon(self) -> None:
        self.file.close()
        self.directory.close()
        Path(self.directory.name).unlink(missing_ok=True)


class StoredEntry(NamedTuple):
    """A file of a stored zip, as the zip's directory tells of it.

    Attributes
    ----------
    name : str
    method : int
        0: stored.
    crc : int
        CRC-32 of its bytes.
    size : int
        Their number.
    offset : int
        Where its local header begins in the zip.
    at : int
        Where its record begins in the zip, for `Directory.entries`.
    """

    name: str
    method: int
    crc: int
    size: int
    offset: int
    at: int


class Directory:
    """The directory of a stored zip, read front to back; nothing of it is kept, however long it is.

    Parameters
    ----------
    file : binary file
        Stays the caller's; is moved about in.

    Raises
    ------
    zipfile.BadZipFile
        There is no directory, or a record of it is damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        length = file.seek(0, os.SEEK_END)
        begin = max(0, length - _END.size - 0xFFFF)  # behind it there may be a comment
        file.seek(begin)
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) - at < _END.size:
            raise zipfile.BadZipFile("it has no directory: cut off, or not a zip")
        size, start = _END.unpack_from(tail, at)[5:7]
        end = begin + at
        locator = at - _LOCATOR64.size
        if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
            end = _LOCATOR64.unpack_from(tail, locator)[2]
            file.seek(end)
            record = file.read(_END64.size)
            if len(record) < _END64.size or record[:4] != b"PK\6\6":
                raise zipfile.BadZipFile("the end of its directory is damaged")
            size, start = _END64.unpack(record)[8:]
        if start + size > end:
            raise zipfile.BadZipFile("its directory is damaged")
        self._start, self._stop = start, start + size

    def entries(self, at: int | None = None) -> Iterator[StoredEntry]:
        """The files in order, from the one whose record is at ``at`` on; by default all."""
        begin, data, within = self._start if at is None else at, b"", 0
        while begin + within < self._stop:
            if len(data) - within < _LONGEST and begin + len(data) < self._stop:
                begin += within
                self._file.seek(begin)
                data, within = self._file.read(min(_READ_BYTES, self._stop - begin)), 0
            if len(data) - within < _CENTRAL.size:
                raise zipfile.BadZipFile("its directory is cut off")
            fields = _CENTRAL.unpack_from(data, within)
            name_at = within + _CENTRAL.size
            extra_at = name_at + fields[10]
            after = extra_at + fields[11] + fields[12]
            if fields[0] != b"PK\1\2" or after > len(data):
                raise zipfile.BadZipFile("its directory is damaged")
            offset = fields[16]
            if offset == _BIG:
                if fields[11] < 12:
                    raise zipfile.BadZipFile("its directory is damaged")
                (offset,) = struct.unpack_from("<Q", data, extra_at + 4)
            name = data[name_at:extra_at].decode("utf-8", "surrogateescape")
            yield StoredEntry(name, fields[4], fields[7], fields[9], offset, begin + within)
            within = after


def contents(file: BinaryIO, entry: StoredEntry) -> Iterator[bytes]:
    """The bytes of a file of a stored zip, in pieces.

    Raises
    ------
    zipfile.BadZipFile
        They are not what the zip's directory says; known at their end.
    """
    if entry.method != _STORED:
        raise zipfile.BadZipFile(f"{printable(entry.name)}: compressed, expected stored")
    file.seek(entry.offset)
    header = file.read(_LOCAL.size)
    left, crc = entry.size, 0
    if len(header) == _LOCAL.size and header[:4] == b"PK\3\4":
        fields = _LOCAL.unpack(header)
        file.seek(fields[9] + fields[10], os.SEEK_CUR)
        while left and (data := file.read(min(left, _READ_BYTES))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
            yield data
    if left or crc != entry.crc:
        raise zipfile.BadZipFile(f"{printable(entry.name)}: its length or checksum is not what the archive says")


class ZipSink:
    """Keeps everything in one zip; see the module."""

    name = "zip"
    uploads = 0

    def __init__(self, out: Path, plan: Plan, layout: Layout, kinds: Sequence[str]) -> None:
        self.out = out
        self.kinds = kinds
        self.plan = plan
        self.layout = layout
        self.file = out / "dataset.zip"
        self.parts = out / STATE / "parts"

    def pack(self, samples: EncodedSamples, folder: Path) -> bytes:
        """The samples' files as entries, one after the other."""
        return b"".join(entry(path, data) for path, data in samples.items())

    def open(self, folder: Path, shard: Shard) -> FileShard:
        """Begin a shard."""
        return FileShard(folder / _UNFINISHED)

    def sync(self) -> None:
        """One call for all parts that wait."""
        sync_file_system(self.out)

    def publish(self, folder: Path, shard: Shard) -> None:
        """Move the part to where `finish` looks for it."""
        self.parts.mkdir(exist_ok=True)
        (folder / _UNFINISHED).replace(self.parts / shard.name)
        fsync_folder(self.parts)

    def _found(self) -> list[Shard]:
        paths = self.parts.iterdir() if self.parts.is_dir() else ()
        return sorted(Shard.from_name(path.name) for path in paths if path.name[0] != ".")

    def read(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        """(path, bytes) of every file of a committed shard, from its part or from the zip."""
        pieces = tiling(self._found(), shard)
        folders = tuple(f"{KINDS[kind]}/" for kind in self.kinds)
        try:
            if pieces:
                for piece in pieces:
                    with (self.parts / piece.name).open("rb") as file:
                        for name, data, _ in entries(file):
                            if name.startswith(folders):
                                yield name, data
                return
            with self.file.open("rb") as listing, self.file.open("rb") as file:
                left = len(shard) * len(self.kinds)
                for found in Directory(listing).entries(self._place_of(shard.start)):
                    if left and found.name.startswith(folders):
                        yield found.name, b"".join(contents(file, found))
                        left -= 1
                    if not left:
                        break
        except (OSError, KeyError, zipfile.BadZipFile, struct.error) as error:
            raise DatasetError(f"{printable(self.file)}: can't be read: {error}") from None

    def finish(self, done: Sequence[Shard]) -> None:
        """Put the zip together from what is there."""
        pieces = self._found()
        complete = list(done) == [Shard(0, len(self.plan))]
        if pieces:
            writer = _ZipFile(self.out / STATE / "dataset.tmp")
            try:
                for path in self._own_files():
                    name, data = path.relative_to(self.out).as_posix(), path.read_bytes()
                    header = entry(name, data)[: _LOCAL.size]
                    writer.add(name, data, header)
                for whole in done:
                    for piece in self._parts_of(whole, pieces):
                        with (self.parts / piece.name).open("rb") as file:
                            for name, data, header in entries(file):
                                writer.add(name, data, header)
                writer.close(self.file)
            except BaseException:
                writer.abandon()
                writer.temporary.unlink(missing_ok=True)
                raise
        used = self.parts.with_name("parts.used")
        if complete and pieces:  # all at once: a kill between two removals would leave parts that make no whole
            self.parts.rename(used)
        remove_tree(used)

    def _place_of(self, index: int) -> int:
        """Where in the zip's directory the files of a sample begin."""
        (stem,) = self.layout.stems(self.plan.placements([index]))
        path = Layout.sample_path(self.kinds[0], stem)
        at = bisect_right(self._marks, (index, _FARTHEST)) - 1
        with self.file.open("rb") as file:
            after = Directory(file).entries(self._marks[at][1] if at >= 0 else None)
            for found in itertools.islice(after, None if at < 0 else _MARK * len(KINDS)):
                if found.name == path:
                    return found.at
        raise zipfile.BadZipFile(f"{path} is missing")

    @cached_property
    def _marks(self) -> list[tuple[int, int]]:
        """(sample, where its files begin in the zip's directory) of one sample in some thousand, sorted."""
        folder, marks, count = f"{KINDS[self.kinds[0]]}/", [], 0
        with self.file.open("rb") as file:
            for found in Directory(file).entries():
                if not found.name.startswith(folder):
                    continue
                index = found.name[found.name.rfind("_") + 1 : -4]
                if count % _MARK == 0 and index.isdecimal():
                    marks.append((int(index), found.at))
                count += 1
        return sorted(marks)

    def _parts_of(self, whole: Shard, pieces: list[Shard]) -> list[Shard]:
        parts = tiling(pieces, whole)
        if parts is None:
            raise DatasetError(
                f"{printable(self.parts)}: parts of samples {whole.start}:{whole.stop} are gone: remove "
                "the data set and make it again"
            )
        return parts

    def _own_files(self) -> Iterator[Path]:
        for folder in ("bg", "fg", "fg_mask", "labels"):
            yield from sorted((self.out / folder).iterdir())
        yield self.out / "labels.parquet"
        yield self.out / "dataset.json"
