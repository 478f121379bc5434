"""The main job's pipeline on a card: render and encode batch k + 1 while batch k's bytes are copied and written.

With depth maps, batch k + 1 is rendered, and its inferences are queued, while batch k's run, so that the card's next
inference never waits for Python.

Pixels stay on the card. One copy of compressed bytes a batch goes into pinned memory that writers share; these are
processes (`gpufgbg.writer`), each with one shard at a time. The pinned memory is a ring of slots of fixed size, so
memory does not depend on how many samples are made.
"""

from __future__ import annotations

import mmap
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpufgbg.backends import PendingMoments
from gpufgbg.backends.cuda import CudaBackend, CudaJpeg, PendingSums, start_moments
from gpufgbg.children import Child
from gpufgbg.depth.options import DEPTH_JPEG
from gpufgbg.exceptions import DeviceError
from gpufgbg.labels import LabelJob
from gpufgbg.manifest import Recorder, ShardRecord
from gpufgbg.moments import Moments
from gpufgbg.recipe import Plan, Shard
from gpufgbg.shards import Committer
from gpufgbg.sinks import Sink

if TYPE_CHECKING:
    from gpufgbg.depth.model import DepthModel

__all__ = ["CudaPipeline"]

_SLOT_BYTES = 16 << 20  # with 32 MB, pinning takes longer and writers wait longer for their first samples
_PINNED_BYTES = 1 << 30  # all slots together, unless one sample needs more
_BLOCK_BYTES = 128  # an 8x8 block's share of the largest files seen (noise at quality 100)
_MEMORY_SHARE = 0.25  # of the card's free memory that a batch may take
_DEVICE_TO_HOST = 2  # cudaMemcpyDeviceToHost


