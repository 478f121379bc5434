"""The main job: from folders of pictures to the data set, in whole shards, resumable, with bounded memory."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpufgbg import sinks
from gpufgbg._version import versions
from gpufgbg.assets import AssetFile, Assets, Sources, find_sources, prepare_sources
from gpufgbg.backends import check_device
from gpufgbg.compositor import Compositor, check_workers
from gpufgbg.exceptions import DatasetError, InputError, Interrupted, OptionError, printable
from gpufgbg.files import storage_errors, write_atomic
from gpufgbg.labels import LabelJob, mask_areas, publish_labels, write_labels
from gpufgbg.layout import Layout
from gpufgbg.manifest import Manifest, ShardChecksum, ShardRecord, merged, missing
from gpufgbg.moments import Moments
from gpufgbg.recipe import Recipe, Shard

__all__ = ["GenerateReport", "generate"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerateReport:
    """What a run of `generate` did.

    Attributes
    ----------
    out : Path
    samples : int
        Samples that this run made.
    done, total : int
        Samples that the data set has now, and has when it is complete.
    device : str
        Where it made them, for example ``"cpu"`` or ``"cuda:0"``.
    seconds : float
        Wall time of the run.
    counts : dict of str to int
        Pictures that the data set has now, by kind.
    statistics : dict of str to Moments
        Exact sums by kind over everything that is there, as rendered, before JPEG.
    size_bytes : dict of str to int
        Bytes of the files by kind.
    memory : dict of str to int
        Bytes that the run held at most: ``"device"``, of a card's memory for frames and scratch, and ``"pinned"``, of
        the host's for files under way; 0 on the CPU.
    timeline : dict of str to float
        Seconds that each part of the run took, in order; of the parts of "samples" that the calling thread spent
        waiting, which overlap with the work of others.
    """

    out: Path
    samples: int
    done: int
    total: int
    device: str
    seconds: float
    counts: dict[str, int]
    statistics: dict[str, Moments]
    size_bytes: dict[str, int]
    memory: dict[str, int]
    timeline: dict[str, float]

    @property
    def complete(self) -> bool:
        """Whether the data set has all its samples."""
        return self.done == self.total


def generate(
    out: str | os.PathLike[str],
    backgrounds: str | os.PathLike[str],
    foregrounds: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    *,
    sink: str = "tree",
    device: str = "auto",
    samples: tuple[int | None, int | None] | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> GenerateReport:
    """Make a data set, or continue one.

    Parameters
    ----------
    out : path
        Folder of the data set: new, empty, or one that this very call began before.
    backgrounds, foregrounds, masks : path
        Folders of pictures, as for `gpufgbg.prepare`.
    recipe : Recipe, optional
    sink : {"tree", "zip", "tar"}
        Files in folders, one stored zip, or WebDataset shards.
    device : {"auto", "cpu", "cuda", "cuda:N"}
    samples : (start, stop), optional
        Make these samples alone; None leaves an end open. Several processes may fill one data set together.
    workers : int, optional
        Threads that render and encode, by default one a core.
    batch_size : int, optional
        Samples a worker takes at a time. No byte depends on it.
    progress : callable, optional
        Called with (samples there are, samples there will be) of the part asked for, from this thread.

    Returns
    -------
    GenerateReport

    Raises
    ------
    OptionError, InputError, DatasetError, DeviceError
        Before anything is written.
    StorageError
        The file system refuses; what is committed is kept and the same call continues.
    Interrupted
        Ctrl-C; likewise.

    Warns
    -----
    GpufgbgWarning
        About what is odd but usable in the input.
    """
    start = time.perf_counter()
    recipe = recipe or Recipe()
    workers = check_workers(workers)
    check_device(device)
    if sink not in sinks.SINKS:
        raise OptionError("sink", f"got {sink!r}, expected one of {', '.join(sinks.SINKS)}")
    if batch_size is not None and (not isinstance(batch_size, int) or not 1 <= batch_size <= 65536):
        raise OptionError("batch_size", f"got {batch_size!r}, expected 1 to 65536")
    sources = find_sources(backgrounds, foregrounds, masks)
    if not os.fspath(out):
        raise OptionError("out", "got an empty name, expected the data set's folder")
    manifest = Manifest(Path(out))
    wanted: Shard | None = None
    timeline: dict[str, float] = {}
    memory = {"device": 0, "pinned": 0}
    mark = start

    def lap(phase: str) -> None:
        nonlocal mark
        now = time.perf_counter()
        timeline[phase], mark = now - mark, now

    def safe() -> str:
        if wanted is None or not manifest.started:
            return ""
        return f"{_overlap(manifest, wanted):,} of {len(wanted):,} samples are safe; "

    with storage_errors(manifest.out, safe), ExitStack() as held:
        manifest.check_free()
        content = manifest.read()
        described = {"recipe": recipe.to_dict(), "sink": sink}
        if content is None:
            assets = prepare_sources(sources, recipe, workers)
            source_sums = sources.checksums()
        else:
            source_sums = sources.checksums()
            _check_same(manifest, content, described, source_sums)
            assets = load_assets(manifest.out, content)
        lap("read, check and prepare the pictures")
        compositor = Compositor(assets, recipe, device, workers)
        lap("load them to the device")
        wanted = _part(samples, len(compositor))
        layout = Layout.of(compositor.plan)
        target = sinks.select(sink, manifest.out, compositor.plan)
        with manifest.locked():
            theirs = manifest.read()
            if theirs is None:
                content = _begin(manifest, described, layout, assets, sources, source_sums)
            elif content is None:  # begun by another process while this one prepared
                _check_same(manifest, theirs, described, source_sums)
                content = theirs
            assert content is not None
            done = [record.shard for record in manifest.records()]
            gaps = missing(wanted, done)
            run = held.enter_context(manifest.claim(wanted)) if gaps else None
        lap("write the assets and the first dataset.json")
        made = sum(len(gap) for gap in gaps)
        ahead: LabelJob | None = None
        if run is not None:
            engine = _engine(compositor, target, manifest, workers, batch_size)
            labels = LabelJob(run / "labels", mask_areas(assets), merged([*done, *gaps]))
            count = _Count(len(wanted) - made, len(wanted), progress)
            try:
                if engine.run(gaps, run, count.add, labels):
                    ahead = labels
                lap("samples")
                timeline.update(engine.timeline)
                memory.update(engine.memory)
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted: {safe()}the same command continues") from None
        with manifest.locked():
            latest = _finish(manifest, content, compositor, layout, target, ahead)
        lap("finish: labels, dataset.json")
    numbers = latest["counts"]
    counts = {
        "background": numbers["backgrounds"],
        "foreground": numbers["foregrounds"],
        "foreground_mask": numbers["foregrounds"],
    }
    statistics = {kind: Moments.from_dict(m) for kind, m in latest["statistics"].items()}
    counts.update({kind: m.images for kind, m in statistics.items() if kind not in counts})
    seconds = time.perf_counter() - start
    return GenerateReport(
        manifest.out,
        made,
        numbers["done"],
        numbers["samples"],
        compositor.backend.name,
        seconds,
        counts,
        statistics,
        latest["bytes"],
        memory,
        timeline,
    )


class _Count:
    """Counts samples as they are made, and tells."""

    def __init__(self, done: int, total: int, progress: Progress | None) -> None:
        self.done = done
        self.total = total
        self.progress = progress

    def add(self, count: int) -> None:
        """So many more."""
        self.done += count
        if self.progress:
            self.progress(self.done, self.total)


def _overlap(manifest: Manifest, part: Shard) -> int:
    """How many samples of ``part`` are committed."""
    shards = [record.shard for record in manifest.records()]
    return len(part) - sum(len(gap) for gap in missing(part, shards))


def _engine(
    compositor: Compositor, sink: sinks.Sink, manifest: Manifest, workers: int, batch_size: int | None
) -> Any:
    """The pipeline for the compositor's device."""
    backend: Any = compositor.backend
    if backend.name == "cpu":
        from gpufgbg.cpu_pipeline import CpuPipeline

        return CpuPipeline(backend, compositor.plan, sink, manifest, workers, batch_size)
    from gpufgbg.cuda_pipeline import CudaPipeline

    return CudaPipeline(backend, compositor.plan, sink, manifest, workers, batch_size)


