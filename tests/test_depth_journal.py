"""Depth maps of unfinished shards outlive a kill: what is predicted once is not predicted again."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import oracle
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models

from gpufgbg import DepthModel, Interrupted, Moments, Recipe, add_depth, generate
from gpufgbg.depth.journal import DepthJournal, KeptDepth
from gpufgbg.recipe import Shard

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=1)
COUNT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_models.blur(tmp_path_factory.mktemp("model") / "blur.onnx")


@pytest.fixture
def predicted(monkeypatch) -> list[int]:
    """Numbers of pictures that went through the network, call by call."""
    counts: list[int] = []
    maps = DepthModel.maps

    def counted(self, images, metres=False):
        counts.append(len(images))
        return maps(self, images, metres)

    monkeypatch.setattr(DepthModel, "maps", counted)
    return counts


def entry(sample: int) -> KeptDepth:
    near = float(np.float32(0.1 * sample))
    return KeptDepth(sample, bytes([sample]) * (sample + 3), (near, 2.5), Moments(1, 12, (sample,), (sample**2,)))


def stop(done: int, total: int) -> None:
    if done >= 10:
        raise KeyboardInterrupt


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("sink", ["tree", "zip", "tar"])
def test_a_run_that_continues_predicts_what_is_missing_alone(folders, model, tmp_path, predicted, sink, added):
    """All 24 samples are one shard, so that nothing is committed when it is interrupted."""
    made = {"recipe": SMALL, "sink": sink, "device": "cpu", "workers": 1}
    generate(tmp_path / "whole", **folders, **made, depth=model)
    out = tmp_path / "out"
    if added:
        generate(out, **folders, **made)

    def run(**options):
        if added:
            return add_depth(out, model, device="cpu", workers=1, **options)
        return generate(out, **folders, **made, depth=model, **options)

    predicted.clear()
    with pytest.raises(Interrupted) as raised:
        run(batch_size=2, progress=stop)
    before = sum(predicted)
    assert 10 <= before < COUNT
    assert f"0 of {COUNT} samples and the depth maps of {before} more are safe" in str(raised.value)
    assert list((out / ".gpufgbg" / "journal").iterdir())
    assert run(batch_size=5).complete
    assert sum(predicted) == COUNT
    assert not (out / ".gpufgbg" / "journal").exists()
    assert oracle.tree_of(out) == oracle.tree_of(tmp_path / "whole")


def test_of_committed_shards_nothing_is_kept(folders, model, tmp_path, monkeypatch):
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", 6)
    journal = tmp_path / "out" / ".gpufgbg" / "journal"
    most = 0

    def look(done: int, total: int) -> None:
        nonlocal most
        most = max(most, len(list(journal.iterdir())))
        if done == COUNT:  # the last shards are committed meanwhile
            end = time.monotonic() + 30
            while len(list(journal.iterdir())) > 1 and time.monotonic() < end:
                time.sleep(0.01)
            assert len(list(journal.iterdir())) <= 1

    generate(tmp_path / "out", **folders, recipe=SMALL, device="cpu", workers=1, depth=model, progress=look)
    assert most >= 1 and not journal.exists()


def test_a_torn_entry_is_predicted_again(folders, model, tmp_path, predicted):
    made = {**folders, "recipe": SMALL, "device": "cpu", "workers": 1, "depth": model}
    generate(tmp_path / "whole", **made)
    for spoil in (lambda data: data[:-7], lambda data: data[:-7] + b"changed", lambda data: data + b"\0" * 100):
        out = tmp_path / f"out{len(predicted)}"
        with pytest.raises(Interrupted):
            generate(out, **made, batch_size=1, progress=stop)
        (journal,) = (out / ".gpufgbg" / "journal").iterdir()
        journal.write_bytes(spoil(journal.read_bytes()))
        with pytest.raises(Interrupted):  # appends behind what is whole
            generate(out, **made, batch_size=1, progress=lambda done, total: stop(done - 5, total))
        assert generate(out, **made).complete
        assert oracle.tree_of(out) == oracle.tree_of(tmp_path / "whole")


def test_other_cuts_find_what_is_kept(folders, model, tmp_path, predicted):
    made = {**folders, "recipe": SMALL, "device": "cpu", "workers": 1, "depth": model}
    generate(tmp_path / "whole", **made)
    predicted.clear()
    with pytest.raises(Interrupted):
        generate(tmp_path / "out", **made, batch_size=1, progress=stop)
    generate(tmp_path / "out", **made, samples=(4, 20))
    assert generate(tmp_path / "out", **made).complete
    assert sum(predicted) == COUNT
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_journal_gives_back_what_it_was_given(tmp_path):
    folder = tmp_path / "journal"
    first = DepthJournal(folder, [Shard(0, 40)])
    assert len(first) == 0 and first.find(3) is None and not folder.exists()
    first.add(Shard(0, 20), [entry(3), entry(4)])
    first.add(Shard(0, 20), [entry(9)])
    first.add(Shard(20, 40), [entry(21)])
    found = DepthJournal(folder, [Shard(0, 4), Shard(9, 40)])
    assert len(found) == 3
    assert [found.find(n) for n in (3, 9, 21)] == [entry(3), entry(9), entry(21)]
    assert found.find(4) is None  # not of this run
    found.forget(Shard(0, 20))
    assert [path.name for path in folder.iterdir()] == [f"{Shard(20, 40).name}.depth"]
    assert DepthJournal(folder, [Shard(0, 20)]).find(3) is None
