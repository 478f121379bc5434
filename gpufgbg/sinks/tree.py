"""The folder tree of the original: one JPEG file a picture.

A shard is written into the run's own folder and then moved: whole folders by one rename where the shard fills
them, single files where a folder is filled by several shards.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpufgbg.exceptions import DatasetError, printable
from gpufgbg.files import fsync_folder, sync_file_system
from gpufgbg.layout import Layout
from gpufgbg.readers import read_file
from gpufgbg.recipe import Plan, Shard
from gpufgbg.sinks import EncodedSamples

__all__ = ["TreeSink"]


class TreeSink:
    """Keeps every picture as a file; see the module."""

    name = "tree"
    uploads = 0

    def __init__(self, out: Path, plan: Plan, layout: Layout, kinds: Sequence[str]) -> None:
        self.out = out
        self.kinds = kinds
        self.plan = plan
        self.layout = layout
        self._lock = threading.Lock()

    def pack(self, samples: EncodedSamples, folder: Path) -> None:
        """Write the files below ``folder``, under their paths in the tree."""
        for kind, files in samples.files.items():
            start, count = 0, len(samples.stems)
            backgrounds = samples.placements.background.tolist()
            while start < count:  # a run of samples on one background shares a folder
                stop = start + 1
                while stop < count and backgrounds[stop] == backgrounds[start]:
                    stop += 1
                parent = (folder / Layout.sample_path(kind, samples.stems[start])).parent
                descriptor = self._open_folder(parent)
                try:
                    for n in range(start, stop):
                        _write(f"{samples.stems[n]}.jpg", files[n], descriptor)
                finally:
                    os.close(descriptor)
                start = stop

    def _open_folder(self, folder: Path) -> int:
        try:
            return os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            with self._lock:  # the shard's own folder is there, unless another has taken it away
                folder.parent.mkdir(exist_ok=True)
                folder.mkdir(exist_ok=True)
            return os.open(folder, os.O_RDONLY)

    def open(self, folder: Path, shard: Shard) -> _TreeShard:
        """Begin a shard."""
        return _TreeShard()

    def sync(self) -> None:
        """One call for all files: an fsync a file would take longer than making them."""
        sync_file_system(self.out)

    def publish(self, folder: Path, shard: Shard) -> None:
        """Move the files into the tree."""
        parents = {self.out}
        for kind in sorted(folder.iterdir()):
            parent = self.out / kind.name
            parent.mkdir(exist_ok=True)
            parents.add(parent)
            for source in sorted(kind.iterdir()):
                target = parent / source.name
                try:
                    source.rename(target)  # refused where the target has files already
                except OSError:
                    if not target.is_dir():
                        raise
                    for file in source.iterdir():
                        file.replace(target / file.name)
                    parents.add(target)
        for parent in sorted(parents):
            fsync_folder(parent)

    def read(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        """(path, bytes) of every file of a committed shard."""
        for start in range(shard.start, shard.stop, 4096):
            indices = range(start, min(start + 4096, shard.stop))
            for stem in self.layout.stems(self.plan.placements(indices)):
                for kind in self.kinds:
                    path = Layout.sample_path(kind, stem)
                    try:
                        yield path, read_file(self.out / path)
                    except OSError as error:
                        raise DatasetError(
                            f"{printable(self.out / path)}: can't be read: {error.strerror or error}"
                        ) from None

    def finish(self, done: Sequence[Shard]) -> None:
        """Nothing to do: every shard is in its final form."""


def _write(name: str, data: bytes, folder: int) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


class _TreeShard:
    def append(self, pack: None) -> None:
        """The files are written already."""

    def close(self) -> None:
        """Nothing is open."""

    def abandon(self) -> None:
        """Nothing is open."""
