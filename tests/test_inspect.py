"""stats, verify and preview: on our data sets, on damaged ones, and on ones that we did not make."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import smooth
from PIL import Image

from gpufgbg import Interrupted, Moments, Recipe, decoding, generate, mean_std, report
from gpufgbg.readers import StoredPicture
from gpufgbg.report import format_bytes
from gpufgbg.statistics import statistics

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
SINKS = ("tree", "zip", "tar")


@pytest.fixture(scope="module")
def sets(folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for sink in SINKS:
        generate(root / sink, **folders, recipe=SMALL, sink=sink)
    return root


@pytest.fixture
def dataset(sets, tmp_path, request) -> Path:
    """A copy of the data set to damage."""
    sink = getattr(request, "param", "tree")
    shutil.copytree(sets / sink, tmp_path / "set")
    return tmp_path / "set"


def decoded(folder: Path, mode: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert(mode)) for path in sorted(folder.rglob("*.jpg"))])


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("workers", [1, 2])
def test_statistics_equal_pillows_decoding(sets, sink, workers):
    found = statistics(sets / sink, workers, device="cpu")
    tree = sets / "tree"
    assert list(found) == ["background", "foreground", "foreground_mask", "composite", "composite_mask"]
    for kind, folder, mode in (
        ("background", "bg", "RGB"),
        ("composite", "fg_bg", "RGB"),
        ("composite_mask", "fg_bg_masks", "L"),
    ):
        assert found[kind].moments == Moments.of(decoded(tree / folder, mode))
        assert found[kind].size_bytes == sum(p.stat().st_size for p in (tree / folder).rglob("*.jpg"))
        assert found[kind].forms == {(64, 48, mode, "JPEG")}
    assert found["foreground"].images == found["foreground_mask"].images == 4
    assert found["foreground"].moments == Moments()


def test_statistics_of_a_data_set_that_we_did_not_make(tmp_path, run):
    """The original's layout with odd members: PNG and progressive files, a mask in colour, other files between."""
    rng = np.random.default_rng(0)
    root = tmp_path / "download" / "the_set"
    pictures = {"bg/bg_00.png": smooth(rng, 30, 20, 3), "fg_bg/bg_00/a_T_0.jpg": smooth(rng, 30, 20, 3)}
    pictures |= {
        "fg_bg/bg_00/a_F_1.jpg": smooth(rng, 30, 20, 3),
        "fg_bg_depth/bg_00/a_T_0.jpg": smooth(rng, 30, 20, 3)[..., 0],
    }
    pictures |= {"fg_bg_masks/bg_00/a_T_0.jpg": smooth(rng, 30, 20, 3)}
    for name, pixels in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name, **({"progressive": True} if name.endswith("1.jpg") else {}))
    (root / "notes.txt").write_text("not a picture")
    (root / "fg_bg" / "bg_00" / "list.txt").write_text("not a picture")
    expected = {
        kind: Moments.of(
            np.stack([np.asarray(Image.open(p).convert(mode)) for p in sorted((root / folder).rglob("*.[jp][pn]g"))])
        )
        for kind, folder, mode in (
            ("background", "bg", "RGB"),
            ("composite", "fg_bg", "RGB"),
            ("composite_mask", "fg_bg_masks", "L"),
            ("depth", "fg_bg_depth", "L"),
        )
    }
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root.parent))
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        archive.add(root, "x/y")
    with tarfile.open(tmp_path / "c.tar", "w") as archive:
        archive.add(root, "x/y")
    for path in (root, root.parent, tmp_path / "a.zip", tmp_path / "c.tar"):
        assert {kind: s.moments for kind, s in statistics(path, device="cpu").items()} == expected
    code, printed, _ = run("stats", root)
    assert code == 0 and "depth map" in printed and "fg_bg_depth/" in printed
    code, _, error = run("stats", tmp_path / "b.tar.gz")
    assert code == 2 and "compressed" in error


def test_pictures_of_sixteen_bits(tmp_path, run):
    deep = np.random.default_rng(0).integers(0, 65536, (2, 20, 30), dtype=np.uint16)
    folder = tmp_path / "fg_bg_depth"
    folder.mkdir()
    for n, pixels in enumerate(deep):
        Image.fromarray(pixels).save(folder / f"{n}.png")
    expected = Moments.of((deep >> 8).astype(np.uint8))
    assert statistics(tmp_path, device="cpu")["depth"].moments == expected == mean_std(folder)
    Image.fromarray(deep[0].astype(np.float32)).save(folder / "3.tiff")
    code, _, error = run("stats", tmp_path)
    assert code == 2 and "fg_bg_depth/3.tiff: floating-point pixels: expected 8 or 16 bits" in error


