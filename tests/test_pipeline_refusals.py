"""Runs over a data set that is not what it was: nothing of it is made again or replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from oracle import tree_of

from gpufgbg import DatasetError, Recipe, add_depth, generate, merge

RECIPE = Recipe(per_pair=1, size=(64, 48), foreground_height=20)


@pytest.fixture
def made(folders, tmp_path) -> Path:
    generate(tmp_path / "out", *folders.values(), RECIPE, device="cpu", workers=2)
    return tmp_path / "out"


def test_a_copy_without_its_records(made, folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy, ignore=shutil.ignore_patterns(".gpufgbg"))
    (copy / ".gpufgbg").mkdir()  # as a run that looked at it leaves it
    before = tree_of(copy)
    said = r"copy: dataset.json lists 24 samples, but there is no \S+\.gpufgbg that tells of them: copy it too"
    with pytest.raises(DatasetError, match=said):
        generate(copy, *folders.values(), RECIPE, device="cpu")
    with pytest.raises(DatasetError, match=said):
        add_depth(copy, "demo", device="cpu")
    with pytest.raises(DatasetError, match=said):
        merge(tmp_path / "merged", [copy])
    assert tree_of(copy) == before and not (tmp_path / "merged").exists()


def test_a_record_that_was_removed_is_made_again(made, folders):
    before = tree_of(made)
    for record in (made / ".gpufgbg" / "shards").iterdir():
        record.unlink()
    assert generate(made, *folders.values(), RECIPE, device="cpu").samples == 24
    assert tree_of(made) == before


@pytest.mark.parametrize("sink", ["tree", "tar", "zip"])
@pytest.mark.parametrize(("name", "value"), [("seed", 9), ("quality", 30), ("subsampling", "444")])
def test_depth_replaces_no_other_samples(folders, tmp_path, sink, name, value):
    out = tmp_path / "out"
    generate(out, *folders.values(), RECIPE, sink=sink, device="cpu")
    content = json.loads((out / "dataset.json").read_text())
    content["recipe"][name] = value
    (out / "dataset.json").write_text(json.dumps(content))
    before = tree_of(out)
    with pytest.raises(DatasetError, match=r"out: samples 0:24 are not what the recipe in dataset\.json makes"):
        add_depth(out, "demo", device="cpu")
    assert tree_of(out) == before


def test_assets_that_decode_to_other_pixels(made, folders):
    content = json.loads((made / "dataset.json").read_text())
    content["assets"]["fingerprint"] = "0" * 64
    (made / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="decode to other pixels than when it was begun"):
        add_depth(made, "demo", device="cpu")
    with pytest.raises(DatasetError, match="decode to other pixels than when it was begun"):
        generate(made, *folders.values(), RECIPE, device="cpu")


@pytest.mark.parametrize("name", ["labels.parquet", "labels/bg_01_label_info.txt"])
def test_labels_that_are_gone_are_written_again(made, folders, name):
    before = tree_of(made)
    (made / name).unlink()
    assert generate(made, *folders.values(), RECIPE, device="cpu").samples == 0
    assert tree_of(made) == before


def test_a_damaged_tree_is_mended(made, folders):
    before = tree_of(made)
    files = sorted((made / "fg_bg").rglob("*.jpg"))
    files[0].unlink()
    files[1].write_bytes(b"damaged")
    for record in (made / ".gpufgbg" / "shards").iterdir():
        record.unlink()
    generate(made, *folders.values(), RECIPE, device="cpu")
    assert tree_of(made) == before
