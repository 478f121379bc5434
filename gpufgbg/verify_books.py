"""What a data set says that it has, in dataset.json and in the records of its shards, and whether the two agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.assets import Assets
from gpufgbg.description import ASSETS
from gpufgbg.exceptions import printable
from gpufgbg.layout import SAMPLE_KINDS, Layout
from gpufgbg.manifest import Manifest, ShardRecord, merged, missing, within
from gpufgbg.merging import ranges
from gpufgbg.moments import Moments
from gpufgbg.recipe import Plan, Shard
from gpufgbg.verify_report import Faults, VerifyReport

__all__ = ["Books", "check_counts", "check_sums"]


@dataclass(frozen=True)
class Books:
    """A data set's own account of its samples.

    Attributes
    ----------
    manifest : Manifest
    content : dict
        Of dataset.json.
    plan : Plan
    layout : Layout
    records : list of ShardRecord
        In order. More than dataset.json lists where a run did not end; none where a data set was copied without
        its ``.gpufgbg/``.
    """

    manifest: Manifest
    content: dict[str, Any]
    plan: Plan
    layout: Layout
    records: list[ShardRecord]

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of which each sample in dataset.json has a picture."""
        return [kind for kind in SAMPLE_KINDS if kind in self.content["bytes"]]

    @cached_property
    def done(self) -> list[Shard]:
        """The samples in dataset.json, sorted, neighbours joined."""
        return merged([Shard(entry["start"], entry["stop"]) for entry in self.content["shards"]])

    @cached_property
    def recorded(self) -> list[Shard]:
        """The samples in records, likewise."""
        return merged([record.shard for record in self.records])

    @property
    def depth_is_pending(self) -> bool:
        """Whether depth maps are being added: some samples may have theirs."""
        return self.content["depth"] is not None and bool(self.kinds) and "depth" not in self.kinds

    @cached_property
    def is_current(self) -> bool:
        """Whether dataset.json lists all that is recorded; else a run is under way, or did not end."""
        return not self.depth_is_pending and all(within(part, self.done) == [part] for part in self.recorded)

    def having(self, kind: str) -> list[Shard]:
        """Samples that have a picture of this kind, by dataset.json or by a record; sorted, disjoint."""
        found = self.done if kind in self.kinds else []
        return united([*found, *(record.shard for record in self.records if kind in record.moments)])

    def record_of(self, shard: Shard) -> ShardRecord | None:
        """The record that covers a shard."""
        at = self._starts.searchsorted(shard.start, "right") - 1
        return self.records[at] if at >= 0 and shard.stop <= self.records[at].shard.stop else None

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.array([record.shard.start for record in self.records], np.int64)

    def depth_ranges(self, part: Shard) -> npt.NDArray[np.float32]:
        """(samples, 2) least and greatest depth of samples; `DatasetError` where they can't be read."""
        return self.manifest.depth_ranges(part, self.records)


def united(shards: Sequence[Shard]) -> list[Shard]:
    """The samples that any of ``shards``, which may overlap, has; sorted, disjoint, neighbours joined."""
    found: list[Shard] = []
    for shard in sorted(shards):
        if found and shard.start <= found[-1].stop:
            found[-1] = Shard(found[-1].start, max(found[-1].stop, shard.stop))
        else:
            found.append(shard)
    return found


