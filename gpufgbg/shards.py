"""Shards on their way to the disk: filled by one thread or process, committed in groups by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpufgbg.layout import Layout
from gpufgbg.manifest import Recorder, ShardChecksum, ShardRecord
from gpufgbg.recipe import Placements, Plan, Shard
from gpufgbg.sinks import EncodedSamples, Publisher, Sink

__all__ = ["Committer", "OpenShard"]


class OpenShard:
    """A shard that is being filled, in order of samples; its unfinished files lie in a folder of its own.

    Parameters
    ----------
    plan : Plan
    sink : Sink
    shard : Shard
    runs : Path
        The run's folder, in which the shard's is made.
    """

    def __init__(self, plan: Plan, sink: Sink, shard: Shard, runs: Path) -> None:
        self.shard = shard
        self.folder = runs / shard.name
        self.folder.mkdir()
        self.placements: Placements = plan.placements(np.arange(shard.start, shard.stop))
        self.size_bytes: dict[str, int] = {}
        self._depth_ranges: list[npt.NDArray[np.float32]] = []
        self._layout = Layout.of(plan)
        self._sink = sink
        self._writer = sink.open(self.folder, shard)
        self._checksum = ShardChecksum()

    def samples(
        self,
        part: slice,
        files: Mapping[str, Sequence[bytes]],
        depth_ranges: npt.NDArray[np.float32] | None = None,
    ) -> EncodedSamples:
        """The files of a part of the shard's samples, with their names."""
        placements = self.placements[part]
        return EncodedSamples(placements, self._layout.stems(placements), files, depth_ranges)

    def append(self, samples: EncodedSamples, pack: object) -> None:
        """Add the next samples and what the sink made of them."""
        self._writer.append(pack)
        for path, data in samples.items():
            self._checksum.add(path, data)
        for kind, files in samples.files.items():
            self.size_bytes[kind] = self.size_bytes.get(kind, 0) + sum(map(len, files))
        if samples.depth_ranges is not None:
            self._depth_ranges.append(samples.depth_ranges)

    def close(self) -> str:
        """All samples are there: finish the files. Returns the checksum."""
        self._writer.close()
        return self._checksum.hexdigest()

    @property
    def depth_ranges(self) -> npt.NDArray[np.float32] | None:
        """(samples, 2) least and greatest depth of each sample so far; None where there are no depth maps."""
        return np.concatenate(self._depth_ranges) if self._depth_ranges else None

    def abandon(self) -> None:
        """Let go of open files; the run's folder is removed by its owner."""
        self._writer.abandon()


class Committer:
    """Commits closed shards in a thread of its own: durable, visible, recorded, in this order.

    All shards that wait are made durable by one call, since one call for many files costs little more than for one.
    ``committed`` is called with each shard in that thread, once it is recorded. A sink that uploads publishes several
    at a time, and then a bounded number waits.
    """

    def __init__(
        self, sink: Publisher, manifest: Recorder, committed: Callable[[Shard], None] = lambda shard: None
    ) -> None:
        self._sink = sink
        self._manifest = manifest
        self._committed = committed
        self._waiting: queue.SimpleQueue[tuple[ShardRecord, Path] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._room = threading.Semaphore(3 * sink.uploads) if sink.uploads else None
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._thread.start()

    def submit(self, record: ShardRecord, folder: Path) -> None:
        """Hand in a closed shard; raises what an earlier commit raised."""
        if self._room is not None:
            self._room.acquire()
        if self._error is not None:
            raise self._error
        self._waiting.put((record, folder))

    def finish(self) -> None:
        """Wait until everything handed in is committed; raises what a commit raised."""
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        last = False
        while not last:
            group = [self._waiting.get()]
            while not self._waiting.empty():
                group.append(self._waiting.get())
            last = None in group
            closed = [item for item in group if item is not None]
            if closed and self._error is None:
                try:
                    self._sink.sync()
                    self._publish(closed)
                    self._manifest.record([record for record, _ in closed])
                    for record, _ in closed:
                        self._committed(record.shard)
                except BaseException as error:  # raised again in the thread that hands shards in
                    self._error = error
            if self._room is not None and closed:
                self._room.release(len(closed))

    def _publish(self, closed: list[tuple[ShardRecord, Path]]) -> None:
        if self._sink.uploads and len(closed) > 1:
            with ThreadPoolExecutor(self._sink.uploads) as pool:
                list(pool.map(lambda item: self._sink.publish(item[1], item[0].shard), closed))
            return
        for record, folder in closed:
            self._sink.publish(folder, record.shard)
