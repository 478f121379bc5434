"""A data set's own description: begun, compared with what a run wants, loaded, and finished with labels and sums."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from gpufgbg import sinks
from gpufgbg._version import versions
from gpufgbg.assets import AssetFile, Assets, Sources
from gpufgbg.compositor import Compositor
from gpufgbg.description import ASSETS
from gpufgbg.exceptions import DatasetError, InputError, StorageError, printable
from gpufgbg.files import remove_tree
from gpufgbg.jpeg import JpegEncoder
from gpufgbg.labels import LabelJob, mask_areas, publish_labels, write_labels
from gpufgbg.layout import SAMPLE_KINDS, Layout
from gpufgbg.manifest import (
    Manifest,
    ShardChecksum,
    ShardRecord,
    merged,
)
from gpufgbg.moments import Moments
from gpufgbg.recipe import Plan, Shard
from gpufgbg.segments import has_segments, pack_segments

__all__ = [
    "add_engines",
    "begin_dataset",
    "check_records",
    "check_replaced",
    "check_same",
    "check_same_depth",
    "depth_differences",
    "differences_of",
    "finish_dataset",
    "list_assets",
    "load_assets",
    "same_assets",
]

_COMPARED = 64  # samples rendered at a time, to be compared with those that there are


def check_same(
    manifest: Manifest,
    content: dict[str, Any],
    described: dict[str, Any],
    source_sums: dict[str, list[str]],
) -> None:
    """Raise `DatasetError` where the data set at the output path was begun with anything else."""
    there, here = (
        {**of["recipe"], "sink": of["sink"], "labels": of.get("labels", True)} for of in (content, described)
    )
    differences = differences_of(there, here)
    if content.get("depth") is None and described["depth"] is not None and not differences:
        raise DatasetError(
            f"--out {printable(manifest.out)}: holds a data set without depth maps: add them with "
            f"gpufgbg depth {printable(manifest.out)} --weights FILE"
        )
    differences += depth_differences(content.get("depth"), described["depth"])
    for kind, sums in source_sums.items():
        listed = content["assets"][kind]
        known = [entry["source_sha256"] for entry in listed]
        if kind == "masks" and content["assets"]["masks_from"] == "alpha":
            known = []
        if known != sums:
            what = f"{len(known)} {kind} there, {len(sums)} here"
            if len(known) == len(sums):
                changed = [i for i, pair in enumerate(zip(known, sums, strict=True)) if len({*pair}) > 1]
                what = f"{kind}: another {listed[changed[0]]['source']}"
            differences.append(what)
    if differences:
        raise DatasetError(
            f"--out {printable(manifest.out)}: holds a data set of another recipe or other pictures: "
            f"{'; '.join(differences)}: give the same ones to continue it, or choose another path"
        )


def check_same_depth(manifest: Manifest, content: dict[str, Any], described: dict[str, Any]) -> None:
    """Raise `DatasetError` where the data set has depth maps that are not like those described."""
    if content.get("depth") is None:
        return
    differences = depth_differences(content["depth"], described)
    if differences:
        raise DatasetError(
            f"{printable(manifest.out)}: has depth maps of other weights or options: {'; '.join(differences)}: give "
            "the same ones to continue"
        )


_FILE = ("weights", "sha256", "engines")  # of depth: what is not an option


def differences_of(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    ]


def depth_differences(there: dict[str, Any] | None, here: dict[str, Any] | None) -> list[str]:
    """In what decides depth maps but for the engine; a file of weights may have any name."""
    if there is None or here is None:
        states = ("has none" if depth is None else "has depth maps" for depth in (there, here))
        return [] if there is here else ["it {}, this run {}".format(*states)]
    shown = ({f"depth_{name}": value for name, value in d.items() if name not in _FILE} for d in (there, here))
    differences = differences_of(*shown)
    if there["sha256"] != here["sha256"]:
        names = (f"{d['weights']} ({d['sha256'][:12]})" for d in (there, here))
        differences.insert(0, "depth weights are {} there and {} here".format(*names))
    return differences


def add_engines(manifest: Manifest, content: dict[str, Any], engines: list[dict[str, Any]]) -> None:
    """Note in dataset.json which engines make depth maps from here on. Call it with the lock held."""
    new = [engine for engine in engines if engine not in (content["depth"] or {}).get("engines", [])]
    if new:
        content["depth"].setdefault("engines", []).extend(new)
        manifest.write(content)


def list_assets(
    layout: Layout, assets: Assets, sources: Sources, source_sums: dict[str, list[str]]
) -> dict[str, Any]:
    """The assets as dataset.json lists them."""
    paths = {
        "background": layout.background_file,
        "foreground": layout.foreground_file,
        "foreground_mask": layout.mask_file,
    }
    listed: dict[str, Any] = {
        "fingerprint": assets.fingerprint(),
        "masks_from": "files" if sources.masks else "alpha",
    }
    for kind, plural in ASSETS.items():
        # Without mask files, a mask comes from the foreground's alpha.
        sums = source_sums[plural] or source_sums["foregrounds"]
        listed[plural] = [
            {
                "file": paths[kind](i),
                "sha256": _sha256(file.data),
                "source": file.source,
                "source_sha256": source_sum,
            }
            for i, (file, source_sum) in enumerate(zip(assets.files[kind], sums, strict=True))
        ]
    return listed


def begin_dataset(
    manifest: Manifest, described: dict[str, Any], listed: dict[str, Any], assets: Assets, plan: Plan
) -> dict[str, Any]:
    """Write the assets and the first dataset.json; returns its content. Call it with the lock held."""
    manifest.put(
        {
            entry["file"]: file.data
            for kind, plural in ASSETS.items()
            for entry, file in zip(listed[plural], assets.files[kind], strict=True)
        }
    )
    content = {
        **({"format_version": 2} if has_segments(plan) else {}),
        **described,
        "versions": versions(),
        "counts": {
            "backgrounds": plan.n_backgrounds,
            "foregrounds": plan.n_foregrounds,
            "samples": len(plan),
            "done": 0,
        },
        "complete": False,
        "assets": listed,
        "bytes": {},
        "statistics": {"background": Moments.of(assets.backgrounds).to_dict(summary=True)},
        "shards": [],
    }
    manifest.write(content)
    return content


def load_assets(out: Path, content: dict[str, Any]) -> Assets:
    """The assets that a data set keeps, checked against dataset.json.

    Raises
    ------
    DatasetError
        A file is missing or is not what it was.
    """
    files: dict[str, tuple[AssetFile, ...]] = {}
    for kind, plural in ASSETS.items():
        loaded = []
        listed = content["assets"][plural]
        for entry, read in zip(listed, _reading([out / entry["file"] for entry in listed]), strict=True):
            path = out / entry["file"]
            try:
                data = read()
            except StorageError:
                raise
            except OSError as error:
                raise DatasetError(f"{printable(path)}: can't be read: {error.strerror}") from None
            if _sha256(data) != entry["sha256"]:
                raise DatasetError(
                    f"{printable(path)}: changed since the data set was begun (its checksum differs from "
                    "dataset.json): restore it or begin a new data set"
                )
            loaded.append(AssetFile(data, entry["source"]))
        files[kind] = tuple(loaded)
    try:
        return Assets.from_files(files)
    except (OSError, InputError) as error:
        raise DatasetError(f"{printable(out)}: assets can't be decoded: {error}") from None


def same_assets(manifest: Manifest, content: dict[str, Any]) -> Assets:
    """`load_assets`, for samples that are to be made like those that there are."""
    assets = load_assets(manifest.out, content)
    if assets.fingerprint() != content["assets"]["fingerprint"]:
        raise DatasetError(
            f"{printable(manifest.out)}: its bg/, fg/ and fg_mask/ decode to other pixels than when it was begun: "
            "use the version of Pillow that dataset.json names, or begin a new data set"
        )
    return assets


def check_records(manifest: Manifest, content: dict[str, Any]) -> None:
    """Raise `DatasetError` where a data set has lost the records of its samples, as a copy without .gpufgbg/ has."""
    if content["shards"] and not manifest.records() and not (manifest.state / "shards").is_dir():
        raise DatasetError(
            f"{printable(manifest.out)}: dataset.json lists {content['counts']['done']:,} samples, but there is no "
            f"{printable(manifest.state)} that tells of them: copy it too, from where the data set was copied"
        )


def check_replaced(manifest: Manifest, compositor: Compositor, sink: str, shards: Sequence[Shard]) -> None:
    """Raise `DatasetError` where shards that are to be made again, with depth maps, would be others than they are.

    The first sample of each tells: what a changed recipe makes differs everywhere.
    """
    layout, recipe = Layout.of(compositor.plan), compositor.recipe
    there = sinks.select(sink, manifest.out, compositor.plan, SAMPLE_KINDS[:-1])
    encoder = JpegEncoder(recipe.quality, recipe.subsampling, recipe.optimize, compositor.backend.name)
    for first in range(0, len(shards), _COMPARED):
        group = shards[first : first + _COMPARED]
        batch = compositor.render([shard.start for shard in group])
        pictures = {
            "composite": encoder.encode(batch.image, "HWC"),
            "composite_mask": encoder.encode(batch.mask, "HW"),
        }
        for at, (shard, stem) in enumerate(zip(group, layout.stems(batch.labels), strict=True)):
            expected = [(Layout.sample_path(kind, stem), bytes(files[at])) for kind, files in pictures.items()]
            if list(islice(there.read(shard), len(expected))) != expected:
                raise DatasetError(
                    f"{printable(manifest.out)}: samples {shard.start}:{shard.stop} are not what the recipe in "
                    f"dataset.json makes, and would be replaced: restore dataset.json or the samples "
                    f"(gpufgbg verify {printable(manifest.out)} says more)"
                )


def _reading(paths: list[Path]) -> Iterator[Callable[[], bytes]]:
    """What gives each file's bytes; of a store, several are on their way at a time."""
    if paths and isinstance(paths[0], Path):
        yield from (path.read_bytes for path in paths)
        return
    with ThreadPoolExecutor(16) as pool:
        yield from (future.result for future in [pool.submit(path.read_bytes) for path in paths])


