"""Helper processes: what comes out is the same, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
from test_children import lives, wait_until

from gpufgbg import Recipe, decoding, generate
from gpufgbg.decoding import CpuDecoder, decode_stored
from gpufgbg.helpers import Helpers
from gpufgbg.readers import scan

pytestmark = pytest.mark.skipif(os.name != "posix", reason="helpers need file descriptors that are passed on")
linux = pytest.mark.skipif(sys.platform != "linux", reason="helpers are forks on Linux")


def wait_ready(helpers: Helpers, count: int) -> None:
    helpers._begin(1)
    end = time.monotonic() + 60
    while helpers._ready.qsize() < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def parent_pid(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def children_of(pid: int) -> list[int]:
    """Zombies too."""
    pids = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
    return [child for child in pids if parent_pid(child) == pid]


def pids_of(helpers: Helpers) -> list[int]:
    """All that were started: the first helper's forks, then what this process started."""
    ours = [child.process.pid for child in helpers._children]
    forks = children_of(ours[0]) if sys.platform == "linux" and ours else []
    return [*forks, *ours]


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ready_helpers(count: int, ready: int | None = None) -> Helpers:
    """Helpers that take every call."""
    helpers = Helpers(count, after=0)
    wait_ready(helpers, ready or (count if count > 1 else 0))
    return helpers


@pytest.fixture
def at_once(monkeypatch):
    """Helpers from the first picture on, and as many as there are threads; gives those that were made."""
    made: list[Helpers] = []

    def make(count: int) -> Helpers:
        made.append(Helpers(count, after=0))
        return made[-1]

    monkeypatch.setattr(decoding, "ONE_LOCK", 1)
    monkeypatch.setattr(decoding, "Helpers", make)
    return made