def check_counts(report: VerifyReport, books: Books, assets: Assets) -> None:
    """Counts in dataset.json, whether the data set is complete, and whether it says so."""
    manifest, content, total = books.manifest, books.content, len(books.plan)
    file, counts = printable(manifest.file), content["counts"]
    for name, there in (("backgrounds", assets.n_backgrounds), ("foregrounds", assets.n_foregrounds)):
        if counts[name] != there:
            report.faults.append(f"{file}: says {counts[name]} {name}, there are {there}")
    if report.samples != counts["done"]:
        report.faults.append(f"{file}: says {counts['done']} samples, its shards have {report.samples}")
    if books.depth_is_pending:
        report.faults.append(
            f"{printable(manifest.out)}: not all samples have their depth maps: continue with gpufgbg depth "
            f"{printable(manifest.out)}"
        )
    elif report.samples < total or not books.is_current:
        there = sum(len(part) for part in books.recorded)
        fault = f"incomplete: {max(there, report.samples):,} of {total:,} samples are there"
        if there > report.samples:
            fault += f", {report.samples:,} of them in dataset.json: a run did not end; the same command continues it"
        report.faults.append(f"{printable(manifest.out)}: {fault}")
    if content["complete"] != (report.samples == total and not books.depth_is_pending):
        has = f"has {report.samples:,} of {total:,} samples"
        report.faults.append(f"{file}: complete: says {str(content['complete']).lower()}, {has}")
    if books.records:
        lost = [gap for part in books.done for gap in missing(part, within(part, books.recorded))]
        if lost:
            report.faults.append(
                f"{printable(manifest.state / 'shards')}: no records of samples {ranges(lost)}: generate makes "
                "these samples again"
            )


def check_sums(report: VerifyReport, books: Books, assets: Assets, size_bytes: Mapping[str, int] | None) -> None:
    """Statistics and bytes of dataset.json: the sums over the records, and over the pictures that it keeps.

    Parameters
    ----------
    report : VerifyReport
    books : Books
    assets : Assets
    size_bytes : mapping of str to int or None
        Lengths of the samples' files by kind as they were read; None where not all could be.
    """
    content = books.content
    expected = {kind: sum(len(file.data) for file in assets.files[kind]) for kind in ASSETS if books.kinds}
    statistics = {"background": Moments.of(assets.backgrounds)}
    source = "its files"
    records = [record for record in books.records if within(record.shard, books.done) == [record.shard]]
    if merged([record.shard for record in records]) == books.done:  # else they were joined with ones that are new
        for kind in books.kinds:
            if all(kind in record.moments for record in records):
                statistics[kind] = Moments.total(record.moments[kind] for record in records)
                expected[kind] = sum(record.size_bytes[kind] for record in records)
                source = "its files and records"
        _check_checksums(report, books, records)
    elif size_bytes is not None:
        expected.update(size_bytes)
    wrong = Faults(report, "numbers of dataset.json are wrong")
    file = printable(books.manifest.file)
    for kind in content["bytes"]:
        if kind in expected and content["bytes"][kind] != expected[kind]:
            wrong.add(f"{file}: bytes.{kind}: says {content['bytes'][kind]}, {source} have {expected[kind]}")
    for kind, found in content["statistics"].items():
        known = statistics.get(kind)
        if known is None:  # no record tells: what it says must follow from its sums, over all pictures
            known, own = Moments.from_dict(found), sum(len(part) for part in books.done)
            if (known.images, known.pixels) != (own, own * books.plan.recipe.width * books.plan.recipe.height):
                wrong.add(f"{file}: statistics.{kind}: says {known.images} images of {known.pixels} pixels in all")
                continue
        for name, value in known.to_dict(summary=True).items():
            if found.get(name) != value:
                wrong.add(f"{file}: statistics.{kind}.{name}: says {found.get(name)}, {source} give {value}")
    wrong.close()


def _check_checksums(report: VerifyReport, books: Books, records: list[ShardRecord]) -> None:
    """The checksums of dataset.json are those of the records."""
    wrong = Faults(report, "records differ from dataset.json")
    listed = {(entry["start"], entry["stop"]): entry["sha256"] for entry in books.content["shards"]}
    for record in records:
        shard = record.shard
        if list(record.moments) == books.kinds and listed.get((shard.start, shard.stop), record.checksum) != (
            record.checksum
        ):
            wrong.add(
                f"{printable(books.manifest.state / 'shards' / f'{shard.name}.json')}: its checksum differs from "
                "dataset.json"
            )
    wrong.close()
