"""Is a data set whole and what it says it is?

Counts, names, checksums, labels and sums; nothing beside them that would be read with them; and, where asked for,
samples rendered and decoded again. What is compared is made again a part at a time, so that memory does not grow with
the samples.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from gpufgbg import backends, decoding, sinks
from gpufgbg.checks import is_whole
from gpufgbg.compositor import Compositor
from gpufgbg.dataset import load_assets
from gpufgbg.exceptions import DatasetError, OptionError, printable
from gpufgbg.jpeg import JpegEncoder
from gpufgbg.labels import mask_areas
from gpufgbg.layout import Layout
from gpufgbg.manifest import Manifest, ShardChecksum, ShardRecord, open_dataset, open_manifest
from gpufgbg.readers import StoredPicture, kind_of
from gpufgbg.recipe import Recipe, Shard
from gpufgbg.segments import shards_of
from gpufgbg.sinks import EncodedSamples
from gpufgbg.sinks.stored_zip import ZipSink
from gpufgbg.sinks.tar import KIND_OF_SUFFIX, TarSink
from gpufgbg.urls import is_url, local_path
from gpufgbg.verify_books import Books, check_counts, check_sums
from gpufgbg.verify_foreign import verify_foreign
from gpufgbg.verify_labels import check_labels
from gpufgbg.verify_report import Faults, VerifyReport
from gpufgbg.verify_strangers import check_strangers, check_zip

__all__ = ["VerifyReport", "verify"]

_BATCH = 256  # samples rendered again at a time
_STEMS = 4096  # names made at a time


def verify(
    path: str | os.PathLike[str],
    rerender: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str = "auto",
    decode: bool = False,
) -> VerifyReport:
    """Check a data set.

    One made by gpufgbg is compared with its own record. Of any other, which has none, the structure is checked: see
    `gpufgbg.verify_foreign`.

    Parameters
    ----------
    path : path
        The folder that holds dataset.json; or another data set's folder, zip or tar file.
    rerender : int
        Number of samples, chosen at random but the same each time, that are rendered again and compared byte for
        byte.
    workers : int, optional
        Threads that render and decode, by default one a core.
    progress : callable, optional
        Called with (samples checked, samples there are, or 0 where that is not known).
    device : {"auto", "cpu", "cuda", "cuda:N"}
        Where samples are rendered and pictures decoded; decoding on a card needs DALI.
    decode : bool
        Decode every picture and compare its size and mode with the recipe's. Data sets made by others are always
        decoded.

    Returns
    -------
    VerifyReport
        With a line for every fault: a missing, changed, additional or undecodable file, a wrong count.

    Raises
    ------
    DatasetError
        There is no data set at the path, or its description is damaged.
    OptionError
        ``rerender`` is negative, or asked for of a data set that gpufgbg did not make.
    DeviceError
        The device is not there, or can't decode.
    """
    if not is_whole(rerender) or rerender < 0:
        raise OptionError("rerender", f"got {rerender!r}, expected 0 or more")
    rerender = int(rerender)
    backends.check_device(device)
    if is_foreign(path):
        if rerender:
            raise OptionError("rerender", f"{printable(path)} has no dataset.json: its samples can't be made again")
        return verify_foreign(path, decoding.select(device, workers), progress)
    manifest, content, recipe = open_dataset(path)
    report = VerifyReport()
    try:
        assets = load_assets(manifest.out, content)
    except DatasetError as error:
        report.faults.append(str(error))
        return report
    if assets.fingerprint() != content["assets"]["fingerprint"]:
        report.faults.append(
            f"{printable(manifest.out)}: the assets decode to other pixels than when the data set was made"
        )
    compositor = Compositor(assets, recipe, device if rerender or device != "auto" else "cpu", workers)
    plan, layout = compositor.plan, Layout.of(compositor.plan)
    try:
        records = manifest.records()
    except DatasetError as error:
        report.faults.append(str(error))
        records = []
    books = Books(manifest, content, plan, layout, records)
    report.samples = sum(len(part) for part in books.done)
    check_counts(report, books, assets)
    sink = sinks.select(content["sink"], manifest.out, plan, books.kinds)
    shards = [(Shard(s["start"], s["stop"]), s["sha256"], s.get("shards", 1)) for s in content["shards"]]
    chosen = _chosen(books.done, rerender)
    seen = _Seen(report, books, sink)

    def checked() -> Iterator[StoredPicture]:
        """All pictures of samples, each shard's after it was found whole."""
        count = 0
        for shard, checksum in _single(report, manifest, shards):
            again = chosen[bisect_left(chosen, shard.start) : bisect_left(chosen, shard.stop)]
            yield from seen.check(shard, checksum, _rendered(compositor, layout, again))
            report.rerendered += len(again)
            count += len(shard)
            if progress:
                progress(count, report.samples)

    before = len(report.faults)
    if decode:
        _check_forms(report, decoding.select(device, workers), checked(), recipe)
    else:
        deque(checked(), 0)
    seen.close()
    check_sums(report, books, assets, seen.size_bytes if len(report.faults) == before else None)
    if content.get("labels", True):
        check_labels(report, books, mask_areas(assets))
    if isinstance(sink, ZipSink):
        check_zip(report, books, sink)
    check_strangers(report, books, sink)
    return report


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether a path has no data set of gpufgbg's, finished or begun: an archive by itself counts as anybody's."""
    if is_url(path):
        return not open_manifest(path).started
    root = local_path(path)
    return not root.is_dir() or not Manifest(root).started


def _single(
    report: VerifyReport, manifest: Manifest, shards: list[tuple[Shard, str, int]]
) -> Iterator[tuple[Shard, str]]:
    """Single shards and their checksums; those of a segment from its list."""
    for shard, checksum, count in shards:
        try:
            found = shards_of(manifest, ShardRecord(shard, checksum, {}, {}, shards=count))
        except DatasetError as error:
            report.faults.append(str(error))
            continue
        yield from ((record.shard, record.checksum) for record in found)


class _Seen:
    """Reads committed shards: names in order, whole JPEG files, checksums, labels in tar shards.

    Attributes
    ----------
    size_bytes : Counter
        Lengths of the files read so far, by kind.
    """

    def __init__(self, report: VerifyReport, books: Books, sink: sinks.Sink) -> None:
        self.size_bytes: Counter[str] = Counter()
        self._report, self._books, self._sink = report, books, sink
        self._labels = Faults(report, "members of tar shards are wrong")

    def check(self, shard: Shard, expected_checksum: str, rendered: dict[str, bytes]) -> Iterator[StoredPicture]:
        """Read a shard, and compare it with its checksum and with what was ``rendered``; gives its pictures."""
        report = self._report
        checksum = ShardChecksum()
        names = (Layout.sample_path(kind, stem) for stem in self._stems(shard) for kind in self._books.kinds)
        try:
            for path, data in self._pictures(shard):
                name = next(names, None)
                if path != name:
                    report.faults.append(f"samples {shard.start}:{shard.stop}: expected {name}, found {path}")
                    return
                kind = kind_of(path)
                assert kind is not None
                if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
                    report.faults.append(f"{path}: not a whole JPEG file ({len(data)} bytes)")
                else:
                    if rendered.get(path, data) != data:
                        report.faults.append(f"{path}: differs from the sample rendered again")
                    yield StoredPicture(kind, "", path, functools.partial(bytes, data))
                checksum.add(path, data)
                self.size_bytes[kind] += len(data)
                report.files += 1
        except DatasetError as error:
            report.faults.append(str(error))
            return
        if (name := next(names, None)) is not None:
            report.faults.append(f"samples {shard.start}:{shard.stop}: {name} is missing")
        elif checksum.hexdigest() != expected_checksum:
            report.faults.append(
                f"samples {shard.start}:{shard.stop}: the checksum differs from dataset.json: a file has changed; "
                "--rerender tells which"
            )

    def close(self) -> None:
        """All are read."""
        self._labels.close()

    def _stems(self, shard: Shard) -> Iterator[str]:
        for start in range(shard.start, shard.stop, _STEMS):
            indices = np.arange(start, min(start + _STEMS, shard.stop))
            yield from self._books.layout.stems(self._books.plan.placements(indices))

    def _pictures(self, shard: Shard) -> Iterator[tuple[str, bytes]]:
        """What `Sink.read` gives; of a tar shard, whatever else is in it is checked on the way."""
        sink = self._sink
        if not isinstance(sink, TarSink):
            yield from sink.read(shard)
            return
        labels = _TarLabels(self._books, sink, shard, self._labels)
        for name, data in sink.stored(shard):
            stem, _, suffix = name.partition(".")
            kind = KIND_OF_SUFFIX.get(suffix)
            if kind is not None and kind in sink.kinds:
                yield Layout.sample_path(kind, stem), data
            elif suffix == "json":
                labels.check(name, data)
            elif kind not in labels.kinds:
                self._labels.add(f"{labels.where}: {printable(name)} belongs to no sample")
        labels.close()


class _TarLabels:
    """Compares the labels in a tar shard with what the plan says.

    Parameters
    ----------
    books : Books
    sink : TarSink
    shard : Shard
    wrong : Faults

    Attributes
    ----------
    kinds : list of str
        Kinds of pictures that the shard may have; while depth maps are being added, theirs too.
    where : str
        The shard, for messages.
    """

    def __init__(self, books: Books, sink: TarSink, shard: Shard, wrong: Faults) -> None:
        record = books.record_of(shard)
        self.kinds = books.kinds if record is None else list(record.moments)
        self._depth = "depth" in self.kinds
        if not self._depth and books.depth_is_pending:  # a run may have published the shard and not recorded it
            self.kinds.append("depth")
        self.where = f"samples {shard.start}:{shard.stop}"
        self._sink, self._wrong = sink, wrong
        self._ranges: npt.NDArray[np.float32] | None = None
        if record is not None and self._depth and books.content.get("labels", True):  # else they are kept here alone
            try:
                self._ranges = books.depth_ranges(shard)
            except DatasetError as error:
                wrong.add(str(error))
        self._placements = books.plan.placements(np.arange(shard.start, shard.stop))
        self._names = [f"{stem}.json" for stem in books.layout.stems(self._placements)]
        self._at = 0
        self._in_order = True

    def check(self, name: str, data: bytes) -> None:
        """The next label of the shard."""
        n, self._at = self._at, self._at + 1
        if not self._in_order:
            return
        expected = self._names[n] if n < len(self._names) else "none"
        if name != expected:
            self._wrong.add(f"{self.where}: expected {expected}, found {printable(name)}")
            self._in_order = False
        elif data != self._sink.label(self._placements, n, self._range(n, data)):
            self._wrong.add(f"{self.where}: {name} differs from the sample's label")

    def close(self) -> None:
        """There are no more."""
        if self._in_order and self._at < len(self._names):
            self._wrong.add(f"{self.where}: {self._names[self._at]} is missing")

    def _range(self, n: int, label: bytes) -> Sequence[float] | None:
        """Least and greatest depth of sample n: as recorded, or, where no record is, as its label says itself."""
        if self._ranges is not None:
            found: list[float] = self._ranges[n].tolist()
            return found
        if "depth" not in self.kinds:
            return None
        try:
            fields = json.loads(label)
            return float(fields["depth_min"]), float(fields["depth_max"])
        except (ValueError, KeyError, TypeError):
            return (math.nan, math.nan) if self._depth else None  # the first is no label's


def _check_forms(
    report: VerifyReport, decoder: decoding.Decoder, pictures: Iterable[StoredPicture], recipe: Recipe
) -> None:
    """Decode pictures of samples: each is a JPEG file of the frame's size, in its kind's mode."""
    undecodable = Faults(report, "pictures can't be decoded")
    odd = Faults(report, "pictures of another size or mode")
    with closing(decoder.decode(pictures)) as batches:
        for batch in batches:
            expected = (*recipe.size, decoding.mode_of(batch.kind), "JPEG")
            for fault in batch.faults:
                undecodable.add(fault)
            for picture, form in zip(batch.pictures, batch.forms, strict=True):
                report.decoded += form is not None
                if form is not None and form != expected:
                    odd.add(f"{picture.name}: {_said(form)}, expected {_said(expected)}")
    undecodable.close()
    odd.close()


def _said(form: decoding.Form) -> str:
    width, height, mode, encoding = form
    return f"{width}x{height} {mode} {encoding}"


def _chosen(done: list[Shard], count: int) -> list[int]:
    """Up to ``count`` of the samples that are there, sorted; the same ones each time."""
    total = sum(len(part) for part in done)
    ranks = deque(sorted(random.Random(0).sample(range(total), min(count, total))))
    indices, passed = [], 0
    for part in done:
        while ranks and ranks[0] < passed + len(part):
            indices.append(part.start + ranks.popleft() - passed)
        passed += len(part)
    return indices


def _rendered(compositor: Compositor, layout: Layout, indices: list[int]) -> dict[str, bytes]:
    """The files of these samples, made again where the compositor renders."""
    recipe = compositor.recipe
    encoder = JpegEncoder(recipe.quality, recipe.subsampling, recipe.optimize, compositor.backend.name)
    files: dict[str, bytes] = {}
    for start in range(0, len(indices), _BATCH):
        batch = compositor.render(indices[start : start + _BATCH])
        encoded = {
            "composite": list(encoder.encode(batch.image, "HWC")),
            "composite_mask": list(encoder.encode(batch.mask, "HW")),
        }
        files.update(EncodedSamples(batch.labels, layout.stems(batch.labels), encoded).items())
    return files