def _part(samples: tuple[int | None, int | None] | None, total: int) -> Shard:
    start, stop = samples or (None, None)
    start, stop = 0 if start is None else start, total if stop is None else stop
    if not 0 <= start < stop <= total:
        raise OptionError(
            "samples", f"got {start}:{stop}, expected A:B with 0 <= A < B <= {total}, the data set's size"
        )
    return Shard(start, stop)


# -- the data set's own description ---------------------------------------------------------------------


def _check_same(
    manifest: Manifest,
    content: dict[str, Any],
    described: dict[str, Any],
    source_sums: dict[str, list[str]],
) -> None:
    """Raise `DatasetError` where the data set at the output path was begun with anything else."""
    there = {**content["recipe"], "sink": content["sink"]}
    here = {**described["recipe"], "sink": described["sink"]}
    differences = [
        f"{name} is {there.get(name)!r} there and {here[name]!r} here"
        for name in here
        if there.get(name) != here[name]
    ]
    for kind, sums in source_sums.items():
        listed = content["assets"][kind]
        known = [entry["source_sha256"] for entry in listed]
        if kind == "masks" and content["assets"]["masks_from"] == "alpha":
            known = []
        if known != sums:
            what = f"{len(known)} {kind} there, {len(sums)} here"
            if len(known) == len(sums):
                changed = [i for i, pair in enumerate(zip(known, sums, strict=True)) if len({*pair}) > 1]
                what = f"{kind}: another {listed[changed[0]]['source']}"
            differences.append(what)
    if differences:
        raise DatasetError(
            f"--out {printable(manifest.out)}: holds a data set of another recipe or other pictures: "
            f"{'; '.join(differences)}: give the same ones to continue it, or choose another path"
        )


