"""Data sets made apart and merged: the bytes of one run, gaps and overlaps by name, nothing damaged taken."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
from PIL import Image

from gpufgbg import DatasetError, Interrupted, Recipe, generate, merge
from gpufgbg.manifest import Manifest
from gpufgbg.recipe import Shard

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
SINKS = ("tree", "zip", "tar")


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    """Shards of a few samples, so that slices cut through them and have several."""
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", 7)


@pytest.fixture
def make(folders, tmp_path):
    def call(name: str, samples=None, recipe: Recipe = SMALL, **options) -> Path:
        given = {**folders, **{key: options.pop(key) for key in folders if key in options}}
        generate(tmp_path / name, **given, recipe=recipe, samples=samples, workers=2, device="cpu", **options)
        return tmp_path / name

    return call


@pytest.mark.parametrize("sink", SINKS)
def test_merged_slices_are_one_run(make, tmp_path, sink):
    whole = oracle.tree_of(make("whole", sink=sink))
    parts = [make(f"part{cut}", cut, sink=sink) for cut in ((30, 48), (0, 11), (11, 30))]
    before = [oracle.tree_of(part) for part in parts]
    report = merge(tmp_path / "out", parts, workers=2)
    assert (report.samples, report.done, report.total, report.gaps, report.complete) == (48, 48, 48, (), True)
    assert oracle.tree_of(tmp_path / "out") == whole
    assert [oracle.tree_of(part) for part in parts] == before
    assert merge(tmp_path / "out", parts).samples == 0
    assert oracle.tree_of(tmp_path / "out") == whole


def test_parts_of_any_sink(make, tmp_path):
    parts = [make(sink, cut, sink=sink) for sink, cut in zip(SINKS, ((0, 11), (11, 30), (30, 48)), strict=True)]
    for sink, first in zip(SINKS, range(3), strict=True):
        merge(tmp_path / f"out-{sink}", [parts[first], *parts])
        assert oracle.tree_of(tmp_path / f"out-{sink}") == oracle.tree_of(make(f"whole-{sink}", sink=sink))


def test_depth_is_merged_too(make, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    whole = oracle.tree_of(make("whole", depth="demo", sink="tar"))
    parts = [make(f"part{cut}", cut, depth="demo", sink="tar") for cut in ((0, 11), (11, 48))]
    merge(tmp_path / "out", parts)
    assert oracle.tree_of(tmp_path / "out") == whole
    with pytest.raises(DatasetError, match="it has depth maps, this run has none"):
        merge(tmp_path / "mixed", [parts[0], make("bare", (11, 48), sink="tar")])
    assert not (tmp_path / "mixed").exists()


def test_gaps_are_named_and_can_be_filled(make, run, tmp_path):
    make("a", (0, 11))
    make("b", (20, 40))
    report = merge(tmp_path / "out", [tmp_path / "b", tmp_path / "a"])
    assert report.gaps == (Shard(11, 20), Shard(40, 48)) and not report.complete and report.done == 31
    code, printed, _ = run("merge", tmp_path / "out", tmp_path / "a")
    assert code == 0
    assert "31 of 48 samples\nmissing: samples 11:20, 40:48: make them with" in printed
    make("c", (11, 20))
    code, printed, _ = run("merge", "--json", tmp_path / "out", tmp_path / "c")
    assert json.loads(printed)["gaps"] == [[40, 48]] and json.loads(printed)["samples"] == 9
    make("out")
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(make("whole"))


def test_overlaps_are_named_before_anything_is_written(make, refused, tmp_path):
    a, b, c = make("a", (0, 20)), make("b", (15, 30)), make("c", (28, 48))
    error = refused("merge", tmp_path / "out", a, b, c)
    assert f"samples 15:20 are in {a} and in {b}; samples 28:30 are in {b} and in {c}" in error
    merge(tmp_path / "out", [b])
    error = refused("merge", tmp_path / "out", c)
    assert f"samples 28:30 are in {tmp_path / 'out'} and in {c}" in error


def test_what_differs_is_refused(make, refused, folders, tmp_path):
    a = make("a", (0, 20))
    other = make("other", (20, 48), Recipe(size=(64, 48), foreground_height=20, per_pair=2, seed=1))
    assert "seed is 0 there and 1 here" in refused("merge", tmp_path / "out", a, other)
    changed = tmp_path / "backgrounds"
    changed.mkdir()
    for path in folders["backgrounds"].iterdir():
        Image.open(path).rotate(180).save(changed / path.name)
    assert "other pictures" in refused("merge", tmp_path / "out", a, make("turned", (20, 48), backgrounds=changed))
    assert "is also OUT" in refused("merge", a, a, out=a)
    assert "no dataset.json" in refused("merge", tmp_path / "out", a, folders["masks"])
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x")
    assert "is not a data set of ours" in refused("merge", full, a, out=full)


@pytest.mark.parametrize("sink", SINKS)
def test_a_damaged_part_is_not_taken(make, refused, tmp_path, sink):
    make("a", (0, 20), sink=sink)
    make("b", (20, 48), sink=sink)
    where = {"tree": "fg_bg", "zip": ".gpufgbg/parts", "tar": "shards"}[sink]
    victim = sorted(path for path in (tmp_path / "b" / where).rglob("*") if path.is_file())[3]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DatasetError, match=r"are not what was made: gpufgbg verify|can't be read"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"], workers=1)
    for record in Manifest(tmp_path / "out").records():  # what was taken before is whole
        assert record.shard.stop <= 48
    make("again", (20, 48), sink=sink)
    merge(tmp_path / "out", [tmp_path / "a", tmp_path / "again"])
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(make("whole", sink=sink))


def test_interrupted_and_continued(make, tmp_path):
    parts = [make("a", (0, 20)), make("b", (20, 48))]

    def stop(done: int, total: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"of 48 samples are merged; the same command continues"):
        merge(tmp_path / "out", parts, workers=1, progress=stop)
    assert not any((tmp_path / "out" / ".gpufgbg" / "runs").iterdir())
    assert 0 < merge(tmp_path / "out", parts).samples < 48
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(make("whole"))


def test_samples_that_a_run_is_making_are_not_taken(make, tmp_path):
    part = make("part", (20, 48))
    make("out", (0, 10))
    with (
        Manifest(tmp_path / "out").claim(Shard(10, 25)),
        pytest.raises(DatasetError, match="another process is making samples 10:25"),
    ):
        merge(tmp_path / "out", [part])
    assert [record.shard.stop for record in Manifest(tmp_path / "out").records()] == [6, 10]


def test_what_another_process_makes_meanwhile(make, tmp_path, monkeypatch):
    """Between the first look at OUT and the lock: samples of the parts, or another data set altogether."""
    parts = [make("a", (0, 20)), make("b", (20, 48))]
    original = Manifest.locked

    def at_the_last_moment(call):
        def locked(manifest):
            monkeypatch.setattr(Manifest, "locked", original)
            call()
            return original(manifest)

        monkeypatch.setattr(Manifest, "locked", locked)

    at_the_last_moment(lambda: merge(tmp_path / "out", parts[:1]))
    report = merge(tmp_path / "out", parts)
    assert (report.samples, report.complete) == (28, True)
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(make("whole"))
    other = Recipe(size=(64, 48), foreground_height=20, per_pair=2, seed=1)
    at_the_last_moment(lambda: make("other", (0, 20), other))
    with pytest.raises(DatasetError, match="seed is 1 there and 0 here"):
        merge(tmp_path / "other", parts)
    at_the_last_moment(lambda: make("cut", (15, 30)))
    with pytest.raises(DatasetError, match=r"samples 15:16 are in .*cut and in .*a: make those again"):
        merge(tmp_path / "cut", parts)
    at_the_last_moment(lambda: make("shards", (0, 6), sink="tar"))
    merge(tmp_path / "shards", [make("c", (6, 48))])
    assert oracle.tree_of(tmp_path / "shards") == oracle.tree_of(make("whole-tar", sink="tar"))
