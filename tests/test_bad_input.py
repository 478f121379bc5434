"""Bad input: every row of the list in issue 3, through the command line.

Each ends in one line of error that names the file or option and says what was expected, with exit code 2, before
anything is written; or, where the input can be used, in a warning that names it.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import cutout, smooth
from oracle import expected_files, samples_of, tree_of
from PIL import Image
from test_pictures import encoded, write

from gpufgbg import InputError, Recipe, dataset, manifest, prepare
from gpufgbg.manifest import Manifest
from gpufgbg.sinks import stored_zip, tar, tree

RNG = np.random.default_rng(21)
SCENE = encoded(smooth(RNG, 64, 48, 3), "JPEG")
FIGURE = encoded(cutout(RNG, 30, 40), "PNG")
MATTE = encoded(cutout(RNG, 30, 40)[..., 3].copy(), "PNG")
FOLDERS = ("backgrounds", "foregrounds", "masks")
every_folder = pytest.mark.parametrize("option", FOLDERS)


@pytest.fixture
def given(folders: dict[str, Path], arguments: list[str], tmp_path: Path) -> Given:
    return Given(folders, arguments, tmp_path)


class Given:
    """Copies of the small input that a test may spoil, and the command line that names them."""

    def __init__(self, folders: dict[str, Path], arguments: list[str], root: Path) -> None:
        for name, folder in folders.items():
            shutil.copytree(folder, root / "in" / name)
        self.backgrounds, self.foregrounds, self.masks = (root / "in" / name for name in FOLDERS)
        kept = [a for a in arguments if not a.startswith(tuple(f"--{name}" for name in FOLDERS))]
        self.command = [*kept, "--device=cpu", *(f"--{name}={root / 'in' / name}" for name in FOLDERS)]
        self.without_masks = self.command[:-1]
        self.out = root / "out"

    def folder(self, option: str) -> Path:
        return getattr(self, option)

    def clear(self, option: str) -> Path:
        for path in self.folder(option).iterdir():
            path.unlink()
        return self.folder(option)


def warnings_in(error: str) -> list[str]:
    return [line.removeprefix("gpufgbg: warning: ") for line in error.splitlines() if "gpufgbg: warning: " in line]


def error_in(error: str) -> str:
    """The one line of error; notes and progress may come before it."""
    assert "Traceback" not in error
    *before, last = error.splitlines()
    assert not any("error" in line for line in before), error
    return last


@contextmanager
def nobody() -> Iterator[None]:
    """Without root's right to everything, if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def forbidden(folders: dict[str, Path], arguments: list[str], run) -> Iterator[Given]:
    """As ``given``, in a place that everybody reaches, with all modules loaded that the run needs."""
    if os.name == "nt":
        pytest.skip("permissions of POSIX")
    root = Path(tempfile.mkdtemp())
    root.chmod(0o777)
    try:
        Image.init()
        assert run(*arguments, "--device=cpu")[0] == 0
        yield Given(folders, [*arguments, f"--out={root / 'out'}"], root)
    finally:
        for path in root.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(root)


# -- missing or empty folder ----------------------------------------------------------------------------


@every_folder
def test_missing_folder(given: Given, refused, option: str, tmp_path: Path) -> None:
    error = refused(*given.command, f"--{option}={tmp_path / 'nowhere'}")
    assert error.endswith(f"{option}: no such folder: {tmp_path / 'nowhere'}")


@every_folder
def test_empty_folder(given: Given, refused, option: str) -> None:
    error = refused(*given.command, f"--{option}={given.clear(option)}")
    assert f"{option}: no pictures in {given.folder(option)} (it is empty); expected files ending in .bmp" in error


@every_folder
def test_folder_without_pictures(given: Given, refused, option: str) -> None:
    (given.clear(option) / "a.gif").write_bytes(b"GIF89a")
    (given.folder(option) / ".hidden.png").write_bytes(FIGURE)
    error = refused(*given.command)
    assert f"{option}: no pictures in {given.folder(option)} (not pictures by their extension" in error
    assert "a.gif); expected files ending in" in error


