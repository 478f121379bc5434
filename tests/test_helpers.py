"""Helper processes: what comes out is the same, whatever becomes of them."""

from __future__ import annotations

import os
import signal
import time
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from gpufgbg import Recipe, decoding, generate
from gpufgbg.decoding import CpuDecoder, decode_stored
from gpufgbg.helpers import Helpers
from gpufgbg.readers import scan

pytestmark = pytest.mark.skipif(os.name != "posix", reason="helpers need file descriptors that are passed on")


def wait_ready(helpers: Helpers, count: int) -> None:
    helpers._begin(1)
    end = time.monotonic() + 60
    while helpers._ready.qsize() < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def ready_helpers(count: int) -> Helpers:
    """Helpers that take every call."""
    helpers = Helpers(count, after=0)
    wait_ready(helpers, count if count > 1 else 0)
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
    assert all(helper.process.poll() is not None for helper in helpers._all)


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
        for helper in at_once[0]._all:
            helper.process.send_signal(signal.SIGKILL)
        for batch in batches:
            assert not batch.faults
            total += batch.moments
    assert total.sum == tuple(40 * value for value in expected.sum) and total.images == 40 * len(pictures)


def test_processes_end_with_a_decoder_that_is_left(sets, at_once):
    pictures = [picture for picture in scan(sets["tar"]) if picture.kind == "composite"]
    with closing(CpuDecoder(2).decode(iter(pictures * 40))) as batches:
        next(batches)
        assert len(at_once[0]._all) == 2
    assert all(helper.process.poll() is not None for helper in at_once[0]._all)


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
