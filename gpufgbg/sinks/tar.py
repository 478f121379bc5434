"""Tar shards in the WebDataset convention: ``KEY.composite.jpg``, ``KEY.mask.jpg``, ``KEY.depth.jpg``, ``KEY.json``.

Each cell of the shard grid is ``shards/shard-000000.tar``. A cell of which runs with ``--samples`` made pieces has
``shards/shard-000000.part-START-STOP.tar`` until all pieces are there; then they are joined into the shard that one
run would have made, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from gpufgbg.exceptions import DatasetError, printable
from gpufgbg.files import atomic_path, fsync_folder, sync_file_system
from gpufgbg.layout import TAR_SUFFIXES, Layout
from gpufgbg.manifest import STATE, missing, tiling
from gpufgbg.recipe import Placements, Plan, Shard
from gpufgbg.sinks import EncodedSamples, FileShard

__all__ = ["TarSink"]

_BLOCK, _RECORD = 512, 10240
_END = bytes(2 * _BLOCK)  # two empty blocks end an archive
# A ustar header but for name (0..99), size (124..135) and checksum (148..155): mode 0644, owner 0, time 0, a file.
_HEADER = bytearray(_BLOCK)
_HEADER[100:124] = b"0000644\0" + b"0000000\0" + b"0000000\0"
_HEADER[136:148] = b"00000000000\0"
_HEADER[156:157] = b"0"
_HEADER[257:265] = b"ustar\x0000"
_HEADER_SUM = sum(_HEADER) + 8 * ord(" ")  # the checksum's own field counts as spaces
UNFINISHED = "shard.tar"  # in the shard's folder
_NAME = re.compile(r"shard-([0-9]{6,})(?:\.part-([0-9]{12,}-[0-9]{12,}))?\.tar")
KIND_OF_SUFFIX = {suffix: kind for kind, suffix in TAR_SUFFIXES.items()}


def member(name: str, data: bytes) -> bytes:
    """A file as a member of a ustar archive; names up to 100 bytes, all fields but name and size constant.

    Format: POSIX.1-1988 ustar.
    """
    encoded, size = name.encode("ascii"), b"%011o\0" % len(data)
    if len(encoded) > 100:
        raise ValueError(f"{name}: {len(encoded)} bytes long, expected at most 100")
    header = bytearray(_HEADER)
    header[: len(encoded)] = encoded
    header[124:136] = size
    header[148:156] = b"%06o\0 " % (_HEADER_SUM + sum(encoded) + sum(size))
    return b"".join((header, data, bytes(-len(data) % _BLOCK)))


def members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the members that `member` made, up to the end of the archive."""
    while True:
        header = file.read(_BLOCK)
        if len(header) < _BLOCK or not header[0]:
            return
        size = int(header[124:135], 8)
        data = file.read(size + -size % _BLOCK)
        if len(data) < size:
            return
        yield header[: header.index(0)].decode("ascii"), data[:size]