@every_folder
def test_folder_is_a_file(given: Given, refused, option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(SCENE)
    assert refused(*given.command, f"--{option}={tmp_path / 'file'}").endswith(
        f"{option}: not a folder: {tmp_path / 'file'}"
    )


@every_folder
def test_folder_with_an_empty_name(given: Given, refused, option: str) -> None:
    """As a shell makes it of a variable that is not set; it does not mean the current folder."""
    assert refused(*given.command, f"--{option}=").endswith(f"{option}: got an empty name, expected a folder")


@every_folder
def test_folder_that_is_a_loop(given: Given, refused, option: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert f"{option}: can't read {tmp_path / 'loop'}: " in refused(*given.command, f"--{option}={tmp_path / 'loop'}")


def test_all_missing_folders_are_named(given: Given, refused, tmp_path: Path) -> None:
    error = refused(*given.command, *(f"--{name}={tmp_path / f'no {name}'}" for name in FOLDERS))
    assert "3 problems with the input: " in error
    for name in FOLDERS:
        assert f"{name}: no such folder: {tmp_path / f'no {name}'}" in error


@every_folder
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o311])
def test_folder_without_permission(forbidden: Given, refused, option: str, mode: int) -> None:
    forbidden.folder(option).chmod(mode)
    with nobody():
        error = refused(*forbidden.command, out=forbidden.out)
    assert error.endswith(f"{option}: no permission to read {forbidden.folder(option)}")


# -- unreadable, truncated, zero-byte, mislabelled ------------------------------------------------------

