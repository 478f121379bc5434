"""The driver and its workers, on two or three processes of the CPU: the same bytes, whatever is killed or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import crews
import oracle
import pytest

from gpufgbg import DeviceError, Interrupted, OptionError, Recipe, StorageError, add_depth, generate
from gpufgbg.manifest import Manifest
from gpufgbg.scaleout import devices, driver, processes
from gpufgbg.scaleout.processes import ProcessCrew

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=8)  # 192 samples, 27 shards and more
SINKS = ("tree", "zip", "tar")


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", crews.SHARD)
    monkeypatch.setattr(processes, "COMMAND", crews.WORKER)


@pytest.fixture
def make(folders, tmp_path):
    def call(name: str, **options):
        options = {"workers": 2, "device": "cpu,cpu", "recipe": SMALL, **options}
        return generate(tmp_path / name, **folders, **options)

    return call


@pytest.fixture
def members(monkeypatch):
    """The workers that are started, in order."""
    found = []
    original = ProcessCrew._start

    def start(self, device):
        found.append(original(self, device))
        return found[-1]

    monkeypatch.setattr(ProcessCrew, "_start", start)
    return found


@pytest.mark.parametrize("sink", SINKS)
def test_two_processes_make_the_bytes_of_one(make, tmp_path, members, sink):
    make("whole", device="cpu", sink=sink)
    seen = []
    report = make("out", sink=sink, progress=lambda done, total: seen.append((done, total)))
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    assert report.samples == report.done == 192 and report.complete and report.device == "cpu, cpu"
    assert seen == sorted(seen) and seen[-1] == (192, 192)
    assert len(members) == 2 and sum(member.shards for member in members) == 30
    assert all(member.link.process.poll() is not None for member in members)
    assert make("out", sink=sink).samples == 0 and len(members) == 2  # nothing to do, nobody to do it


def test_slices_and_depth(make, tmp_path, members):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    small = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
    make("whole", device="cpu", sink="tar", depth="demo", recipe=small)
    make("out", sink="tar", depth="demo", samples=(5, 30), recipe=small)
    make("out", sink="tar", depth="demo", device="cpu,cpu,cpu", recipe=small)
    assert len(members) == 5
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    make("later", device="cpu", sink="tar", recipe=small)
    assert add_depth(tmp_path / "later", "demo", device="cpu,cpu").device == "cpu, cpu"
    shards = [{k: v for k, v in oracle.tree_of(tmp_path / name).items() if k.startswith("shards/")}
              for name in ("later", "whole")]  # fmt: skip
    assert shards[0] == shards[1]


def give_time(members) -> None:
    """Workers wait for the driver's next shard meanwhile, and the disk gets done with their first."""
    if not any(member.shards for member in members):
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("sink", "stop"), [("tree", signal.SIGKILL), ("zip", signal.SIGKILL), ("tar", signal.SIGSTOP)], ids=str
)
def test_a_worker_that_dies_or_hangs_loses_nothing(make, tmp_path, members, monkeypatch, sink, stop):
    make("whole", device="cpu", sink=sink)
    monkeypatch.setattr(driver, "HANG_S", 1.5)
    struck, told, seen = [], [], []

    def strike(done: int, total: int) -> None:
        seen.append(done)
        give_time(members)
        # one that has something in hand
        ours = [member for member in members if member.held and member.shards and member not in struck]
        if ours and done > 40 * (len(struck) + 1) and len(struck) < 2:
            struck.append(ours[0])
            ours[0].link.process.send_signal(stop)

    report = make("out", sink=sink, progress=strike, tell=told.append, batch_size=1)
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    assert report.samples == 192 and seen == sorted(seen) and seen[-1] == 192
    assert struck and len(members) == 2 + len(struck)  # each was replaced
    reason = "ended with code -9" if stop == signal.SIGKILL else "silent for 2 s"
    assert [line for line in told if f"cpu: {reason}: " in line and "given out again" in line]


