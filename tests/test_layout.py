"""Names are the original's, and widen where counts need it."""

from __future__ import annotations

import pytest

from gpufgbg import Plan, Recipe
from gpufgbg.layout import Layout


def test_names_of_the_original():
    layout = Layout(100, 100, 400_000)
    assert layout.background_file(0) == "bg/bg_00.jpg"
    assert layout.foreground_file(99) == "fg/fg_99.png"
    assert layout.mask_file(7) == "fg_mask/fg_07.jpg"
    assert layout.label_file(12) == "labels/bg_12_label_info.txt"
    plan = Plan(Recipe(), 100, [50] * 100, [105] * 100)
    stems = layout.stems(plan.placements([0, 1, 399_999]))
    assert stems == ["bg_00_fg_00_T_000000", "bg_00_fg_00_F_000001", "bg_99_fg_99_F_399999"]
    assert Layout.sample_path("composite", stems[0]) == "fg_bg/bg_00/bg_00_fg_00_T_000000.jpg"
    assert Layout.sample_path("composite_mask", stems[2]) == "fg_bg_masks/bg_99/bg_99_fg_99_F_399999.jpg"
    assert Layout.sample_path("depth", stems[0]) == "fg_bg_depth/bg_00/bg_00_fg_00_T_000000.jpg"


@pytest.mark.parametrize(("count", "first"), [(1, "bg_00"), (100, "bg_00"), (101, "bg_000"), (10_001, "bg_00000")])
def test_asset_digits(count, first):
    assert Layout(count, 1, 1).background(0) == first


@pytest.mark.parametrize(("count", "digits"), [(1, 6), (10**6, 6), (10**6 + 1, 7), (40 * 10**9, 11)])
def test_sample_digits(count, digits):
    stem = Layout(1, 1, count).stems(Plan(Recipe(), 1, [1], [1]).placements([3]))[0]
    assert len(stem.rpartition("_")[2]) == digits
