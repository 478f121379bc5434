"""Workers on cards: the bytes of the CPU, also where one is killed half way. Two workers share a single card."""

from __future__ import annotations

import json

import crews
import oracle
import pytest

from gpufgbg import Recipe, generate, pipeline
from gpufgbg.backends import cuda
from gpufgbg.scaleout import processes
from gpufgbg.scaleout.processes import ProcessCrew

pytestmark = pytest.mark.skipif(cuda.count_devices() == 0, reason=f"no CUDA device: {cuda.why_not()}")
SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=40)  # 960 samples, 138 shards and more


@pytest.fixture
def make(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", crews.SHARD)
    monkeypatch.setattr(processes, "COMMAND", crews.WORKER)
    if cuda.count_devices() == 1:
        monkeypatch.setattr(
            pipeline, "several_devices", lambda name: ("cuda:0", "cuda:0") if name == "cuda:all" else ()
        )

    def call(name: str, **options):
        return generate(tmp_path / name, **folders, recipe=SMALL, **{"workers": 4, **options})

    return call


@pytest.mark.parametrize("sink", ["tree", "tar"])
def test_all_cards_make_the_bytes_of_the_cpu(make, tmp_path, sink):
    make("whole", device="cpu", sink=sink)
    report = make("out", device="cuda:all", sink=sink)
    assert report.samples == 960 and report.device.startswith("cuda:0, cuda:")
    assert report.memory["device"] > 0 and report.transferred["files"] > 0
    content = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("whole", "out")]
    assert content[0]["shards"] == content[1]["shards"] and content[0]["statistics"] == content[1]["statistics"]
    trees = [
        {k: v for k, v in oracle.tree_of(tmp_path / name).items() if k != "dataset.json"} for name in ("whole", "out")
    ]
    assert trees[0] == trees[1]


def test_a_worker_on_a_card_is_killed(make, tmp_path, monkeypatch):
    make("whole", device="cpu", sink="tar")
    members, struck = [], []
    original = ProcessCrew._start

    def start(self, device):
        members.append(original(self, device))
        return members[-1]

    monkeypatch.setattr(ProcessCrew, "_start", start)

    def strike(done: int, total: int) -> None:
        ours = [member for member in members if member.held]
        if ours and done > 200 and not struck:
            struck.append(ours[0])
            ours[0].link.process.kill()

    report = make("out", device="cuda:all", sink="tar", progress=strike, batch_size=2)
    assert report.complete and struck
    assert {k: v for k, v in oracle.tree_of(tmp_path / "out").items() if k.startswith("shards/")} == {
        k: v for k, v in oracle.tree_of(tmp_path / "whole").items() if k.startswith("shards/")
    }
