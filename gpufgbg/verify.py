"""Is a data set whole and what it says it is? Counts, names, checksums, and samples rendered and decoded again."""

from __future__ import annotations

import functools
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from gpufgbg import backends, decoding, sinks
from gpufgbg.checks import is_whole
from gpufgbg.compositor import Compositor
from gpufgbg.exceptions import DatasetError, OptionError, printable
from gpufgbg.jpeg import JpegEncoder
from gpufgbg.layout import SAMPLE_KINDS, Layout
from gpufgbg.manifest import Manifest, ShardChecksum, ShardRecord, merged, open_dataset, open_manifest
from gpufgbg.pipeline import load_assets
from gpufgbg.readers import StoredPicture, kind_of
from gpufgbg.recipe import Plan, Recipe, Shard
from gpufgbg.segments import shards_of
from gpufgbg.sinks import EncodedSamples
from gpufgbg.urls import is_url, local_path
from gpufgbg.verify_foreign import verify_foreign
from gpufgbg.verify_report import Faults, VerifyReport

__all__ = ["VerifyReport", "verify"]

_BATCH = 256  # samples rendered again at a time


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
    kinds = [kind for kind in SAMPLE_KINDS if kind in content["bytes"]]
    sink = sinks.select(content["sink"], manifest.out, plan, kinds)
    shards = [(Shard(s["start"], s["stop"]), s["sha256"], s.get("shards", 1)) for s in content["shards"]]
    done = merged([shard for shard, *_ in shards])
    report.samples = sum(len(part) for part in done)
    if report.samples != content["counts"]["done"]:
        report.faults.append(
            f"{printable(manifest.file)}: says {content['counts']['done']} samples, its shards have {report.samples}"
        )
    if content.get("depth") and kinds and "depth" not in kinds:
        report.faults.append(
            f"{printable(manifest.out)}: not all samples have their depth maps: continue with gpufgbg depth "
            f"{printable(manifest.out)}"
        )
    elif not content["complete"]:
        there = sum(len(part) for part in merged([record.shard for record in manifest.records()]))
        fault = f"incomplete: {max(there, report.samples):,} of {len(plan):,} samples are there"
        if there > report.samples:
            fault += f", {report.samples:,} of them in dataset.json: a run did not end; the same command continues it"
        report.faults.append(f"{printable(manifest.out)}: {fault}")
    chosen = _chosen(done, rerender)

    def checked() -> Iterator[StoredPicture]:
        """All pictures of samples, each shard's after it was found whole."""
        count = 0
        for shard, checksum in _single(report, manifest, shards):
            again = [index for index in chosen if shard.start <= index < shard.stop]
            expected = _rendered(compositor, layout, again)
            yield from _check_shard(report, sink, layout, plan, shard, checksum, kinds, expected)
            report.rerendered += len(again)
            count += len(shard)
            if progress:
                progress(count, report.samples)

    if decode:
        _check_forms(report, decoding.select(device, workers), checked(), recipe)
    else:
        deque(checked(), 0)
    if content.get("labels", True):
        _check_labels(report, manifest.out, plan, layout, done)
    if sink.name == "tree":
        _check_strangers(report, manifest.out, plan, layout, done, kinds)
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


def _check_shard(
    report: VerifyReport,
    sink: sinks.Sink,
    layout: Layout,
    plan: Plan,
    shard: Shard,
    expected_checksum: str,
    kinds: list[str],
    rendered: dict[str, bytes],
) -> Iterator[StoredPicture]:
    """Read a shard: names in order, whole JPEG files, the checksum, and equality with what was ``rendered``."""
    checksum = ShardChecksum()
    names = (
        Layout.sample_path(kind, stem)
        for start in range(shard.start, shard.stop, 4096)
        for stem in layout.stems(plan.placements(range(start, min(start + 4096, shard.stop))))
        for kind in kinds
    )
    try:
        for path, data in sink.read(shard):
            name = next(names, None)
            if path != name:
                report.faults.append(f"samples {shard.start}:{shard.stop}: expected {name}, found {path}")
                return
            if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
                report.faults.append(f"{path}: not a whole JPEG file ({len(data)} bytes)")
            else:
                if rendered.get(path, data) != data:
                    report.faults.append(f"{path}: differs from the sample rendered again")
                kind = kind_of(path)
                assert kind is not None
                yield StoredPicture(kind, "", path, functools.partial(bytes, data))
            checksum.add(path, data)
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


def _check_labels(report: VerifyReport, out: Path, plan: Plan, layout: Layout, done: list[Shard]) -> None:
    count = 0
    for b in range(plan.n_backgrounds):
        path = out / layout.label_file(b)
        if path.is_file():
            with path.open("rb") as file:
                count += sum(1 for _ in file)
    if count != report.samples:
        report.faults.append(f"{printable(out / 'labels')}: {count} lines, expected {report.samples}")


def _check_strangers(
    report: VerifyReport,
    out: Path,
    plan: Plan,
    layout: Layout,
    done: list[Shard],
    kinds: list[str],
) -> None:
    """Files in the sample folders that belong to no committed sample."""
    strangers = Faults(report, "files belong to no sample")
    for kind in kinds:
        for b in range(plan.n_backgrounds):
            folder = (out / Layout.sample_path(kind, f"{layout.background(b)}_fg_")).parent
            if not folder.is_dir():
                continue
            whole = Shard(b * plan.per_background, (b + 1) * plan.per_background)
            known: set[str] = set()
            for part in done:
                start, stop = max(part.start, whole.start), min(part.stop, whole.stop)
                if start < stop:
                    known.update(layout.stems(plan.placements(np.arange(start, stop))))
            for file in sorted(folder.iterdir()):
                if file.name.removesuffix(".jpg") not in known:
                    strangers.add(f"{printable(file)}: belongs to no sample")
    strangers.close()


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
