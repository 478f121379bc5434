"""Data sets made apart with ``--samples`` become one: every file is read, checked and written once."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg import sinks
from gpufgbg.assets import Assets
from gpufgbg.compositor import Compositor, check_workers
from gpufgbg.dataset import (
    begin_dataset,
    check_records,
    depth_differences,
    differences_of,
    finish_dataset,
    load_assets,
)
from gpufgbg.exceptions import DatasetError, Interrupted, OptionError, printable
from gpufgbg.files import storage_errors
from gpufgbg.layout import SAMPLE_KINDS
from gpufgbg.manifest import Manifest, Recorder, ShardRecord, merged, missing, open_dataset, open_manifest, within
from gpufgbg.pipeline import LOOKS
from gpufgbg.recipe import Plan, Recipe, Shard
from gpufgbg.segments import CompactingRecorder, has_segments, shards_of
from gpufgbg.shards import Committer, OpenShard
from gpufgbg.urls import is_url, local_path

__all__ = ["MergeReport", "merge"]

_BATCH = 64  # samples that are read and written at a time
_NAMED = 5  # ranges that a message names


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes
    ----------
    out : Path
    samples : int
        Samples that were taken from the parts now.
    done, total : int
        Samples that the data set has, and has when it is complete.
    gaps : tuple of Shard
        Samples that no part had.
    seconds : float
        Wall time.
    """

    out: Path
    samples: int
    done: int
    total: int
    gaps: tuple[Shard, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether the data set has all its samples."""
        return not self.gaps


@dataclass(frozen=True)
class _Part:
    """A data set to be taken in."""

    manifest: Manifest
    content: dict[str, Any]
    recipe: Recipe
    records: list[ShardRecord]
    sink: sinks.Sink


def merge(
    out: str | os.PathLike[str],
    parts: Sequence[str | os.PathLike[str]],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Make one data set of several that hold different samples of the same recipe and pictures.

    Every file is read and its shard's checksum compared before the shard is taken. Stopped at any moment, the same
    call continues.

    Parameters
    ----------
    out : path or URL
        Folder of the data set: new, empty, or one of the same recipe and pictures, which is added to.
    parts : sequence of path or URL
        Data sets that `generate` made, of any sink; they stay as they are. A new ``out`` gets the first one's sink.
    workers : int, optional
        Threads that copy, by default one a core.
    progress : callable, optional
        Called with (samples taken, samples to be taken), from this thread.

    Returns
    -------
    MergeReport
        Names the gaps that are left; `generate` fills them.

    Raises
    ------
    OptionError
        No parts, or ``out`` among them.
    DatasetError
        A part is no data set, differs in recipe, pictures or depth, overlaps another, or is damaged.
    StorageError, Interrupted
        What is committed is kept and the same call continues.
    """
    begun = time.perf_counter()
    threads = check_workers(workers)
    if not parts:
        raise OptionError("PART", "got none, expected the data sets to be merged")
    if not os.fspath(out):
        raise OptionError("OUT", "got an empty name, expected the data set's folder")
    manifest = open_manifest(out)
    for part in parts:
        if not os.fspath(part):
            raise OptionError("PART", "got an empty name, expected a data set to be merged")
        if _place(part) == _place(out):
            raise OptionError("PART", f"{printable(part)} is also OUT: leave it out, its samples stay")
    with storage_errors(manifest.disk):
        manifest.check_free()
        assets, opened = _open(parts)
        first = opened[0]
        _check_overlaps(opened)
        compositor = Compositor(assets, first.recipe, "cpu", threads)
        plan = compositor.plan
        _wanted(manifest, opened)  # refuses before anything is written, even a lock
        sinks.select((manifest.read() or first.content)["sink"], manifest.out, plan, first.sink.kinds)  # likewise
        recorder: Recorder = CompactingRecorder(manifest, plan) if has_segments(plan) else manifest
        with ExitStack() as held:
            with manifest.locked():
                wanted = _wanted(manifest, opened)  # another process may have made or begun it meanwhile
                if wanted:
                    span = Shard(wanted[0][1].shard.start, wanted[-1][1].shard.stop)
                    folder = held.enter_context(manifest.claim(span))
                    if manifest.claims_wait:
                        wanted = _wanted(manifest, opened)
                content = manifest.read() or _begin(manifest, opened, assets, plan)
            manifest.keeps_ranges = content.get("labels", True)
            sink = sinks.select(content["sink"], manifest.out, plan, first.sink.kinds)
            if wanted:
                _take(recorder, sink, plan, wanted, folder, threads, progress)
            with manifest.locked():
                latest = finish_dataset(manifest, content, compositor, sink, None)
                for _ in range(LOOKS):
                    if manifest.settled(latest):
                        break
                    latest = finish_dataset(manifest, content, compositor, sink, None)
        done = merged([record.shard for record in manifest.records()])
    return MergeReport(
        manifest.out,
        sum(len(record.shard) for _, record in wanted),
        latest["counts"]["done"],
        len(compositor),
        tuple(missing(Shard(0, len(compositor)), done)),
        time.perf_counter() - begun,
    )


def _place(path: str | os.PathLike[str]) -> object:
    return str(path).rstrip("/") if is_url(path) else local_path(path).resolve()


def _open(paths: Sequence[str | os.PathLike[str]]) -> tuple[Assets, list[_Part]]:
    """The assets, which are the same for all, and the parts."""
    parts: list[_Part] = []
    assets: Assets | None = None
    for path in paths:
        manifest, content, recipe = open_dataset(path)
        check_records(manifest, content)
        if assets is None:
            assets = load_assets(manifest.out, content)
            plan = Plan(recipe, assets.n_backgrounds, assets.widths, assets.heights)
        records = [shard for record in manifest.records() for shard in shards_of(manifest, record)]
        kinds = SAMPLE_KINDS if content.get("depth") else SAMPLE_KINDS[:-1]
        if any(kind not in record.moments for record in records for kind in kinds):
            raise DatasetError(
                f"{printable(manifest.out)}: not all samples have their depth maps: complete it with gpufgbg depth"
            )
        part = _Part(manifest, content, recipe, records, sinks.select(content["sink"], manifest.out, plan, kinds))
        if parts:
            _check_alike(parts[0].manifest.out, parts[0].content, part)
        parts.append(part)
    assert assets is not None
    return assets, parts


def _check_alike(there: Path, content: dict[str, Any], part: _Part) -> None:
    """Raise `DatasetError` where a part can't be one with the data set at ``there``."""
    theirs = part.content
    differences = differences_of(content["recipe"], theirs["recipe"])
    differences += depth_differences(content.get("depth"), theirs.get("depth"))
    if content["assets"]["fingerprint"] != theirs["assets"]["fingerprint"]:
        differences.append("other pictures")
    if differences:
        raise DatasetError(
            f"{printable(part.manifest.out)}: can't be one with {printable(there)}: {'; '.join(differences)}"
        )


def _check_overlaps(parts: list[_Part]) -> None:
    """Raise `DatasetError` that names what two parts have both, but for shards that are the same."""
    entries = sorted(
        ((record, part) for part in parts for record in part.records),
        key=lambda entry: (entry[0].shard, entry[0].checksum),
    )
    named: dict[tuple[str, str], list[Shard]] = {}
    last: tuple[ShardRecord, _Part] | None = None
    for record, part in entries:
        if last is not None and record.shard.start < last[0].shard.stop and record != last[0]:
            both = Shard(record.shard.start, min(record.shard.stop, last[0].shard.stop))
            pair = (printable(last[1].manifest.out), printable(part.manifest.out))
            named.setdefault(pair, []).append(both)
        if last is None or record.shard.stop > last[0].shard.stop:
            last = record, part
    if named:
        found = "; ".join(f"samples {ranges(merged(found))} are in {a} and in {b}" for (a, b), found in named.items())
        raise DatasetError(f"the parts overlap: {found}: make one of each two again with other --samples")


def ranges(shards: Sequence[Shard]) -> str:
    """``0:10, 20:30``, cut off where there are many."""
    text = ", ".join(f"{shard.start}:{shard.stop}" for shard in shards[:_NAMED])
    return text if len(shards) <= _NAMED else f"{text} and {len(shards) - _NAMED} more ranges"


def _wanted(manifest: Manifest, parts: list[_Part]) -> list[tuple[_Part, ShardRecord]]:
    """The shards of the parts that the data set lacks as it is now, sorted.

    Raises
    ------
    DatasetError
        It is of another recipe or other pictures, or has some of a shard's samples.
    """
    content = manifest.read()
    if content is not None:
        _check_alike(manifest.out, content, parts[0])
    there = [record.shard for record in manifest.records()]
    wanted = [(part, record) for part in parts for record in _new_ones(part, there, manifest.out)]
    return sorted(wanted, key=lambda pair: pair[1].shard)


def _new_ones(part: _Part, there: list[Shard], out: Path) -> list[ShardRecord]:
    """The records of a part that ``out`` lacks as a whole; they are added to ``there``, sorted, what it has."""
    new: list[ShardRecord] = []
    both: list[Shard] = []
    for record in part.records:
        found = within(record.shard, there)
        if not found:
            new.append(record)
        elif missing(record.shard, found):
            both += found
    if both:
        raise DatasetError(
            f"the parts overlap: samples {ranges(merged(both))} are in {printable(out)} and in "
            f"{printable(part.manifest.out)}: make those again with other --samples"
        )
    there.extend(record.shard for record in new)
    there.sort()
    return new


def _begin(manifest: Manifest, parts: list[_Part], assets: Assets, plan: Plan) -> dict[str, Any]:
    """Write the assets and the first dataset.json."""
    first = parts[0].content
    described: dict[str, Any] = {name: first[name] for name in ("recipe", "sink", "depth", "labels") if name in first}
    if described["depth"] is not None:
        engines = [engine for part in parts for engine in part.content["depth"].get("engines", [])]
        unique = [engine for i, engine in enumerate(engines) if engine not in engines[:i]]
        described["depth"] = {**described["depth"], "engines": unique}
    return begin_dataset(manifest, described, first["assets"], assets, plan)


def _take(
    recorder: Recorder,
    sink: sinks.Sink,
    plan: Plan,
    wanted: list[tuple[_Part, ShardRecord]],
    folder: Path,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Copy shards and commit them, several at a time."""
    committer = Committer(sink, recorder)
    total, done = sum(len(record.shard) for _, record in wanted), 0
    pending: deque[Future[tuple[ShardRecord, Path]]] = deque()
    left = iter(wanted)
    try:
        with ThreadPoolExecutor(threads, "merge") as pool:
            try:
                while True:
                    for part, record in itertools.islice(left, 2 * threads - len(pending)):
                        pending.append(pool.submit(_copy, part, record, sink, plan, folder))
                    if not pending:
                        break
                    record, path = pending.popleft().result()
                    committer.submit(record, path)
                    done += len(record.shard)
                    if progress:
                        progress(done, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        committer.finish()
    except BaseException as error:
        with suppress(Exception):  # the first error is the one that counts
            committer.finish()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"interrupted: {done:,} of {total:,} samples are merged; the same command continues"
            ) from None
        raise


def _copy(part: _Part, record: ShardRecord, sink: sinks.Sink, plan: Plan, folder: Path) -> tuple[ShardRecord, Path]:
    """Read a shard of a part and write it as the sink keeps it; not published yet."""
    shard = record.shard
    opened = OpenShard(plan, sink, shard, folder)
    kinds = part.sink.kinds
    try:
        ranges_of_depth = _depth_ranges(part, record) if "depth" in kinds else None
        source = part.sink.read(shard)
        for start in range(0, len(shard), _BATCH):
            batch = slice(start, min(start + _BATCH, len(shard)))
            found = list(itertools.islice(source, len(kinds) * (batch.stop - start)))
            if len(found) < len(kinds) * (batch.stop - start):
                raise _damaged(part, shard)
            files = {kind: [data for _, data in found[n :: len(kinds)]] for n, kind in enumerate(kinds)}
            depth_ranges = None if ranges_of_depth is None else ranges_of_depth[batch]
            samples = opened.samples(batch, files, depth_ranges)
            if any(path != name for (path, _), (name, _) in zip(found, samples.items(), strict=True)):
                raise _damaged(part, shard)
            opened.append(samples, sink.pack(samples, opened.folder))
        if opened.close() != record.checksum:
            raise _damaged(part, shard)
    except BaseException:
        opened.abandon()
        raise
    return ShardRecord(shard, record.checksum, record.size_bytes, record.moments, ranges_of_depth), opened.folder


def _depth_ranges(part: _Part, record: ShardRecord) -> npt.NDArray[np.float32]:
    """(samples, 2) least and greatest depth: kept for label files; where there are none, in the shard's labels."""
    if part.content.get("labels", True):
        return part.manifest.depth_ranges(record.shard, [record])
    found = np.array(list(part.sink.read_ranges(record.shard)), np.float32).reshape(-1, 2)  # type: ignore[attr-defined]
    if len(found) != len(record.shard):
        raise _damaged(part, record.shard)
    return found


def _damaged(part: _Part, shard: Shard) -> DatasetError:
    name = printable(part.manifest.out)
    return DatasetError(
        f"{name}: samples {shard.start}:{shard.stop} are not what was made: gpufgbg verify {name} says more"
    )
