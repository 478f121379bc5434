"""The main job's pipeline on the CPU: worker threads render, encode and pack; one thread keeps the order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpufgbg.backends.cpu import CpuBackend, decode_jpeg, encode_jpeg
from gpufgbg.backends.cpu import moments as count
from gpufgbg.depth.journal import DepthJournal, KeptDepth
from gpufgbg.depth.options import DEPTH_JPEG
from gpufgbg.labels import LabelJob
from gpufgbg.manifest import Recorder, ShardRecord
from gpufgbg.moments import Moments
from gpufgbg.recipe import Plan, Shard
from gpufgbg.shards import Committer, OpenShard
from gpufgbg.sinks import EncodedSamples, Sink

if TYPE_CHECKING:
    from gpufgbg.depth.model import DepthModel

__all__ = ["BATCH", "CpuPipeline"]

BATCH = 32  # samples a worker renders at a time: their frames (6 MB at 224x224) stay in the cache
_BATCH_BYTES = 16 << 20  # frames larger than the usual make smaller batches
_PREDICTED = 4  # depth maps that are kept at a time: at DenseDepth's seconds a picture, what a kill may lose


class CpuPipeline:
    """Workers render, encode and pack a batch each; the calling thread takes their packs in order.

    Batches are handed out a bounded number ahead, so memory does not depend on how many samples are made.

    Parameters
    ----------
    backend : CpuBackend
    plan : Plan
    sink : Sink
    manifest : Recorder
    workers : int
        Threads.
    batch_size : int, optional
        Samples a worker takes at a time.
    depth : DepthModel, optional
        Makes depth maps too.
    """

    def __init__(
        self,
        backend: CpuBackend,
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
        self.workers = workers
        frame_bytes = 4 * plan.recipe.width * plan.recipe.height
        self.batch = batch_size or max(1, min(BATCH, _BATCH_BYTES // frame_bytes))
        self.manifest = manifest
        self.alive: Callable[[], None] = lambda: None  # called after each prediction, from any thread
        self.timeline: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.transferred: dict[str, int] = {}

    def run(self, gaps: Iterable[Shard], folder: Path, made: Callable[[int], None], labels: LabelJob | None) -> bool:
        """Make the samples of ``gaps``; unfinished shards lie in ``folder``; ``made`` is told each batch's length.

        Returns False: the label files are not written.
        """
        journal: DepthJournal | None = None
        if self.depth is not None and self.manifest.journal is not None:
            gaps = list(gaps)
            journal = DepthJournal(self.manifest.journal, gaps)
        committer = Committer(self.sink, self.manifest, *([journal.forget] if journal is not None else []))
        opened: deque[tuple[OpenShard, dict[str, Moments]]] = deque()
        pending: deque[tuple[bool, Future[Any]]] = deque()
        with ThreadPoolExecutor(self.workers, "render") as pool:

            def take() -> None:
                last, future = pending.popleft()
                samples, pack, part = future.result()
                shard, moments = opened[0]
                shard.append(samples, pack)
                for kind, m in part.items():
                    moments[kind] = moments.get(kind, Moments()) + m
                if last:
                    checksum = shard.close()
                    record = ShardRecord(shard.shard, checksum, shard.size_bytes, moments, shard.depth_ranges)
                    opened.popleft()
                    committer.submit(record, shard.folder)
                made(len(samples.placements))

            try:
                for shard in (cut for gap in gaps for cut in self.plan.shards(gap)):
                    current = OpenShard(self.plan, self.sink, shard, folder)
                    opened.append((current, {}))
                    for batch, last in self._batches(len(shard)):
                        pending.append((last, pool.submit(self._make, current, batch, journal)))
                        while len(pending) > 2 * self.workers + 2:
                            take()
                while pending:
                    take()
                begun = time.perf_counter()
                committer.finish()
                self.timeline["samples: last commits"] = time.perf_counter() - begun
            except BaseException:
                # What is closed is committed; what is under way is let go, after the batches that workers hold.
                for _, future in pending:
                    future.cancel()
                pool.shutdown(wait=True)
                for left, _ in opened:
                    left.abandon()
                with suppress(Exception):  # the first error is the one that counts
                    committer.finish()
                raise
        return False

    def _batches(self, count: int) -> Iterator[tuple[slice, bool]]:
        for start in range(0, count, self.batch):
            stop = min(start + self.batch, count)
            yield slice(start, stop), stop == count

    def _make(
        self, shard: OpenShard, batch: slice, journal: DepthJournal | None
    ) -> tuple[EncodedSamples, Any, dict[str, Moments]]:
        """In a worker: render, encode and pack a batch."""
        backend = self.backend
        composites, masks, moments = backend.render_reusing(shard.placements[batch], self.batch)
        files = {"composite": backend.encode(composites), "composite_mask": backend.encode(masks)}
        ranges = None
        if self.depth is not None:
            first = shard.shard.start + batch.start
            saved = files["composite"]
            maps = _DepthOfBatch(self.depth, journal, shard.shard, composites, saved, first, self.alive).maps()
            files["depth"] = [one.file for one in maps]
            ranges = np.array([one.range for one in maps], np.float32)
            moments["depth"] = Moments.total(one.moments for one in maps)
        samples = shard.samples(batch, files, ranges)
        return samples, self.sink.pack(samples, shard.folder), moments


@dataclass(frozen=True)
class _DepthOfBatch:
    """Depth maps of samples ``first`` and on of a shard: from the journal, if any, or predicted and kept there."""

    depth: DepthModel
    journal: DepthJournal | None
    shard: Shard
    composites: npt.NDArray[np.uint8]
    saved: list[bytes]
    first: int
    alive: Callable[[], None]

    def maps(self) -> list[KeptDepth]:
        """In order of samples."""
        found: list[KeptDepth | None] = [None] * len(self.saved)
        if self.journal is not None:
            found = [self.journal.find(self.first + n) for n in range(len(self.saved))]
        lacking = [n for n, kept in enumerate(found) if kept is None]
        step = self.depth.batch if self.journal is None else max(_PREDICTED, self.depth.batch)
        for start in range(0, len(lacking), step):
            part = lacking[start : start + step]
            made = self._predicted(part)
            self.alive()
            if self.journal is not None:
                self.journal.add(self.shard, made)
            for n, kept in zip(part, made, strict=True):
                found[n] = kept
        return [kept for kept in found if kept is not None]

    def _predicted(self, part: list[int]) -> list[KeptDepth]:
        """Depth maps of these of the batch's composites."""
        saved = self.depth.options.input == "saved"
        pictures = decode_jpeg([self.saved[n] for n in part]) if saved else self.composites[part]
        maps = self.depth.maps(pictures)
        indices = [self.first + n for n in part]
        self.depth.check(maps.faults, names=[f"picture {index}" for index in indices])
        self.depth.warn_clipped(maps.range)
        files = encode_jpeg(maps.grey, *DEPTH_JPEG)
        return [
            KeptDepth(index, file, (float(near), float(far)), count(grey[None]))
            for index, file, (near, far), grey in zip(indices, files, maps.range, maps.grey, strict=True)
        ]
