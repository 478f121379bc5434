"""What lies in a data set's folders beside its own files: whoever loads the data set would read that too."""

from __future__ import annotations

import heapq
import itertools
import os
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from gpufgbg import sinks
from gpufgbg.exceptions import StorageError, printable
from gpufgbg.layout import KINDS, SAMPLE_KINDS, Layout
from gpufgbg.manifest import within
from gpufgbg.recipe import Plan, Shard
from gpufgbg.remote.store import RemotePath
from gpufgbg.sinks.stored_zip import Directory, StoredEntry, ZipSink, contents
from gpufgbg.sinks.tar import TarSink
from gpufgbg.verify_books import Books
from gpufgbg.verify_report import NAMED, Faults, VerifyReport

__all__ = ["check_strangers", "check_zip"]

_AT_ONCE = 1 << 14  # names that are looked at together
_LABELS, _TABLE, _ZIP, _SHARDS = "labels", "labels.parquet", "dataset.zip", "shards"
_UNKNOWN = "belongs to no sample"
_UNRECORDED = "belongs to no sample that is recorded: a run did not end; the same command continues it"

#: what is wrong with each of some (name, whether it is a folder), or None
_Judge = Callable[[list[tuple[str, bool]]], Iterable[str | None]]


def check_strangers(report: VerifyReport, books: Books, sink: sinks.Sink) -> None:
    """Name what is in the data set's folders and is not a file of its own.

    Of other names beside the folders nothing is said, but for those that mean samples to whoever reads data sets.
    """
    found = _Strangers(report, books, sink)
    found.check()
    found.close()


class _Strangers:
    def __init__(self, report: VerifyReport, books: Books, sink: sinks.Sink) -> None:
        self._books, self._sink = books, sink
        self._samples = Faults(report, "files belong to no sample")
        self._others = Faults(report, "files do not belong to the data set")

    def check(self) -> None:
        """Look into all folders."""
        books, sink, layout = self._books, self._sink, self._books.layout
        counts = books.content["counts"]
        b, f = range(counts["backgrounds"]), range(counts["foregrounds"])
        own: dict[str, list[str]] = {
            "bg": [layout.background_file(i) for i in b],
            "fg": [layout.foreground_file(i) for i in f],
            "fg_mask": [layout.mask_file(i) for i in f],
        }
        taken = {*own}
        if books.content.get("labels", True):
            own[_LABELS] = [layout.label_file(i) for i in b]
            taken |= {_LABELS, _TABLE}
        for folder, paths in own.items():
            names = {path.rpartition("/")[2] for path in paths}
            self._look(self._others, folder, _only(names, "does not belong to the data set"))
        if sink.name == "tree":
            for kind in SAMPLE_KINDS[: 3 if books.content["depth"] else 2]:
                taken.add(KINDS[kind])
                self._tree(kind)
        elif isinstance(sink, TarSink):
            taken.add(_SHARDS)
            self._tar(sink)
        else:
            taken.add(_ZIP)
        known = {*KINDS.values(), _LABELS, _TABLE, _SHARDS, _ZIP} - taken
        self._look(
            self._others,
            "",
            lambda entries: (
                "does not belong to the data set" if name in known or name.endswith(".tar") else None
                for name, _ in entries
            ),
        )

    def close(self) -> None:
        """All are known."""
        self._samples.close()
        self._others.close()

    def _look(self, faults: Faults, folder: str, judge: _Judge) -> None:
        """Hand a folder's entries to ``judge``, some at a time, and name the first of those that are strange."""
        path = self._books.manifest.out / folder if folder else self._books.manifest.out
        first: list[tuple[str, str]] = []
        count = 0
        try:
            entries = _entries(path)
            while some := list(itertools.islice(entries, _AT_ONCE)):
                judged = zip(some, judge(some), strict=True)
                new = [(f"{path / name}", reason) for (name, _), reason in judged if reason is not None]
                count += len(new)
                first = heapq.nsmallest(NAMED, [*first, *new])
        except StorageError:
            raise
        except OSError as error:
            faults.add(f"{printable(path)}: can't be read: {error.strerror}")
        for n, (name, reason) in enumerate(first, 1):
            faults.add(f"{printable(name)}: {reason}", 1 if n < len(first) else count - n + 1)

    def _tree(self, kind: str) -> None:
        """The folder of a kind of samples' pictures, and one in it for each background."""
        plan, layout, out = self._books.plan, self._books.layout, self._books.manifest.out
        folder, known = KINDS[kind], Known(plan, layout, self._books.having(kind))
        backgrounds = {layout.background(b): b for b in range(plan.n_backgrounds)}
        self._look(
            self._samples,
            folder,
            lambda entries: (None if d and name in backgrounds else _UNKNOWN for name, d in entries),
        )
        for name, b in backgrounds.items():
            if (out / folder / name).is_dir():
                whole = Shard(b * plan.per_background, (b + 1) * plan.per_background)
                self._look(self._samples, f"{folder}/{name}", partial(known.judge, whole=whole))

    def _tar(self, sink: TarSink) -> None:
        """The folder of the tar shards; in a store, pieces of shards have one in it."""
        parts = _SHARDS if sink.parts is sink.folder else f"{_SHARDS}/{sink.parts.name}"
        units = {record.shard for record in self._books.records} | {
            Shard(entry["start"], entry["stop"]) for entry in self._books.content["shards"]
        }
        done = self._books.having(SAMPLE_KINDS[0])

        def judge(name: str, folder: str) -> str | None:
            shard = sink.shard_of(name)
            if shard is None:
                return _UNKNOWN
            cell = sink.plan.cell(shard.start)[0]
            if folder != (_SHARDS if shard == cell else parts):
                return _UNKNOWN
            if within(shard, done) != [shard]:
                return _UNRECORDED
            if shard == cell or shard in units:
                return None
            record = self._books.record_of(shard)
            whole = sink.path(cell if record is None or record.shards > 1 else record.shard)
            if whole.exists():  # else the piece stands in for it until a run joins them
                return f"its samples are in {whole.name} too: the same command removes it"
            return None

        def judge_all(entries: list[tuple[str, bool]], folder: str) -> Iterator[str | None]:
            for name, is_folder in entries:
                if is_folder:
                    yield None if f"{folder}/{name}" == parts else _UNKNOWN
                else:
                    yield judge(name, folder)

        for folder in dict.fromkeys((_SHARDS, parts)):
            self._look(self._samples, folder, partial(judge_all, folder=folder))


