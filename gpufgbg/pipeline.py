"""The main job: from folders of pictures to the data set, in whole shards, resumable, with bounded memory."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpufgbg import sinks
from gpufgbg._version import versions
from gpufgbg.assets import AssetFile, Assets, Sources, find_sources, prepare_sources
from gpufgbg.backends import check_device
from gpufgbg.checks import is_whole, whole
from gpufgbg.compositor import Compositor, check_workers
from gpufgbg.depth.journal import DepthJournal
from gpufgbg.depth.options import DepthOptions
from gpufgbg.exceptions import DatasetError, InputError, Interrupted, OptionError, StorageError, printable
from gpufgbg.files import remove_tree, storage_errors
from gpufgbg.jpeg import JpegEncoder
from gpufgbg.labels import LabelJob, mask_areas, publish_labels, write_labels
from gpufgbg.layout import SAMPLE_KINDS, Layout
from gpufgbg.manifest import (
    Manifest,
    Recorder,
    ShardChecksum,
    ShardRecord,
    merged,
    missing,
    open_dataset,
    open_manifest,
)
from gpufgbg.moments import Moments
from gpufgbg.recipe import Plan, Recipe, Shard
from gpufgbg.scaleout.devices import several_devices
from gpufgbg.segments import CompactingRecorder, has_segments, pack_segments, unpack_segments
from gpufgbg.urls import is_url

if TYPE_CHECKING:
    from gpufgbg.depth.model import DepthModel
    from gpufgbg.depth.sources import NetworkSource
    from gpufgbg.scaleout.driver import Driver
    from gpufgbg.scaleout.processes import ProcessCrew

__all__ = ["GenerateReport", "add_depth", "generate"]

Progress = Callable[[int, int], None]
LOOKS = 100  # at records that other runs add meanwhile; the last of these to end lists all

_COMPARED = 64  # samples rendered at a time, to be compared with those that there are


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
    transferred : dict of str to int
        Bytes that a card sent to the host: ``"files"``, and all ``"other"``, lengths, sums and ranges of depth.
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
    transferred: dict[str, int]
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
    depth: str | os.PathLike[str] | DepthOptions | None = None,
    sink: str = "tree",
    device: str = "auto",
    ray: str | None = None,
    labels: bool = True,
    samples: tuple[int | None, int | None] | None = None,
    workers: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> GenerateReport:
    """Make a data set, or continue one.

    Parameters
    ----------
    out : path or URL
        Folder of the data set: new, empty, or one that this very call began before. Also ``s3://BUCKET/FOLDER`` and
        any other URL that fsspec knows, with ``sink="tar"``.
    backgrounds, foregrounds, masks : path
        Folders of pictures, as for `gpufgbg.prepare`.
    recipe : Recipe, optional
    depth : path, "demo" or DepthOptions, optional
        Make depth maps too, with these weights; see `DepthOptions`.
    sink : {"tree", "zip", "tar"}
        Files in folders, one stored zip, or WebDataset shards.
    device : {"auto", "cpu", "cuda", "cuda:N", "cuda:N,M", "cuda:all"}
        With several cards, a process for each; they share the workers.
    ray : str, optional
        Make the samples on a Ray cluster, ``"HOST:PORT"`` or ``"auto"``, or on one of this machine, ``"local"``: on
        all its GPUs, or all machines where there is none. ``out`` is a folder that all machines share, or a URL.
    labels : bool
        False leaves labels/ and labels.parquet out, which one process writes, for very many samples; with
        ``sink="tar"`` alone, whose shards have every sample's label.
    samples : (start, stop), optional
        Make these samples alone; None leaves an end open. Several processes may fill one data set together.
    workers : int, optional
        Threads that render and encode, by default one a core.
    batch_size : int, optional
        Samples a worker takes at a time. No byte depends on it.
    progress : callable, optional
        Called with (samples there are, samples there will be) of the part asked for, from this thread.
    tell : callable, optional
        Called with a line of text when something takes minutes: building a TensorRT engine.

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
        About what is odd but usable in the input, or an engine that can't be kept.
    """
    recipe = recipe or Recipe()
    workers = check_workers(workers)
    devices = several_devices(device)
    if not devices:
        check_device(device)
    if ray is not None and device != "auto":
        raise OptionError(
            "device", f"got {device!r} with --ray, which takes the cluster's GPUs: leave one of them out"
        )
    if not labels and sink != "tar":
        raise OptionError("labels", f"can't be left out with sink {sink!r}, expected tar, whose shards have them")
    if sink not in sinks.SINKS:
        raise OptionError("sink", f"got {sink!r}, expected one of {', '.join(sinks.SINKS)}")
    batch_size = _checked_batch_size(batch_size)
    options = None if depth is None else DepthOptions.of(depth)
    sources = find_sources(backgrounds, foregrounds, masks)
    if not os.fspath(out):
        raise OptionError("out", "got an empty name, expected the data set's folder")
    if is_url(out) and sink != "tar":
        raise OptionError("sink", f"got {sink!r} with a URL as --out, expected tar: a store takes whole shards")
    if str(out).lower().startswith("memory:") and is_url(out) and (len(devices) > 1 or ray is not None):
        raise OptionError("out", f"got {printable(out)} with several processes, each of which has its own memory")
    run = _Run(open_manifest(out), device, workers, batch_size, progress, tell, devices, ray)
    manifest = run.manifest
    with run.guarded():
        manifest.check_free()
        content = manifest.read()
        if run.devices and (content is None or not content["complete"]):
            run.processes()
        described: dict[str, Any] = {"recipe": recipe.to_dict(), "sink": sink, "depth": None}
        if not labels:
            described["labels"] = manifest.keeps_ranges = False
        if options is not None:
            described["depth"] = run.open_network(options, recipe)
        if content is None:
            assets = prepare_sources(sources, recipe, workers)
            source_sums = sources.checksums()
        else:
            source_sums = sources.checksums()
            _check_same(manifest, content, described, source_sums)
            check_records(manifest, content)
            assets = _same_assets(manifest, content)
        run.lap("read, check and prepare the pictures")
        compositor = run.load(assets, recipe)
        wanted = _part(samples, len(compositor))

        def begin() -> dict[str, Any]:
            theirs = manifest.read()
            if theirs is None:
                layout = Layout.of(compositor.plan)
                listed = _list_assets(layout, assets, sources, source_sums)
                return begin_dataset(manifest, described, listed, assets, compositor.plan)
            if content is None:  # begun by another process while this one prepared
                _check_same(manifest, theirs, described, source_sums)
            return theirs

        return run.make(compositor, sink, begin, wanted)


def add_depth(
    path: str | os.PathLike[str],
    depth: str | os.PathLike[str] | DepthOptions,
    *,
    device: str = "auto",
    workers: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> GenerateReport:
    """Add depth maps to the samples that a data set of ours has, or continue to.

    Samples are pure functions, so they are rendered again, and each shard is replaced as a whole by one with depth
    maps; its other files are the same bytes.

    Parameters
    ----------
    path : path
        Folder of a data set made by gpufgbg.
    depth : path, "demo" or DepthOptions
    device, workers, batch_size, progress, tell
        As for `generate`.

    Returns
    -------
    GenerateReport

    Raises
    ------
    OptionError, InputError, DatasetError, DeviceError
        Before anything is written. `DatasetError` where it has depth maps of another network or other options.
    StorageError, Interrupted
        What is committed is kept and the same call continues.
    """
    workers = check_workers(workers)
    devices = several_devices(device)
    if not devices:
        check_device(device)
    batch_size = _checked_batch_size(batch_size)
    options = DepthOptions.of(depth)
    if is_url(path):
        raise OptionError("DATASET", f"got {printable(path)}: depth maps go into a store with generate --depth alone")
    manifest, content, recipe = open_dataset(path)
    run = _Run(manifest, device, workers, batch_size, progress, tell, devices)
    with run.guarded():
        check_records(manifest, content)
        if not manifest.records():
            raise DatasetError(
                f"{printable(manifest.out)}: has no samples yet: make them with gpufgbg generate --depth"
            )
        manifest.keeps_ranges = content.get("labels", True)
        described = run.open_network(options, recipe)
        _check_same_depth(manifest, content, described)
        if run.devices and (content.get("depth") is None or not content["complete"]):
            run.processes()
        with manifest.locked():
            unpack_segments(manifest, [r for r in manifest.records() if "depth" not in r.moments])
        assets = _same_assets(manifest, content)
        run.lap("read, check and prepare the pictures")
        compositor = run.load(assets, recipe)

        def begin() -> dict[str, Any]:
            theirs = manifest.read()
            assert theirs is not None
            _check_same_depth(manifest, theirs, described)
            if theirs.get("depth") is None:
                theirs.update(depth=described, complete=False)
                manifest.write(theirs)
            return theirs

        return run.make(compositor, content["sink"], begin, None)


class _Run:
    """One run over a data set: what generating it and adding to it have in common."""

    def __init__(
        self,
        manifest: Manifest,
        device: str,
        workers: int,
        batch_size: int | None,
        progress: Progress | None,
        tell: Callable[[str], None] | None,
        devices: tuple[str, ...] = (),
        ray: str | None = None,
    ) -> None:
        self.manifest = manifest
        self.device = devices[0] if len(devices) == 1 else device
        self.devices = devices if len(devices) > 1 else ()
        self.ray = ray
        self.workers = workers
        self.batch_size = batch_size
        self.progress = progress
        self.tell = tell
        self.timeline: dict[str, float] = {}
        self._start = self._mark = time.perf_counter()
        self._options: DepthOptions | None = None
        self._network: NetworkSource | None = None
        self._crew: ProcessCrew | None = None
        self._scope: list[Shard] = []

    def lap(self, phase: str) -> None:
        """A phase has ended."""
        now = time.perf_counter()
        self.timeline[phase], self._mark = now - self._mark, now

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What the file system refuses becomes one line that says what is safe; no process is left in the end."""
        with storage_errors(self.manifest.disk, self._safe):
            try:
                yield
            finally:
                if self._crew is not None:
                    self._crew.close()

    def processes(self) -> ProcessCrew:
        """Those of several devices: they start, which takes seconds, beside what comes before their work."""
        from gpufgbg.scaleout.processes import ProcessCrew

        if self._crew is None:
            self._crew = ProcessCrew(self.devices)
        return self._crew

    def _safe(self) -> str:
        if not self._scope or not self.manifest.started:
            return ""
        done = [record.shard for record in self.manifest.records() if self._is_whole(record)]
        total = _count(self._scope)
        lacking = [gap for part in self._scope for gap in missing(part, done)]
        journal = self.manifest.journal if self._options else None
        kept = 0 if journal is None else len(DepthJournal(journal, lacking))
        more = f" and the depth maps of {kept:,} more" if kept else ""
        return f"{total - _count(lacking):,} of {total:,} samples{more} are safe; "

    def _is_whole(self, record: ShardRecord) -> bool:
        """Whether a committed shard has all that this run makes."""
        return self._options is None or "depth" in record.moments

    def _gaps(self, wanted: Shard | None) -> list[Shard]:
        """What is to be made of ``wanted``, or, for None, of the samples that there are; sets the run's scope.

        A shard that lacks depth maps is made again as it is, even where ``wanted`` cuts through it, so that its new
        files take the place of the old ones.
        """
        records = self.manifest.records()
        lacking = [record.shard for record in records if not self._is_whole(record)]
        there = [record.shard for record in records]
        if wanted is None:
            self._scope = merged(there)
            return lacking
        lacking = [shard for shard in lacking if shard.start < wanted.stop and wanted.start < shard.stop]
        parts = sorted([wanted, *lacking])
        self._scope = [Shard(parts[0].start, max(part.stop for part in parts))]
        return sorted([*missing(wanted, there), *lacking])

    def open_network(self, options: DepthOptions, recipe: Recipe) -> dict[str, Any]:
        """Read and check what depth maps are predicted with; returns its description."""
        from gpufgbg.depth.model import describe, resolve  # Numba's start takes 0.2 s
        from gpufgbg.depth.sources import open_source

        for device in self.devices or (self.device,) if self.ray is None else ():
            resolve(options, device)
        self._options, self._network = options, open_source(options, recipe.size)
        return describe(options, self._network)

    def load(self, assets: Assets, recipe: Recipe) -> Compositor:
        """The compositor on the run's device; where there are several, workers have them."""
        compositor = Compositor(assets, recipe, "cpu" if self._spread else self.device, self.workers)
        self.lap("load them to the device")
        return compositor

    @property
    def _spread(self) -> bool:
        """Whether others make the samples."""
        return bool(self.devices) or self.ray is not None

    def _driver(self, compositor: Compositor, sink: str, held: ExitStack) -> Driver:
        """The driver of workers on several devices or machines; ``held`` ends them."""
        from gpufgbg.scaleout.cluster import RayCrew, connected
        from gpufgbg.scaleout.driver import Crew, Driver
        from gpufgbg.scaleout.worker import Job

        out, options = self.manifest.out, self._options
        if isinstance(out, Path):
            out = out.absolute()
        workers = max(1, self.workers // max(1, len(self.devices)))
        job = Job(compositor.assets, compositor.recipe, sink, out, workers, self.batch_size, options)
        crew: Crew
        if self.ray is None:
            crew = self.processes()
            crew.take(job)
        else:
            held.enter_context(connected(self.ray))
            crew = RayCrew(job.carrying_weights())
        recorder: Recorder = self.manifest
        if has_segments(compositor.plan):
            recorder = CompactingRecorder(self.manifest, compositor.plan)
        driver = Driver(crew, compositor.plan, recorder, options is not None, self.tell)
        held.callback(driver.close)
        return driver

    def make(
        self,
        compositor: Compositor,
        sink: str,
        begin: Callable[[], dict[str, Any]],
        wanted: Shard | None,
    ) -> GenerateReport:
        """Make what is missing of ``wanted``, or, for None, of the samples that there are.

        ``begin`` gives dataset.json's content, written first if need be; it is called with the data set's lock held
        and the samples claimed.
        """
        manifest, options = self.manifest, self._options
        kinds = SAMPLE_KINDS if options else SAMPLE_KINDS[:-1]
        target = sinks.select(sink, manifest.out, compositor.plan, kinds)
        memory, transferred = {"device": 0, "pinned": 0}, {"files": 0, "other": 0}
        model: DepthModel | None = None
        driver: Driver | None = None
        with ExitStack() as held:
            if self._spread and self._gaps(wanted):
                driver = self._driver(compositor, sink, held)
                driver.start()
                self.lap("start the workers")
            elif options and self._gaps(wanted):
                name = compositor.backend.name
                from gpufgbg.depth.model import DepthModel

                model = DepthModel(options, compositor.recipe.size, name, 1, self.tell, self._network)
                self.lap("load or build the depth engine")
            with manifest.locked():
                gaps = self._gaps(wanted)
                scope = self._scope
                replaced = {record.shard for record in manifest.records()}.intersection(gaps)
                _check_replaced(manifest, compositor, sink, sorted(replaced))
                claimed = held.enter_context(manifest.claim(Shard(scope[0].start, scope[-1].stop))) if gaps else None
                if claimed is not None and manifest.claims_wait:  # for another run, which may have made them
                    gaps = self._gaps(wanted)
                after = merged(list({*(record.shard for record in manifest.records()), *gaps}))
                content = begin()
                engines = driver.engines if driver else [model.engine.description] if model else []
                if gaps:
                    _add_engines(manifest, content, engines)
            self.lap("write the assets and the first dataset.json")
            made, total = _count(gaps), _count(scope)
            ahead: LabelJob | None = None
            if claimed is not None and gaps:
                maker = driver or select_maker(compositor, target, manifest, self.workers, self.batch_size, model)
                labels: LabelJob | None = None
                if content.get("labels", True):
                    labels = LabelJob(claimed / "labels", mask_areas(compositor.assets), after)
                count = _Count(total - made, total, self.progress)
                try:
                    if maker.run(gaps, claimed, count.add, labels):
                        ahead = labels
                    self.lap("samples")
                    self.timeline.update(maker.timeline)
                    memory.update(maker.memory)
                    transferred.update(maker.transferred)
                except KeyboardInterrupt:
                    raise Interrupted(f"interrupted: {self._safe()}the same command continues") from None
            with manifest.locked():
                if driver is not None:  # workers may have joined meanwhile
                    _add_engines(manifest, manifest.read() or content, driver.engines)
                latest = finish_dataset(manifest, content, compositor, target, ahead)
                for _ in range(LOOKS):
                    if manifest.settled(latest):
                        break
                    latest = finish_dataset(manifest, content, compositor, target, None)
            self.lap("finish: labels, dataset.json")
        numbers = latest["counts"]
        counts = {
            "background": numbers["backgrounds"],
            "foreground": numbers["foregrounds"],
            "foreground_mask": numbers["foregrounds"],
        }
        statistics = {kind: Moments.from_dict(m) for kind, m in latest["statistics"].items()}
        counts.update({kind: m.images for kind, m in statistics.items() if kind not in counts})
        return GenerateReport(
            manifest.out,
            made,
            numbers["done"],
            numbers["samples"],
            compositor.backend.name if driver is None else driver.name,
            time.perf_counter() - self._start,
            counts,
            statistics,
            latest["bytes"],
            memory,
            transferred,
            self.timeline,
        )


def _count(shards: Iterable[Shard]) -> int:
    return sum(len(shard) for shard in shards)


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


class Maker(Protocol):
    """What makes samples: the pipeline of a device, or the driver of several.

    Attributes
    ----------
    timeline : dict of str to float
        Seconds by part, after `run`; as `GenerateReport`'s, like ``memory`` and ``transferred``.
    """

    timeline: dict[str, float]
    memory: dict[str, int]
    transferred: dict[str, int]

    def run(self, gaps: Iterable[Shard], folder: Path, made: Callable[[int], None], labels: LabelJob | None) -> bool:
        """Make the samples of ``gaps``; unfinished shards lie in ``folder``; ``made`` is told how many more

        Returns whether the label files were written too.
        """


def select_maker(
    compositor: Compositor,
    sink: sinks.Sink,
    manifest: Recorder,
    workers: int,
    batch_size: int | None,
    depth: DepthModel | None,
) -> Maker:
    """The pipeline for the compositor's device."""
    backend: Any = compositor.backend
    if backend.name == "cpu":
        from gpufgbg.cpu_pipeline import CpuPipeline

        return CpuPipeline(backend, compositor.plan, sink, manifest, workers, batch_size, depth)
    from gpufgbg.cuda_pipeline import CudaPipeline

    return CudaPipeline(backend, compositor.plan, sink, manifest, workers, batch_size, depth)


def _checked_batch_size(batch_size: int | None) -> int | None:
    return None if batch_size is None else whole("batch_size", batch_size, 1, 65_536)


def _part(samples: tuple[int | None, int | None] | None, total: int) -> Shard:
    start, stop = samples or (None, None)
    start, stop = 0 if start is None else start, total if stop is None else stop
    if not is_whole(start) or not is_whole(stop) or not 0 <= start < stop <= total:
        raise OptionError(
            "samples", f"got {start}:{stop}, expected A:B with 0 <= A < B <= {total}, the data set's size"
        )
    return Shard(int(start), int(stop))


# -- the data set's own description ---------------------------------------------------------------------


def _check_same(
    manifest: Manifest,
    content: dict[str, Any],
    described: dict[str, Any],
    source_sums: dict[str, list[str]],
) -> None:
    """Raise `DatasetError` where the data set at the output path was begun with anything else."""
    there, here = (
        {**of["recipe"], "sink": of["sink"], "labels": of.get("labels", True)} for of in (content, described)
    )
    differences = differences_of(there, here)
    if content.get("depth") is None and described["depth"] is not None and not differences:
        raise DatasetError(
            f"--out {printable(manifest.out)}: holds a data set without depth maps: add them with "
            f"gpufgbg depth {printable(manifest.out)} --weights FILE"
        )
    differences += depth_differences(content.get("depth"), described["depth"])
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


def _check_same_depth(manifest: Manifest, content: dict[str, Any], described: dict[str, Any]) -> None:
    """Raise `DatasetError` where the data set has depth maps that are not like those described."""
    if content.get("depth") is None:
        return
    differences = depth_differences(content["depth"], described)
    if differences:
        raise DatasetError(
            f"{printable(manifest.out)}: has depth maps of other weights or options: {'; '.join(differences)}: give "
            "the same ones to continue"
        )


_FILE = ("weights", "sha256", "engines")  # of depth: what is not an option


def differences_of(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    ]


def depth_differences(there: dict[str, Any] | None, here: dict[str, Any] | None) -> list[str]:
    """In what decides depth maps but for the engine; a file of weights may have any name."""
    if there is None or here is None:
        states = ("has none" if depth is None else "has depth maps" for depth in (there, here))
        return [] if there is here else ["it {}, this run {}".format(*states)]
    shown = ({f"depth_{name}": value for name, value in d.items() if name not in _FILE} for d in (there, here))
    differences = differences_of(*shown)
    if there["sha256"] != here["sha256"]:
        names = (f"{d['weights']} ({d['sha256'][:12]})" for d in (there, here))
        differences.insert(0, "depth weights are {} there and {} here".format(*names))
    return differences


def _add_engines(manifest: Manifest, content: dict[str, Any], engines: list[dict[str, Any]]) -> None:
    """Note in dataset.json which engines make depth maps from here on. Call it with the lock held."""
    new = [engine for engine in engines if engine not in (content["depth"] or {}).get("engines", [])]
    if new:
        content["depth"].setdefault("engines", []).extend(new)
        manifest.write(content)


#: kind of asset -> where dataset.json lists it
_LISTED = {"background": "backgrounds", "foreground": "foregrounds", "foreground_mask": "masks"}


def _list_assets(
    layout: Layout, assets: Assets, sources: Sources, source_sums: dict[str, list[str]]
) -> dict[str, Any]:
    """The assets as dataset.json lists them."""
    paths = {
        "background": layout.background_file,
        "foreground": layout.foreground_file,
        "foreground_mask": layout.mask_file,
    }
    listed: dict[str, Any] = {
        "fingerprint": assets.fingerprint(),
        "masks_from": "files" if sources.masks else "alpha",
    }
    for kind, plural in _LISTED.items():
        # Without mask files, a mask comes from the foreground's alpha.
        sums = source_sums[plural] or source_sums["foregrounds"]
        listed[plural] = [
            {
                "file": paths[kind](i),
                "sha256": _sha256(file.data),
                "source": file.source,
                "source_sha256": source_sum,
            }
            for i, (file, source_sum) in enumerate(zip(assets.files[kind], sums, strict=True))
        ]
    return listed


def begin_dataset(
    manifest: Manifest, described: dict[str, Any], listed: dict[str, Any], assets: Assets, plan: Plan
) -> dict[str, Any]:
    """Write the assets and the first dataset.json; returns its content. Call it with the lock held."""
    manifest.put(
        {
            entry["file"]: file.data
            for kind, plural in _LISTED.items()
            for entry, file in zip(listed[plural], assets.files[kind], strict=True)
        }
    )
    content = {
        **({"format_version": 2} if has_segments(plan) else {}),
        **described,
        "versions": versions(),
        "counts": {
            "backgrounds": plan.n_backgrounds,
            "foregrounds": plan.n_foregrounds,
            "samples": len(plan),
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
    files: dict[str, tuple[AssetFile, ...]] = {}
    for kind, plural in _LISTED.items():
        loaded = []
        listed = content["assets"][plural]
        for entry, read in zip(listed, _reading([out / entry["file"] for entry in listed]), strict=True):
            path = out / entry["file"]
            try:
                data = read()
            except StorageError:
                raise
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


def _same_assets(manifest: Manifest, content: dict[str, Any]) -> Assets:
    """`load_assets`, for samples that are to be made like those that there are."""
    assets = load_assets(manifest.out, content)
    if assets.fingerprint() != content["assets"]["fingerprint"]:
        raise DatasetError(
            f"{printable(manifest.out)}: its bg/, fg/ and fg_mask/ decode to other pixels than when it was begun: "
            "use the version of Pillow that dataset.json names, or begin a new data set"
        )
    return assets


def check_records(manifest: Manifest, content: dict[str, Any]) -> None:
    """Raise `DatasetError` where a data set has lost the records of its samples, as a copy without .gpufgbg/ has."""
    if content["shards"] and not manifest.records() and not (manifest.state / "shards").is_dir():
        raise DatasetError(
            f"{printable(manifest.out)}: dataset.json lists {content['counts']['done']:,} samples, but there is no "
            f"{printable(manifest.state)} that tells of them: copy it too, from where the data set was copied"
        )


def _check_replaced(manifest: Manifest, compositor: Compositor, sink: str, shards: Sequence[Shard]) -> None:
    """Raise `DatasetError` where shards that are to be made again, with depth maps, would be others than they are.

    The first sample of each tells: what a changed recipe makes differs everywhere.
    """
    layout, recipe = Layout.of(compositor.plan), compositor.recipe
    there = sinks.select(sink, manifest.out, compositor.plan, SAMPLE_KINDS[:-1])
    encoder = JpegEncoder(recipe.quality, recipe.subsampling, recipe.optimize, compositor.backend.name)
    for first in range(0, len(shards), _COMPARED):
        group = shards[first : first + _COMPARED]
        batch = compositor.render([shard.start for shard in group])
        pictures = {
            "composite": encoder.encode(batch.image, "HWC"),
            "composite_mask": encoder.encode(batch.mask, "HW"),
        }
        for at, (shard, stem) in enumerate(zip(group, layout.stems(batch.labels), strict=True)):
            expected = [(Layout.sample_path(kind, stem), bytes(files[at])) for kind, files in pictures.items()]
            if list(islice(there.read(shard), len(expected))) != expected:
                raise DatasetError(
                    f"{printable(manifest.out)}: samples {shard.start}:{shard.stop} are not what the recipe in "
                    f"dataset.json makes, and would be replaced: restore dataset.json or the samples "
                    f"(gpufgbg verify {printable(manifest.out)} says more)"
                )


def _reading(paths: list[Path]) -> Iterator[Callable[[], bytes]]:
    """What gives each file's bytes; of a store, several are on their way at a time."""
    if paths and isinstance(paths[0], Path):
        yield from (path.read_bytes for path in paths)
        return
    with ThreadPoolExecutor(16) as pool:
        yield from (future.result for future in [pool.submit(path.read_bytes) for path in paths])


def finish_dataset(
    manifest: Manifest,
    content: dict[str, Any],
    compositor: Compositor,
    sink: sinks.Sink,
    ahead: LabelJob | None,
) -> dict[str, Any]:
    """Join what can be joined, write labels and dataset.json, and return its content. Call it with the lock held."""
    plan = compositor.plan
    theirs = manifest.read() or content
    if content.get("depth"):
        content = {**content, "depth": theirs["depth"]}  # other processes may have added their engines
        with_depth = [record.shard for record in manifest.records() if "depth" in record.moments]
        if len(with_depth) < len(manifest.records()):  # whoever gives the last shards their depth maps finishes
            return {**content, "counts": {**content["counts"], "done": _count(with_depth)}, "complete": False}
    records = _join_records(manifest, compositor, sink)
    done = merged([record.shard for record in records])
    count = sum(len(part) for part in done)
    kinds = sorted({kind for record in records for kind in record.moments})
    statistics = {"background": Moments.from_dict(content["statistics"]["background"])}
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
        "shards": [_listed(record) for record in records],
    }
    if any(record.shards > 1 for record in records):
        latest["format_version"] = 2
    if done and (theirs["shards"] != latest["shards"] or _lacks_labels(manifest, latest, compositor.plan)):
        if content.get("labels", True):
            if ahead is None or ahead.done != done:  # another process has made samples meanwhile
                ahead = LabelJob(manifest.scratch / "labels", mask_areas(compositor.assets), done)
                ranges = functools.partial(manifest.depth_ranges, records=records) if content.get("depth") else None
                write_labels(ahead.folder, plan, ahead.areas, done, ranges)
            publish_labels(ahead.folder, manifest.out)
        manifest.write(latest)
    if latest["complete"] and manifest.journal is not None:
        remove_tree(manifest.journal)
    sink.finish(done)
    return latest


def _lacks_labels(manifest: Manifest, content: dict[str, Any], plan: Plan) -> bool:
    """Whether label files of a data set on this machine are gone; a zip's are in it."""
    if not content.get("labels", True) or content["sink"] == "zip" or not isinstance(manifest.out, Path):
        return False
    layout = Layout.of(plan)
    names = ("labels.parquet", *(layout.label_file(b) for b in range(plan.n_backgrounds)))
    return not all((manifest.out / name).is_file() for name in names)


def _listed(record: ShardRecord) -> dict[str, Any]:
    """A shard, or a segment of many, as dataset.json lists it."""
    entry: dict[str, Any] = {"start": record.shard.start, "stop": record.shard.stop, "sha256": record.checksum}
    return entry if record.shards == 1 else {**entry, "shards": record.shards}


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
        try:
            whole = _joined(manifest, sink, cell, pieces)
        except DatasetError:  # in a store, another run that ends may have joined and removed them
            found = [record for record in manifest.records() if record.shard == cell]
            if not found:
                raise
            joined.extend(found)
            continue
        manifest.record([whole])
        joined.append(whole)
    manifest.forget_pieces(joined)
    return pack_segments(manifest, compositor.plan, joined)


def _joined(manifest: Manifest, sink: sinks.Sink, cell: Shard, pieces: list[ShardRecord]) -> ShardRecord:
    """The pieces of a cell as one record."""
    checksum = ShardChecksum()
    for piece in pieces:
        for path, data in sink.read(piece.shard):
            checksum.add(path, data)
    kinds = pieces[0].moments
    return ShardRecord(
        cell,
        checksum.hexdigest(),
        {kind: sum(piece.size_bytes[kind] for piece in pieces) for kind in kinds},
        {kind: Moments.total(piece.moments[kind] for piece in pieces) for kind in kinds},
        manifest.depth_ranges(cell, pieces) if "depth" in kinds and manifest.keeps_ranges else None,
    )


def _file_bytes(assets: Assets, kind: str) -> int:
    return sum(len(file.data) for file in assets.files[kind])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