def _begin(
    manifest: Manifest,
    described: dict[str, Any],
    layout: Layout,
    assets: Assets,
    sources: Sources,
    source_sums: dict[str, list[str]],
) -> dict[str, Any]:
    """Write the assets and the first dataset.json."""
    names = {
        "background": ("backgrounds", layout.background_file),
        "foreground": ("foregrounds", layout.foreground_file),
        "foreground_mask": ("masks", layout.mask_file),
    }
    listed: dict[str, Any] = {
        "fingerprint": assets.fingerprint(),
        "masks_from": "files" if sources.masks else "alpha",
    }
    for kind, (plural, path_of) in names.items():
        # Without mask files, a mask comes from the foreground's alpha.
        sums = source_sums[plural] or source_sums["foregrounds"]
        listed[plural] = []
        for i, (file, source_sum) in enumerate(zip(assets.files[kind], sums, strict=True)):
            write_atomic(manifest.out / path_of(i), file.data, manifest.scratch)
            listed[plural].append(
                {
                    "file": path_of(i),
                    "sha256": _sha256(file.data),
                    "source": file.source,
                    "source_sha256": source_sum,
                }
            )
    content = {
        **described,
        "versions": versions(),
        "counts": {
            "backgrounds": layout.n_backgrounds,
            "foregrounds": layout.n_foregrounds,
            "samples": layout.n_samples,
            "done": 0,
        },
        "complete": False,
        "assets": listed,
        "bytes": {},
        "statistics": {"background": Moments.of(assets.backgrounds).to_dict(summary=True)},
        "shards": [],
    }
    manifest.write(content)
    return content