def test_stats_prints_the_originals_table(sets, run):
    code, printed, _ = run("stats", sets / "tar", "--device", "cpu")
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["kind", "folder", "count", "size", "mean", "std"]
    assert [" ".join(line[:-8]) for line in lines[4:5]] == ["composite fg_bg/"]
    found = statistics(sets / "tar", device="cpu")["composite"].moments
    assert lines[4][-6:] == [f"{v:.4f}"[1:] for v in (*found.mean, *found.std)]
    code, printed, _ = run("stats", sets / "tar", "--json", "--device", "cpu")
    content = json.loads(printed)
    assert content["composite"]["statistics"]["sum"] == list(found.sum)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nothing", "no such file or folder"),
        ("empty", "no pictures of a data set"),
        ("text", "neither a zip nor a tar"),
    ],
)
def test_stats_of_something_else(tmp_path, run, what, message):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    if what == "text":
        path.write_text("hello")
    code, printed, error = run("stats", path)
    assert (code, printed) == (2, "") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "no JPEG": (lambda p: p.write_bytes(b"\xff\xd8 no"), "can't be decoded"),
        "empty": (lambda p: p.write_bytes(b""), "can't be decoded: not a picture"),
        "cut off": (lambda p: p.write_bytes(p.read_bytes()[:-40]), "truncated JPEG: its end is not there"),
        "a PNG that is cut off": (lambda p: cut_png(p), "can't be decoded"),
        "a link to nothing": (lambda p: (p.unlink(), p.symlink_to("none")), "can't be read: No such file"),
    }.values(),
)  # fmt: skip
def test_stats_names_a_picture_that_is_damaged(dataset, run, damage, message):
    path = next((dataset / "fg_bg").rglob("*.jpg"))
    damage(path)
    code, printed, error = run("stats", dataset, "--device", "cpu")
    assert (code, printed) == (2, "") and error.count("gpufgbg: error") == 1
    assert path.name in error.splitlines()[-1] and message in error.splitlines()[-1]


def cut_png(path: Path) -> None:
    Image.open(path).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-300])


def test_auto_says_why_it_decodes_on_the_cpu(sets, run):
    reason = decoding.why_cpu("auto")
    if reason is None:
        pytest.skip("this machine has a CUDA device and DALI")
    for command in (("stats",), ("verify", "--decode")):
        code, printed, _ = run(*command, sets / "tree")
        assert code == 0 and printed.splitlines()[-1] == f"decoded on the CPU: {reason}"
        assert "on the CPU" not in run(*command, sets / "tree", "--device", "cpu")[1]


@pytest.mark.parametrize("command", ["stats", "verify"])
@pytest.mark.parametrize("device", ["gpu", "cuda:", "CPU", "cuda:x"])
def test_devices_that_are_no_names(sets, run, command, device):
    code, printed, error = run(command, sets / "tree", "--device", device)
    assert (code, printed) == (2, "") and f"--device: got '{device}', expected auto, cpu, cuda" in error


@pytest.mark.parametrize("command", [("stats",), ("verify",), ("verify", "--decode"), ("verify", "--rerender", "2")])
def test_devices_that_are_not_there(sets, run, command):
    code, printed, error = run(*command, sets / "tree", "--device", "cuda:99")
    assert (code, printed) == (2, "") and error.count("\n") == 1
    assert "device cuda:99: " in error and "use device cpu" in error


@pytest.mark.parametrize("dataset", SINKS, indirect=True)
def test_verify_finds_no_fault_in_a_good_set(dataset, run):
    code, printed, error = run("verify", dataset, "--rerender", 30)
    assert code == 0, printed
    assert "48 samples, 96 files read, 30 samples rendered again: no faults" in printed
    assert "48 of 48 samples" in error


def flip_a_bit(path: Path, at: int = -20) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


