"""Is a data set whole and what it says it is? Counts, names, checksums, and samples rendered again."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpufgbg import sinks
from gpufgbg.backends.cpu import encode_jpeg
from gpufgbg.compositor import Compositor
from gpufgbg.exceptions import DatasetError, OptionError, printable
from gpufgbg.layout import SAMPLE_KINDS, Layout
from gpufgbg.manifest import Manifest, ShardChecksum, ShardRecord, merged, open_dataset
from gpufgbg.pipeline import load_assets
from gpufgbg.recipe import Plan, Shard
from gpufgbg.segments import shards_of
from gpufgbg.sinks import EncodedSamples

__all__ = ["VerifyReport", "verify"]

_BATCH = 64  # samples rendered again at a time
_NAMED = 20  # faults of one sort that are named one by one


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    samples : int
        Samples that the data set has.
    files : int
        Files that were read and checked.
    rerendered : int
        Samples that were rendered again and compared.
    faults : list of str
        One line each; empty where all is well.
    """

    samples: int = 0
    files: int = 0
    rerendered: int = 0
    faults: list[str] = field(default_factory=list)


def verify(
    path: str | os.PathLike[str],
    rerender: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a data set made by gpufgbg.

    Parameters
    ----------
    path : path
        The folder that holds dataset.json.
    rerender : int
        Number of samples, chosen at random but the same each time, that are rendered again and compared byte for
        byte.
    progress : callable, optional
        Called with (samples checked, samples there are).

    Returns
    -------
    VerifyReport
        With a line for every fault: a missing, changed or additional file, a wrong count.

    Raises
    ------
    DatasetError
        There is no data set of ours at the path, or its description is damaged.
    """
    if isinstance(rerender, bool) or not isinstance(rerender, int) or rerender < 0:
        raise OptionError("rerender", f"got {rerender!r}, expected 0 or more")
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
    compositor = Compositor(assets, recipe, "cpu", workers)
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
        report.faults.append(
            f"{printable(manifest.out)}: incomplete: {report.samples:,} of {len(plan):,} samples are there"
        )
    chosen = _chosen(done, rerender)
    checked = 0
    for shard, checksum in _single(report, manifest, shards):
        again = [index for index in chosen if shard.start <= index < shard.stop]
        expected = _rendered(compositor, layout, again)
        _check_shard(report, sink, layout, plan, shard, checksum, kinds, expected)
        report.rerendered += len(again)
        checked += len(shard)
        if progress:
            progress(checked, report.samples)
    if content.get("labels", True):
        _check_labels(report, manifest.out, plan, layout, done)
    if sink.name == "tree":
        _check_strangers(report, manifest.out, plan, layout, done, kinds)
    return report


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


def _fault(report: VerifyReport, text: str, before: int) -> None:
    if len(report.faults) - before < _NAMED:
        report.faults.append(text)


def _check_shard(
    report: VerifyReport,
    sink: sinks.Sink,
    layout: Layout,
    plan: Plan,
    shard: Shard,
    expected_checksum: str,
    kinds: list[str],
    rendered: dict[str, bytes],
) -> None:
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
            elif rendered.get(path, data) != data:
                report.faults.append(f"{path}: differs from the sample rendered again")
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
    before = len(report.faults)
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
                    _fault(report, f"{printable(file)}: belongs to no sample", before)


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
    """The files of these samples, made again."""
    recipe = compositor.recipe
    options = (recipe.quality, recipe.subsampling, recipe.optimize)
    files: dict[str, bytes] = {}
    for start in range(0, len(indices), _BATCH):
        batch = compositor.render(indices[start : start + _BATCH])
        encoded = {
            "composite": encode_jpeg(batch.image, *options),
            "composite_mask": encode_jpeg(batch.mask, *options),
        }
        files.update(EncodedSamples(batch.labels, layout.stems(batch.labels), encoded).items())
    return files