def test_a_worker_that_lives_on_can_not_publish(make, tmp_path, members, monkeypatch):
    """Where a worker can't be ended (its machine is cut off), it goes on, and finds its folder gone."""
    make("whole", device="cpu", sink="tree")
    kept = []
    original = ProcessCrew.drop

    def leave(self, member):
        if member is not members[0] or kept:
            original(self, member)
            return
        kept.append(member)
        self._open.pop(member.link.connection)  # its messages reach nobody

    monkeypatch.setattr(ProcessCrew, "drop", leave)
    monkeypatch.setattr(driver, "HANG_S", 1.5)

    def strike(done: int, total: int) -> None:
        if done > 60 and members[0].held and not kept:
            os.kill(members[0].link.process.pid, signal.SIGSTOP)

    make("out", sink="tree", progress=strike, batch_size=1)
    (member,) = kept
    assert member.held
    before = oracle.tree_of(tmp_path / "out")
    os.kill(member.link.process.pid, signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired):  # it may have published just before, and ask for the next
        member.link.process.wait(timeout=3)
    member.link.connection.close()
    member.link.process.wait(timeout=60)
    assert oracle.tree_of(tmp_path / "out") == before == oracle.tree_of(tmp_path / "whole")


def test_slow_predictions_are_no_silence(make, tmp_path, members, monkeypatch):
    """A batch whose depth maps take longer than a worker may be silent; one that hangs in a prediction is lost."""
    pytest.importorskip("onnxruntime")
    small = Recipe(size=(64, 48), foreground_height=20, per_pair=1)
    make("whole", device="cpu", sink="tar", depth="demo", recipe=small)
    monkeypatch.setattr(driver, "HANG_S", 4.0)

    def each_takes(seconds: float) -> tuple[str, ...]:
        patch = (
            "import time; from gpufgbg.depth.model import DepthModel; maps = DepthModel.maps; "
            f"DepthModel.maps = lambda self, *given: (time.sleep({seconds} * len(given[0])), maps(self, *given))[1]; "
        )
        return *crews.WORKER[:2], patch + crews.WORKER[2]

    monkeypatch.setattr(processes, "COMMAND", each_takes(0.8))  # 5.6 s a shard of 7
    make("out", sink="tar", depth="demo", recipe=small)
    assert len(members) == 2
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    monkeypatch.setattr(processes, "COMMAND", each_takes(1000))
    monkeypatch.setattr(driver, "HANG_S", 1.5)
    with pytest.raises(DeviceError, match=r"3 workers were lost|no worker is left: cpu: silent for 2 s"):
        make("hung", sink="tar", depth="demo", recipe=small)


def test_replacements_that_hang_while_they_load(make, tmp_path, members, monkeypatch):
    """Each has a time of its own to get ready; nobody waits for ever."""
    monkeypatch.setattr(driver, "START_S", 30.0)
    struck = []

    def strike(done: int, total: int) -> None:
        give_time(members)
        if not struck and any(member.shards for member in members):
            struck.append(done)
            monkeypatch.setattr(processes, "COMMAND", (*crews.WORKER[:2], "import time; time.sleep(600)"))
            monkeypatch.setattr(driver, "START_S", 1.5)
            for member in list(members):
                member.link.process.kill()

    with pytest.raises(DeviceError, match=r"^no worker is left: cpu: not ready within 2 s: run the same command"):
        make("out", progress=strike, batch_size=1)
    assert len(members) == 4 and all(member.link.process.poll() is not None for member in members)
    monkeypatch.undo()


def test_lost_before_the_first_shard(make, tmp_path, members, monkeypatch):
    """One such worker is replaced, and its replacements, but not for ever."""
    make("whole", device="cpu")
    struck = []
    original = driver.Driver._on_next

    def strike(self, member):
        if member is members[0] and not struck:
            struck.append(member)
            member.link.process.kill()
        original(self, member)

    monkeypatch.setattr(driver.Driver, "_on_next", strike)
    make("out")
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    assert struck and len(members) == 3

    def kill(self, member):
        member.link.process.kill()  # nothing in hand

    monkeypatch.setattr(driver.Driver, "_on_next", kill)
    with pytest.raises(DeviceError, match=r"^no worker is left: cpu: ended with code -9: run the same command again"):
        make("other")
    assert len(members) == 3 + 2 * driver._TRIES


def test_all_workers_lost(make, tmp_path, members, monkeypatch):
    monkeypatch.setattr(ProcessCrew, "replace", lambda self, member: None)

    def strike(done: int, total: int) -> None:
        for member in members:
            member.link.process.kill()

    with pytest.raises(
        DeviceError, match=r"^no worker is left: cpu: ended with code -9: run the same command again$"
    ):
        make("out", progress=strike)
    assert not any((tmp_path / "out" / ".gpufgbg" / "runs").iterdir())
    monkeypatch.undo()
    make("out")