SAMPLE = "bg_01/bg_01_fg_02_T_000024.jpg"
FIRST = "bg_00/bg_00_fg_00_T_000000.jpg"


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "a sample is gone": (lambda d: (d / "fg_bg" / SAMPLE).unlink(), "000024.jpg: can't be read"),
        "a mask changed": (lambda d: flip_a_bit(d / "fg_bg_masks" / SAMPLE), "24.jpg: differs"),
        "a sample is cut off": (lambda d: (d / "fg_bg" / FIRST).write_bytes(b"\xff\xd8"), "not a whole JPEG"),
        "one too many": (lambda d: shutil.copy(d / "dataset.json", d / "fg_bg/bg_00/more.jpg"), "more.jpg: belongs"),
        "an asset changed": (lambda d: flip_a_bit(d / "fg/fg_00.png"), "fg_00.png: changed"),
        "an asset is gone": (lambda d: (d / "bg/bg_02.jpg").unlink(), "bg_02.jpg: can't be read"),
        "labels are short": (lambda d: (d / "labels/bg_00_label_info.txt").write_text(""), "32 lines, expected 48"),
    }.values(),
)  # fmt: skip
def test_verify_names_each_fault(dataset, run, damage, message):
    damage(dataset)
    code, printed, _ = run("verify", dataset, "--rerender", 48)
    assert code == 1
    assert any(message in line for line in printed.splitlines() if line.startswith("fault: ")), printed
    code, printed, _ = run("verify", dataset, "--json", "--rerender", 48)
    assert code == 1 and any(message in fault for fault in json.loads(printed)["faults"])


@pytest.mark.parametrize("dataset", SINKS, indirect=True)
def test_verify_decodes_a_good_set(dataset, run):
    code, printed, _ = run("verify", dataset, "--decode", "--device", "cpu")
    assert code == 0 and printed == (
        "48 samples, 96 files read, 0 samples rendered again, 96 pictures decoded: no faults\n"
    )
    assert json.loads(run("verify", dataset, "--decode", "--json", "--rerender", 3)[1]) == {
        "samples": 48, "files": 96, "rerendered": 3, "decoded": 96, "faults": [],
    }  # fmt: skip


def test_verify_decode_names_what_is_no_frame(dataset, run):
    rng = np.random.default_rng(0)
    folder = dataset / "fg_bg" / "bg_00"
    names = sorted(path.name for path in folder.iterdir())
    Image.fromarray(smooth(rng, 64, 47, 3)).save(folder / names[0])
    Image.fromarray(smooth(rng, 64, 48, 1)[..., 0]).save(folder / names[1])
    (folder / names[2]).write_bytes(b"\xff\xd8\xff\xd9")
    code, printed, _ = run("verify", dataset, "--decode", "--device", "cpu")
    faults = [line for line in printed.splitlines() if line.startswith("fault: ")]
    assert code == 1 and len(faults) == 4, printed
    assert sum("checksum differs" in fault for fault in faults) == 1
    assert f"fault: fg_bg/bg_00/{names[0]}: 64x47 RGB JPEG, expected 64x48 RGB JPEG" in faults
    assert f"fault: fg_bg/bg_00/{names[1]}: 64x48 L JPEG, expected 64x48 RGB JPEG" in faults
    assert any(f"fg_bg/bg_00/{names[2]}: can't be decoded" in fault for fault in faults)
    assert "95 pictures decoded" in printed


def test_verify_names_twenty_strangers_and_counts_the_rest(dataset, run):
    for i in range(25):
        (dataset / "fg_bg" / "bg_00" / f"more_{i:02d}.jpg").touch()
    code, printed, _ = run("verify", dataset)
    faults = [line for line in printed.splitlines() if line.startswith("fault: ")]
    assert code == 1 and len(faults) == 21 and faults[-1] == "fault: 5 more files belong to no sample"


def test_verify_notices_a_change_without_rendering(dataset, run):
    flip_a_bit(dataset / "fg_bg/bg_01/bg_01_fg_02_T_000024.jpg")
    code, printed, _ = run("verify", dataset)
    assert code == 1 and "checksum differs" in printed


@pytest.mark.parametrize("dataset", ["zip", "tar"], indirect=True)
def test_verify_notices_a_change_in_an_archive(dataset, run):
    path = next(p for p in dataset.rglob("*") if p.name in ("dataset.zip", "shard-000000.tar"))
    with path.open("r+b") as file:
        data = file.read()
        at = data.rindex(b"\xff\xda") + 40  # in the scan of the last picture
        file.seek(at)
        file.write(bytes([data[at] ^ 4]))
    code, printed, _ = run("verify", dataset)
    assert code == 1 and "fault: " in printed


def test_verify_says_that_a_set_is_incomplete(folders, tmp_path, run):
    generate(tmp_path / "part", **folders, recipe=SMALL, samples=(0, 20))
    code, printed, _ = run("verify", tmp_path / "part")
    assert code == 1 and "incomplete: 20 of 48 samples" in printed


