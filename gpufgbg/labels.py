"""Label files: the original's text a background, and one table of everything, labels.parquet.

Both are pure functions of the plan and the foregrounds' masks, so they can be written at any time; they become the
data set's when a run ends, for the samples that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gpufgbg.assets import Assets
from gpufgbg.backends import blended_masks
from gpufgbg.files import fsync_folder, remove_tree, sync_file_system
from gpufgbg.layout import Layout
from gpufgbg.manifest import within
from gpufgbg.recipe import Plan, Shard
from gpufgbg.remote.store import RemotePath

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "DepthRanges",
    "LabelJob",
    "TableRows",
    "label_lines",
    "mask_areas",
    "publish_labels",
    "row_groups",
    "table_schema",
    "write_labels",
]

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
        present = within(Shard(b * plan.per_background, (b + 1) * plan.per_background), done)
        if not present:
            continue
        with (folder / layout.label_file(b)).open("wb") as file:
            file.writelines(label_lines(plan, layout, rows) for rows in row_groups(present))
    _write_table(folder / "labels.parquet", plan, areas, done, depth_ranges)


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


def row_groups(parts: Iterable[Shard]) -> Iterator[Shard]:
    """``parts`` in pieces of as many samples as are in memory at a time."""
    for part in parts:
        for start in range(part.start, part.stop, _ROWS):
            yield Shard(start, min(start + _ROWS, part.stop))


def label_lines(plan: Plan, layout: Layout, rows: Shard) -> bytes:
    """The lines of a label file for these samples."""
    p = plan.placements(np.arange(rows.start, rows.stop))
    columns = zip(layout.stems(p), p.x.tolist(), p.y.tolist(), strict=True)
    return "".join([f"{stem}.jpg\t{x}\t{y}\n" for stem, x, y in columns]).encode("ascii")


def table_schema(depth: bool) -> pa.Schema:
    """The columns of labels.parquet; with ``depth`` two more."""
    import pyarrow as pa

    word = pa.dictionary(pa.int32(), pa.string())
    fields = [
        ("index", pa.int64()), ("name", pa.string()), ("background", word), ("foreground", word),
        ("repetition", pa.int32()), ("flip", pa.bool_()), ("x", pa.int32()), ("y", pa.int32()),
        ("w", pa.int32()), ("h", pa.int32()), ("mask_area", pa.int32()),
    ]  # fmt: skip
    if depth:
        fields += [("depth_min", pa.float32()), ("depth_max", pa.float32())]
    return pa.schema(fields)


class TableRows:
    """Makes the rows of labels.parquet.

    Parameters
    ----------
    plan : Plan
    areas : (F,) int32
        Those of `mask_areas`.
    """

    def __init__(self, plan: Plan, areas: npt.NDArray[np.int32]) -> None:
        import pyarrow as pa

        self._plan, self._layout, self._areas = plan, Layout.of(plan), areas
        self._backgrounds = pa.array([self._layout.background(b) for b in range(plan.n_backgrounds)])
        self._foregrounds = pa.array([self._layout.foreground(f) for f in range(plan.n_foregrounds)])

    def columns(self, rows: Shard, depth_ranges: DepthRanges | None) -> list[pa.Array]:
        """The columns of `table_schema` for these samples; those of depth only with ``depth_ranges``."""
        import pyarrow as pa

        plan = self._plan
        p = plan.placements(np.arange(rows.start, rows.stop))
        f = p.foreground
        columns = [
            pa.array(p.index),
            pa.array([f"{stem}.jpg" for stem in self._layout.stems(p)]),
            pa.DictionaryArray.from_arrays(p.background, self._backgrounds),
            pa.DictionaryArray.from_arrays(f, self._foregrounds),
            pa.array(p.repetition),
            pa.array(p.flip),
            pa.array(p.x),
            pa.array(p.y),
            pa.array(plan.foreground_widths[f].astype(np.int32)),
            pa.array(plan.foreground_heights[f].astype(np.int32)),
            pa.array(self._areas[f]),
        ]
        if depth_ranges is not None:
            columns += [pa.array(column) for column in depth_ranges(rows).T]
        return columns


def _write_table(
    path: Path,
    plan: Plan,
    areas: npt.NDArray[np.int32],
    done: Sequence[Shard],
    depth_ranges: DepthRanges | None,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, made = table_schema(depth_ranges is not None), TableRows(plan, areas)
    # an open file, since pyarrow takes a relative path with a colon in it for a URL
    with path.open("wb") as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows in row_groups(done):
            writer.write_table(pa.Table.from_arrays(made.columns(rows, depth_ranges), schema=schema))
