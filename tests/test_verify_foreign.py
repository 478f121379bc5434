"""verify of data sets that gpufgbg did not make: the original's layout in a tree, a zip and a tar file."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import smooth
from PIL import Image

from gpufgbg import DatasetError, OptionError
from gpufgbg.readers import scan, scan_labels
from gpufgbg.verify import verify

WIDTH, HEIGHT = 40, 30
STEMS = [f"bg_{b:02d}/bg_{b:02d}_fg_00_{f}_{2 * b + (f == 'F'):06d}" for b in range(4) for f in "TF"]


@pytest.fixture
def download(tmp_path) -> Path:
    """Four backgrounds, eight composites with masks, depth maps and labels."""
    rng = np.random.default_rng(0)
    root = tmp_path / "download" / "original"

    def save(path: str, channels: int, width: int = WIDTH, height: int = HEIGHT) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = smooth(rng, width, height, channels)
        Image.fromarray(pixels if channels > 1 else pixels[..., 0]).save(root / path)

    for b in range(4):
        save(f"bg/bg_{b:02d}.jpg", 3)
    save("fg/fg_00.png", 4, 11, 13)
    save("fg_mask/fg_00.jpg", 1, 11, 13)
    (root / "labels").mkdir()
    for stem in STEMS:
        save(f"fg_bg/{stem}.jpg", 3)
        save(f"fg_bg_masks/{stem}.jpg", 1)
        save(f"fg_bg_depth/{stem}.jpg", 1)
        with (root / "labels" / f"{stem[:5]}_label_info.txt").open("a") as file:
            file.write(f"{stem[6:]}.jpg\t{WIDTH - 11}\t0\n")
    (root / "notes.txt").write_text("not a picture")
    return root


def packed(root: Path, form: str) -> Path:
    """The data set as a tree, below a folder, as a zip (stored or compressed) or as a tar file."""
    if form == "below":
        return root.parent
    path = root.parent / f"packed.{form}"
    if form in ("stored", "deflated"):
        method = zipfile.ZIP_STORED if form == "stored" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            for file in sorted(root.rglob("*")):
                archive.write(file, file.relative_to(root.parent))
    elif form == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(root, "some/where")
    else:
        return root
    return path


FORMS = ("tree", "below", "stored", "deflated", "tar")


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_set_has_no_fault(download, run, form):
    code, printed, _ = run("verify", packed(download, form), "--device", "cpu")
    assert code == 0, printed
    assert printed == "8 samples, 34 files read, 0 samples rendered again, 30 pictures decoded: no faults\n"


@pytest.mark.parametrize("form", FORMS)
def test_what_a_system_adds_is_passed_over(download, run, form):
    """macOS writes ``._NAME`` beside each file of an archive, file managers keep thumbnails in hidden folders."""
    for place in ("fg_bg/bg_00/._x.jpg", "fg_bg/bg_00/.thumbs/x.jpg", "labels/._bg_00_label_info.txt", "bg/.x.jpg"):
        (download / place).parent.mkdir(exist_ok=True)
        (download / place).write_bytes(b"litter")
    shutil.copytree(download / "bg", download.parent / "__MACOSX" / "bg")
    (download.parent / "__MACOSX" / "bg" / "bg_00.jpg").write_bytes(b"litter")
    path = packed(download, form)
    if form == "stored":
        with zipfile.ZipFile(path, "a") as archive:
            archive.write(download.parent / "__MACOSX" / "bg" / "bg_00.jpg", "__MACOSX/bg/bg_00.jpg")
    (download.parent / "__MACOSX").rename(download.parent / "mac")
    if form == "below":
        shutil.rmtree(download.parent / "mac")
    assert run("verify", path, "--device", "cpu")[1].startswith("8 samples, 34 files read")
    assert run("stats", path, "--device", "cpu")[0] == 0


def test_members_of_a_tar_of_the_folder_itself(download):
    with tarfile.open(download.parent / "dot.tar", "w") as archive:
        archive.add(download, ".")  # as tar names them: ./fg_bg/...
    assert verify(download.parent / "dot.tar", device="cpu").files == 34


def test_linked_folders_are_read_once(download):
    (download / "fg_bg" / "bg_00").rename(download.parent / "elsewhere")
    (download / "fg_bg" / "bg_00").symlink_to(download.parent / "elsewhere", target_is_directory=True)
    (download / "fg_bg" / "bg_01" / "circle").symlink_to(download / "fg_bg", target_is_directory=True)
    report = verify(download, device="cpu")
    assert report.samples == 8 and not report.faults


def test_progress_counts_composites(download):
    seen: list[tuple[int, int]] = []
    verify(download, device="cpu", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (8, 0)


@pytest.mark.parametrize("form", FORMS)
def test_every_fault_is_found_in_every_form(download, form):
    bad = STEMS[3]
    path = download / "fg_bg" / f"{bad}.jpg"
    path.write_bytes(path.read_bytes()[:-30])
    (download / "fg_bg_masks" / f"{STEMS[5]}.jpg").unlink()
    Image.new("L", (WIDTH, HEIGHT - 1)).save(download / "fg_bg_depth" / f"{STEMS[6]}.jpg")
    found = verify(packed(download, form), device="cpu")
    assert (found.samples, found.files, found.decoded) == (8, 33, 28)
    assert len(found.faults) == 3, found.faults
    for fault, (name, message) in zip(
        found.faults,
        [
            (f"fg_bg/{bad}.jpg", "can't be decoded: damaged or truncated JPEG: its end is not there"),
            (f"fg_bg_depth/{STEMS[6]}.jpg", "40x29, most in fg_bg_depth/ are 40x30"),
            (f"fg_bg_masks/{STEMS[5]}", "missing, fg_bg/ has it"),
        ],
        strict=True,
    ):
        assert name in fault and fault.endswith(message)


def change(root: Path, old: str, new: str) -> None:
    path = root / "labels" / "bg_02_label_info.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


FIRST = f"{STEMS[4][6:]}.jpg"


@pytest.mark.parametrize(
    ("damage", "messages"),
    {
        "another name": (
            lambda d: change(d, FIRST, "other.jpg"),
            ["bg_02_label_info.txt: line 1: other.jpg: no such picture in fg_bg/", "fg_00_T_000004 has no label"],
        ),
        "twice": (
            lambda d: change(d, f"{STEMS[5][6:]}.jpg", FIRST),
            [f"line 2: {FIRST}: labelled twice", f"{STEMS[5][6:]} has no label"],
        ),
        "no numbers": (lambda d: change(d, f"{FIRST}\t29", f"{FIRST}\tx"), ["line 1: 'bg_02"]),
        "too few": (lambda d: change(d, f"{FIRST}\t29\t0", FIRST), ["expected NAME, tab, X, tab, Y"]),
        "outside": (
            lambda d: change(d, f"{FIRST}\t29\t0", f"{FIRST}\t40\t0"),
            [f"line 1: {FIRST}: corner 40, 0 lies outside the frame of 40x30"],
        ),
        "a file is gone": (
            lambda d: (d / "labels" / "bg_02_label_info.txt").unlink(),
            ["bg_02_fg_00_F_000005 has no label", "bg_02_fg_00_T_000004 has no label"],
        ),
        "all are gone": (lambda d: shutil.rmtree(d / "labels"), []),
        "two of one name": (
            lambda d: shutil.copy(d / "fg_bg" / f"{STEMS[0]}.jpg", d / "fg_bg" / f"{STEMS[0]}.jpeg"),
            ["another picture has this name but for its ending"],
        ),
        "no depth at all": (lambda d: shutil.rmtree(d / "fg_bg_depth"), []),
        "the composite is gone": (
            lambda d: (d / "fg_bg" / f"{STEMS[0]}.jpg").unlink(),
            [f"fg_bg/{STEMS[0]}: missing, fg_bg_masks/ has it", "no such picture in fg_bg/"],
        ),
    }.values(),
)  # fmt: skip
def test_faults_of_labels_and_names(download, run, damage, messages):
    damage(download)
    code, printed, _ = run("verify", download, "--device", "cpu")
    faults = [line for line in printed.splitlines() if line.startswith("fault: ")]
    assert len(faults) == len(messages) and code == bool(messages), printed
    for message in messages:
        assert any(message in fault for fault in faults), printed


def test_cut_outs_may_have_any_size(download):
    Image.new("RGBA", (5, 6)).save(download / "fg" / "fg_01.png")
    assert verify(download, device="cpu").faults == []


def test_twenty_are_named_and_the_rest_is_counted(download):
    for i in range(30):
        for folder in ("fg_bg", "fg_bg_masks", "fg_bg_depth"):
            shutil.copy(download / folder / f"{STEMS[0]}.jpg", download / folder / "bg_00" / f"more_{i:02d}.jpg")
        (download / "fg_bg_masks" / "bg_00" / f"more_{i:02d}.jpg").unlink()
        Image.new("L", (3, 3)).save(download / "fg_bg_depth" / "bg_00" / f"more_{i:02d}.jpg")
    shutil.rmtree(download / "labels")
    for i in range(30):  # so that the small ones are fewer
        Image.new("L", (WIDTH, HEIGHT)).save(download / "fg_bg_depth" / "bg_01" / f"large_{i:02d}.jpg")
    faults = verify(download, device="cpu").faults
    assert sum("3x3, most in fg_bg_depth/ are 40x30" in fault for fault in faults) == 20
    assert "10 more pictures in fg_bg_depth/ have another size than most" in faults
    assert sum("missing" in fault for fault in faults) == 21 and "70 more pictures are missing" in faults


def test_rerender_wants_a_set_of_ours(download, run):
    code, printed, error = run("verify", download, "--rerender", 3)
    assert (code, printed) == (2, "") and "--rerender: " in error and "no dataset.json" in error
    with pytest.raises(OptionError, match="rerender"):
        verify(packed(download, "tar"), 1)


def test_a_damaged_member_of_a_zip_is_named(download):
    path = packed(download, "stored")
    member = f"original/fg_bg/{STEMS[2]}.jpg"
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo(member).header_offset + 200
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    (fault,) = verify(path, device="cpu").faults
    assert member in fault and "its length or checksum is not what the archive says" in fault


@pytest.mark.parametrize("form", FORMS)
def test_readers_give_the_files_as_they_are(download, form):
    pictures = {picture.path: picture for picture in scan(packed(download, form))}
    assert len(pictures) == 30
    for picture in pictures.values():
        parts = picture.path.split("/")
        at = next(i for i, part in enumerate(parts) if part.startswith(("bg", "fg")))
        assert picture.load() == download.joinpath(*parts[at:]).read_bytes()
        assert picture.name.endswith(picture.path)
    composites = {picture.key for picture in pictures.values() if picture.kind == "composite"}
    assert composites == {picture.key for picture in pictures.values() if picture.kind == "depth"} == set(STEMS)
    labels = {name.rpartition("/")[2]: content for name, content in scan_labels(packed(download, form))}
    assert labels == {path.name: path.read_bytes() for path in (download / "labels").iterdir()}


def test_a_large_file_is_read_whole(tmp_path):
    for size in (0, 1, 65_535, 65_536, 65_537, 300_000):
        path = tmp_path / "bg" / "a.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
        (picture,) = scan(tmp_path)
        assert picture.load() == path.read_bytes() and len(picture.load()) == size
    path.unlink()
    with pytest.raises(DatasetError, match=r"a\.png: can't be read: No such file"):
        picture.load()