def load_assets(out: Path, content: dict[str, Any]) -> Assets:
    """The assets that a data set keeps, checked against dataset.json.

    Raises
    ------
    DatasetError
        A file is missing or is not what it was.
    """
    kinds = {
        "background": "backgrounds",
        "foreground": "foregrounds",
        "foreground_mask": "masks",
    }
    files: dict[str, tuple[AssetFile, ...]] = {}
    for kind, plural in kinds.items():
        loaded = []
        for entry in content["assets"][plural]:
            path = out / entry["file"]
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DatasetError(f"{printable(path)}: can't be read: {error.strerror}") from None
            if _sha256(data) != entry["sha256"]:
                raise DatasetError(
                    f"{printable(path)}: changed since the data set was begun (its checksum differs from "
                    "dataset.json): restore it or begin a new data set"
                )
            loaded.append(AssetFile(data, entry["source"]))
        files[kind] = tuple(loaded)
    try:
        return Assets.from_files(files)
    except (OSError, InputError) as error:
        raise DatasetError(f"{printable(out)}: assets can't be decoded: {error}") from None


def _finish(
    manifest: Manifest,
    content: dict[str, Any],
    compositor: Compositor,
    layout: Layout,
    sink: sinks.Sink,
    ahead: LabelJob | None,
) -> dict[str, Any]:
    """Join what can be joined, write labels and dataset.json, and return its content. Call it with the lock held."""
    plan = compositor.plan
    records = _join_records(manifest, compositor, sink)
    done = merged([record.shard for record in records])
    count = sum(len(part) for part in done)
    kinds = sorted({kind for record in records for kind in record.moments})
    statistics = {"background": Moments.of(compositor.assets.backgrounds)}
    for kind in kinds:
        statistics[kind] = Moments.total(record.moments[kind] for record in records)
    size_bytes = {
        "background": _file_bytes(compositor.assets, "background"),
        "foreground": _file_bytes(compositor.assets, "foreground"),
        "foreground_mask": _file_bytes(compositor.assets, "foreground_mask"),
        **{kind: sum(record.size_bytes[kind] for record in records) for kind in kinds},
    }
    latest = {
        **content,
        "versions": versions(),
        "counts": {**content["counts"], "done": count},
        "complete": count == len(plan),
        "bytes": size_bytes,
        "statistics": {kind: m.to_dict(summary=True) for kind, m in statistics.items()},
        "shards": [{"start": r.shard.start, "stop": r.shard.stop, "sha256": r.checksum} for r in records],
    }
    if done and (manifest.read() or {}).get("shards") != latest["shards"]:
        if ahead is None or ahead.done != done:  # another process has made samples meanwhile
            ahead = LabelJob(manifest.scratch / "labels", mask_areas(compositor.assets), done)
            write_labels(ahead.folder, plan, ahead.areas, done)
        publish_labels(ahead.folder, manifest.out)
        manifest.write(latest)
    sink.finish(done)
    return latest


def _join_records(manifest: Manifest, compositor: Compositor, sink: sinks.Sink) -> list[ShardRecord]:
    """The records, with the pieces of each cell that is whole by now as one record."""
    cells: dict[Shard, list[ShardRecord]] = {}
    for record in manifest.records():
        cells.setdefault(compositor.plan.cell(record.shard.start)[0], []).append(record)
    joined: list[ShardRecord] = []
    for cell, pieces in sorted(cells.items()):
        if len(pieces) == 1 or sum(len(piece.shard) for piece in pieces) != len(cell):
            joined.extend(pieces)
            continue
        checksum = ShardChecksum()
        for piece in pieces:
            for path, data in sink.read(piece.shard):
                checksum.add(path, data)
        kinds = pieces[0].moments
        whole = ShardRecord(
            cell,
            checksum.hexdigest(),
            {kind: sum(piece.size_bytes[kind] for piece in pieces) for kind in kinds},
            {kind: Moments.total(piece.moments[kind] for piece in pieces) for kind in kinds},
        )
        manifest.record([whole])
        joined.append(whole)
    manifest.forget_pieces(joined)
    return joined


def _file_bytes(assets: Assets, kind: str) -> int:
    return sum(len(file.data) for file in assets.files[kind])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