def finish_dataset(
    manifest: Manifest,
    content: dict[str, Any],
    compositor: Compositor,
    sink: sinks.Sink,
    ahead: LabelJob | None,
) -> dict[str, Any]:
    """Join what can be joined, write labels and dataset.json, and return its content. Call it with the lock held."""
    plan = compositor.plan
    theirs = manifest.read() or content
    if content.get("depth"):
        content = {**content, "depth": theirs["depth"]}  # other processes may have added their engines
        with_depth = [record.shard for record in manifest.records() if "depth" in record.moments]
        if len(with_depth) < len(manifest.records()):  # whoever gives the last shards their depth maps finishes
            return {**content, "counts": {**content["counts"], "done": sum(map(len, with_depth))}, "complete": False}
    records = _join_records(manifest, compositor, sink)
    done = merged([record.shard for record in records])
    count = sum(len(part) for part in done)
    kinds = sorted({kind for record in records for kind in record.moments})
    statistics = {"background": Moments.from_dict(content["statistics"]["background"])}
    for kind in kinds:
        statistics[kind] = Moments.total(record.moments[kind] for record in records)
    size_bytes = {
        "background": _file_bytes(compositor.assets, "background"),
        "foreground": _file_bytes(compositor.assets, "foreground"),
        "foreground_mask": _file_bytes(compositor.assets, "foreground_mask"),
        **{kind: sum(record.size_bytes[kind] for record in records) for kind in kinds},
    }
    latest = {
        **content,
        "versions": versions(),
        "counts": {**content["counts"], "done": count},
        "complete": count == len(plan),
        "bytes": size_bytes,
        "statistics": {kind: m.to_dict(summary=True) for kind, m in statistics.items()},
        "shards": [_listed(record) for record in records],
    }
    if any(record.shards > 1 for record in records):
        latest["format_version"] = 2
    if done and (theirs["shards"] != latest["shards"] or _lacks_labels(manifest, latest, compositor.plan)):
        if content.get("labels", True):
            if ahead is None or ahead.done != done:  # another process has made samples meanwhile
                ahead = LabelJob(manifest.scratch / "labels", mask_areas(compositor.assets), done)
                ranges = functools.partial(manifest.depth_ranges, records=records) if content.get("depth") else None
                write_labels(ahead.folder, plan, ahead.areas, done, ranges)
            publish_labels(ahead.folder, manifest.out)
        manifest.write(latest)
    if latest["complete"] and manifest.journal is not None:
        remove_tree(manifest.journal)
    sink.finish(done)
    return latest


