"""What a data set knows of itself: dataset.json, a record for each shard, and who is working on it.

::

    OUT/dataset.json                      recipe, assets, counts, statistics, shards; written last
    OUT/.gpufgbg/shards/START-STOP.json   one record a committed shard, small, written atomically
    OUT/.gpufgbg/depth/START-STOP.f32     with depth and labels: least and greatest depth of each of its samples
    OUT/.gpufgbg/journal/                 with depth on a CPU: maps of shards under way (`gpufgbg.depth.journal`)
    OUT/.gpufgbg/segments/                lists of shards that one record stands for, see gpufgbg.segments
    OUT/.gpufgbg/runs/START-STOP/         of a run under way: its lock and its unfinished shards
    OUT/.gpufgbg/scratch/                 files on their way to their names
    OUT/.gpufgbg/lock                     held while one process starts or finishes

A shard counts as made once its record exists. Records never overlap: a run that asks for samples that another
process is making is refused, and samples that have a record are not made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from gpufgbg.description import check_description, check_record
from gpufgbg.exceptions import DatasetError, StorageError, printable
from gpufgbg.files import fsync_folder, remove_tree, sync_file_system, write_atomic
from gpufgbg.moments import Moments
from gpufgbg.recipe import Recipe, Shard
from gpufgbg.urls import is_url, local_path

__all__ = [
    "Manifest",
    "Recorder",
    "ShardChecksum",
    "ShardRecord",
    "inside",
    "kept",
    "merged",
    "missing",
    "open_dataset",
    "open_manifest",
    "tiling",
    "within",
]

FORMAT_VERSION = 1  # 2 where there are segments, see gpufgbg.segments
_READ_VERSIONS = (1, 2)
STATE = ".gpufgbg"
_LOOKS = 100  # at records that change meanwhile


@dataclass(frozen=True)
class ShardRecord:
    """What is recorded of a committed shard.

    Attributes
    ----------
    shard : Shard
    checksum : str
        SHA-256 over the shard's files in order of samples, composite before mask before depth: for each its path in
        the folder tree, a NUL, its length in decimal, a newline, its bytes. The same for every sink.
    size_bytes : dict
        Sum of the files' lengths by kind.
    moments : dict
        Exact sums by kind.
    depth_ranges : (samples, 2) float32, optional
        Least and greatest depth of each sample; on its way to a file of its own, not read back with the record.
    shards : int
        1; of a segment, the number of shards that it stands for.
    """

    shard: Shard
    checksum: str
    size_bytes: dict[str, int]
    moments: dict[str, Moments]
    depth_ranges: npt.NDArray[np.float32] | None = None
    shards: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "start": self.shard.start,
            "stop": self.shard.stop,
            "sha256": self.checksum,
            **({"shards": self.shards} if self.shards > 1 else {}),
            "bytes": self.size_bytes,
            "moments": {kind: m.to_dict() for kind, m in self.moments.items()},
        }

    def to_json(self) -> bytes:
        """As the file of it."""
        return (json.dumps(self.to_dict(), indent=1) + "\n").encode()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ShardRecord:
        """The record of ``to_dict``'s result."""
        return cls(
            Shard(fields["start"], fields["stop"]),
            fields["sha256"],
            dict(fields["bytes"]),
            {kind: Moments.from_dict(m) for kind, m in fields["moments"].items()},
            shards=int(fields.get("shards", 1)),
        )


