"""Child processes end with the process that started them, also where that is killed and they have much in hand."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpufgbg import DatasetError, InputError, OptionError
from gpufgbg.children import portable_error

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")

WRITER = """
import os, sys, time
from pathlib import Path
import numpy as np
from gpufgbg import Plan, Recipe
from gpufgbg.cuda_pipeline import _Writer
from gpufgbg.labels import LabelJob
from gpufgbg.recipe import Shard

out = Path(sys.argv[1])
plan = Plan(Recipe(per_pair=100_000), 100, [80], [105])  # 20 million samples: minutes of labels
memory = os.memfd_create("ring")
os.ftruncate(memory, 4096)
setup = ("plan", plan.recipe, plan.n_backgrounds, plan.foreground_widths, plan.foreground_heights)
writer = _Writer((*setup, out, "tree", ("composite", "composite_mask"), out, 4096), memory)
writer.send(("labels", str(out / "labels"), np.zeros(1, np.int32), [Shard(0, len(plan))]))
print(writer.process.pid, flush=True)
time.sleep(60)
"""
WORKER = """
import sys, time
from pathlib import Path
from gpufgbg import Recipe, prepare
from gpufgbg.sample_assets import write_sample_assets
from gpufgbg.scaleout.processes import ProcessCrew
from gpufgbg.scaleout.worker import Job

out = Path(sys.argv[1])
recipe = Recipe()
assets = prepare(*write_sample_assets(out / "assets", 1, 1), recipe=recipe)
crew = ProcessCrew(["cpu"])
crew.take(Job(assets, recipe, "tar", out, 1))
(member,) = crew.start()
assert crew.wait(60)[0][1][0] == "ready"
member.link.process.send_signal(19)  # stopped: it would not hear of the driver's end
print(member.link.process.pid, flush=True)
time.sleep(60)
"""


def lives(pid: int) -> bool:
    """A process that has ended but was not waited for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("program", [WRITER, WORKER], ids=["writer", "worker"])
def test_the_parent_is_killed(program, tmp_path):
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as parent:
        try:
            child = int(parent.stdout.readline())
            if program is WRITER:
                assert wait_until((tmp_path / "labels" / "labels").is_dir, 60)
            assert lives(child)
        finally:
            parent.kill()
    left = not wait_until(lambda: not lives(child))
    if left:
        os.kill(child, signal.SIGKILL)
    assert not left


def test_the_parent_is_gone_before(tmp_path):
    program = "import sys; from gpufgbg.children import parent_of; parent_of('0', sys.argv[1]); print('lives')"
    for parent, expected in ((os.getpid(), "lives"), (2**22 - 1, "")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(parent)], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    "error",
    [OptionError("size", "got 3"), InputError("a.png: broken", "b.png: broken"), DatasetError("x"),
     OSError(28, "No space", "file")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_errors_that_travel_as_they_are(error):
    found = pickle.loads(pickle.dumps(portable_error(error, "a worker")))
    assert type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)


def test_errors_that_travel_as_text():
    class Odd(Exception):
        pass

    try:
        raise Odd("x")
    except Odd as error:
        found = pickle.loads(pickle.dumps(portable_error(error, "a worker")))
    assert (
        type(found) is RuntimeError
        and str(found).startswith("a worker failed:\nTraceback")
        and "Odd: x" in str(found)
    )