def _lacks_labels(manifest: Manifest, content: dict[str, Any], plan: Plan) -> bool:
    """Whether label files of a data set on this machine are gone; a zip's are in it."""
    if not content.get("labels", True) or content["sink"] == "zip" or not isinstance(manifest.out, Path):
        return False
    layout = Layout.of(plan)
    names = ("labels.parquet", *(layout.label_file(b) for b in range(plan.n_backgrounds)))
    return not all((manifest.out / name).is_file() for name in names)


def _listed(record: ShardRecord) -> dict[str, Any]:
    """A shard, or a segment of many, as dataset.json lists it."""
    entry: dict[str, Any] = {"start": record.shard.start, "stop": record.shard.stop, "sha256": record.checksum}
    return entry if record.shards == 1 else {**entry, "shards": record.shards}


def _join_records(manifest: Manifest, compositor: Compositor, sink: sinks.Sink) -> list[ShardRecord]:
    """The records, with the pieces of each cell that is whole by now as one record."""
    cells: dict[Shard, list[ShardRecord]] = {}
    for record in manifest.records():
        cells.setdefault(compositor.plan.cell(record.shard.start)[0], []).append(record)
    joined: list[ShardRecord] = []
    for cell, pieces in sorted(cells.items()):
        if len(pieces) == 1 or sum(len(piece.shard) for piece in pieces) != len(cell):
            joined.extend(pieces)
            continue
        try:
            whole = _joined(manifest, sink, cell, pieces)
        except DatasetError:  # in a store, another run that ends may have joined and removed them
            found = [record for record in manifest.records() if record.shard == cell]
            if not found:
                raise
            joined.extend(found)
            continue
        manifest.record([whole])
        joined.append(whole)
    manifest.forget_pieces(joined)
    return pack_segments(manifest, compositor.plan, joined)


def _joined(manifest: Manifest, sink: sinks.Sink, cell: Shard, pieces: list[ShardRecord]) -> ShardRecord:
    """The pieces of a cell as one record."""
    checksum = ShardChecksum()
    for piece in pieces:
        for path, data in sink.read(piece.shard):
            checksum.add(path, data)
    kinds = pieces[0].moments
    return ShardRecord(
        cell,
        checksum.hexdigest(),
        {kind: sum(piece.size_bytes[kind] for piece in pieces) for kind in kinds},
        {kind: Moments.total(piece.moments[kind] for piece in pieces) for kind in kinds},
        manifest.depth_ranges(cell, pieces) if "depth" in kinds and manifest.keeps_ranges else None,
    )


def _file_bytes(assets: Assets, kind: str) -> int:
    return sum(len(file.data) for file in assets.files[kind])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