def test_a_shard_that_kills_its_workers_is_named(make, tmp_path, members, monkeypatch):
    original = driver.Driver._on_next

    def deadly(self, member):
        original(self, member)
        if any(shard.start <= 100 < shard.stop for shard in member.held):
            member.link.process.kill()

    monkeypatch.setattr(driver.Driver, "_on_next", deadly)
    monkeypatch.setattr(driver.Member, "shards", 1, raising=False)
    with pytest.raises(
        DeviceError, match=r"^samples \d+:\d+: 3 workers were lost with them in hand, the last was cpu: ended"
    ):
        make("out", device="cpu,cpu,cpu")
    assert not any(r.shard.start <= 100 < r.shard.stop for r in Manifest(tmp_path / "out").records())


def test_a_worker_that_can_not_start(make, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", (*crews.WORKER[:2], "raise SystemExit(3)"))
    with pytest.raises(DeviceError, match=r"^no worker could be started: cpu: ended with code 3$"):
        make("out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(processes, "COMMAND", (*crews.WORKER[:2], "import time; time.sleep(60)"))
    monkeypatch.setattr(driver, "START_S", 0.5)
    with pytest.raises(DeviceError, match=r"^no worker could be started: cpu: not ready within 0 s$"):
        make("out")


def test_errors_of_workers_are_one_line(make, tmp_path, monkeypatch):
    def raising(error: str) -> tuple[str, ...]:
        patch = f"from gpufgbg.shards import OpenShard\ndef fail(*a): raise {error}\nOpenShard.close = fail\n"
        return *crews.WORKER[:2], patch + crews.WORKER[2]

    monkeypatch.setattr(processes, "COMMAND", raising("OSError(28, 'No space', 'x')"))
    with pytest.raises(StorageError, match=r"^no space left on the disk of x; 0 of 192 samples are safe; free some"):
        make("out")
    monkeypatch.setattr(processes, "COMMAND", raising("ValueError('odd')"))
    with pytest.raises(RuntimeError, match="ValueError: odd"):
        make("out")
    assert not any((tmp_path / "out" / ".gpufgbg" / "runs").iterdir())


def test_interrupted_and_continued(make, tmp_path, members):
    make("whole", device="cpu")

    def stop(done: int, total: int) -> None:
        give_time(members)
        if done >= 60 and any(member.shards for member in members):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"of 192 samples are safe; the same command continues"):
        make("out", progress=stop)
    assert all(member.link.process.poll() is not None for member in members)
    assert not any((tmp_path / "out" / ".gpufgbg" / "runs").iterdir())
    assert 0 < make("out").samples < 192
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


@pytest.mark.parametrize("sink", ["zip"])
def test_the_driver_is_killed_and_started_again(make, folders, tmp_path, sink, luck):
    make("whole", device="cpu", sink=sink, recipe=Recipe(size=(192, 144), foreground_height=20, per_pair=30))
    command = [
        *crews.CLI, "generate", *(f"--{name}={folder}" for name, folder in folders.items()),
        f"--out={tmp_path / 'out'}", "--size=192x144", "--foreground-height=20", "--per-pair=30",
        "--device=cpu,cpu", f"--sink={sink}", "--json",
    ]  # fmt: skip
    records = tmp_path / "out" / ".gpufgbg" / "shards"
    wanted = luck.randrange(1, 60)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not records.is_dir() or len(list(records.iterdir())) < wanted):
            time.sleep(0.002)
        done = process.poll() is not None  # before it was seen at work, on a machine that does something else
        process.kill()
    assert 0 < len(Manifest(tmp_path / "out").records()) < 105 or done
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_names_of_several_devices(monkeypatch, refused, arguments, tmp_path):
    assert (
        devices.several_devices("cpu") == devices.several_devices("auto") == devices.several_devices("cuda:1") == ()
    )
    assert devices.several_devices("cpu,cpu,cpu") == ("cpu",) * 3
    cards = 3
    monkeypatch.setattr("gpufgbg.backends.cuda.count_devices", lambda: cards)
    monkeypatch.setattr("gpufgbg.backends.cuda.why_not", lambda index=0: None if index < cards else "no such card")
    assert devices.several_devices("cuda:all") == ("cuda:0", "cuda:1", "cuda:2")
    assert devices.several_devices("cuda:0,2") == ("cuda:0", "cuda:2")
    with pytest.raises(OptionError, match="names card 1 twice"):
        devices.several_devices("cuda:1,0,1")
    with pytest.raises(DeviceError, match="device cuda:3: no such card"):
        devices.several_devices("cuda:0,3")
    monkeypatch.undo()
    for name in ("cuda:", "cuda:0,", "cuda:all,1", "cpu,cuda:0"):
        assert "expected auto, cpu, cuda" in refused(*arguments, f"--device={name}")
