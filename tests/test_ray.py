"""A Ray cluster of three machines, all of them this one: the same bytes, whatever is killed or hangs; needs ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import crews
import oracle
import pytest

import gpufgbg
from gpufgbg import DeviceError, OptionError, Recipe, generate
from gpufgbg.scaleout import cluster, driver

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=20)  # 480 samples, 72 shards
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of its many processes


@pytest.fixture(scope="module")
def three():
    """The cluster: a head and two machines, a processor each."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 5}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick, "object_store_memory": 100 << 20}
    found = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        found.add_node(num_cpus=1, object_store_memory=100 << 20)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.fixture
def make(three, folders, tmp_path, monkeypatch):
    (tmp_path / "pids").mkdir()
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", crews.SHARD)
    monkeypatch.setattr(cluster, "_Actor", crews.short_actor(str(tmp_path / "pids")))

    def call(name: str, **options):
        options = {"workers": 1, "recipe": SMALL, "sink": "tar", **options}
        if "device" not in options:
            options.setdefault("ray", three.address)
        return generate(tmp_path / name, **folders, **options)

    return call


def pids(tmp_path) -> list[int]:
    return [int(path.name) for path in (tmp_path / "pids").iterdir()]


def test_three_machines_make_the_bytes_of_one_process(make, tmp_path):
    make("whole", device="cpu", sink="tree")
    report = make("out", samples=(3, 200), sink="tree")
    assert report.samples == 197 and report.device.count("cpu on ") == 3 and len(pids(tmp_path)) == 3
    assert make("out", sink="tree").complete
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_a_machine_dies_half_way_and_another_joins(make, three, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_LOOK_S", 0.1)
    make("whole", device="cpu")
    nodes = [three.add_node(num_cpus=1, object_store_memory=100 << 20)]
    three.wait_for_nodes()
    told, struck = [], []

    def strike(done: int, total: int) -> None:
        if done > 60 and not struck:
            struck.append(done)
            three.remove_node(nodes[0], allow_graceful=False)
            nodes.append(three.add_node(num_cpus=1, object_store_memory=100 << 20))
        until = time.monotonic() + 30
        while done > 360 and len(pids(tmp_path)) < 5 and time.monotonic() < until:
            time.sleep(0.1)

    report = make("out", progress=strike, tell=told.append, batch_size=1)
    three.remove_node(nodes[1])
    assert report.complete and struck
    assert any("given out again" in line for line in told)
    assert len(pids(tmp_path)) == 5
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_a_worker_hangs(make, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "HANG_S", 2.0)
    make("whole", device="cpu")
    told, struck = [], []

    def strike(done: int, total: int) -> None:
        if done > 100 and not struck:
            struck.append(pids(tmp_path)[0])
            os.kill(struck[0], signal.SIGSTOP)

    report = make("out", progress=strike, tell=told.append, batch_size=1)
    assert report.complete
    assert any("silent for 2 s" in line for line in told)
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_the_driver_is_killed_and_started_again(make, three, folders, tmp_path):
    recipe = Recipe(size=(192, 144), foreground_height=20, per_pair=30)
    make("whole", device="cpu", recipe=recipe)
    command = [
        sys.executable, crews.__file__, str(tmp_path / "pids"), "generate",
        *(f"--{name}={folder}" for name, folder in folders.items()), f"--out={tmp_path / 'out'}",
        "--size=192x144", "--foreground-height=20", "--per-pair=30", "--sink=tar", f"--ray={three.address}",
    ]  # fmt: skip
    records = tmp_path / "out" / ".gpufgbg" / "shards"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not records.is_dir() or len(list(records.iterdir())) < 20):
            time.sleep(0.002)
        process.kill()
    assert 20 <= len(list(records.iterdir())) < 105
    report = make("out", recipe=recipe)
    assert report.complete and 0 < report.samples <= 720 - 20 * 3
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_refusals(make, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="with --ray, which takes the cluster's GPUs"):
        make("out", ray="auto", device="cpu")
    with pytest.raises(OptionError, match="expected local, auto or HOST:PORT"):
        make("out", ray="")
    with pytest.raises(DeviceError, match=r"^--ray 127\.0\.0\.1:1: no cluster answers: "):
        make("out", ray="127.0.0.1:1")
    monkeypatch.setattr(cluster, "_CONNECT_S", 1.0)
    for said, reason in (
        (b"", "no answer within 1 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "something else than Ray"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as other:

            def answer(other=other, said=said):
                link, _ = other.accept()
                with link:
                    link.sendall(said)
                    time.sleep(2)

            threading.Thread(target=answer, daemon=True).start()
            with pytest.raises(DeviceError, match=f"no cluster answers: {reason}"):
                make("out", ray=f"127.0.0.1:{other.getsockname()[1]}")
    assert not (tmp_path / "out").exists()


def test_blocks_are_made_where_they_are_used(three, folders):
    pytest.importorskip("pandas")
    from gpufgbg.integrations.ray import read_samples

    assets = gpufgbg.prepare(*folders.values(), SMALL)
    compositor = gpufgbg.Compositor(assets, SMALL, "cpu")
    ray.init(address=three.address, log_to_driver=False, logging_level="ERROR")
    try:
        samples = read_samples(assets, SMALL, override_num_blocks=8)
        assert samples.count() == 480
        seen = {}
        for batch in samples.iter_batches(batch_size=50):
            expected = compositor.render(batch["index"])
            assert (batch["image"] == expected.image).all() and (batch["mask"] == expected.mask).all()
            for name in ("background", "foreground", "flip", "x", "y"):
                assert (batch[name] == getattr(expected.labels, name)).all()
            seen.update(dict.fromkeys(batch["index"].tolist()))
        assert sorted(seen) == list(range(480))
        shuffled = read_samples(assets, SMALL, samples=(100, 200), shuffle=True, seed=3)
        order = [row["index"] for row in shuffled.iter_rows()]
        assert sorted(order) == list(range(100, 200)) and order != sorted(order)
    finally:
        ray.shutdown()