@pytest.fixture(scope="module")
def sets(folders, tmp_path_factory) -> dict[str, Path]:
    """A data set in each form, also as a compressed zip."""
    root = tmp_path_factory.mktemp("sets")
    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=3)
    for sink in ("tree", "zip", "tar"):
        generate(root / sink, **folders, recipe=recipe, device="cpu", sink=sink)
    with zipfile.ZipFile(root / "packed.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((root / "tree" / "fg_bg").rglob("*.jpg")):
            archive.write(path, path.relative_to(root / "tree"))
    return {**{sink: root / sink for sink in ("tree", "zip", "tar")}, "packed": root / "packed.zip"}


@pytest.mark.parametrize("form", ["tree", "zip", "tar", "packed"])
def test_pictures_are_decoded_elsewhere(sets, form):
    pictures = [picture for picture in scan(sets[form]) if picture.kind == "composite"]
    assert {picture.portable for picture in pictures} == {form != "packed"}
    with ready_helpers(2) as helpers:
        for picture in pictures[:20]:
            found, expected = decoding.decode_apart(helpers, [picture]), decode_stored([picture])
            assert found == expected and found.forms[0] and found.moments.images == 1
        assert helpers._ready.qsize() == 2
        pids = pids_of(helpers)
    assert len(pids) >= 2 and not any(map(exists, pids))
    assert all(child.process.poll() is not None for child in helpers._children)


def test_a_damaged_file_is_told_of_as_here(sets, tmp_path):
    folder = tmp_path / "fg_bg"
    folder.mkdir()
    file = next((sets["tree"] / "fg_bg").rglob("*.jpg")).read_bytes()
    (folder / "half.jpg").write_bytes(file[: len(file) // 2])
    (folder / "gone.jpg").write_bytes(file)
    pictures = list(scan(tmp_path))
    (folder / "gone.jpg").unlink()
    with ready_helpers(2) as helpers:
        found = decoding.decode_apart(helpers, pictures)
    assert found == decode_stored(pictures)
    assert len(found.faults) == 2 and "gone.jpg: can't be read" in found.faults[0]


def test_what_a_function_raises_is_raised_here():
    with Helpers(2, after=0) as helpers:
        assert helpers.call(len, "abc") == 3  # none is ready: done here
        wait_ready(helpers, 2)
        with pytest.raises(ValueError, match="invalid literal"):
            helpers.call(int, "x")
        assert helpers.call(int, "7") == 7 and helpers._ready.qsize() == 2


def test_a_helper_that_dies_is_not_missed(sets, at_once):
    pictures = [picture for picture in scan(sets["tree"]) if picture.kind == "composite"]
    expected = decode_stored(pictures).moments
    with closing(CpuDecoder(2).decode(iter(pictures * 40))) as batches:
        total = next(batches).moments
        wait_ready(at_once[0], 1)
        for pid in pids_of(at_once[0]):
            os.kill(pid, signal.SIGKILL)
        for batch in batches:
            assert not batch.faults
            total += batch.moments
    assert total.sum == tuple(40 * value for value in expected.sum) and total.images == 40 * len(pictures)


def test_processes_end_with_a_decoder_that_is_left(sets, at_once):
    pictures = [picture for picture in scan(sets["tar"]) if picture.kind == "composite"]
    with closing(CpuDecoder(2).decode(iter(pictures * 40))) as batches:
        next(batches)
        assert len(at_once[0]._all) == 2
        pids = pids_of(at_once[0])
    assert pids and not any(map(exists, pids))
    assert all(child.process.poll() is not None for child in at_once[0]._children)


def test_few_items_are_worth_no_process():
    with Helpers(4, after=100) as helpers:
        for _ in range(10):
            helpers.call(len, "abc", 10)
        assert not helpers._all
        helpers.call(len, "abc", 1)
        assert len(helpers._all) == 4
    with Helpers(1, after=0) as helpers:
        helpers.call(len, "abc", 10)
        assert not helpers._all


def test_a_machine_that_refuses_processes(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("gpufgbg.children.subprocess.Popen", refuse)
    with Helpers(2, after=0) as helpers:
        assert [helpers.call(len, "abc") for _ in range(3)] == [3, 3, 3]
        assert not helpers._all


# -- forks ----------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from test_helpers import pids_of, ready_helpers
with ready_helpers(3) as helpers:
    print(*pids_of(helpers), flush=True)
    time.sleep(60)
"""


@linux
def test_one_process_imports_for_all():
    with ready_helpers(4) as helpers:
        (first,) = helpers._children
        pids = pids_of(helpers)
        assert len(pids) == 5 and pids[-1] == first.process.pid
        asked = [helpers.call(eval, "__import__('os').getpid()") for _ in range(4)]
        assert sorted(asked) == sorted(pids[:-1])
        assert [len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids] == [1] * 5  # so a fork is safe
        loaded = "sorted({'gpufgbg.decoding', 'gpufgbg.decoding_dali', 'numba'} & set(__import__('sys').modules))"
        assert helpers.call(eval, loaded) == ["gpufgbg.decoding", "gpufgbg.decoding_dali", "numba"]
        assert not helpers.call(eval, "'scipy.linalg' in __import__('sys').modules")
        assert helpers.call(eval, "__import__('gc').isenabled()")
        interrupted = "__import__('signal').getsignal(2) is __import__('signal').SIG_IGN"
        assert helpers.call(eval, interrupted)
        # each holds its own socket alone: another's would keep the end of its fork from us
        files = [[str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()] for pid in pids]
        assert [sum(file.startswith("socket:") for file in open_) for open_ in files] == [1] * 5
    assert not any(map(exists, pids)) and not set(pids) & set(children_of(os.getpid()))


@linux
def test_one_fork_is_killed():
    with ready_helpers(3) as helpers:
        pids = pids_of(helpers)
        os.kill(pids[0], signal.SIGKILL)
        assert wait_until(lambda: not lives(pids[0]))
        assert [helpers.call(len, "abc") for _ in range(9)] == [3] * 9
        assert helpers._ready.qsize() == 2 and all(map(lives, pids[1:]))
    assert not any(map(exists, pids))


@linux
def test_a_fork_is_killed_in_a_call():
    with ready_helpers(2) as helpers:
        pids = pids_of(helpers)
        found: list[object] = []
        code = f"__import__('time').sleep(0 if __import__('os').getpid() == {os.getpid()} else 60)"
        calls = [threading.Thread(target=lambda: found.append(helpers.call(eval, code))) for _ in range(2)]
        for call in calls:
            call.start()
        assert wait_until(lambda: not helpers._ready.qsize())
        for pid in pids[:2]:
            os.kill(pid, signal.SIGKILL)
        for call in calls:
            call.join(20)
        assert found == [None, None]


@linux
def test_the_first_process_is_killed():
    with ready_helpers(3) as helpers:
        pids = pids_of(helpers)
        os.kill(pids[-1], signal.SIGKILL)
        assert wait_until(lambda: not any(map(lives, pids)))
        assert [helpers.call(len, "abc") for _ in range(5)] == [3] * 5


@linux
def test_the_first_process_does_not_answer(monkeypatch):
    monkeypatch.setattr("gpufgbg.helpers._PATIENCE_S", 0.2)
    with ready_helpers(2) as helpers:
        pids = pids_of(helpers)
        os.kill(pids[-1], signal.SIGSTOP)
    assert not exists(pids[-1]) and wait_until(lambda: not any(map(lives, pids)))


@linux
@pytest.mark.parametrize("stopped", [False, True])
def test_the_parent_is_killed(stopped):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 4 and all(map(lives, pids))
            for pid in pids if stopped else ():
                os.kill(pid, signal.SIGSTOP)
        finally:
            parent.kill()
    wait_until(lambda: not any(map(lives, pids)))
    left = list(filter(lives, pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize("after_s", [0, 0.05, 0.3, 0.6, 0.9])
def test_closed_before_all_are_there(after_s):
    helpers = Helpers(4, after=0)
    helpers._begin(1)
    time.sleep(after_s)
    start = time.monotonic()
    pids = pids_of(helpers)
    helpers.close()
    assert time.monotonic() - start < 5 and not any(map(exists, pids))
    assert helpers._children and all(child.process.poll() is not None for child in helpers._children)
    assert helpers.call(len, "abc") == 3


def test_processes_that_each_import_for_themselves(monkeypatch):
    monkeypatch.setattr("gpufgbg.helpers._FORKS", False)
    with ready_helpers(2) as helpers:
        pids = {child.process.pid for child in helpers._children}
        assert {helpers.call(eval, "__import__('os').getpid()") for _ in range(2)} == pids and len(pids) == 2
    assert not any(map(exists, pids))


@linux
def test_a_machine_that_refuses_forks(monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfork, left = os.fork, [1]\n"
        "def few():\n    if not left:\n        raise OSError(11, 'x')\n    left.pop()\n    return fork()\n"
        "os.fork = few\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with ready_helpers(3, 1) as helpers:
        for thread in helpers._welcoming:
            thread.join(20)
        assert helpers._ready.qsize() == 1 and [helpers.call(len, "abc") for _ in range(3)] == [3] * 3
        assert len(pids_of(helpers)) == 2
