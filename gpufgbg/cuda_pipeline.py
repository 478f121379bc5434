"""The main job's pipeline on a card: render and encode batch k + 1 while batch k's bytes are copied and written.

Pixels stay on the card. One copy of compressed bytes a batch goes into pinned memory that writers share; these are
processes (`gpufgbg.writer`), each with one shard at a time. The pinned memory is a ring of slots of fixed size, so
memory does not depend on how many samples are made.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from gpufgbg.backends.cuda import CudaBackend
from gpufgbg.exceptions import DeviceError
from gpufgbg.labels import LabelJob
from gpufgbg.manifest import Manifest, ShardRecord
from gpufgbg.moments import Moments
from gpufgbg.recipe import Plan, Shard
from gpufgbg.shards import Committer
from gpufgbg.sinks import Sink

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
    manifest : Manifest
    workers : int
        Writer processes.
    batch_size : int, optional
        Samples a launch; by default what a slot and the card's free memory allow.
    """

    def __init__(
        self,
        backend: CudaBackend,
        plan: Plan,
        sink: Sink,
        manifest: Manifest,
        workers: int,
        batch_size: int | None,
    ) -> None:
        self.backend = backend
        self.plan = plan
        self.sink = sink
        self.manifest = manifest
        self.workers = workers
        self.committer = Committer(sink, manifest)
        self.timeline: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        recipe = plan.recipe
        largest = 4096 + _BLOCK_BYTES * 4 * (-(-recipe.width // 16)) * (-(-recipe.height // 16)) * 4
        self.slot_bytes = -(-max(_SLOT_BYTES, largest) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.slots = max(2, min(2 * workers + 2, _PINNED_BYTES // self.slot_bytes))
        with backend.device:
            free, _ = backend.device.mem_info
        fits = int(free * _MEMORY_SHARE) // backend.sample_bytes()
        usual = self.slot_bytes * 8 // (4 * recipe.width * recipe.height)  # files are some 1/12 of their pixels
        self.batch = batch_size or max(1, min(usual, fits))

    def run(self, gaps: list[Shard], folder: Path, made: Callable[[int], None], labels: LabelJob) -> bool:
        """Make the samples of ``gaps``; returns whether the label files were written too."""
        with self.backend.device:
            with self._timed("samples: pin the shared memory"):
                ring = _Ring(self.slots, self.slot_bytes)
            with self._timed("samples: start the writers"):
                writers = _Writers(self, ring, folder)
            try:
                writers.start_labels(labels)
                self._fill(gaps, ring, writers, made)
                with self._timed("samples: last writers"):
                    writers.finish()
                with self._timed("samples: last commits"):
                    self.committer.finish()
            except BaseException:
                writers.stop()
                with suppress(Exception):  # the first error is the one that counts
                    self.committer.finish()
                raise
            finally:
                writers.stop()
                ring.close()
            self.memory = {"device": _pool_bytes(), "pinned": self.slots * self.slot_bytes}
        return True

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timeline[phase] = self.timeline.get(phase, 0.0) + time.perf_counter() - begun

    def _fill(self, gaps: list[Shard], ring: _Ring, writers: _Writers, made: Callable[[int], None]) -> None:
        import cupy

        compute, copy = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
        copying: deque[tuple[Any, _Writer, tuple[Any, ...], Any]] = deque()

        def hand_over(left: int) -> None:
            while len(copying) > left:
                done, writer, message, _ = copying.popleft()
                done.synchronize()
                writer.send(message)
                made(message[3] - message[2])

        for shard in (cut for gap in gaps for cut in self.plan.shards(gap)):
            with self._timed("samples: wait for a writer"):
                writer = writers.next_idle(lambda: hand_over(0))
            writer.shard, writer.moments = shard, {}
            start = shard.start
            while start < shard.stop:
                stop = min(start + self.batch, shard.stop)
                try:
                    with compute, self._timed("samples: render and encode on the card"):
                        files, offsets, moments = self._make(start, stop)
                        event = compute.record()
                except cupy.cuda.memory.OutOfMemoryError:
                    self._shrink(stop - start)
                    continue
                for kind, m in moments.items():
                    writer.moments[kind] = writer.moments.get(kind, Moments()) + m
                copy.wait_event(event)
                for first, last, parts in _pieces(offsets, self.slot_bytes):
                    with self._timed("samples: wait for a slot"):
                        slot = writers.free_slot(lambda: hand_over(0))
                    ends: dict[str, list[int]] = {}
                    at = 0
                    for kind, (begin, end) in parts.items():
                        cupy.cuda.runtime.memcpyAsync(
                            ring.pointer(slot) + at,
                            files[kind].data.ptr + begin,
                            end - begin,
                            _DEVICE_TO_HOST,
                            copy.ptr,
                        )
                        ends[kind] = (offsets[kind][first : last + 1] - begin + at).tolist()
                        at += end - begin
                    message = (
                        "samples", shard, start + first, start + last, slot, ends, start + last == shard.stop
                    )  # fmt: skip
                    copying.append((copy.record(), writer, message, files))
                hand_over(1)
                start = stop
        hand_over(0)

    def _make(self, start: int, stop: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Moments]]:
        """Render and encode samples start to stop - 1: files on the card; their offsets and the moments here."""
        backend = self.backend
        composites, masks = backend.frames(stop - start)
        pending = backend.render(self.plan.placements(np.arange(start, stop)), composites, masks)
        files, offsets = {}, {}
        for kind, pictures in (("composite", composites), ("composite_mask", masks)):
            files[kind], ends = backend.encode(pictures)
            offsets[kind] = ends.get()
        return files, offsets, pending.get()

    def _shrink(self, tried: int) -> None:
        """Out of the card's memory: take smaller batches, or say what one sample needs."""
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        if tried == 1:
            free, total = self.backend.device.mem_info
            needed = self.backend.sample_bytes() >> 20
            raise DeviceError(
                f"device {self.backend.name}: out of memory: one sample takes {needed} MB, {free >> 20} MB of "
                f"{total >> 20} MB are free: free some, lower --size, or use --device cpu"
            ) from None
        self.batch = max(1, tried // 2)


def _pool_bytes() -> int:
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())  # it never gives back, so this is its peak


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


class _Writer:
    """The parent's side of a writer process."""

    def __init__(self, setup: tuple[Any, ...], memory: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gpufgbg.writer", str(theirs.fileno()), str(memory)],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
            )
        self.connection = Connection(ours.detach())
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
            pipeline.manifest.out, sink.name, folder, ring.slot_bytes,
        )  # fmt: skip
        self._ring = ring
        self._folder = folder
        self._committer = pipeline.committer
        self._error: BaseException | None = None
        self._stopping = False
        self._all = [_Writer(setup, ring.descriptor) for _ in range(pipeline.workers)]
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
            if writer.process.poll() is None:
                writer.process.kill()
            writer.process.wait()
        self._thread.join()
        for writer in self._all:
            writer.connection.close()

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
            _, checksum, size_bytes = message
            shard = writer.shard
            assert shard is not None
            record = ShardRecord(shard, checksum, size_bytes, writer.moments)
            self._committer.submit(record, self._folder / shard.name)
            self._idle.put(writer)
        else:
            _, code, text, name = message
            self._error = OSError(code, text, name) if code else RuntimeError(f"a writer failed:\n{text}")