SPOILED = {
    "zero.png": (b"", "zero bytes long"),
    "text.jpg": (b"not a picture", "not a picture: expected JPEG by its name"),
    "other.jpg": (FIGURE, "mislabelled: the name says JPEG, the content is PNG; rename it"),
    "cut.png": (FIGURE[: len(FIGURE) // 2], "damaged or truncated PNG: "),
    "header.png": (FIGURE[:20], "damaged"),
    "end.png": (FIGURE[:-5], "damaged or truncated PNG: its end is not there"),
    "cut.jpeg": (SCENE[: len(SCENE) // 2], "damaged or truncated JPEG: "),
    "head.jpg": (SCENE[:30], "damaged or truncated JPEG: "),
}


@every_folder
@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_picture(given: Given, refused, option: str, name: str) -> None:
    data, message = SPOILED[name]
    path = given.folder(option) / name
    path.write_bytes(data)
    if option == "foregrounds":
        (given.masks / f"{path.stem}_mask.png").write_bytes(MATTE)
    elif option == "masks":
        (given.foregrounds / f"{path.stem}.png").write_bytes(FIGURE)
    assert f"{path}: {message}" in refused(*given.command)


@every_folder
def test_unreadable_pictures(forbidden: Given, refused, option: str) -> None:
    pictures = sorted(forbidden.folder(option).iterdir())[:2]
    for path in pictures:
        path.chmod(0)
    with nobody():
        error = refused(*forbidden.command, out=forbidden.out)
    assert "2 problems with the input: " in error
    assert all(f"{path}: no permission to read it" in error for path in pictures)


def test_all_spoiled_pictures_are_named(forbidden: Given, refused) -> None:
    """Of every kind, in every folder, at once: the command names 20 and counts the others, the error has all."""
    expected = []
    for option in FOLDERS:
        for name, (data, message) in SPOILED.items():
            path = forbidden.folder(option) / f"{name.replace('.', '_')}{Path(name).suffix}"
            path.write_bytes(data)
            expected.append(f"{path}: {message}")
    locked = forbidden.backgrounds / "a.jpg", forbidden.foregrounds / "p.png", forbidden.masks / "mask_q.png"
    for path in locked:
        path.chmod(0)
        expected.append(f"{path}: no permission to read it")
    with nobody():
        error = refused(*forbidden.command, out=forbidden.out)
        with pytest.raises(InputError) as caught:
            prepare(*map(forbidden.folder, FOLDERS), Recipe(size=(64, 48), foreground_height=20))
    assert f"{len(expected)} problems with the input: " in error and f"; and {len(expected) - 20} more" in error
    assert sum(problem in error for problem in expected) == 20
    assert len(caught.value.problems) == len(expected)
    for problem in expected:
        assert problem in str(caught.value)


# -- foregrounds and masks that do not fit together -----------------------------------------------------


def test_no_alpha_and_no_mask(given: Given, refused) -> None:
    for name, form, pixels in (("flat.jpg", "JPEG", (20, 20, 3)), ("grey.png", "PNG", (20, 20))):
        (given.foregrounds / name).write_bytes(encoded(np.zeros(pixels, np.uint8), form))
    error = refused(*given.without_masks)
    assert "2 problems" in error
    for name in ("flat.jpg", "grey.png"):
        assert f"{given.foregrounds / name}: no alpha and no mask: expected a cut-out with transparency, or" in error


def test_fully_transparent(given: Given, refused) -> None:
    for name in ("x.png", "y.webp"):
        form = {"x.png": "PNG", "y.webp": "WEBP"}[name]
        (given.foregrounds / name).write_bytes(encoded(np.zeros((40, 30, 4), np.uint8), form))
    error = refused(*given.without_masks)
    assert "2 problems" in error
    for name in ("x.png", "y.webp"):
        assert f"{given.foregrounds / name}: fully transparent: nothing of it would be seen; remove it" in error


def test_mask_of_another_size(given: Given, refused) -> None:
    (given.masks / "mask_p.png").write_bytes(encoded(np.full((39, 30), 255, np.uint8), "PNG"))
    (given.masks / "mask_s.png").write_bytes(encoded(np.full((90, 61), 255, np.uint8), "PNG"))
    error = refused(*given.command)
    assert "2 problems" in error
    for name, mask, figure in (("p", "30x39", "30x40"), ("s", "61x90", "90x61")):
        path = given.masks / f"mask_{name}.png"
        assert f"{path}: the mask is {mask}, its foreground {name}.png is {figure}: expected one size" in error


def test_black_mask(given: Given, refused) -> None:
    (given.masks / "mask_p.png").write_bytes(encoded(np.zeros((40, 30), np.uint8), "PNG"))
    assert f"{given.masks / 'mask_p.png'}: black everywhere: a mask needs some white" in refused(*given.command)


def test_mask_without_a_foreground_is_a_warning(given: Given, run) -> None:
    assert run(*given.command, f"--out={given.out}_before")[0] == 0
    (given.masks / "lost_mask.png").write_bytes(MATTE)
    (given.masks / "lost too.jpg").write_bytes(b"not even a picture")
    code, _, error = run(*given.command)
    assert (code, warnings_in(error)) == (0, ["masks: no foreground for lost too.jpg, lost_mask.png; not used"])
    assert tree_of(given.out) == tree_of(Path(f"{given.out}_before"))


def test_foreground_without_a_mask(given: Given, refused) -> None:
    (given.foregrounds / "alone.png").write_bytes(FIGURE)
    (given.masks / "mask_q.png").unlink()
    error = refused(*given.command)
    assert "2 problems" in error
    for name in ("alone", "q"):
        expected = f"(expected {name} or mask_{name} or {name}_mask); add it or remove the foreground"
        path = given.foregrounds / f"{name}.png"
        assert f"{path}: a foreground without a mask in {given.masks} {expected}" in error


def test_foreground_that_does_not_fit(given: Given, refused) -> None:
    for name, width in (("wide", 65), ("wider", 200), ("fits", 64)):
        (given.foregrounds / f"{name}.png").write_bytes(encoded(cutout(RNG, width, 20), "PNG"))
    error = refused(*given.without_masks)
    assert "2 problems" in error
    for name, size in (("wide", "65x20"), ("wider", "200x20")):
        path = given.foregrounds / f"{name}.png"
        assert f"{path}: {size} is {size} when scaled, which does not fit the frame of 64x48" in error
    assert "foreground_height" in error


@every_folder
def test_two_files_with_one_stem(given: Given, refused, option: str) -> None:
    first = sorted(given.folder(option).iterdir())[0]
    for twin in (first.with_suffix(".tif"), given.folder(option) / "é.png", given.folder(option) / "é.webp"):
        twin.write_bytes(FIGURE)
    (given.folder(option) / f"{unicodedata.normalize('NFD', 'é')}.bmp").write_bytes(FIGURE)
    error = refused(*given.command)
    assert "3 problems" in error
    assert f"{first} and {first.stem}.tif share one stem: rename or remove one" in error
    assert len(re.findall(r"é\.\w+ and é\.\w+ share one stem", unicodedata.normalize("NFC", error))) == 2


# -- the output path ------------------------------------------------------------------------------------


def test_out_is_not_ours(given: Given, refused, tmp_path: Path) -> None:
    full = write(tmp_path / "full", **{"thesis.txt": b"dear"})
    (tmp_path / "file").write_bytes(b"dear")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = tree_of(tmp_path)
    for path, message in {
        full: "exists and is not a data set of ours (no dataset.json): choose another path or empty it",
        given.backgrounds: "exists and is not a data set of ours",
        given.foregrounds.parent: "exists and is not a data set of ours",
        tmp_path / "file": "exists and is not a folder: choose another path",
        tmp_path / "link": "exists and is not a folder",
        tmp_path / "dangling": "exists and is not a folder",
    }.items():
        assert f"--out {path}: {message}" in refused(*given.command, f"--out={path}", out=path)
    assert tree_of(tmp_path) == before


def test_out_in_a_file(given: Given, refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"dear")
    assert str(tmp_path / "file") in refused(*given.command, f"--out={tmp_path / 'file' / 'out'}")
    assert (tmp_path / "file").read_bytes() == b"dear"


def test_out_with_an_empty_name(given: Given, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not mean the current folder, even if that is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "out: got an empty name" in refused(*given.command, "--out=", out=tmp_path / "here")


def test_out_with_a_name_too_long(given: Given, refused) -> None:
    path = given.out.with_name("x" * 300)
    assert f"{path}: the name is too long for this file system" in refused(*given.command, f"--out={path}")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"format": "coco"}', b"[1]", b"\xff\xfe{"])
def test_out_holds_another_dataset_json(given: Given, refused, content: bytes) -> None:
    write(given.out, **{"dataset.json": content})
    error = refused(*given.command)
    assert f"{given.out / 'dataset.json'}: damaged or not ours: expected JSON with format gpufgbg" in error
    assert (given.out / "dataset.json").read_bytes() == content


def test_no_permission_to_write(forbidden: Given, refused) -> None:
    closed = forbidden.out.parent / "closed"
    closed.mkdir(mode=0o555)
    with nobody():
        error = refused(*forbidden.command, f"--out={closed / 'out'}", out=closed)
    assert "no permission to write " in error
    assert str(closed / "out") in error
    assert error.endswith("choose another folder or change its permissions")


def test_no_permission_to_enter(forbidden: Given, refused) -> None:
    closed = forbidden.out.parent / "closed"
    closed.mkdir(mode=0o000)
    with nobody():
        error = refused(*forbidden.command, f"--out={closed / 'out'}", out=forbidden.out)
    assert f"no permission to write {closed / 'out'}" in error
    closed.chmod(0o755)
    assert not any(closed.iterdir())


def test_no_permission_on_resume(forbidden: Given, run, refused) -> None:
    """A data set that somebody else owns."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make what others own")
    assert run(*forbidden.command, "--samples=0:5")[0] == 0
    before = tree_of(forbidden.out)
    with nobody():
        assert "no permission to write " in refused(*forbidden.command, out=forbidden.out)
    assert tree_of(forbidden.out) == before


# -- another recipe or other assets on resume -----------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--per-pair=3", "per_pair is 2 there and 3 here"),
        ("--flip=never", "flip is 'both' there and 'never' here"),
        ("--size=64x49", "size is [64, 48] there and [64, 49] here"),
        ("--foreground-height=19", "foreground_height is 20 there and 19 here"),
        ("--seed=1", "seed is 0 there and 1 here"),
        ("--quality=66", "quality is 65 there and 66 here"),
        ("--subsampling=444", "subsampling is '420' there and '444' here"),
        ("--no-optimize", "optimize is True there and False here"),
        ("--sink=zip", "sink is 'tree' there and 'zip' here"),
        ("--sink=tar", "sink is 'tree' there and 'tar' here"),
    ],
)
def test_another_recipe_on_resume(given: Given, run, refused, changed: str, message: str) -> None:
    assert run(*given.command, "--samples=0:9")[0] == 0
    before = tree_of(given.out)
    error = refused(*given.command, changed)
    assert error.endswith(
        f"--out {given.out}: holds a data set of another recipe or other pictures: {message}: "
        "give the same ones to continue it, or choose another path"
    )
    assert tree_of(given.out) == before


def _replace(given: Given) -> None:
    (given.backgrounds / "b.PNG").write_bytes(encoded(smooth(RNG, 120, 80, 3), "PNG"))


def _one_more(given: Given) -> None:
    (given.foregrounds / "t.png").write_bytes(FIGURE)
    (given.masks / "t.png").write_bytes(MATTE)


def _one_less(given: Given) -> None:
    (given.backgrounds / "c.jpeg").unlink()


def _another_mask(given: Given) -> None:
    matte = np.full((20, 11), 200, np.uint8)
    (given.masks / "mask_q.png").write_bytes(encoded(matte, "PNG"))


def _reordered(given: Given) -> None:
    (given.backgrounds / "a.jpg").rename(given.backgrounds / "z.jpg")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (_replace, ["backgrounds: another b.PNG"]),
        (_one_more, ["4 foregrounds there, 5 here", "4 masks there, 5 here"]),
        (_one_less, ["3 backgrounds there, 2 here"]),
        (_another_mask, ["masks: another mask_q.png"]),
        (_reordered, ["backgrounds: another a.jpg"]),
    ],
)
@pytest.mark.parametrize("samples", ["0:9", "0:48"], ids=["begun", "complete"])
def test_other_pictures_on_resume(
    given: Given, run, refused, samples: str, change: Callable[[Given], None], messages: list[str]
) -> None:
    assert run(*given.command, f"--samples={samples}")[0] == 0
    before = tree_of(given.out)
    change(given)
    error = refused(*given.command)
    assert f"--out {given.out}: holds a data set of another recipe or other pictures: " in error
    for message in messages:
        assert message in error
    assert tree_of(given.out) == before


@pytest.mark.parametrize("first", ["files", "alpha"])
def test_other_masks_on_resume(given: Given, run, refused, first: str) -> None:
    one, other = (given.command, given.without_masks)[:: 1 if first == "files" else -1]
    assert run(*one, "--samples=0:9")[0] == 0
    before = tree_of(given.out)
    error = refused(*other)
    there, here = ("4 masks", "0") if first == "files" else ("0 masks", "4")
    assert f"{there} there, {here} here" in error
    assert tree_of(given.out) == before


def test_the_same_files_as_masks_on_resume(given: Given, run, refused) -> None:
    """The foregrounds given as masks too are other masks than the foregrounds' alpha."""
    assert run(*given.without_masks, "--samples=0:9")[0] == 0
    before = tree_of(given.out)
    assert "0 masks there, 4 here" in refused(*given.command, f"--masks={given.foregrounds}")
    assert tree_of(given.out) == before


def test_all_differences_on_resume_are_named(given: Given, run, refused) -> None:
    assert run(*given.command, "--samples=0:9")[0] == 0
    _replace(given)
    error = refused(*given.command, "--seed=1", "--quality=1", "--sink=tar")
    for part in ("seed is 0 there and 1 here", "quality is 65", "sink is 'tree'", "backgrounds: another b.PNG"):
        assert part in error


def test_same_pictures_elsewhere_continue(given: Given, folders: dict[str, Path], arguments: list[str], run) -> None:
    """It is the pictures that count, not where they lie."""
    assert run(*given.command, "--samples=0:9")[0] == 0
    code, printed, _ = run(*arguments)
    assert code == 0
    assert "39 samples in " in printed
    assert "complete" in printed


# -- no space left --------------------------------------------------------------------------------------


def undisturbed(given: Given, run, sink: str) -> dict[str, bytes]:
    out = Path(f"{given.out}_{sink}")
    assert run(*given.command, f"--sink={sink}", f"--out={out}")[0] == 0
    return tree_of(out)


@pytest.fixture
def short_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 6 samples, so that small data sets have many."""
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", 7)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "gpufgbg-test", folder]
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root on Linux to mount a small disk")
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, capture_output=True)


SAFE = re.compile(r"^gpufgbg: error: no space left on the disk of \S+; (\d+) of 48 samples are safe; free some and ")


@pytest.mark.usefixtures("short_shards")
@pytest.mark.parametrize("sink", ["tree", "zip", "tar"])
def test_no_space_left(given: Given, run, small_disk: Path, sink: str) -> None:
    expected = undisturbed(given, run, sink)
    out = small_disk / "out"
    command = [*given.command, f"--sink={sink}", f"--out={out}"]
    assert run(*command, "--samples=0:12")[0] == 0
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - (40 << 10)))
    code, printed, error = run(*command)
    assert (code, printed) == (2, ""), error
    stopped = SAFE.match(error_in(error))
    assert stopped, error
    safe = int(stopped[1])
    assert 12 <= safe == sum(len(record.shard) for record in Manifest(out).records())
    made = tree_of(out)  # no picture is there in part
    assert all(made[path] == data for path, data in expected.items() if path in made and path.endswith(".jpg"))
    code, _, error = run(*command)  # still full: says so again, and loses nothing
    assert code == 2
    assert int(SAFE.match(error_in(error))[1]) >= safe
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    code, printed, error = run(*command)
    assert code == 0, error
    assert "complete" in printed
    assert tree_of(out) == expected
    assert run("verify", out, "--rerender=48")[0] == 0


@pytest.mark.usefixtures("short_shards")
@pytest.mark.parametrize(
    ("owner", "name", "sink", "calls"),
    [
        (manifest, "write_atomic", "tree", 5),  # the assets
        (tree, "_write", "tree", 60),  # the samples
        (tar.TarSink, "pack", "tar", 5),
        (stored_zip.ZipSink, "pack", "zip", 5),
        (tree, "sync_file_system", "tree", 0),  # committing
        (Manifest, "record", "tree", 0),
        (Manifest, "record", "zip", 0),
        (dataset, "publish_labels", "tar", 0),  # finishing
        (Manifest, "write", "tree", 1),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_no_space_left_at_any_step(
    given: Given, run, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, sink: str, calls: int
) -> None:
    expected = undisturbed(given, run, sink)
    real, count = getattr(owner, name), itertools.count()

    def full(*arguments, **options):
        if next(count) >= calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    command = [*given.command, f"--sink={sink}"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        code, printed, error = run(*command)
    assert (code, printed) == (2, ""), error
    line = error_in(error)
    assert line.startswith(f"gpufgbg: error: no space left on the disk of {given.out}; ")
    assert line.endswith("free some and run the same command again")
    safe = sum(len(record.shard) for record in Manifest(given.out).records())
    assert f"; {safe} of 48 samples are safe; " in line
    code, printed, error = run(*command)
    assert code == 0, error
    assert "complete" in printed
    assert f"{48 - safe} samples in " in printed
    assert tree_of(given.out) == expected


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EDQUOT, "the disk quota is used up at {out}; 0 of 48 samples are safe; free some and run"),
        (errno.EROFS, "{out} is on a read-only file system: choose another folder"),
        (errno.EIO, "{out}: the disk reports an input/output error; 0 of 48 samples are safe; run the same"),
        (errno.EMFILE, "too many open files: raise the limit (ulimit -n) or use fewer workers"),
        (errno.EFBIG, "{out}: larger than its file system or ulimit -f allows; 0 of 48 samples are safe; raise"),
    ],
)
def test_other_refusals_of_the_disk(
    given: Given, run, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def broken(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(tree, "_write", broken)
        status, printed, error = run(*given.command)
    assert (status, printed) == (2, "")
    assert error_in(error).startswith(f"gpufgbg: error: {message.format(out=given.out)}")
    assert run(*given.command)[0] == 0


# -- values out of range --------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "per-pair": (["0", "-1", "1000001", "2.5", "many", "", "1e3"], "expected 1 to 1000000"),
    "flip": (["x", "", "BOTH", "true"], "both"),
    "size": (
        ["0", "16385", "a", "10x", "x10", "0x10", "10x0", "10x16385", "-5", "10X10", "10.5", "", "1x2x3"],
        "size",
    ),
    "foreground-height": (["0", "-1", "49", "16385", "x", ""], "expected 1 to 48"),
    "seed": (["-1", str(2**64), "x", "", "0.5", "0x1"], f"expected 0 to {2**64 - 1}"),
    "quality": (["0", "101", "-1", "high", ""], "expected 1 to 100"),
    "subsampling": (["411", "4:2:0", "42", ""], "420"),
    "sink": (["x", "", "TREE", "dir"], "tree"),
    "device": (["x", "", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"], "expected auto, cpu, cuda or cuda:N"),
    "samples": (["5:5", "5:2", "0:1000000000", "48:49", "0:49", "0:0", ":0", "48:"], "0 <= A < B <= 48"),
    "workers": (["0", "1025", "-1", "x", "", "1.5"], "expected 1 to 1024"),
}
MALFORMED = {"samples": ["x", "5", "1:2:3", "-1:5", "5:-1", "a:b", "1.5:2", "", "1-5"]}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [(option, value, expected) for option, (values, expected) in OUT_OF_RANGE.items() for value in values]
    + [(option, value, "expected A:B") for option, values in MALFORMED.items() for value in values],
)
def test_value_out_of_range(given: Given, refused, option: str, value: str, expected: str) -> None:
    error = refused(*given.command, f"--{option}={value}")
    assert f"--{option}: " in error
    assert value in error or (option == "size" and any(f"got {part}," in error for part in value.split("x")))
    assert expected in error or ("whole number" in error and not re.fullmatch(r"-?\d+", value))


@pytest.mark.parametrize(
    "changed",
    [
        ["--per-pair=1000000"], ["--per-pair=1"], ["--seed=0"], [f"--seed={2**64 - 1}"], ["--quality=1"],
        ["--quality=100"], ["--foreground-height=1"], ["--foreground-height=48", "--size=200x48"], ["--workers=1"],
        ["--workers=1024"], ["--samples=47:48"], ["--samples=:1"], ["--samples=47:"], ["--size=64x20"],
        ["--flip=always"], ["--device=cpu"], ["--device=auto"],
    ],
    ids=lambda changed: changed[0],
)  # fmt: skip
def test_value_at_the_edge(given: Given, run, changed: list[str]) -> None:
    code, _, error = run(*given.command, "--samples=0:1", *changed)
    assert (code, warnings_in(error)) == (0, [])
    assert len(samples_of(given.out)) == 1


def test_largest_frame() -> None:
    assert Recipe(size=(16384, 16384), foreground_height=16384).size == (16384, 16384)
    assert Recipe(size=1, foreground_height=1).size == (1, 1)


@pytest.mark.parametrize("option", ["backgrounds", "foregrounds", "masks", "out", *OUT_OF_RANGE])
def test_option_without_its_value(given: Given, refused, option: str) -> None:
    assert f"argument --{option}: expected one argument" in refused(*given.command, f"--{option}")


@pytest.mark.parametrize("option", ["backgrounds", "foregrounds", "out"])
def test_option_that_is_left_out(given: Given, refused, option: str) -> None:
    kept = [argument for argument in given.command if not argument.startswith(f"--{option}=")]
    assert f"the following arguments are required: --{option}" in refused(*kept)


def test_the_last_of_an_options_values_counts(given: Given, run) -> None:
    """As everywhere: a script's defaults are overruled at the end of its command line."""
    assert run(*given.command, "--seed=1", "--samples=0:9")[0] == 0
    once = tree_of(given.out)
    shutil.rmtree(given.out)
    assert run(*given.command, "--seed=7", "--samples=3:4", "--seed=1", "--samples=0:9")[0] == 0
    assert tree_of(given.out) == once


def test_arguments_that_are_too_many(given: Given, refused) -> None:
    assert "unrecognized arguments: more" in refused(*given.command, "more")
    assert "unrecognized arguments: --seeds=3" in refused(*given.command, "--seeds=3")


# -- decompression bombs --------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@every_folder
@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (12_000, 11_000)], ids=str)
def test_decompression_bomb(given: Given, refused, option: str, size: tuple[int, int]) -> None:
    assert size[0] * size[1] > Image.MAX_IMAGE_PIXELS
    name = {"backgrounds": "b.PNG", "foregrounds": "q.png", "masks": "mask_q.png"}[option]
    path = given.folder(option) / name
    path.write_bytes(bomb(*size))
    assert f"{path}: too large to decode safely: expected at most 89,478,485 pixels; scale it down" in refused(
        *given.command
    )


def test_all_bombs_are_named(given: Given, refused) -> None:
    paths = [given.backgrounds / "x.png", given.backgrounds / "y.png", given.foregrounds / "q.png"]
    for path in paths:
        path.write_bytes(bomb(12_000, 11_000))
    error = refused(*given.command)
    assert "3 problems" in error
    assert all(f"{path}: too large to decode safely" in error for path in paths)


# -- names, links, subfolders ---------------------------------------------------------------------------


def check_samples(out: Path, count: int) -> None:
    listed = samples_of(out)
    assert len(listed) == count
    for name, x, y in listed[:: max(1, count // 10)]:
        for path, data in expected_files(out, name, x, y).items():
            assert (out / path).read_bytes() == data


def test_odd_names(folders: dict[str, Path], run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pictures, of folders and of the data set, given relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    figures, mattes = sorted(folders["foregrounds"].iterdir()), sorted(folders["masks"].iterdir())
    spelled = ["-rf", "--help", "日本 語", 'it\'s; "a" $HOME']
    if sys.platform == "linux":
        spelled[3] += "\n" + os.fsdecode(b"\xff")
    for folder in ("-in dir", "-fg é", "-m"):
        Path(folder).mkdir()
    (Path("-in dir") / "-été %s.jpg").write_bytes(SCENE)
    for name, figure, matte in zip(spelled, figures, mattes, strict=True):
        (Path("-fg é") / f"{name}.png").write_bytes(figure.read_bytes())
        (Path("-m") / f"{name}_mask.png").write_bytes(matte.read_bytes())
    command = ["generate", "--backgrounds=-in dir", "--foregrounds=-fg é", "--masks=-m", "--size=64x48"]
    command += ["--foreground-height=20", "--per-pair=1", "--out=-out ö\n"]
    code, printed, error = run(*command)
    assert (code, warnings_in(error)) == (0, []), error
    assert "-out ö\\n: complete" in printed
    check_samples(tmp_path / "-out ö\n", 8)
    assert run("verify", "./-out ö\n", "--rerender=8")[0] == 0
    assert run(*command)[0] == 0  # and again: nothing left to do


def test_odd_names_in_messages_are_printable(given: Given, refused) -> None:
    for name in ("new\nline.png", "tab\t.png", os.fsdecode(b"\xff.png"), "\x1b[31m.png"):
        (given.backgrounds / name).write_bytes(b"")
    error = refused(*given.command)
    assert error.isprintable()
    assert "4 problems" in error
    for name in (r"new\nline.png", r"tab\t.png", r"\udcff.png", r"\x1b[31m.png"):
        assert f"{given.backgrounds}/{name}: zero bytes long" in error


def test_links_and_subfolders(given: Given, run, tmp_path: Path) -> None:
    assert run(*given.command, f"--out={given.out}_before")[0] == 0
    elsewhere = tmp_path / "elsewhere"
    given.backgrounds.rename(elsewhere)
    given.backgrounds.symlink_to(elsewhere)
    (elsewhere / "a.jpg").rename(tmp_path / "target without ending")
    (elsewhere / "a.jpg").symlink_to(tmp_path / "target without ending")
    (given.foregrounds / "deeper").mkdir()
    (given.foregrounds / "deeper" / "x.png").write_bytes(b"not looked at")
    (given.masks / "more.png").symlink_to(given.foregrounds / "deeper")
    (given.masks / "notes.txt").write_text("not looked at")
    code, _, error = run(*given.command)
    assert code == 0, error
    assert warnings_in(error) == [
        "foregrounds: subfolders are not read: deeper",
        "masks: subfolders are not read: more.png",
        "masks: not pictures by their extension, not read: notes.txt",
    ]
    assert tree_of(given.out) == tree_of(Path(f"{given.out}_before"))


@every_folder
def test_links_to_nothing(given: Given, refused, option: str) -> None:
    (given.folder(option) / "broken.png").symlink_to("nowhere.png")
    (given.folder(option) / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(given.folder(option) / "pipe.png")
    error = refused(*given.command)
    assert "3 problems" in error
    for name in ("broken.png", "loop.jpg"):
        assert f"{given.folder(option) / name}: a symbolic link to nothing that can be read" in error
    assert f"{given.folder(option) / 'pipe.png'}: neither a file nor a folder: remove it" in error


def test_out_may_be_a_link_to_a_folder(given: Given, run, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    given.out.symlink_to(tmp_path / "real")
    assert run(*given.command)[0] == 0
    check_samples(tmp_path / "real", 48)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_everything_is_named_at_once(given: Given, refused) -> None:
    """What is seen from outside, and what is seen once it is decoded."""
    os.mkfifo(given.backgrounds / "pipe.jpg")
    (given.backgrounds / "zero.jpg").write_bytes(b"")
    (given.foregrounds / "gone.png").symlink_to("nowhere")
    (given.foregrounds / "alone.png").write_bytes(FIGURE)
    (given.foregrounds / "p.png").write_bytes(b"")
    error = refused(*given.command)
    assert "5 problems with the input: " in error
    for message in (
        f"{given.backgrounds / 'pipe.jpg'}: neither a file nor a folder",
        f"{given.backgrounds / 'zero.jpg'}: zero bytes long",
        f"{given.foregrounds / 'gone.png'}: a symbolic link to nothing",
        f"{given.foregrounds / 'alone.png'}: a foreground without a mask",
        f"{given.foregrounds / 'p.png'}: zero bytes long",
    ):
        assert message in error