def _only(names: Collection[str], otherwise: str) -> _Judge:
    return lambda entries: (None if name in names and not is_folder else otherwise for name, is_folder in entries)


def _entries(path: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of what is in a folder; nothing where there is none."""
    if isinstance(path, RemotePath):
        yield from ((name, size < 0) for name, size in path.store.list(path.key).items())
        return
    with suppress(FileNotFoundError), os.scandir(path) as found:
        yield from ((entry.name, entry.is_dir()) for entry in found)


class Known:
    """Tells from a picture's name whether it is of one of these samples.

    Parameters
    ----------
    plan : Plan
    layout : Layout
    done : list of Shard
        The samples that are there, sorted, disjoint.
    """

    def __init__(self, plan: Plan, layout: Layout, done: Sequence[Shard]) -> None:
        self._plan, self._layout = plan, layout
        self._starts = np.array([part.start for part in done], np.int64)
        self._lengths = np.array([len(part) for part in done], np.int64)
        self._before = np.cumsum(self._lengths) - self._lengths

    def places(self, names: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What file names are of: (N,) indices of samples, and (N,) their places among those that are there.

        -1 where a name is no sample's, or its sample is not there.
        """
        indices = np.array([self._index(name) for name in names], np.int64)
        some = np.flatnonzero(indices >= 0)
        stems = self._layout.stems(self._plan.placements(indices[some]))
        for n, stem in zip(some.tolist(), stems, strict=True):
            if names[n] != f"{stem}.jpg":
                indices[n] = -1
        places = np.full(len(names), -1, np.int64)
        if len(self._starts):
            part = np.maximum(self._starts.searchsorted(indices, "right") - 1, 0)
            offset = indices - self._starts[part]
            there = (offset >= 0) & (offset < self._lengths[part])
            places[there] = (self._before[part] + offset)[there]
        return indices, places

    def judge(self, entries: list[tuple[str, bool]], whole: Shard) -> Iterator[str | None]:
        """What is wrong with each entry of the folder of the samples ``whole``."""
        indices, places = self.places([name for name, _ in entries])
        for (_, is_folder), index, place in zip(entries, indices.tolist(), places.tolist(), strict=True):
            if is_folder or not whole.start <= index < whole.stop:
                yield _UNKNOWN
            else:
                yield None if place >= 0 else _UNRECORDED

    def _index(self, name: str) -> int:
        digits = name[name.rfind("_") + 1 : -4]
        if len(digits) > 18 or not digits.isdecimal() or not digits.isascii():
            return -1
        index = int(digits)
        return index if index < len(self._plan) else -1


# -- dataset.zip ----------------------------------------------------------------------------------------


def check_zip(report: VerifyReport, books: Books, sink: ZipSink) -> None:
    """dataset.zip has the data set's files, each once and in order, and those that lie beside it are the same in it.

    Samples' pictures in it are compared elsewhere, with their shards' checksums; while the data set is incomplete, in
    the parts of which the zip is made.
    """
    if not books.done:
        return
    name = printable(sink.file)
    found = VerifyReport()
    try:
        with sink.file.open("rb") as file:
            _check_members(found, books, sink, file, name)
    except FileNotFoundError:
        found.faults.append(f"{name}: is missing")
    except OSError as error:
        found.faults.append(f"{name}: can't be read: {error.strerror}")
    except zipfile.BadZipFile as error:
        found.faults.append(f"{name}: can't be read: {error}")
    if not sink.parts.is_dir():
        report.faults += found.faults
    elif found.faults:
        report.faults.append(f"{found.faults[0]}: a run did not end; the same command puts the zip together again")
    elif books.content["complete"] and books.is_current:
        report.faults.append(
            f"{printable(sink.parts)}: is left by a run that did not end: the same command removes it"
        )


def _check_members(report: VerifyReport, books: Books, sink: ZipSink, file: BinaryIO, name: str) -> None:
    own = _own_files(books)
    members = _Members(books, own)
    strangers = Faults(report, f"files in {name} belong to no sample")
    missing = Faults(report, f"files are missing in {name}")
    changed = Faults(report, f"files in {name} differ from those beside it")
    expected = 0  # place of the next member
    entries = Directory(file).entries()
    with sink.file.open("rb") as archive:
        while some := list(itertools.islice(entries, _AT_ONCE)):
            places = members.places([entry.name for entry in some])
            if np.array_equal(places, np.arange(expected, expected + len(some))) and expected >= len(own):
                expected += len(some)
                continue
            for entry, place in zip(some, places.tolist(), strict=True):
                shown = f"{name}:{printable(entry.name)}"
                if place < 0:
                    strangers.add(f"{shown}: belongs to no sample")
                elif place < expected:
                    strangers.add(f"{shown}: is there twice, or not in its place")
                else:
                    if place > expected:
                        missing.add(f"{name}: {members.path(expected)} is missing", place - expected)
                    expected = place + 1
                    if place < len(own) and not _is_same(books, archive, entry):
                        changed.add(f"{shown}: differs from {entry.name} beside the zip")
    if expected < len(members):
        missing.add(f"{name}: {members.path(expected)} is missing", len(members) - expected)
    for faults in (strangers, missing, changed):
        faults.close()


def _own_files(books: Books) -> list[str]:
    """The members of dataset.zip but for samples, in order."""
    layout, counts, per = books.layout, books.content["counts"], books.plan.per_background
    b, f = range(counts["backgrounds"]), range(counts["foregrounds"])
    labelled = [i for i in b if within(Shard(i * per, (i + 1) * per), books.done)]
    return [
        *(layout.background_file(i) for i in b),
        *(layout.foreground_file(i) for i in f),
        *(layout.mask_file(i) for i in f),
        *(layout.label_file(i) for i in labelled),
        _TABLE,
        books.manifest.file.name,
    ]


class _Members:
    """The places of a zip's members: its own files first, then each sample's pictures."""

    def __init__(self, books: Books, own: list[str]) -> None:
        self._own = {name: place for place, name in enumerate(own)}
        self._books, self._samples = books, Known(books.plan, books.layout, books.done)
        self._folders = {KINDS[kind]: n for n, kind in enumerate(books.kinds)}
        self._paths = own

    def __len__(self) -> int:
        return len(self._own) + len(self._folders) * sum(map(len, self._books.done))

    def path(self, place: int) -> str:
        """The name of the member at a place."""
        if place < len(self._paths):
            return self._paths[place]
        rank, kind = divmod(place - len(self._paths), len(self._folders))
        for part in self._books.done:
            if rank < len(part):
                (stem,) = self._books.layout.stems(self._books.plan.placements([part.start + rank]))
                return Layout.sample_path(self._books.kinds[kind], stem)
            rank -= len(part)
        raise IndexError(place)

    def places(self, names: list[str]) -> npt.NDArray[np.int64]:
        """(N,) places of members by their names; -1 where there is none of such a name."""
        split = [name.split("/") for name in names]
        files = [parts[-1] for parts in split]
        ranks = self._samples.places(files)[1]
        kinds = np.array([self._kind(parts) for parts in split], np.int64)
        places = len(self._own) + ranks * len(self._folders) + kinds
        places[(ranks < 0) | (kinds < 0)] = -1
        for n in np.flatnonzero(places < 0).tolist():
            places[n] = self._own.get(names[n], -1)
        return places

    def _kind(self, parts: list[str]) -> int:
        """The number of a picture's kind, by its folder; -1 where the path is no sample's."""
        if len(parts) != 3 or not parts[2].startswith(f"{parts[1]}_fg_"):
            return -1
        return self._folders.get(parts[0], -1)


def _is_same(books: Books, archive: BinaryIO, entry: StoredEntry) -> bool:
    """Whether a member has the bytes of the file of its name beside the zip; True of one that a run is changing."""
    if not books.is_current and (entry.name in (_TABLE, books.manifest.file.name) or entry.name.startswith(_LABELS)):
        return True
    try:
        file = (books.manifest.out / entry.name).open("rb")
    except OSError:
        return True  # which is told elsewhere
    with file:
        same = all(file.read(len(data)) == data for data in contents(archive, entry))
        return same and not file.read(1)
