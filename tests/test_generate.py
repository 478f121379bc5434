"""The main job end to end: bytes, independence, resume."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import start

from gpufgbg import DatasetError, Interrupted, Moments, OptionError, Plan, Recipe, dataset, generate, sinks
from gpufgbg.layout import SAMPLE_KINDS
from gpufgbg.manifest import Manifest, ShardChecksum
from gpufgbg.recipe import Shard

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
SINKS = ("tree", "zip", "tar")


@pytest.fixture
def make(folders, tmp_path):
    """Makes a data set of the small input in ``tmp_path / name``."""

    def call(name: str, recipe: Recipe = SMALL, **options):
        return generate(tmp_path / name, **folders, recipe=recipe, **{"workers": 2, "device": "cpu", **options})

    return call


@pytest.fixture
def short_shards(monkeypatch):
    """Shards of a few samples, so that small data sets have many."""
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", 7)


@pytest.mark.parametrize(
    "recipe",
    [
        SMALL,
        Recipe(size=(64, 48), foreground_height=20, per_pair=1, flip="never", quality=90, subsampling="444"),
        Recipe(size=(101, 77), foreground_height=31, per_pair=1, flip="always", quality=7, optimize=False, seed=3),
        Recipe(size=(64, 20), foreground_height=20, per_pair=1, subsampling="422"),
    ],
)
def test_every_file_equals_pillow(make, tmp_path, recipe):
    report = make("out", recipe)
    out = tmp_path / "out"
    samples = oracle.samples_of(out)
    expected = {}
    for name, x, y in samples:
        expected |= oracle.expected_files(
            out, name, x, y, quality=recipe.quality, subsampling=recipe.subsampling, optimize=recipe.optimize
        )
    found = {path: data for path, data in oracle.tree_of(out).items() if path.startswith("fg_bg")}
    assert found == expected
    assert report.samples == report.done == report.total == len(samples) == 12 * recipe.per_pair * recipe.orientations
    assert report.complete


def test_what_a_data_set_holds(make, tmp_path):
    import pyarrow.parquet as pq

    report = make("out")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        ".gpufgbg", "bg", "dataset.json", "fg", "fg_bg", "fg_bg_masks", "fg_mask", "labels", "labels.parquet",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "labels").iterdir()) == [f"bg_0{b}_label_info.txt" for b in range(3)]
    content = json.loads((out / "dataset.json").read_text())
    assert content["recipe"] == SMALL.to_dict() and content["complete"]
    assert content["counts"] == {"backgrounds": 3, "foregrounds": 4, "samples": 48, "done": 48}
    assert [entry["source"] for entry in content["assets"]["backgrounds"]] == ["a.jpg", "b.PNG", "c.jpeg"]
    # statistics are those of the rendered pixels, and `bytes` those of the files
    from gpufgbg import Compositor, prepare

    batch = Compositor(prepare(out / "bg", out / "fg", out / "fg_mask", SMALL), SMALL, "cpu").render(range(48))
    assert Moments.from_dict(content["statistics"]["composite"]) == Moments.of(batch.image)
    assert Moments.from_dict(content["statistics"]["composite_mask"]) == Moments.of(batch.mask)
    assert report.statistics["composite"] == Moments.of(batch.image)
    sizes = {kind: sum(map(len, oracle.tree_of(out / kind).values())) for kind in ("fg_bg", "fg_bg_masks", "bg")}
    assert [content["bytes"][k] for k in ("composite", "composite_mask", "background")] == list(sizes.values())
    table = pq.read_table(out / "labels.parquet").to_pydict()
    assert table["index"] == list(range(48))
    labels = {name: (x, y) for name, x, y in oracle.samples_of(out)}
    assert {name: (x, y) for name, x, y in zip(table["name"], table["x"], table["y"], strict=True)} == labels
    for n in (0, 17, 47):
        mask = batch.mask[n] >= 128
        assert table["mask_area"][n] == mask.sum()
        f = int(table["foreground"][n][3:])
        assert (table["h"][n], table["w"][n]) == (20, batch.labels and [15, 11, 64, 30][f])
        assert table["flip"][n] == bool(batch.labels.flip[n])


@pytest.mark.parametrize("sink", SINKS)
def test_a_data_set_is_rendered_again_from_itself(make, tmp_path, sink):
    make("first", sink=sink)
    first = tmp_path / "first"
    generate(tmp_path / "again", first / "bg", first / "fg", first / "fg_mask", SMALL, sink=sink)
    one, two = oracle.tree_of(first), oracle.tree_of(tmp_path / "again")
    if sink != "zip":  # whose dataset.json, with the names of the sources, lies in the zip too
        assert {k: v for k, v in one.items() if k != "dataset.json"} == {
            k: v for k, v in two.items() if k != "dataset.json"
        }
    contents = [json.loads(tree["dataset.json"]) for tree in (one, two)]
    assert contents[0]["assets"]["fingerprint"] == contents[1]["assets"]["fingerprint"]
    assert contents[0]["shards"] == contents[1]["shards"]
    assert contents[0]["statistics"] == contents[1]["statistics"]


@pytest.mark.parametrize("sink", SINKS)
def test_batches_workers_and_slices_do_not_matter(make, tmp_path, sink, short_shards):
    make("whole", sink=sink)
    whole = oracle.tree_of(tmp_path / "whole")
    for batch_size in (1, 7, 256):
        for workers in (1, 2):
            name = f"b{batch_size}w{workers}"
            make(name, sink=sink, batch_size=batch_size, workers=workers)
            assert oracle.tree_of(tmp_path / name) == whole
    for name, cuts in {"slices": (0, 11, 30, 48), "backwards": (48, 29, 29, 9, 0), "single": (0, 1, 2, 48)}.items():
        parts = [tuple(sorted(pair)) for pair in itertools.pairwise(cuts) if pair[0] != pair[1]]
        for number, part in enumerate(parts):
            report = make(name, sink=sink, samples=part)
            assert report.samples == part[1] - part[0]
            assert report.complete == (number == len(parts) - 1)
        assert oracle.tree_of(tmp_path / name) == whole


@pytest.mark.parametrize("sink", SINKS)
def test_overlapping_slices_and_finished_runs_make_nothing_twice(make, tmp_path, sink, short_shards):
    make("whole", sink=sink)
    assert make("parts", sink=sink, samples=(5, 25)).samples == 20
    assert make("parts", sink=sink, samples=(10, 20)).samples == 0
    assert make("parts", sink=sink, samples=(None, 30)).samples == 10
    assert make("parts", sink=sink).samples == 18
    before = oracle.tree_of(tmp_path / "parts")
    assert before == oracle.tree_of(tmp_path / "whole")
    assert make("parts", sink=sink).samples == 0
    assert oracle.tree_of(tmp_path / "parts") == before


@pytest.mark.parametrize("sink", SINKS)
def test_a_slice_alone_is_usable(make, tmp_path, sink):
    from gpufgbg.statistics import statistics

    make("slice", sink=sink, samples=(3, 21))
    assert statistics(tmp_path / "slice")["composite"].images == 18
    assert len(oracle.samples_of(tmp_path / "slice")) == 18


@pytest.mark.parametrize("sink", SINKS)
def test_two_processes_fill_one_data_set(make, arguments, tmp_path, sink):
    make("whole", sink=sink)
    arguments.append(f"--sink={sink}")
    with (
        start(*arguments, "--samples=0:20") as first,
        start(*arguments, "--samples=20:48") as second,
    ):
        for process in (first, second):
            printed = process.communicate(timeout=120)
            assert process.returncode == 0, printed
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


@pytest.mark.parametrize("sink", SINKS)
def test_one_process_finishes_while_another_commits(make, tmp_path, monkeypatch, sink):
    """The other has published a piece but not recorded it yet; and it records one between two looks of ours."""
    make("whole", sink=sink)
    make("donor", sink=sink, samples=(20, 48))
    make("out", sink=sink, samples=(0, 10))
    donor, out = tmp_path / "donor", tmp_path / "out"
    record = next((donor / ".gpufgbg" / "shards").iterdir())

    def copy(*folders: str) -> None:
        for folder in folders:
            if (donor / folder).is_dir():
                shutil.copytree(donor / folder, out / folder, dirs_exist_ok=True)

    copy("fg_bg", "fg_bg_masks", "shards", ".gpufgbg/parts")  # published
    make("out", sink=sink, samples=(10, 20))
    original = Manifest.forget_pieces

    def late(self, joined):
        shutil.copy(record, out / ".gpufgbg" / "shards" / record.name)  # recorded
        original(self, joined)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "forget_pieces", late)
        make("out", sink=sink, samples=(0, 20))
    assert (out / ".gpufgbg" / "shards" / record.name).exists()
    report = make("out", sink=sink)
    assert report.samples == 0 and report.complete
    assert oracle.tree_of(out) == oracle.tree_of(tmp_path / "whole")


def test_samples_that_another_process_makes_are_refused(make, tmp_path):
    make("out", samples=(0, 10))
    manifest = Manifest(tmp_path / "out")
    with manifest.claim(Shard(20, 30)):
        with pytest.raises(DatasetError, match="another process is making samples 20:30"):
            make("out", samples=(25, 40))
        assert make("out", samples=(30, 40)).samples == 10
    assert make("out").samples == 28


@pytest.mark.parametrize("sink", SINKS)
def test_killed_at_random_moments_and_resumed(folders, tmp_path, sink, luck):
    options = [
        "--per-pair=300",
        "--size=64x48",
        "--foreground-height=20",
        "--workers=2",
        "--device=cpu",
        f"--sink={sink}",
    ]
    command = ["generate", *(f"--{name}={path}" for name, path in folders.items()), *options]
    begun = time.monotonic()
    with start(*command, f"--out={tmp_path / 'whole'}") as process:
        printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed
    took = time.monotonic() - begun
    runs = tmp_path / "out" / ".gpufgbg" / "runs"
    kills = 0
    for _ in range(5):
        moment = took * luck.uniform(0.2, 0.95)
        with start(*command, f"--out={tmp_path / 'out'}") as process:
            while not kills and process.poll() is None and not (runs.is_dir() and any(runs.iterdir())):
                time.sleep(0.005)  # until it has begun its work, however fast this machine is by now
            try:
                process.communicate(timeout=moment if kills else 0.01)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        manifest = Manifest(tmp_path / "out")
        content = manifest.read()
        if content is not None:  # at any moment, what has a record is there, whole
            assets = dataset.load_assets(tmp_path / "out", content)
            plan = Plan(Recipe.from_dict(content["recipe"]), len(assets.backgrounds), assets.widths, assets.heights)
            for record in manifest.records():
                checksum = ShardChecksum()
                for path, data in sinks.select(sink, tmp_path / "out", plan, SAMPLE_KINDS[:2]).read(record.shard):
                    checksum.add(path, data)
                assert checksum.hexdigest() == record.checksum
    with start(*command, f"--out={tmp_path / 'out'}") as process:
        printed = process.communicate(timeout=120)
        assert process.returncode == 0, printed
    assert kills > 0
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


class Killed(BaseException):
    """Stands for a kill at an exact place."""


@pytest.mark.parametrize("sink", SINKS)
def test_killed_at_every_step_of_committing_and_finishing(make, tmp_path, monkeypatch, sink, short_shards):
    """Every function that changes the disk is interrupted before and after each of its first calls."""
    from gpufgbg import files, labels, manifest
    from gpufgbg.sinks import FileShard, stored_zip, tar, tree

    make("whole", sink=sink)
    whole = oracle.tree_of(tmp_path / "whole")
    places = [
        (manifest.Manifest, "record"),
        (manifest.Manifest, "forget_pieces"),
        (manifest.Manifest, "write"),
        (dataset, "write_labels"),
        (dataset, "publish_labels"),
        (FileShard, "close"),
        (tree.TreeSink, "publish"),
        (tar.TarSink, "publish"),
        (stored_zip.ZipSink, "publish"),
        (tar.TarSink, "finish"),
        (stored_zip.ZipSink, "finish"),
        (stored_zip._ZipFile, "close"),
        (labels, "sync_file_system"),
        (files, "fsync_folder"),
    ]
    for number, (owner, name) in enumerate(places):
        for after in (False, True):
            for call in (1, 2):
                out = f"out{number}{after}{call}"
                calls = 0
                original = getattr(owner, name)

                def killing(*args, original=original, after=after, call=call, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls == call and not after:
                        raise Killed
                    result = original(*args, **kwargs)
                    if calls == call and after:
                        raise Killed
                    return result

                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, killing)
                    try:
                        make(out, sink=sink, samples=(0, 30))
                        make(out, sink=sink)
                    except Killed:
                        pass
                make(out, sink=sink)
                assert oracle.tree_of(tmp_path / out) == whole, (owner, name, after, call)


def test_interrupted_and_resumed(make, tmp_path, short_shards):
    make("whole")

    def stop(done: int, total: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"of 48 samples are safe; the same command continues"):
        make("out", batch_size=1, progress=stop)
    assert not any((tmp_path / "out" / ".gpufgbg" / "runs").iterdir())
    report = make("out")
    assert 0 < report.samples < 48
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_progress_counts_what_was_there(make):
    make("out", samples=(0, 12))
    seen = []
    make("out", progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] > 12 and seen[-1] == (48, 48)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_sample_needs_nothing_but_its_index(people, tmp_path, luck):
    """The real input: a slice of the full 392,040, in no hurry, equal to Pillow's from labels and assets."""
    out = tmp_path / "out"
    first = luck.randrange(390_000)
    report = generate(
        out, people / "bg", people / "fg", people / "fg_mask", Recipe(), samples=(first, first + 2000), workers=2
    )
    assert report.total == 392_040 and report.samples == 2000
    samples = oracle.samples_of(out)
    assert len(samples) == 2000
    for name, x, y in random.Random(first).sample(samples, 700):
        for path, data in oracle.expected_files(out, name, x, y).items():
            assert (out / path).read_bytes() == data, f"{path}, slice from {first}"


