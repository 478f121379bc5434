"""A writer: a process that takes encoded samples out of shared memory and fills one shard at a time with them.

One Python process creates some 50,000 files a second whatever its threads; a card makes ten times as many. So the
CUDA pipeline starts several of these (``python -m gpufgbg.writer``) and gives each a socket and the shared memory.

Messages to a writer, and its answers:

- ``("plan", ...)``: what the data set is; first, once.
- ``("labels", folder, areas, done)``: write the label files; ``("labels",)``.
- ``("samples", shard, start, stop, slot, offsets, depth_ranges, last)``: the next samples of a shard lie in a slot of
  the memory; ``("free", slot)`` as soon as the slot may be used again, and after the last
  ``("closed", checksum, size_bytes, depth_ranges)``.
- any failure: ``("failed", error)``, for the parent to raise, and the process ends.
"""

from __future__ import annotations

import itertools
import mmap
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpufgbg.children import parent_of, portable_error

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Serve one parent: `children.parent_of`'s arguments, and the file descriptor of the memory."""
    connection = parent_of(*arguments[:2])
    try:
        _serve(connection, memoryview(mmap.mmap(int(arguments[2]), 0)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 1  # the parent is gone
    except BaseException as error:
        connection.send(("failed", portable_error(error, "a writer")))
        return 1
    return 0


def _serve(connection: Connection, memory: memoryview) -> None:
    from gpufgbg import sinks
    from gpufgbg.labels import write_labels
    from gpufgbg.recipe import Plan
    from gpufgbg.shards import OpenShard

    _, recipe, n_backgrounds, widths, heights, out, sink_name, kinds, runs, slot_bytes = connection.recv()
    plan = Plan(recipe, n_backgrounds, widths, heights)
    sink = sinks.select(sink_name, out, plan, kinds)
    current: OpenShard | None = None
    while True:
        message: tuple[Any, ...] = connection.recv()
        if message[0] == "end":
            return
        if message[0] == "labels":
            _, folder, areas, done = message
            write_labels(Path(folder), plan, areas, done)
            connection.send(("labels",))
            continue
        _, shard, start, stop, slot, offsets, depth_ranges, last = message
        if current is None:
            current = OpenShard(plan, sink, shard, runs)
        base = slot * slot_bytes
        files = {
            kind: [memory[base + a : base + b] for a, b in itertools.pairwise(ends)] for kind, ends in offsets.items()
        }
        part = slice(start - shard.start, stop - shard.start)
        samples = current.samples(part, files, depth_ranges)  # type: ignore[arg-type]
        current.append(samples, sink.pack(samples, current.folder))
        connection.send(("free", slot))
        if last:
            checksum = current.close()
            connection.send(("closed", checksum, current.size_bytes, current.depth_ranges))
            current = None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