class ShardChecksum:
    """Builds `ShardRecord.checksum` file by file."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, path: str, data: bytes | memoryview) -> None:
        """Add the next file: its path in the folder tree and its bytes."""
        self._digest.update(f"{path}\0{len(data)}\n".encode())
        self._digest.update(data)

    def hexdigest(self) -> str:
        """The checksum of the files so far."""
        return self._digest.hexdigest()


def missing(wanted: Shard, done: list[Shard]) -> list[Shard]:
    """The parts of ``wanted`` that none of ``done`` (sorted, disjoint) covers."""
    gaps, at = [], wanted.start
    for shard in done:
        if shard.stop <= at or shard.start >= wanted.stop:
            continue
        if shard.start > at:
            gaps.append(Shard(at, shard.start))
        at = max(at, shard.stop)
    if at < wanted.stop:
        gaps.append(Shard(at, wanted.stop))
    return gaps


def within(whole: Shard, done: Sequence[Shard]) -> list[Shard]:
    """The parts of ``whole`` that ``done`` (sorted, disjoint) covers; found by bisection."""
    parts: list[Shard] = []
    for at in range(bisect_right(done, whole.start, key=lambda shard: shard.stop), len(done)):
        if done[at].start >= whole.stop:
            break
        parts.append(Shard(max(done[at].start, whole.start), min(done[at].stop, whole.stop)))
    return parts


def inside(whole: Sequence[Shard], pieces: Iterable[Shard]) -> list[Shard]:
    """Those of ``pieces`` that lie inside one of ``whole`` (sorted, disjoint) and are not one of them; sorted."""
    found, at = [], 0
    for piece in sorted(pieces):
        while at < len(whole) and whole[at].stop <= piece.start:
            at += 1
        if at < len(whole) and piece != whole[at] and whole[at].start <= piece.start and piece.stop <= whole[at].stop:
            found.append(piece)
    return found


def kept(shards: Iterable[Shard]) -> list[Shard]:
    """What counts of recorded shards that may overlap, sorted: the first, of those the longest, that fits."""
    found: list[Shard] = []
    for shard in sorted(shards, key=lambda shard: (shard.start, -shard.stop)):
        if not found or shard.start >= found[-1].stop:
            found.append(shard)
    return found


def merged(shards: list[Shard]) -> list[Shard]:
    """Sorted, disjoint shards with neighbours joined."""
    joined: list[Shard] = []
    for shard in sorted(shards):
        if joined and joined[-1].stop == shard.start:
            joined[-1] = Shard(joined[-1].start, shard.stop)
        else:
            joined.append(shard)
    return joined


def tiling(pieces: Iterable[Shard], whole: Shard) -> list[Shard] | None:
    """Some of ``pieces`` that follow one another and make up ``whole``, or None."""
    reached: dict[int, Shard | None] = {whole.start: None}
    for piece in sorted(pieces):
        if piece.start in reached and piece.stop <= whole.stop:
            reached.setdefault(piece.stop, piece)
    chain: list[Shard] = []
    last = reached.get(whole.stop)
    while last is not None:
        chain.append(last)
        last = reached[last.start]
    return chain[::-1] if chain else None


class Recorder(Protocol):
    """Who takes note of committed shards of the data set at ``out``."""

    @property
    def out(self) -> Path:
        """Root of the data set."""

    @property
    def journal(self) -> Path | None:
        """Folder for `gpufgbg.depth.journal.DepthJournal`; None where none is kept."""

    def record(self, records: Iterable[ShardRecord]) -> None:
        """From here on these shards count as made."""


class Manifest:
    """The bookkeeping of a data set in a folder.

    Parameters
    ----------
    out : Path
        Root of the data set.

    Attributes
    ----------
    claims_wait : bool
        Whether `claim` may wait for another run, so that there may be more records after it.
    keeps_ranges : bool
        Whether the least and greatest depth of each sample are kept: for label files alone.
    disk : Path
        Where unfinished shards lie; named where a disk is full.
    """

    claims_wait = False
    keeps_ranges = True

    def __init__(self, out: Path) -> None:
        self.out = out
        self.state = out / STATE
        self.scratch = self.state / "scratch"
        self.disk = out
        self.journal: Path | None = self.state / "journal"
        self._depth = self.state / "depth"
        self.file = out / "dataset.json"

    # -- opening ------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether a data set of ours has been begun here."""
        return self.state.is_dir() or self.file.is_file()

    def check_free(self) -> None:
        """Raise `DatasetError` where the output path holds something that is not ours."""
        if not self.out.exists() and not self.out.is_symlink():
            return
        if not self.out.is_dir():
            raise DatasetError(f"--out {printable(self.out)}: exists and is not a folder: choose another path")
        if not self.started and any(self.out.iterdir()):
            raise DatasetError(
                f"--out {printable(self.out)}: exists and is not a data set of ours (no dataset.json): "
                "choose another path or empty it"
            )

    def read(self) -> dict[str, Any] | None:
        """dataset.json's content, or None where there is none yet.

        Raises
        ------
        DatasetError
            It is damaged, or of a newer version. What is returned has all that `gpufgbg.description` lists.
        """
        try:
            content = json.loads(self.file.read_bytes())
            version = content["format_version"]
            if content["format"] != "gpufgbg":
                raise ValueError
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DatasetError(
                f"{printable(self.file)}: damaged or not ours: expected JSON with format gpufgbg"
            ) from None
        if version not in _READ_VERSIONS:
            known = " or ".join(map(str, _READ_VERSIONS))
            raise DatasetError(
                f"{printable(self.file)}: format version {version}, expected {known}: "
                "use the version of gpufgbg that made it"
            )
        try:
            check_description(content)
        except ValueError as error:
            raise DatasetError(
                f"{printable(self.file)}: damaged or not ours: {printable(error)}: restore it from a copy, or make "
                "the data set again in another folder"
            ) from None
        return content

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the data set's lock: one process starts or finishes at a time."""
        self.state.mkdir(parents=True, exist_ok=True)
        with FileLock(self.state / "lock"):
            yield

    @contextlib.contextmanager
    def claim(self, part: Shard) -> Iterator[Path]:
        """Claim samples for this process, and give a folder for its unfinished shards.

        Call it with the lock held, and leave the block without it: its end takes the lock. The claim ends with the
        block, or with the process, however it ends.

        Raises
        ------
        DatasetError
            A living process is making some of these samples.
        """
        runs = self.state / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        alone = True
        for other in sorted(runs.iterdir()):
            lock = FileLock(other / "lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                theirs = Shard.from_name(other.name)
                if theirs.start < part.stop and part.start < theirs.stop:
                    raise DatasetError(
                        f"{printable(self.out)}: another process is making samples "
                        f"{theirs.start}:{theirs.stop}: wait for it, or choose other --samples"
                    ) from None
                alone = False
                continue
            lock.release()
            remove_tree(other)  # left by a process that died
        if alone:
            remove_tree(self.scratch)
        folder = runs / part.name
        folder.mkdir()
        own = FileLock(folder / "lock", timeout=0)
        own.acquire()
        try:
            yield folder
        finally:
            # With the lock held, or the next process to claim these samples could have its folder removed. What the
            # file system refuses here is no loss: whoever claims next removes it.
            try:
                with contextlib.suppress(OSError):
                    if folder.is_dir():
                        with self.locked():
                            own.release()
                            remove_tree(folder)
            finally:
                own.release()

    # -- shards -------------------------------------------------------------------------------------

    def record(self, records: Iterable[ShardRecord]) -> None:
        """Commit: from here on these shards count as made."""
        folder = self.state / "shards"
        folder.mkdir(exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        written, ranges = [], []
        for record in records:
            path = self.scratch / f"{record.shard.name}.json"
            path.write_bytes(record.to_json())
            written.append(path)
            if record.depth_ranges is not None and self.keeps_ranges:
                path = self.scratch / f"{record.shard.name}.f32"
                path.write_bytes(record.depth_ranges.astype("<f4").tobytes())
                ranges.append(path)
        if ranges:  # synced as well, so that no record is there without the folder
            self._depth.mkdir(exist_ok=True)
        sync_file_system(self.scratch)
        if ranges:  # they are there before their record is
            for path in ranges:
                path.replace(self._depth / path.name)
            fsync_folder(self._depth)
        for path in written:
            path.replace(folder / path.name)
        fsync_folder(folder)

    def depth_ranges(self, part: Shard, records: Sequence[ShardRecord]) -> npt.NDArray[np.float32]:
        """(samples, 2) least and greatest depth of committed samples; ``records`` (sorted, disjoint) cover them.

        Raises
        ------
        DatasetError
            A file of them is gone or damaged.
        """
        wanted: list[tuple[str, int, int]] = []
        for at in range(bisect_right(records, part.start, key=lambda record: record.shard.stop), len(records)):
            shard = records[at].shard
            start, stop = max(part.start, shard.start), min(part.stop, shard.stop)
            if start >= stop:
                break
            wanted.append((f"{shard.name}.f32", 2 * (start - shard.start), 2 * (stop - start)))
        found, read = [], self._floats(wanted)
        for name, _, count in wanted:
            path = self._depth / name
            try:
                data = next(read)
            except StorageError:
                raise
            except OSError as error:
                reason = error.strerror or "no such file"
                raise DatasetError(f"{printable(path)}: can't be read: {reason}") from None
            if len(data) != 4 * count:
                raise DatasetError(f"{printable(path)}: damaged: too short")
            found.append(np.frombuffer(data, "<f4").reshape(-1, 2))
        return np.concatenate(found) if found else np.empty((0, 2), np.float32)

    def _floats(self, wanted: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        """The bytes of (name, first, count) floats of files of depths, in order; fewer where one is too short."""
        for name, first, count in wanted:
            with (self._depth / name).open("rb") as file:
                file.seek(4 * first)
                yield file.read(4 * count)

    def forget(self, record: ShardRecord) -> None:
        """Remove one record."""
        (self.state / "shards" / f"{record.shard.name}.json").unlink(missing_ok=True)

    def forget_pieces(self, joined: Iterable[ShardRecord]) -> None:
        """Remove the records of pieces that lie in these joined ones; others may be added meanwhile, and stay."""
        folder = self.state / "shards"
        whole = sorted(record.shard for record in joined)
        stale = inside(whole, (Shard.from_name(path.stem) for path in folder.glob("*.json")))
        ranges = (Shard.from_name(path.stem) for path in self._depth.glob("*.f32"))
        for piece in inside(whole, ranges):  # also those of pieces that were never recorded
            (self._depth / f"{piece.name}.f32").unlink()
        for piece in stale:
            (folder / f"{piece.name}.json").unlink()
        if stale:
            fsync_folder(folder)

    def records(self) -> list[ShardRecord]:
        """All committed shards, in order; none overlaps another."""
        for _ in range(_LOOKS):
            try:
                found = list(self._read_records())
                break
            except FileNotFoundError:  # another process has joined it with others since it was listed
                continue
        else:
            raise DatasetError(
                f"{printable(self.state)}: its records change all the time: wait for the others to end"
            )
        by_shard = {record.shard: record for record in found}
        return [by_shard[shard] for shard in kept(by_shard)]  # a kill leaves pieces beside what they were joined into

    def _read_records(self) -> Iterator[ShardRecord]:
        folder = self.state / "shards"
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            yield self._parsed(path, path.read_bytes())

    @staticmethod
    def _parsed(path: Path | str, data: bytes) -> ShardRecord:
        try:
            fields = json.loads(data)
            check_record(fields)
            return ShardRecord.from_dict(fields)
        except (ValueError, RecursionError):
            raise DatasetError(f"{printable(path)}: damaged: remove it and run generate again") from None

    def settled(self, content: dict[str, Any]) -> bool:
        """Whether dataset.json with this content, just written, lists all records; the lock sees to it."""
        return True

    # -- dataset.json -------------------------------------------------------------------------------

    def write(self, content: dict[str, Any]) -> None:
        """Write dataset.json, whole or not at all."""
        head = {"format": "gpufgbg", "format_version": FORMAT_VERSION}
        text = json.dumps({**head, **content}, indent=1, ensure_ascii=False) + "\n"
        self.put({self.file.name: text.encode("utf-8", "backslashreplace")})

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write files of the data set under their paths in it, each whole or not at all."""
        for path, data in files.items():
            write_atomic(self.out / path, data, self.scratch)


def open_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The bookkeeping at a path or URL; nothing is read yet."""
    if is_url(path):
        from gpufgbg.remote.manifest import RemoteManifest

        return RemoteManifest(str(path))
    return Manifest(local_path(path))


def open_dataset(path: str | os.PathLike[str]) -> tuple[Manifest, dict[str, Any], Recipe]:
    """The manifest, dataset.json and recipe of a data set of ours.

    Raises
    ------
    DatasetError
        There is none at this path.
    """
    manifest = open_manifest(path)
    content = manifest.read()
    if content is None:
        raise DatasetError(f"{printable(path)}: no dataset.json: expected a data set made by gpufgbg")
    return manifest, content, Recipe.from_dict(content["recipe"])
