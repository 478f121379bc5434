"""The main job: from folders of pictures to the data set, in whole shards, resumable, with bounded memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpufgbg import sinks
from gpufgbg.assets import Assets, find_sources, prepare_sources
from gpufgbg.backends import check_device
from gpufgbg.checks import is_whole, whole
from gpufgbg.compositor import Compositor, check_workers
from gpufgbg.dataset import (
    add_engines,
    begin_dataset,
    check_records,
    check_replaced,
    check_same,
    check_same_depth,
    finish_dataset,
    list_assets,
    same_assets,
)
from gpufgbg.depth.journal import DepthJournal
from gpufgbg.depth.options import DepthOptions
from gpufgbg.exceptions import DatasetError, Interrupted, OptionError, printable
from gpufgbg.files import storage_errors
from gpufgbg.labels import LabelJob, mask_areas
from gpufgbg.layout import SAMPLE_KINDS, Layout
from gpufgbg.manifest import (
    Manifest,
    Recorder,
    ShardRecord,
    merged,
    missing,
    open_dataset,
    open_manifest,
)
from gpufgbg.moments import Moments
from gpufgbg.recipe import Recipe, Shard
from gpufgbg.scaleout.devices import several_devices
from gpufgbg.segments import CompactingRecorder, has_segments, unpack_segments
from gpufgbg.urls import is_url

if TYPE_CHECKING:
    from gpufgbg.depth.model import DepthModel
    from gpufgbg.depth.sources import NetworkSource
    from gpufgbg.scaleout.driver import Driver
    from gpufgbg.scaleout.processes import ProcessCrew

__all__ = ["GenerateReport", "add_depth", "generate"]

Progress = Callable[[int, int], None]
LOOKS = 100  # at records that other runs add meanwhile; the last of these to end lists all


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
            check_same(manifest, content, described, source_sums)
            check_records(manifest, content)
            assets = same_assets(manifest, content)
        run.lap("read, check and prepare the pictures")
        compositor = run.load(assets, recipe)
        wanted = _part(samples, len(compositor))

        def begin() -> dict[str, Any]:
            theirs = manifest.read()
            if theirs is None:
                layout = Layout.of(compositor.plan)
                listed = list_assets(layout, assets, sources, source_sums)
                return begin_dataset(manifest, described, listed, assets, compositor.plan)
            if content is None:  # begun by another process while this one prepared
                check_same(manifest, theirs, described, source_sums)
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
        check_same_depth(manifest, content, described)
        if run.devices and (content.get("depth") is None or not content["complete"]):
            run.processes()
        with manifest.locked():
            unpack_segments(manifest, [r for r in manifest.records() if "depth" not in r.moments])
        assets = same_assets(manifest, content)
        run.lap("read, check and prepare the pictures")
        compositor = run.load(assets, recipe)

        def begin() -> dict[str, Any]:
            theirs = manifest.read()
            assert theirs is not None
            check_same_depth(manifest, theirs, described)
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
                check_replaced(manifest, compositor, sink, sorted(replaced))
                claimed = held.enter_context(manifest.claim(Shard(scope[0].start, scope[-1].stop))) if gaps else None
                if claimed is not None and manifest.claims_wait:  # for another run, which may have made them
                    gaps = self._gaps(wanted)
                after = merged(list({*(record.shard for record in manifest.records()), *gaps}))
                content = begin()
                engines = driver.engines if driver else [model.engine.description] if model else []
                if gaps:
                    add_engines(manifest, content, engines)
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
                    add_engines(manifest, manifest.read() or content, driver.engines)
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
