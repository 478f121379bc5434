"""Label files: the original's text a background, and one table of everything, labels.parquet.

Both are pure functions of the plan and the foregrounds' masks, so they can be written at any time; they become the
data set's when a run ends, for the samples that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpufgbg.assets import Assets
from gpufgbg.backends import blended_masks
from gpufgbg.files import fsync_folder, remove_tree, sync_file_system
from gpufgbg.layout import Layout
from gpufgbg.manifest import missing
from gpufgbg.recipe import Plan, Shard
from gpufgbg.remote.store import RemotePath

__all__ = ["DepthRanges", "LabelJob", "mask_areas", "publish_labels", "write_labels"]

_ROWS = 1 << 16  # of a row group; what is in memory at a time


def mask_areas(assets: Assets) -> npt.NDArray[np.int32]:
    """(F,) int32: pixels of each foreground's composite mask that are at least 128.

    The mask lies inside the frame as a whole, so its area does not depend on where it lies.
    """
    return np.add.reduceat(blended_masks(assets) >= 128, assets.offsets[:-1], dtype=np.int32)


#: gives the (samples, 2) least and greatest depth of a part of the samples
DepthRanges = Callable[[Shard], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class LabelJob:
    """Label files to be written ahead, below ``folder``, for the samples ``done`` that a run will end with."""

    folder: Path
    areas: npt.NDArray[np.int32]
    done: list[Shard]


def write_labels(
    folder: Path,
    plan: Plan,
    areas: npt.NDArray[np.int32],
    done: Sequence[Shard],
    depth_ranges: DepthRanges | None = None,
) -> None:
    """Write labels/ and labels.parquet below ``folder`` for the samples ``done`` (sorted, disjoint).

    ``areas`` are those of `mask_areas`; ``depth_ranges`` where there are depth maps. `publish_labels` makes the files
    the data set's.
    """
    layout = Layout.of(plan)
    remove_tree(folder)
    (folder / "labels").mkdir(parents=True)
    for b in range(plan.n_backgrounds):
        whole = Shard(b * plan.per_background, (b + 1) * plan.per_background)
        present = missing(whole, missing(whole, list(done)))
        if not present:
            continue
        with (folder / layout.label_file(b)).open("w", encoding="ascii", newline="\n") as file:
            for part in present:
                placements = plan.placements(np.arange(part.start, part.stop))
                stems, x, y = layout.stems(placements), placements.x.tolist(), placements.y.tolist()
                file.writelines(f"{s}.jpg\t{u}\t{v}\n" for s, u, v in zip(stems, x, y, strict=True))
    _write_table(folder / "labels.parquet", plan, layout, areas, done, depth_ranges)


def publish_labels(folder: Path, out: Path | RemotePath) -> None:
    """Make what `write_labels` wrote below ``folder`` durable, and then the data set's at ``out``."""
    if isinstance(out, RemotePath):
        out.store.upload_many({p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()})
        return
    sync_file_system(folder)
    (out / "labels").mkdir(exist_ok=True)
    for path in sorted((folder / "labels").iterdir()):
        path.replace(out / "labels" / path.name)
    (folder / "labels.parquet").replace(out / "labels.parquet")
    fsync_folder(out / "labels")
    fsync_folder(out)


def _write_table(
    path: Path,
    plan: Plan,
    layout: Layout,
    areas: npt.NDArray[np.int32],
    done: Sequence[Shard],
    depth_ranges: DepthRanges | None,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {
        "background": pa.array([layout.background(b) for b in range(plan.n_backgrounds)]),
        "foreground": pa.array([layout.foreground(f) for f in range(plan.n_foregrounds)]),
    }
    word = pa.dictionary(pa.int32(), pa.string())
    fields = [
        ("index", pa.int64()), ("name", pa.string()), ("background", word), ("foreground", word),
        ("repetition", pa.int32()), ("flip", pa.bool_()), ("x", pa.int32()), ("y", pa.int32()),
        ("w", pa.int32()), ("h", pa.int32()), ("mask_area", pa.int32()),
    ]  # fmt: skip
    if depth_ranges is not None:
        fields += [("depth_min", pa.float32()), ("depth_max", pa.float32())]
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in done:
            for start in range(part.start, part.stop, _ROWS):
                rows = Shard(start, min(start + _ROWS, part.stop))
                p = plan.placements(np.arange(rows.start, rows.stop))
                f = p.foreground
                columns = [
                    pa.array(p.index),
                    pa.array([f"{stem}.jpg" for stem in layout.stems(p)]),
                    pa.DictionaryArray.from_arrays(p.background, names["background"]),
                    pa.DictionaryArray.from_arrays(f, names["foreground"]),
                    pa.array(p.repetition),
                    pa.array(p.flip),
                    pa.array(p.x),
                    pa.array(p.y),
                    pa.array(plan.foreground_widths[f].astype(np.int32)),
                    pa.array(plan.foreground_heights[f].astype(np.int32)),
                    pa.array(areas[f]),
                ]
                if depth_ranges is not None:
                    columns += [pa.array(column) for column in depth_ranges(rows).T]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