def test_the_real_input_once_a_pair(people, tmp_path, luck):
    """19,602 samples of which a random thousand are compared with Pillow."""
    out = tmp_path / "out"
    report = generate(
        out, people / "bg", people / "fg", people / "fg_mask", Recipe(per_pair=1), workers=2, sink="tree"
    )
    assert report.complete and report.total == 19_602
    samples = oracle.samples_of(out)
    assert len(samples) == 19_602
    assert (
        sum(1 for _ in (out / "fg_bg").rglob("*.jpg"))
        == sum(1 for _ in (out / "fg_bg_masks").rglob("*.jpg"))
        == 19_602
    )
    for name, x, y in luck.sample(samples, 1000):
        for path, data in oracle.expected_files(out, name, x, y).items():
            assert (Path(out) / path).read_bytes() == data, path


def test_integers_of_numpy_and_what_is_none(folders, tmp_path):
    small = Recipe(size=(32, 24), foreground_height=10, per_pair=1)
    for samples in ((0.0, 4.0), (True, 4), ("0", "4")):
        with pytest.raises(OptionError, match="samples: got"):
            generate(tmp_path / "out", **folders, recipe=small, samples=samples)
    for size in (True, 2.0, 0):
        with pytest.raises(OptionError, match="batch_size: got"):
            generate(tmp_path / "out", **folders, recipe=small, batch_size=size)
    assert not (tmp_path / "out").exists()
    part = (np.int64(0), np.int64(4))
    assert generate(tmp_path / "out", **folders, recipe=small, samples=part, batch_size=np.int64(2)).done == 4