class CudaPipeline:
    """Fills shards from one card; see the module.

    Parameters
    ----------
    backend : CudaBackend
    plan : Plan
    sink : Sink
    manifest : Recorder
    workers : int
        Writer processes.
    batch_size : int, optional
        Samples a launch; by default what a slot and the card's free memory allow.
    depth : DepthModel, optional
        Makes depth maps too.
    """

    def __init__(
        self,
        backend: CudaBackend,
        plan: Plan,
        sink: Sink,
        manifest: Recorder,
        workers: int,
        batch_size: int | None,
        depth: DepthModel | None = None,
    ) -> None:
        self.backend = backend
        self.depth = depth
        self.plan = plan
        self.sink = sink
        self.manifest = manifest
        self.workers = workers
        self.committer = Committer(sink, manifest)
        self.timeline: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.transferred = {"files": 0, "other": 0}
        recipe = plan.recipe
        channels = 4 if depth is None else 5
        largest = 4096 + _BLOCK_BYTES * channels * (-(-recipe.width // 16)) * (-(-recipe.height // 16)) * 4
        self.slot_bytes = -(-max(_SLOT_BYTES, largest) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.slots = max(2, min(2 * workers + 2, _PINNED_BYTES // self.slot_bytes))
        with backend.device:
            free, _ = backend.device.mem_info
        fits = int(free * _MEMORY_SHARE) // self.sample_bytes()
        usual = (
            self.slot_bytes * 8 // (channels * recipe.width * recipe.height)
        )  # files are some 1/12 of their pixels
        batch = max(1, min(usual, fits))
        if depth is not None and batch > depth.batch:
            batch -= batch % depth.batch  # whole inferences
        self.batch = batch_size or batch

    def sample_bytes(self) -> int:
        """Bytes of the card's memory that one sample of a batch takes while it is made."""
        needed = self.backend.sample_bytes()
        if self.depth is None:
            return needed
        recipe = self.plan.recipe
        # two batches are under way, and each has its decoded composites and its maps
        return 2 * needed + recipe.width * recipe.height * 12

    def run(self, gaps: Iterable[Shard], folder: Path, made: Callable[[int], None], labels: LabelJob | None) -> bool:
        """Make the samples of ``gaps``; returns whether the label files were written too."""
        ahead = labels is not None and self.depth is None  # else they want every sample's range of depth
        with self.backend.device, ExitStack() as held:
            with self._timed("samples: pin the shared memory"):
                ring = _Ring(self.slots, self.slot_bytes)
            held.callback(ring.close)
            with self._timed("samples: start the writers"):
                writers = _Writers(self, ring, folder)
            held.callback(writers.stop)
            try:
                if labels is not None and ahead:
                    writers.start_labels(labels)
                _Filler(self, ring, writers, made).fill(gaps)
                with self._timed("samples: last writers"):
                    writers.finish()
                with self._timed("samples: last commits"):
                    self.committer.finish()
            except BaseException:
                writers.stop()
                with suppress(Exception):  # the first error is the one that counts
                    self.committer.finish()
                raise
            self._note_memory()
            self.memory["pinned"] = self.slots * self.slot_bytes
        return ahead

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timeline[phase] = self.timeline.get(phase, 0.0) + time.perf_counter() - begun

    def _note_memory(self) -> None:
        """Keep the pool's peak; it gives back in `_shrink` alone."""
        import cupy

        held = int(cupy.get_default_memory_pool().total_bytes())
        self.memory["device"] = max(held, self.memory.get("device", 0))

    def _shrink(self, tried: int) -> None:
        """Out of the card's memory: take smaller batches, or say what one sample needs."""
        import cupy

        self._note_memory()
        cupy.get_default_memory_pool().free_all_blocks()
        if tried == 1:
            free, total = self.backend.device.mem_info
            needed = self.sample_bytes() >> 20
            raise DeviceError(
                f"device {self.backend.name}: out of memory: one sample takes {needed} MB, {free >> 20} MB of "
                f"{total >> 20} MB are free: free some, lower the size, or use device cpu"
            ) from None
        self.batch = max(1, tried // 2)


@dataclass(frozen=True)
class _Span:
    """Samples of a shard that are still to be made, and the writer that takes them."""

    shard: Shard
    writer: _Writer
    start: int
    stop: int


@dataclass
class _Batch:
    """Samples on their way through the card; ``held`` are arrays that launches under way still read."""

    span: _Span
    files: dict[str, Any]
    offsets: dict[str, Any]
    moments: PendingMoments
    maps: Any = None
    depth_moments: PendingSums | None = None
    event: Any = None
    held: tuple[Any, ...] = ()
    depth_ranges: Any = None


class _Filler:
    """Makes batches and hands their bytes to the writers."""

    def __init__(self, pipeline: CudaPipeline, ring: _Ring, writers: _Writers, made: Callable[[int], None]) -> None:
        import cupy

        self.pipeline = pipeline
        self.ring = ring
        self.writers = writers
        self.made = made
        self.depth_jpeg = CudaJpeg(*DEPTH_JPEG)
        # What is quick goes first where both are ready: inferences fill the card for a long time.
        self.compute, self.finish = (cupy.cuda.Stream(non_blocking=True, priority=-1) for _ in range(2))
        self.infer, self.copy = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        self.flying: deque[_Batch] = deque()
        self.copying: deque[tuple[Any, _Writer, tuple[Any, ...], Any]] = deque()

    def fill(self, gaps: Iterable[Shard]) -> None:
        """Make all samples of ``gaps``."""
        import cupy

        pipeline = self.pipeline
        shards = (cut for gap in gaps for cut in pipeline.plan.shards(gap))
        spans: deque[_Span] = deque()
        lookahead = 0 if pipeline.depth is None else 1
        more = True
        while more or self.flying:
            # A writer may wait for the very batch that is on its way: then that one goes first.
            blocked = more and not spans and bool(self.flying) and not self.writers.any_idle()
            if more and not spans and not blocked:
                shard = next(shards, None)
                if shard is None:
                    more = False
                else:
                    spans.append(self._assigned(shard))
            due = blocked or not (spans or more)
            try:
                if spans:
                    span = spans.popleft()
                    stop = min(span.start + pipeline.batch, span.stop)
                    if stop < span.stop:
                        spans.appendleft(replace(span, start=stop))
                    tried = replace(span, stop=stop)
                    self.flying.append(self._begin(tried))
                due = bool(self.flying) and (due or len(self.flying) > lookahead)
                if due:
                    tried = self.flying[0].span
                    self._end(self.flying[0])
            except cupy.cuda.memory.OutOfMemoryError:
                again = [batch.span for batch in self.flying]
                spans.extendleft(reversed(again if tried in again else [*again, tried]))
                self.flying.clear()
                pipeline._shrink(tried.stop - tried.start)
                continue
            if due:
                self._hand_to_writer(self.flying.popleft())
        self._hand_over(0)

    def _assigned(self, shard: Shard) -> _Span:
        with self.pipeline._timed("samples: wait for a writer"):
            writer = self.writers.next_idle(lambda: self._hand_over(0))
        writer.shard, writer.moments = shard, {}
        return _Span(shard, writer, shard.start, shard.stop)

    def _begin(self, span: _Span) -> _Batch:
        """Render and encode a batch, and queue its inferences."""
        pipeline = self.pipeline
        backend, depth = pipeline.backend, pipeline.depth
        with self.compute, pipeline._timed("samples: render and encode on the card"):
            composites, masks = backend.frames(span.stop - span.start)
            placements = pipeline.plan.placements(np.arange(span.start, span.stop))
            batch = _Batch(span, {}, {}, backend.render(placements, composites, masks))
            for kind, pictures in (("composite", composites), ("composite_mask", masks)):
                batch.files[kind], ends = backend.encode(pictures)
                batch.offsets[kind] = ends.get()
            batch.event = self.compute.record()
        if depth is not None:
            self.infer.wait_event(batch.event)
            with self.infer, pipeline._timed("samples: queue the inferences"):
                pictures = backend.jpeg.reconstruct(composites) if depth.options.input == "saved" else composites
                batch.maps = depth.maps(pictures)
                batch.depth_moments = start_moments(batch.maps.grey)
                batch.event = self.infer.record()
            batch.held = (composites, pictures)
        return batch

    def _end(self, batch: _Batch) -> None:
        """Wait for a batch's depth maps and encode them."""
        pipeline = self.pipeline
        if pipeline.depth is None:
            return
        self.finish.wait_event(batch.event)
        with self.finish, pipeline._timed("samples: wait for depth maps and encode them"):
            batch.files["depth"], ends = self.depth_jpeg.encode(batch.maps.grey)
            batch.offsets["depth"] = ends.get()
            batch.depth_ranges = batch.maps.range.get()
            pipeline.depth.check(batch.maps.faults, batch.span.start)
            pipeline.depth.warn_clipped(batch.depth_ranges)
            batch.event = self.finish.record()

    def _hand_to_writer(self, batch: _Batch) -> None:
        """Copy a batch's files to the host, and tell the batches before it to their writers."""
        import cupy

        pipeline, span, transferred = self.pipeline, batch.span, self.pipeline.transferred
        moments = batch.moments.get()
        if batch.depth_moments is not None:
            moments["depth"] = batch.depth_moments.get()
        totals = span.writer.moments
        for kind, m in moments.items():
            totals[kind] = totals.get(kind, Moments()) + m
        self.copy.wait_event(batch.event)
        for first, last, parts in _pieces(batch.offsets, pipeline.slot_bytes):
            with pipeline._timed("samples: wait for a slot"):
                slot = self.writers.free_slot(lambda: self._hand_over(0))
            ends: dict[str, list[int]] = {}
            at = 0
            for kind, (begin, end) in parts.items():
                cupy.cuda.runtime.memcpyAsync(
                    self.ring.pointer(slot) + at,
                    batch.files[kind].data.ptr + begin,
                    end - begin,
                    _DEVICE_TO_HOST,
                    self.copy.ptr,
                )
                ends[kind] = (batch.offsets[kind][first : last + 1] - begin + at).tolist()
                at += end - begin
            ranges = None if batch.depth_ranges is None else batch.depth_ranges[first:last]
            start, stop = span.start + first, span.start + last
            message = ("samples", span.shard, start, stop, slot, ends, ranges, stop == span.shard.stop)
            self.copying.append((self.copy.record(), span.writer, message, batch.files))
            transferred["files"] += at
        kinds, count = len(batch.files), span.stop - span.start
        transferred["other"] += kinds * 8 * (count + 2) + 48  # offsets and their last one again, composites' sums
        if batch.depth_ranges is not None:
            transferred["other"] += 12 * count + 16  # ranges and faults; sums
        self._hand_over(1)

    def _hand_over(self, left: int) -> None:
        """Tell the writers of all copies but the last ``left``."""
        while len(self.copying) > left:
            done, writer, message, _ = self.copying.popleft()
            done.synchronize()
            writer.send(message)
            self.made(message[3] - message[2])


def _pieces(offsets: dict[str, Any], room: int) -> list[tuple[int, int, dict[str, tuple[int, int]]]]:
    """Cut a batch's samples so that each piece's files fit ``room`` bytes: (first, last, byte ranges by kind)."""
    ends = sum(offsets.values())
    count, first, pieces = len(ends) - 1, 0, []
    while first < count:
        last = int(np.searchsorted(ends, ends[first] + room, "right")) - 1
        if last <= first:
            raise DeviceError(
                f"sample {first} of a batch: {int(ends[first + 1] - ends[first]):,} bytes of JPEG, "
                f"expected at most {room:,}"
            )
        pieces.append((first, last, {kind: (int(o[first]), int(o[last])) for kind, o in offsets.items()}))
        first = last
    return pieces


class _Ring:
    """Slots of pinned memory that this process, the card and the writers share."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        import cupy

        self.slot_bytes = slot_bytes
        self.descriptor = os.memfd_create("gpufgbg")
        os.ftruncate(self.descriptor, slots * slot_bytes)
        self._memory = mmap.mmap(self.descriptor, slots * slot_bytes)
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        try:
            cupy.cuda.runtime.hostRegister(self._address, slots * slot_bytes, 0)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            os.close(self.descriptor)
            raise DeviceError(
                f"can't pin {slots * slot_bytes >> 20} MB of host memory ({error}): free some, raise the limit of "
                "locked memory (ulimit -l), or use fewer workers"
            ) from None
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self.free.put(slot)

    def pointer(self, slot: int) -> int:
        """Address of a slot."""
        return int(self._address + slot * self.slot_bytes)

    def close(self) -> None:
        """Unpin and release the memory."""
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.runtime.hostUnregister(self._address)
        os.close(self.descriptor)


class _Writer(Child):
    """The parent's side of a writer process."""

    def __init__(self, setup: tuple[Any, ...], memory: int) -> None:
        super().__init__([sys.executable, "-m", "gpufgbg.writer"], [memory], [memory])
        self.shard: Shard | None = None
        self.moments: dict[str, Moments] = {}
        self.send(setup)

    def send(self, message: tuple[Any, ...]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the reading thread says why
            self.connection.send(message)


class _Writers:
    """All writers, and the thread that takes their answers."""

    def __init__(self, pipeline: CudaPipeline, ring: _Ring, folder: Path) -> None:
        plan, sink = pipeline.plan, pipeline.sink
        setup = (
            "plan", plan.recipe, plan.n_backgrounds, plan.foreground_widths, plan.foreground_heights,
            pipeline.manifest.out, sink.name, sink.kinds, folder, ring.slot_bytes,
        )  # fmt: skip
        self._ring = ring
        self._folder = folder
        self._committer = pipeline.committer
        self._error: BaseException | None = None
        self._stopping = False
        self._all: list[_Writer] = []
        try:
            for _ in range(pipeline.workers):
                self._all.append(_Writer(setup, ring.descriptor))
        except BaseException:
            for writer in self._all:
                writer.end()
            raise
        self._idle: queue.SimpleQueue[_Writer] = queue.SimpleQueue()
        for writer in reversed(self._all):
            self._idle.put(writer)
        self._thread = threading.Thread(target=self._listen, name="writers", daemon=True)
        self._thread.start()

    def start_labels(self, job: LabelJob) -> None:
        """Have one writer make the label files meanwhile."""
        writer = self._idle.get()
        writer.send(("labels", str(job.folder), job.areas, job.done))

    def next_idle(self, before_waiting: Callable[[], None]) -> _Writer:
        """A writer without a shard; waits for one."""
        return self._get(self._idle, before_waiting)

    def any_idle(self) -> bool:
        """Whether `next_idle` need not wait."""
        return not self._idle.empty()

    def free_slot(self, before_waiting: Callable[[], None]) -> int:
        """A slot that nobody reads any more; waits for one."""
        return self._get(self._ring.free, before_waiting)

    def _get(self, source: queue.SimpleQueue[Any], before_waiting: Callable[[], None]) -> Any:
        if source.empty():
            before_waiting()  # what is copied already must reach the writers, or they have nothing to free
        while True:
            if self._error is not None:
                raise self._error
            with suppress(queue.Empty):
                return source.get(timeout=0.2)

    def finish(self) -> None:
        """Wait until every writer has done what it was given."""
        for _ in self._all:
            self._get(self._idle, lambda: None)
        self._stopping = True
        for writer in self._all:
            writer.send(("end",))
        for writer in self._all:
            writer.process.wait()

    def stop(self) -> None:
        """End the processes, whatever they do."""
        self._stopping = True
        for writer in self._all:
            writer.process.kill()
        self._thread.join()
        for writer in self._all:
            writer.end()

    def _listen(self) -> None:
        open_ones: dict[Any, _Writer] = {writer.connection: writer for writer in self._all}
        while open_ones:
            for connection in wait(list(open_ones)):
                writer = open_ones[connection]
                try:
                    self._answer(writer, writer.connection.recv())
                except (EOFError, ConnectionResetError):
                    del open_ones[connection]
                    if not self._stopping and self._error is None:
                        code = writer.process.wait()
                        self._error = DeviceError(
                            f"a writer process ended with code {code}: run the same command again"
                        )
                except BaseException as error:  # raised again in the thread that fills the shards
                    self._error = self._error or error

    def _answer(self, writer: _Writer, message: tuple[Any, ...]) -> None:
        if message[0] == "free":
            self._ring.free.put(message[1])
        elif message[0] == "labels":
            self._idle.put(writer)
        elif message[0] == "closed":
            _, checksum, size_bytes, depth_ranges = message
            shard = writer.shard
            assert shard is not None
            record = ShardRecord(shard, checksum, size_bytes, writer.moments, depth_ranges)
            self._committer.submit(record, self._folder / shard.name)
            self._idle.put(writer)
        else:
            self._error = message[1]
