"""Label files: their bytes, whatever is in memory at a time, and how little that is."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from oracle import tree_of

from gpufgbg import Plan, Recipe, labels
from gpufgbg.layout import Layout
from gpufgbg.recipe import Shard

AREAS = np.array([40, 50], np.int32)


def plan_of(per_pair: int, backgrounds: int = 3) -> Plan:
    return Plan(Recipe(size=(64, 48), foreground_height=20, per_pair=per_pair), backgrounds, [10, 30], [20, 20])


def test_a_relative_folder_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels.write_labels(Path("run-12:30:00"), plan_of(1), AREAS, [Shard(0, 6)])
    assert len(pq.read_table(io.BytesIO((tmp_path / "run-12:30:00" / "labels.parquet").read_bytes()))) == 6


@pytest.mark.parametrize("rows", [1, 7, 1 << 16])
@pytest.mark.parametrize("done", [[(0, 60)], [(3, 5), (7, 21), (39, 40)], [(20, 40)]])
def test_lines_and_rows_whatever_is_in_memory_at_a_time(tmp_path, monkeypatch, rows, done):
    plan, parts = plan_of(5), [Shard(*part) for part in done]
    monkeypatch.setattr(labels, "_ROWS", rows)
    labels.write_labels(tmp_path / "labels", plan, AREAS, parts)
    found = tree_of(tmp_path / "labels")
    table = pq.read_table(tmp_path / "labels" / "labels.parquet").to_pylist()
    lines: dict[str, str] = {}
    expected = []
    for part in parts:
        for index in range(part.start, part.stop):
            p = plan.placements([index])
            (stem,) = Layout.of(plan).stems(p)
            b, f, x, y = (int(values[0]) for values in (p.background, p.foreground, p.x, p.y))
            name = f"labels/bg_0{b}_label_info.txt"
            lines[name] = lines.get(name, "") + f"{stem}.jpg\t{x}\t{y}\n"
            expected.append(
                {
                    "index": index, "name": f"{stem}.jpg", "background": f"bg_0{b}", "foreground": f"fg_0{f}",
                    "repetition": int(p.repetition[0]), "flip": bool(p.flip[0]), "x": x, "y": y,
                    "w": (10, 30)[f], "h": 20, "mask_area": (40, 50)[f],
                }
            )  # fmt: skip
    assert {name: data.decode() for name, data in found.items() if name != "labels.parquet"} == lines
    assert table == expected


def test_memory_does_not_grow_with_the_samples_of_a_background(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_ROWS", 1000)

    def most(per_pair: int) -> int:
        """Bytes of Python's and NumPy's at most, beyond what was there."""
        plan = plan_of(per_pair, 1)
        tracemalloc.start()
        try:
            labels.write_labels(Path(tmp_path, "labels"), plan, AREAS, [Shard(0, len(plan))])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most(300)  # what is loaded once
    assert most(8000) < 1.5 * most(1000)