def test_verify_counts_what_an_ended_run_left(folders, tmp_path, run, monkeypatch):
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", 7)

    def stop(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as told:
        generate(tmp_path / "part", **folders, recipe=SMALL, workers=1, batch_size=2, progress=stop)
    safe = int(re.search(r"(\d+) of 48 samples are safe", str(told.value))[1])
    code, printed, _ = run("verify", tmp_path / "part")
    assert code == 1 and safe
    assert f"incomplete: {safe} of 48 samples are there, 0 of them in dataset.json: a run did not end" in printed


@pytest.mark.parametrize(("rerender", "message"), [("-1", "expected 0 or more"), ("x", "whole number")])
def test_verify_options(dataset, run, rerender, message):
    code, _, error = run("verify", dataset, "--rerender", rerender)
    assert code == 2 and message in error


def test_verify_of_something_else(tmp_path, run):
    code, _, error = run("verify", tmp_path)
    assert code == 2 and "no pictures of a data set in it" in error
    code, _, error = run("verify", tmp_path / "nothing")
    assert code == 2 and "no such file or folder" in error
    (tmp_path / ".gpufgbg").mkdir()  # begun, not finished
    code, _, error = run("verify", tmp_path)
    assert code == 2 and "no dataset.json" in error
    (tmp_path / "dataset.json").write_text("{")
    code, _, error = run("verify", tmp_path)
    assert code == 2 and "damaged or not ours" in error
    (tmp_path / "dataset.json").write_text('{"format": "gpufgbg", "format_version": 99}')
    code, _, error = run("verify", tmp_path)
    assert code == 2 and "format version 99, expected 1" in error


@pytest.mark.parametrize("dataset", SINKS, indirect=True)
def test_preview_shows_a_strip_of_each_kind(dataset, run, tmp_path):
    code, printed, _ = run("preview", dataset, "--columns", 3)
    assert code == 0 and printed.strip() == str(dataset / "preview.png")
    sheet = Image.open(dataset / "preview.png")
    # three strips of 48 and two of 20 pixels, 4 pixels between and around; columns as wide as the frame
    assert sheet.size == (3 * 68 + 4, 3 * 48 + 2 * 20 + 6 * 4)
    pixels = np.asarray(sheet.convert("RGB"))
    first = np.asarray(Image.open(dataset / "bg" / "bg_00.jpg").convert("RGB"))
    np.testing.assert_array_equal(pixels[4:52, 4:68], first)
    masks = pixels[-52:-4, 4:-4].astype(int)
    assert np.ptp(masks, axis=2).max() == 0  # grey
    code, printed, _ = run("preview", dataset, "--out", tmp_path / "x.png", "--json")
    assert code == 0 and json.loads(printed) == {"preview": str(tmp_path / "x.png")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--columns", "0"], "--columns: got 0, expected 1 to 100"),
        (["--columns", "101"], "expected 1 to 100"),
        (["--out", "x.jpg"], "expected a name ending in .png"),
        (["--out", "/nowhere/at/all/x.png"], "no such folder"),
    ],
)
def test_preview_options(dataset, run, options, message):
    code, printed, error = run("preview", dataset, *options)
    assert (code, printed) == (2, "") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0B"), (1023, "1023B"), (1024, "1.0K"), (413696, "404K"), (4.2 * 2**30, "4.2G"), (2**50, "1024T")],
)
def test_lengths_are_printed_like_du(count, text):
    assert format_bytes(count) == text


def test_preview_keeps_few_pictures_in_memory(monkeypatch):
    """Which it shows depends on how many there are: it counts before it picks."""

    def scan(root: Path):
        for n in range(30_000):
            yield StoredPicture("composite", f"{root}/", f"fg_bg/bg_00/picture_of_a_long_name_{n:06d}.jpg", bytes)
            if n < 7:
                yield StoredPicture("background", f"{root}/", f"bg/{n}.jpg", bytes)

    monkeypatch.setattr(report, "scan", scan)
    tracemalloc.start()
    try:
        background, composite = report._spread(Path("set"), 10)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    shown = [int(picture.path[-10:-4]) for picture in composite]
    assert shown == [int((i + i * 0.6180339887 % 1) * 3000) for i in range(10)]
    assert [picture.path for picture in background] == [f"bg/{int(i + i * 0.6180339887 % 1)}.jpg" for i in range(7)]
    assert most < 1 << 20
