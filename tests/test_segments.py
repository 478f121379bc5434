"""Very many shards: their records packed into segments, at every size, and nothing of it lost."""

from __future__ import annotations

import json

import crews
import numpy as np
import oracle
import pytest

from gpufgbg import DatasetError, Moments, Plan, Recipe, add_depth, generate, merge, segments
from gpufgbg.manifest import Manifest, ShardRecord
from gpufgbg.recipe import Shard
from gpufgbg.scaleout import processes
from gpufgbg.statistics import statistics
from gpufgbg.verify import verify

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=8)  # 192 samples in 30 shards


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Shards of a few samples, segments of a few shards."""
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", crews.SHARD)
    monkeypatch.setattr(segments, "SEGMENT_SHARDS", 4)
    monkeypatch.setattr(processes, "COMMAND", crews.WORKER)


@pytest.fixture
def make(folders, tmp_path):
    def call(name: str, **options):
        options = {"workers": 2, "device": "cpu", "sink": "tar", "recipe": SMALL, **options}
        return generate(tmp_path / name, **folders, **options)

    return call


@pytest.fixture
def plain(make, tmp_path, monkeypatch):
    """The same data set without segments."""
    with monkeypatch.context() as patch:
        patch.setattr(segments, "SEGMENT_SHARDS", 4096)
        make("plain")
    return tmp_path / "plain"


def files_of(folder):
    """Everything but the bookkeeping."""
    return {k: v for k, v in oracle.tree_of(folder).items() if not k.startswith(".gpufgbg") and k != "dataset.json"}


def test_records_are_packed_and_everything_still_adds_up(make, plain, tmp_path):
    report = make("out")
    out, records = tmp_path / "out", Manifest(tmp_path / "out").records()
    assert [record.shards for record in records] == [4] * 7 + [1] * 2
    assert len(list((out / ".gpufgbg" / "shards").iterdir())) == 9
    assert files_of(out) == files_of(plain)
    there, here = (json.loads((folder / "dataset.json").read_text()) for folder in (plain, out))
    assert (there["format_version"], here["format_version"]) == (1, 2)
    assert [entry.get("shards", 1) for entry in here["shards"]] == [4] * 7 + [1] * 2
    for name in ("statistics", "bytes", "counts", "complete"):
        assert here[name] == there[name]
    assert report.statistics["composite"] == Moments.from_dict(there["statistics"]["composite"])
    single = [shard for record in records for shard in segments.shards_of(Manifest(out), record)]
    assert single == Manifest(plain).records()
    checked = verify(out, rerender=30)
    assert (checked.faults, checked.samples, checked.files) == ([], 192, 384)
    assert statistics(out) == statistics(plain)
    assert make("out").samples == 0


def test_the_way_does_not_matter(make, tmp_path):
    make("out")
    whole = oracle.tree_of(tmp_path / "out")
    for number, slices in enumerate([[(0, 50), (50, 192)], [(100, 192), (0, 100)], [(7, 9), (0, 150), (100, 192)]]):
        for part in slices:
            make(f"cut{number}", samples=part)
        assert oracle.tree_of(tmp_path / f"cut{number}") == whole
    make("spread", device="cpu,cpu")  # packs while it runs
    assert oracle.tree_of(tmp_path / "spread") == whole
    make("a", samples=(0, 101))
    make("b", samples=(101, 192))
    merge(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    assert oracle.tree_of(tmp_path / "merged") == whole


def test_a_data_set_of_the_old_form_is_continued(make, tmp_path, monkeypatch):
    make("whole")
    with monkeypatch.context() as patch:
        patch.setattr(segments, "SEGMENT_SHARDS", 4096)
        make("out", samples=(0, 100))
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["format_version"] == 1
    make("out")
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


class Killed(BaseException):
    """Stands for a kill at an exact place."""


@pytest.mark.parametrize("name", ["put", "record", "forget_pieces"])
@pytest.mark.parametrize("after", [False, True])
def test_killed_while_packing(make, tmp_path, monkeypatch, name, after):
    make("whole")
    packing = segments.pack_segments

    def killed(manifest, plan, records):
        original = getattr(manifest, name)

        def strike(given):
            if after:
                original(given)
            raise Killed

        monkeypatch.setattr(manifest, name, strike)
        return packing(manifest, plan, records)

    with monkeypatch.context() as patch:
        patch.setattr("gpufgbg.dataset.pack_segments", killed)
        with pytest.raises(Killed):
            make("out")
    make("out")
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_depth_maps_are_added_to_segments(make, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    make("whole", depth="demo")
    make("out")
    add_depth(tmp_path / "out", "demo", device="cpu")
    assert oracle.tree_of(tmp_path / "out").keys() == oracle.tree_of(tmp_path / "whole").keys()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert Manifest(tmp_path / "out").records() == Manifest(tmp_path / "whole").records()
    assert not verify(tmp_path / "out").faults


def test_a_damaged_list_is_told(make, run, tmp_path):
    make("out")
    path = sorted((tmp_path / "out" / ".gpufgbg" / "segments").iterdir())[1]
    whole = path.read_bytes()
    path.unlink()
    code, printed, _ = run("verify", tmp_path / "out")
    assert code == 1 and f"{path}: can't be read" in printed
    other = sorted(path.parent.iterdir())[0].read_bytes()
    for data in (whole[:100], other):
        path.write_bytes(data)
        assert any(str(path) in fault for fault in verify(tmp_path / "out").faults)
        with pytest.raises(DatasetError):
            merge(tmp_path / "merged", [tmp_path / "out"])
    assert not (tmp_path / "merged").exists()


def test_no_labels(make, run, refused, arguments, tmp_path):
    make("plain")
    make("out", labels=False, samples=(0, 100))
    make("out", labels=False, device="cpu,cpu")
    out = tmp_path / "out"
    assert not (out / "labels").exists() and not (out / "labels.parquet").exists()
    assert not verify(out).faults
    shards = {k: v for k, v in oracle.tree_of(tmp_path / "plain").items() if k.startswith("shards/")}
    assert {k: v for k, v in oracle.tree_of(out).items() if k.startswith("shards/")} == shards
    with pytest.raises(DatasetError, match="labels is False there and True here"):
        make("out")
    make("a", labels=False, samples=(0, 100))
    make("b", labels=False, samples=(100, 192))
    merge(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    assert oracle.tree_of(tmp_path / "merged") == oracle.tree_of(out)
    given = [argument for argument in arguments if not argument.startswith("--out")]
    assert "--labels: can't be left out with sink 'tree'" in refused(
        *given, f"--out={tmp_path / 'new'}", "--no-labels"
    )


def test_no_labels_with_depth(make, tmp_path):
    """The shards' own labels have the depths, so nothing keeps them beside; merging takes them from there."""
    pytest.importorskip("onnxruntime")
    small = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
    make("plain", depth="demo", recipe=small)
    make("out", depth="demo", recipe=small, labels=False, device="cpu,cpu")
    out, plain = tmp_path / "out", oracle.tree_of(tmp_path / "plain")
    assert not (out / ".gpufgbg" / "depth").exists() and (tmp_path / "plain" / ".gpufgbg" / "depth").exists()
    assert not verify(out).faults
    shards = {k: v for k, v in plain.items() if k.startswith("shards/")}
    assert {k: v for k, v in oracle.tree_of(out).items() if k.startswith("shards/")} == shards
    for name, part in (("a", (0, 20)), ("b", (20, 48))):
        make(name, depth="demo", recipe=small, labels=False, samples=part)
    merge(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    assert oracle.tree_of(tmp_path / "merged") == oracle.tree_of(out)
    make("c", depth="demo", recipe=small, samples=(0, 20))  # with labels, and so is what begins with it
    merge(tmp_path / "other", [tmp_path / "c", tmp_path / "b"])
    assert oracle.tree_of(tmp_path / "other") == plain


def test_a_recorder_reads_nothing_that_it_wrote(tmp_path, monkeypatch):
    """In a store each would be a request."""
    pytest.importorskip("fsspec")
    from gpufgbg.remote.manifest import RemoteManifest
    from gpufgbg.remote.store import Store

    plan = Plan(Recipe(size=(64, 48), foreground_height=20, per_pair=8), 5, [10, 11], [20, 20])

    def moments(shard, channels):
        return Moments(len(shard), len(shard) * 64 * 48, (1,) * channels, (1,) * channels)

    shards = list(plan.shards(Shard(0, len(plan))))
    rng = np.random.default_rng(0)
    records = [
        ShardRecord(
            shard, f"{n:064x}", dict.fromkeys(("composite", "composite_mask", "depth"), 1),
            {"composite": moments(shard, 3), "composite_mask": moments(shard, 1), "depth": moments(shard, 1)},
            rng.random((len(shard), 2), np.float32),
        )
        for n, shard in enumerate(shards)
    ]  # fmt: skip
    manifest = RemoteManifest(f"memory://bucket/{tmp_path.name}")
    read = []
    original = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key, *part: (read.append(key), original(self, key, *part))[1])
    recorder = segments.CompactingRecorder(manifest, plan)
    order = [1, 0, 3, 5, 2, 4, *range(6, len(records))]
    for at in range(0, len(order), 3):
        recorder.record(records[n] for n in order[at : at + 3])
    found = manifest.records()
    assert len(found) < len(records) and sum(record.shards for record in found) == len(records)
    assert not read
    whole = manifest.depth_ranges(Shard(0, len(plan)), found)
    assert np.array_equal(whole, np.concatenate([record.depth_ranges for record in records]))
    fresh = RemoteManifest(manifest.store.url)
    assert [r.to_dict() for r in fresh.records()] == [r.to_dict() for r in found]


