"""Where a data set's files go: the folder tree, one stored zip, or tar shards.

A sink takes whole shards. `Sink.pack` turns the encoded files of a few samples into what the shard will hold and may
be called by many threads at once; a `ShardWriter` takes the packs in order; `Sink.publish` makes the shard appear,
whole, under its name. Until then everything of it lies in the run's own folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpufgbg.exceptions import OptionError
from gpufgbg.layout import Layout
from gpufgbg.remote.store import RemotePath

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gpufgbg.recipe import Placements, Plan, Shard

__all__ = ["SINKS", "EncodedSamples", "Publisher", "ShardWriter", "Sink", "select"]

SINKS = ("tree", "zip", "tar")


@dataclass(frozen=True)
class EncodedSamples:
    """The files of a few samples, in order.

    Attributes
    ----------
    placements : Placements
    stems : list of str
        File names without ending.
    files : dict of str to sequence of bytes
        By kind, in the order of `SAMPLE_KINDS`, one a sample.
    depth_ranges : (N, 2) float32, optional
        Least and greatest depth of each sample, where there are depth maps.
    """

    placements: Placements
    stems: list[str]
    files: Mapping[str, Sequence[bytes]]
    depth_ranges: npt.NDArray[np.float32] | None = None

    def items(self) -> Iterator[tuple[str, bytes]]:
        """(path in the folder tree, bytes) of every file, sample by sample."""
        for stem, files in zip(self.stems, zip(*self.files.values(), strict=True), strict=True):
            for kind, data in zip(self.files, files, strict=True):
                yield Layout.sample_path(kind, stem), data


class ShardWriter(Protocol):
    """One shard on its way to the disk."""

    def append(self, pack: Any) -> None:
        """Add the next pack; packs come in order."""

    def close(self) -> None:
        """All packs are there: finish the files."""

    def abandon(self) -> None:
        """Let go of open files; the run's folder is removed by its owner."""


class Publisher(Protocol):
    """What makes closed shards appear.

    Attributes
    ----------
    uploads : int
        Shards that are published at the same time where that takes long, and twice as many may wait; 0: one after
        the other, and any number may wait.
    """

    uploads: int

    def sync(self) -> None:
        """Make everything written so far durable."""

    def publish(self, folder: Path, shard: Shard) -> None:
        """Make a closed and durable shard appear, whole; any process may do it."""


class Sink(Publisher, Protocol):
    """A way to keep a data set in a folder.

    Attributes
    ----------
    name : str
    kinds : sequence of str
        Kinds of pictures that a sample has.
    """

    name: str
    kinds: Sequence[str]

    def pack(self, samples: EncodedSamples, folder: Path) -> Any:
        """What `ShardWriter.append` takes; may write into ``folder``, the shard's own."""

    def open(self, folder: Path, shard: Shard) -> ShardWriter:
        """Begin a shard whose unfinished parts lie in ``folder``."""

    def read(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        """(path in the folder tree, bytes) of every file of a committed shard, sample by sample.

        Raises
        ------
        DatasetError
            A file is missing or can't be read; the message names it.
        """

    def finish(self, done: Sequence[Shard]) -> None:
        """After a run: bring what is there into its final form. ``done``: all samples that are committed."""


class FileShard:
    """A shard that is one file."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def append(self, pack: bytes) -> None:
        """Add the next pack."""
        self.file.write(pack)

    def _end(self) -> None:
        """Write what ends the file."""

    def close(self) -> None:
        """End the file."""
        with self.file:
            self._end()

    def abandon(self) -> None:
        """Let go of the file."""
        self.file.close()


def select(name: str, out: Path | RemotePath, plan: Plan, kinds: Sequence[str]) -> Sink:
    """The sink called ``name`` for a data set at ``out`` with these kinds of pictures a sample, or `OptionError`."""
    layout = Layout.of(plan)
    if isinstance(out, RemotePath):
        if name != "tar":
            raise OptionError("sink", f"got {name!r} with a URL, expected tar: a store takes whole shards")
        from gpufgbg.sinks.remote_tar import RemoteTarSink

        return RemoteTarSink(out, plan, layout, kinds)
    if name == "tree":
        from gpufgbg.sinks.tree import TreeSink

        return TreeSink(out, plan, layout, kinds)
    if name == "tar":
        from gpufgbg.sinks.tar import TarSink

        return TarSink(out, plan, layout, kinds)
    if name == "zip":
        from gpufgbg.sinks.stored_zip import ZipSink

        return ZipSink(out, plan, layout, kinds)
    raise OptionError("sink", f"got {name!r}, expected one of {', '.join(SINKS)}")
