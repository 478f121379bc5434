"""Label files: the original's text a background, and one table of everything, labels.parquet.

Both are pure functions of the plan and the assets, so they are written when a run ends, for the samples that are
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpufgbg.assets import Assets
from gpufgbg.files import atomic_path, write_atomic
from gpufgbg.layout import Layout
from gpufgbg.manifest import Manifest, missing
from gpufgbg.recipe import Plan, Shard

__all__ = ["write_labels"]

_ROWS = 1 << 16  # of a row group; what is in memory at a time


def mask_areas(assets: Assets) -> npt.NDArray[np.int32]:
    """(F,) int32: pixels of each foreground's composite mask that are at least 128.

    The mask lies inside the frame as a whole, so its area does not depend on where it lies.
    """
    m = assets.masks.astype(np.uint16) ** 2 + np.uint16(128)
    white = ((m + (m >> 8)) >> 8) >= 128
    return np.add.reduceat(white, assets.offsets[:-1], dtype=np.int32)


def write_labels(manifest: Manifest, plan: Plan, layout: Layout, assets: Assets, done: Sequence[Shard]) -> None:
    """Write labels/ and labels.parquet for the samples ``done`` (sorted, disjoint), atomically."""
    for b in range(plan.n_backgrounds):
        whole = Shard(b * plan.per_background, (b + 1) * plan.per_background)
        gaps = missing(whole, list(done))
        present = missing(whole, gaps)
        if present:
            lines: list[str] = []
            for part in present:
                placements = plan.placements(np.arange(part.start, part.stop))
                lines.extend(
                    f"{stem}.jpg\t{x}\t{y}\n"
                    for stem, x, y in zip(
                        layout.stems(placements),
                        placements.x.tolist(),
                        placements.y.tolist(),
                        strict=True,
                    )
                )
            write_atomic(manifest.out / layout.label_file(b), "".join(lines).encode(), manifest.scratch)
    with atomic_path(manifest.out / "labels.parquet", manifest.scratch) as path:
        _write_table(path, plan, layout, assets, done)


def _write_table(path: Path, plan: Plan, layout: Layout, assets: Assets, done: Sequence[Shard]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {
        "background": pa.array([layout.background(b) for b in range(plan.n_backgrounds)]),
        "foreground": pa.array([layout.foreground(f) for f in range(plan.n_foregrounds)]),
    }
    areas = mask_areas(assets)
    word = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [("index", pa.int64()), ("name", pa.string()), ("background", word), ("foreground", word),
         ("repetition", pa.int32()), ("flip", pa.bool_()), ("x", pa.int32()), ("y", pa.int32()),
         ("w", pa.int32()), ("h", pa.int32()), ("mask_area", pa.int32())]
    )  # fmt: skip
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in done:
            for start in range(part.start, part.stop, _ROWS):
                p = plan.placements(np.arange(start, min(start + _ROWS, part.stop)))
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
                    pa.array(assets.widths[f]),
                    pa.array(assets.heights[f]),
                    pa.array(areas[f]),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