@pytest.mark.parametrize("recipe", [SMALL, Recipe(size=(64, 48), foreground_height=20, per_pair=1)])
def test_numbers_of_cells(recipe):
    plan = Plan(recipe, 5, [10, 11], [20, 20])
    cells = list(plan.shards(Shard(0, len(plan))))
    assert plan.cells == len(cells)
    assert [plan.cell_at(n) for n in range(plan.cells)] == cells
    assert [plan.cell(cell.start)[1] for cell in cells] == list(range(plan.cells))


def test_a_manifest_of_forty_thousand_million_samples_is_small(tmp_path):
    """Its records as they would be: 2,384 segments, and what is read to resume it."""
    moments = Moments(4096 * 4096, 4096 * 4096 * 224 * 224, (10**14,) * 3, (10**16,) * 3)
    grey = Moments(moments.images, moments.pixels, (10**14,), (10**16,))
    manifest = Manifest(tmp_path)
    length = 4096 * 4096
    count = 40_000_000_000 // length
    manifest.scratch.mkdir(parents=True)
    manifest.record(
        ShardRecord(
            Shard(n * length, (n + 1) * length), "0" * 64, {"composite": 10**11, "composite_mask": 10**10},
            {"composite": moments, "composite_mask": grey}, shards=4096,
        )
        for n in range(count)
    )  # fmt: skip
    records = manifest.records()
    assert len(records) == count
    size = sum(path.stat().st_size for path in (tmp_path / ".gpufgbg" / "shards").iterdir())
    assert size < 3 << 20
    total = Moments.total(record.moments["composite"] for record in records)
    assert total.images == count * length and total.sum == (10**14 * count,) * 3