class TarSink:
    """Keeps whole shards as tar files; see the module."""

    name = "tar"
    uploads = 0

    def __init__(self, out: Path, plan: Plan, layout: Layout, kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self.folder = self.parts = out / "shards"
        self.state = out / STATE
        self.plan = plan
        self.layout = layout

    def pack(self, samples: EncodedSamples, folder: Path) -> bytes:
        """The samples as members, one after the other."""
        packed = []
        for n, stem in enumerate(samples.stems):
            for kind, files in samples.files.items():
                packed.append(member(f"{stem}.{TAR_SUFFIXES[kind]}", files[n]))
            depth_range = None if samples.depth_ranges is None else samples.depth_ranges[n].tolist()
            packed.append(member(f"{stem}.json", self.label(samples.placements, n, depth_range)))
        return b"".join(packed)

    def label(self, p: Placements, n: int, depth_range: Sequence[float] | None) -> bytes:
        """``KEY.json`` of sample n of a batch; ``depth_range``: its least and greatest depth, where it has a map."""
        f = int(p.foreground[n])
        label = {
            "index": int(p.index[n]),
            "background": self.layout.background(int(p.background[n])),
            "foreground": self.layout.foreground(f),
            "repetition": int(p.repetition[n]),
            "flip": bool(p.flip[n]),
            "x": int(p.x[n]),
            "y": int(p.y[n]),
            "w": int(self.plan.foreground_widths[f]),
            "h": int(self.plan.foreground_heights[f]),
        }
        if depth_range is not None:
            label["depth_min"], label["depth_max"] = depth_range
        return json.dumps(label).encode()

    def open(self, folder: Path, shard: Shard) -> _TarShard:
        """Begin a shard."""
        return _TarShard(folder / UNFINISHED)

    def path(self, shard: Shard) -> Path:
        """Where a shard, or a piece of one, is kept."""
        cell, number = self.plan.cell(shard.start)
        piece = "" if shard == cell else f".part-{shard.name}"
        return self.folder / f"shard-{number:06d}{piece}.tar"

    def shard_of(self, name: str) -> Shard | None:
        """The shard, or the piece of one, that is kept under this name; None where no run makes such a file."""
        found = _NAME.fullmatch(name)
        if not found or int(found[1]) >= self.plan.cells:
            return None
        shard = Shard.from_name(found[2]) if found[2] else self.plan.cell_at(int(found[1]))
        fits = shard.start < shard.stop <= len(self.plan) and self.path(shard).name == name
        return shard if fits else None

    def sync(self) -> None:
        """One call for all shards that wait."""
        sync_file_system(self.folder.parent)

    def publish(self, folder: Path, shard: Shard) -> None:
        """Rename the shard."""
        self.folder.mkdir(exist_ok=True)
        (folder / UNFINISHED).replace(self.path(shard))
        fsync_folder(self.folder)

    def _pieces(self, cell: Shard) -> list[Shard]:
        found = self.parts.glob(f"{self.path(cell).stem}.part-*.tar")
        return [Shard.from_name(path.stem.partition(".part-")[2]) for path in found]

    def read(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        """(path, bytes) of every file of a committed shard."""
        for name, data in self.stored(shard):
            stem, _, suffix = name.partition(".")
            if KIND_OF_SUFFIX.get(suffix) in self.kinds:
                yield Layout.sample_path(KIND_OF_SUFFIX[suffix], stem), data

    def read_ranges(self, shard: Shard) -> Iterator[tuple[float, float]]:
        """Least and greatest depth of each sample of a committed shard with depth maps, as its labels have them."""
        try:
            for name, data in self.stored(shard):
                if name.endswith(".json"):
                    label = json.loads(data)
                    yield label["depth_min"], label["depth_max"]
        except DatasetError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{printable(self.path(shard))}: a label without depths: {error!r}") from None

    def stored(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of every member of a committed shard's tar file, labels and all.

        Raises
        ------
        DatasetError
            As for `Sink.read`.
        """
        pieces = [shard]
        if not self.path(shard).exists():  # joined records of which the pieces are not joined yet
            pieces = tiling(self._pieces(self.plan.cell(shard.start)[0]), shard) or [shard]
        for piece in pieces:
            path = self.path(piece)
            try:
                with path.open("rb") as file:
                    yield from members(file)
            except (OSError, ValueError) as error:
                raise DatasetError(f"{printable(path)}: can't be read: {error}") from None

    def finish(self, done: Sequence[Shard]) -> None:
        """Join the pieces of cells that are whole by now.

        Only of cells that are committed as a whole: another process may have published a piece and not recorded it.
        """
        cells = {self.plan.cell(Shard.from_name(p.stem.partition(".part-")[2]).start)[0]
                 for p in self.parts.glob("shard-*.part-*.tar")}  # fmt: skip
        for cell in sorted(cells):
            if missing(cell, list(done)):
                continue
            pieces, whole = self._pieces(cell), self.path(cell)
            order = tiling(pieces, cell)
            if order and not whole.exists():
                try:
                    self._join(order, whole)
                except FileNotFoundError:  # in a store, another run that ends has joined and removed them
                    if not whole.exists():
                        raise
            if whole.exists():
                for piece in pieces:
                    self.path(piece).unlink(missing_ok=True)

    def _join(self, pieces: Sequence[Shard], whole: Path) -> None:
        """Make the shard at ``whole`` of its pieces."""
        with self._whole(whole) as temporary:
            writer = _TarShard(temporary)
            try:
                for piece in pieces:
                    with self.path(piece).open("rb") as file:
                        for name, data in members(file):
                            writer.append(member(name, data))
            except BaseException:
                writer.abandon()
                raise
            writer.close()

    def _whole(self, path: Path) -> AbstractContextManager[Path]:
        """A file to write inside the block, which then becomes the shard at ``path``."""
        return atomic_path(path, self.state / "scratch")


class _TarShard(FileShard):
    def _end(self) -> None:
        self.file.write(_END)
        self.file.write(bytes(-self.file.tell() % _RECORD))
