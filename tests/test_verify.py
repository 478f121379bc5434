"""verify on data sets of ours: every file that is missing, changed or additional is told, in every form and state."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import crews
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpufgbg import Plan, Recipe, add_depth, dataset, generate, labels, segments, verify_labels
from gpufgbg.layout import Layout
from gpufgbg.manifest import Manifest, ShardRecord
from gpufgbg.moments import Moments
from gpufgbg.recipe import Shard
from gpufgbg.verify import verify
from gpufgbg.verify_books import Books
from gpufgbg.verify_report import VerifyReport
from gpufgbg.verify_strangers import Known

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
SINKS = ("tree", "zip", "tar")
SAMPLE = "bg_01_fg_02_T_000024"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shards of a few samples, and no wait for the disk."""
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", crews.SHARD)
    monkeypatch.setattr("gpufgbg.files._syncfs", lambda descriptor: 0)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def sets(folders, tmp_path_factory) -> Callable[..., Path]:
    """Data sets to copy, made once each."""
    root = tmp_path_factory.mktemp("sets")

    def made(sink: str, **options) -> Path:
        out = root / re.sub(r"\W+", "-", f"{sink}{sorted(options.items())}")
        if not out.exists():
            if options.get("depth"):
                pytest.importorskip("onnxruntime")
                pytest.importorskip("onnx")
            options = {"recipe": SMALL, "workers": 2, "device": "cpu", **options}
            generate(out, **folders, sink=sink, **options)
        return out

    return made


@pytest.fixture
def copy(sets, tmp_path) -> Callable[..., Path]:
    def copied(sink: str, name: str = "set", **options) -> Path:
        shutil.copytree(sets(sink, **options), tmp_path / name)
        return tmp_path / name

    return copied


def faults(path: Path, **options) -> list[str]:
    return verify(path, device="cpu", **options).faults


def edit(path: Path, call: Callable) -> None:
    """Change dataset.json's content."""
    file = path / "dataset.json"
    content = json.loads(file.read_text())
    call(content)
    file.write_text(json.dumps(content))


def line_of(path: Path, number: int, call: Callable[[str], str]) -> None:
    """Change a line of a text file, counted from 1."""
    lines = path.read_text().splitlines()
    lines[number - 1] = call(lines[number - 1])
    path.write_text("".join(f"{line}\n" for line in lines if line))


def table_of(path: Path, call: Callable[[pa.Table], pa.Table]) -> None:
    table = call(pq.read_table(path / "labels.parquet"))
    pq.write_table(table, path / "labels.parquet", row_group_size=5)


def column(table: pa.Table, name: str, call: Callable) -> pa.Table:
    """A table with other values in a column."""
    at = table.schema.get_field_index(name)
    return table.set_column(at, name, call(table.column(name).combine_chunks()))


def value_of(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    """A table with another value in a column."""

    def changed(values: pa.Array) -> pa.Array:
        return pa.array([value if n == row else old for n, old in enumerate(values.to_pylist())], values.type)

    return column(table, name, changed)


# -- nothing is wrong -----------------------------------------------------------------------------------

FORMS = [
    ("tree", {}), ("zip", {}), ("tar", {}), ("tar", {"labels": False}),
    ("tree", {"depth": "demo"}), ("zip", {"depth": "demo"}), ("tar", {"depth": "demo"}),
    ("tar", {"depth": "demo", "labels": False}),
]  # fmt: skip


@pytest.mark.parametrize(("sink", "options"), FORMS)
def test_a_good_set_has_no_fault(sets, sink, options):
    report = verify(sets(sink, **options), rerender=48, device="cpu")
    assert report.faults == []
    assert (report.samples, report.files) == (48, 144 if options.get("depth") else 96)


@pytest.mark.parametrize(("sink", "options"), FORMS)
@pytest.mark.parametrize("part", [(0, 5), (3, 21), (40, 48), (16, 32)])
def test_an_incomplete_set_has_no_other_fault(sets, sink, options, part):
    (fault,) = faults(sets(sink, **options, samples=part))
    assert fault.endswith(f": incomplete: {part[1] - part[0]} of 48 samples are there")


@pytest.mark.parametrize("sink", SINKS)
def test_gaps_between_the_samples(copy, folders, sink):
    path = copy(sink, samples=(3, 9))
    for part in ((12, 14), (30, 48), (22, 23)):
        generate(path, **folders, recipe=SMALL, sink=sink, samples=part, device="cpu")
    (fault,) = faults(path)
    assert fault.endswith(": incomplete: 27 of 48 samples are there")
    generate(path, **folders, recipe=SMALL, sink=sink, device="cpu")
    assert faults(path) == []


def test_segments(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT_SHARDS", 4)
    for sink in SINKS:
        generate(tmp_path / sink, **folders, recipe=SMALL, sink=sink, device="cpu")
        assert json.loads((tmp_path / sink / "dataset.json").read_text())["format_version"] == 2
        assert faults(tmp_path / sink) == []
    (tmp_path / "tar" / "shards" / "shard-000009.tar").write_bytes(b"")
    edit(tmp_path / "tar", lambda c: c["statistics"]["composite"]["sum"].__setitem__(0, 5))
    found = faults(tmp_path / "tar")
    assert any("shard-000009.tar: belongs to no sample" in fault for fault in found)
    assert any("statistics.composite.sum: says [5, " in fault for fault in found) and len(found) == 2


@pytest.mark.parametrize("options", [{}, {"depth": "demo"}])
@pytest.mark.parametrize("sink", SINKS)
def test_a_copy_without_its_records_has_no_fault(copy, sink, options):
    """What can't be compared with records is compared with the files, or in itself."""
    path = copy(sink, **options)
    shutil.rmtree(path / ".gpufgbg")
    assert faults(path) == []
    edit(path, lambda c: c["bytes"].__setitem__("composite", 5))
    assert [fault for fault in faults(path) if "bytes.composite: says 5, its files have " in fault]
    edit(path, lambda c: c["statistics"]["composite"].__setitem__("images", 5))
    assert [fault for fault in faults(path) if "statistics.composite: says 5 images" in fault]
    edit(path, lambda c: c["statistics"]["composite_mask"]["mean"].__setitem__(0, 0.5))
    assert [fault for fault in faults(path) if "statistics.composite_mask.mean: says [0.5]" in fault]


# -- labels ---------------------------------------------------------------------------------------------

FIRST = "labels/bg_00_label_info.txt"
TEXTS = {
    "another x": (lambda p: line_of(p / FIRST, 3, lambda line: re.sub(r"\t(\d+)\t", r"\t1\1\t", line)), "line 3:"),
    "another y": (lambda p: line_of(p / FIRST, 16, lambda line: line + "0"), "line 16: got"),
    "another name": (lambda p: line_of(p / FIRST, 1, lambda line: line.replace("T_", "F_")), "line 1: got"),
    "a copy of another": (
        lambda p: line_of(p / FIRST, 7, lambda _: (p / FIRST).read_text().splitlines()[0]),
        r"line 7: got 'bg_00_fg_00_T_000000.jpg\t",
    ),
    "one is missing": (lambda p: line_of(p / FIRST, 9, lambda _: ""), "line 9: got"),
    "the last is missing": (lambda p: line_of(p / FIRST, 16, lambda _: ""), "line 16: got the end of the file"),
    "one more": (
        lambda p: (p / FIRST).write_text((p / FIRST).read_text() + "x\t1\t2\n"),
        r"line 17: got 'x\t1\t2', expected the end of the file",
    ),
    "no newline at the end": (lambda p: (p / FIRST).write_text((p / FIRST).read_text()[:-1]), "line 16: got"),
    "other line ends": (
        lambda p: (p / FIRST).write_bytes((p / FIRST).read_bytes().replace(b"\n", b"\r\n")), "line 1: got",
    ),
    "binary": (lambda p: (p / FIRST).write_bytes(b"\0\xff" * 5000), "line 1: got '\\x00"),
    "empty": (lambda p: (p / FIRST).write_bytes(b""), "line 1: got the end of the file"),
    "gone": (lambda p: (p / FIRST).unlink(), "bg_00_label_info.txt: is missing"),
    "a folder": (lambda p: ((p / FIRST).unlink(), (p / FIRST).mkdir()), "bg_00_label_info.txt: can't be read"),
    "two exchanged": (
        lambda p: (p / FIRST).replace(p / "x")
        and (p / FIRST.replace("00", "01")).replace(p / FIRST) and (p / "x").replace(p / FIRST.replace("00", "01")),
        "bg_01_label_info.txt: line 1: got 'bg_00",
    ),
    "another file": (lambda p: (p / "labels" / "bg_03_label_info.txt").touch(), "bg_03_label_info.txt: does not"),
    "a folder more": (lambda p: (p / "labels" / "more").mkdir(), "more: does not belong to the data set"),
}  # fmt: skip


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize(("damage", "message"), TEXTS.values(), ids=TEXTS)
def test_label_files(copy, sink, damage, message):
    path = copy(sink)
    damage(path)
    found = faults(path)
    assert any(message in fault for fault in found), found
    assert all(str(path / "labels") in fault or "dataset.zip:labels" in fault for fault in found), found
    assert all(fault.isprintable() and len(fault) < 500 for fault in found)


def test_the_lines_of_all_label_files_are_counted(copy):
    path = copy("tree")
    (path / FIRST).write_bytes(b"")
    with (path / FIRST.replace("00", "01")).open("a") as file:
        file.write("one\ntwo\nthree")
    assert f"{path / 'labels'}: 35 lines, expected 48" in faults(path)


TABLES = {
    "gone": (lambda p: (p / "labels.parquet").unlink(), "labels.parquet: is missing"),
    "empty": (lambda p: (p / "labels.parquet").write_bytes(b""), "labels.parquet: can't be read"),
    "damaged": (
        lambda p: (p / "labels.parquet").write_bytes((p / "labels.parquet").read_bytes()[:-100]), "can't be read"
    ),
    "a row less": (lambda p: table_of(p, lambda t: t.slice(0, 47)), "47 rows, expected 48"),
    "a row more": (lambda p: table_of(p, lambda t: pa.concat_tables([t, t.slice(0, 1)])), "49 rows, expected 48"),
    "no rows": (lambda p: table_of(p, lambda t: t.slice(0, 0)), "0 rows, expected 48"),
    "another order": (lambda p: table_of(p, lambda t: t.take(list(range(47, -1, -1)))), "row 0: index is 47, exp"),
    "a copy of a row": (
        lambda p: table_of(p, lambda t: pa.concat_tables([t.slice(0, 20), t.slice(0, 1), t.slice(21)])),
        "row 20: name is 'bg_00_fg_00_T_000000.jpg', expected 'bg_01_fg_01_T_000020.jpg'",
    ),
    "another x": (
        lambda p: table_of(p, lambda t: value_of(t, "x", 33, 63)),
        "row 33: x is 63, expected",
    ),
    "another type": (
        lambda p: table_of(p, lambda t: column(t, "x", lambda v: v.cast(pa.int64()))),
        "column 7: got x int64, expected x int32",
    ),
    "a column less": (lambda p: table_of(p, lambda t: t.drop(["h"])), "column 10: got mask_area int32, expected h"),
    "a column more": (
        lambda p: table_of(p, lambda t: t.append_column("z", t["x"])), "column 12: got z int32, expected none",
    ),
    "another word": (
        lambda p: table_of(
            p, lambda t: column(t, "foreground", lambda v: pa.array(["fg_03"] * 48).dictionary_encode())
        ),
        "row 0: foreground is 'fg_03', expected 'fg_00'",
    ),
    "a null": (
        lambda p: table_of(p, lambda t: value_of(t, "mask_area", 47, None)),
        "row 47: mask_area is None, expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize(("damage", "message"), TABLES.values(), ids=TABLES)
def test_the_table_of_labels(copy, sink, damage, message):
    path = copy(sink)
    damage(path)
    found = faults(path)
    assert any(message in fault for fault in found), found
    assert all("labels.parquet" in fault for fault in found), found


def test_a_table_that_others_wrote_with_the_same_rows(copy):
    path = copy("tree")
    table_of(path, lambda t: t)
    assert pq.ParquetFile(path / "labels.parquet").num_row_groups == 10
    assert faults(path) == []


@pytest.mark.parametrize("sink", SINKS)
def test_ranges_of_depth(copy, sink):
    path = copy(sink, depth="demo")
    good = (path / "labels.parquet").read_bytes()
    table_of(path, lambda t: value_of(t, "depth_max", 9, 7.0))
    assert any("row 9: depth_max is 7.0, expected" in fault for fault in faults(path))
    table_of(path, lambda t: t.drop(["depth_min", "depth_max"]))
    assert any("column 12: got none, expected depth_min float" in fault for fault in faults(path))
    (path / "labels.parquet").write_bytes(good)
    sorted((path / ".gpufgbg" / "depth").iterdir())[2].unlink()
    assert any(".f32: can't be read" in fault for fault in faults(path))


def test_a_set_that_has_no_label_files(copy):
    path = copy("tar", labels=False)
    (path / "labels").mkdir()
    (path / "labels.parquet").touch()
    named = [f"{path / name}: does not belong to the data set" for name in ("labels", "labels.parquet")]
    assert faults(path) == named


@pytest.mark.parametrize("options", [{}, {"labels": False}, {"depth": "demo"}])
def test_labels_in_tar_shards(copy, options):
    def rewritten(call: Callable[[str, bytes], list[tuple[str, bytes]]]) -> list[str]:
        path = copy("tar", name=f"set{len(list(tmp.iterdir()))}", **options)
        shard = path / "shards" / "shard-000004.tar"
        with tarfile.open(shard) as archive:
            members = [(info.name, archive.extractfile(info).read()) for info in archive]
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data in [new for old in members for new in call(*old)]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return faults(path)

    tmp = Path(copy("tar", name="first", **options)).parent
    name = f"{SAMPLE}.json"
    assert rewritten(lambda n, d: [(n, d)]) == []
    (fault,) = rewritten(lambda n, d: [(n, d.replace(b'"x": ', b'"x": 1') if n == name else d)])
    assert fault == f"samples 22:28: {name} differs from the sample's label"
    (fault,) = rewritten(lambda n, d: [] if n == name else [(n, d)])
    assert fault == f"samples 22:28: expected {name}, found bg_01_fg_02_F_000025.json"
    (fault,) = rewritten(lambda n, d: [(n, d)] * (1 + (n == name)))
    assert fault == f"samples 22:28: expected bg_01_fg_02_F_000025.json, found {name}"
    (fault,) = rewritten(lambda n, d: [(n, d), ("more.png", d)] if n == name else [(n, d)])
    assert fault == "samples 22:28: more.png belongs to no sample"
    (fault,) = rewritten(lambda n, d: [(n, d)] if n[-11:] != "000027.json" else [])
    assert fault.endswith("000027.json is missing")
    if "depth" in options:
        (fault,) = rewritten(lambda n, d: [(n, re.sub(rb'"depth_min": ', b'"depth_min": 1', d) if n == name else d)])
        assert fault == f"samples 22:28: {name} differs from the sample's label"


# -- what does not belong there -------------------------------------------------------------------------


def stray(name: str) -> Callable[[Path], None]:
    def call(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"\xff\xd8\xff\xd9")

    return call


TREE = {
    "fg_bg/stray.jpg": "fg_bg/stray.jpg: belongs to no sample",
    "fg_bg/bg_99/bg_99_fg_00_T_000000.jpg": "fg_bg/bg_99: belongs to no sample",
    "fg_bg/bg_00/more": "fg_bg/bg_00/more: belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_T_000000": "bg_00_fg_00_T_000000: belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_T_000000.JPG": "bg_00_fg_00_T_000000.JPG: belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_F_000000.jpg": "bg_00_fg_00_F_000000.jpg: belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_T_0000000.jpg": "bg_00_fg_00_T_0000000.jpg: belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_T_000048.jpg": "bg_00_fg_00_T_000048.jpg: belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_T_٠٠٠٠٠٠.jpg": "belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_T_" + "9" * 100 + ".jpg": "belongs to no sample",
    "fg_bg/bg_00/bg_01_fg_02_T_000024.jpg": "bg_00/bg_01_fg_02_T_000024.jpg: belongs to no sample",
    "fg_bg_masks/bg_02/deep/er.jpg": "fg_bg_masks/bg_02/deep: belongs to no sample",
    "fg_bg_depth/bg_00/bg_00_fg_00_T_000000.jpg": "fg_bg_depth: does not belong to the data set",
    "bg/bg_03.jpg": "bg/bg_03.jpg: does not belong to the data set",
    "fg/more.png": "fg/more.png: does not belong to the data set",
    "fg_mask/fg_00.png": "fg_mask/fg_00.png: does not belong to the data set",
    "shards/shard-000000.tar": "shards: does not belong to the data set",
    "more.tar": "more.tar: does not belong to the data set",
    "dataset.zip": "dataset.zip: does not belong to the data set",
}


@pytest.mark.parametrize("name", TREE, ids=range(len(TREE)))
def test_strangers_in_a_tree(copy, name):
    path = copy("tree")
    stray(name)(path)
    (fault,) = faults(path)
    assert TREE[name] in fault and fault.startswith(str(path))


TAR = {
    "shards/shard-000009.tar": "belongs to no sample",
    "shards/shard-0000001.tar": "belongs to no sample",
    "shards/shard-000001.tar.gz": "belongs to no sample",
    "shards/more.tar": "belongs to no sample",
    "shards/shard-000001.part-000000000006-000000000009.tar": "its samples are in shard-000001.tar too",
    "shards/shard-000001.part-000000000009-000000000006.tar": "belongs to no sample",
    "shards/shard-000001.part-000000000000-000000000006.tar": "belongs to no sample",
    "shards/parts/shard-000001.part-000000000006-000000000009.tar": "shards/parts: belongs to no sample",
    "fg_bg/bg_00/bg_00_fg_00_T_000000.jpg": "fg_bg: does not belong to the data set",
    "more.tar": "more.tar: does not belong to the data set",
}


@pytest.mark.parametrize("name", TAR, ids=range(len(TAR)))
def test_strangers_beside_tar_shards(copy, name):
    path = copy("tar")
    stray(name)(path)
    (fault,) = faults(path)
    assert TAR[name] in fault and fault.startswith(str(path))


@pytest.mark.parametrize("sink", SINKS)
def test_what_lies_beside_the_folders_is_no_fault(copy, sink):
    path = copy(sink)
    for name in ("preview.png", "README.md", "notes/a.jpg", ".DS_Store"):
        stray(name)(path)
    assert faults(path) == []


@pytest.mark.parametrize("sink", ["tree", "tar"])
def test_samples_that_are_of_no_record(copy, sets, sink):
    path = copy(sink, samples=(0, 6))
    whole = sets(sink)
    if sink == "tree":
        shutil.copy(whole / "fg_bg" / "bg_01" / f"{SAMPLE}.jpg", path / "fg_bg" / "bg_00" / "x.jpg")
        (path / "fg_bg" / "bg_01").mkdir()
        shutil.copy(whole / "fg_bg" / "bg_01" / f"{SAMPLE}.jpg", path / "fg_bg" / "bg_01")
        expected = [
            f"{path}/fg_bg/bg_00/x.jpg: belongs to no sample",
            f"{path}/fg_bg/bg_01/{SAMPLE}.jpg: belongs to no",
        ]
    else:
        shutil.copy(whole / "shards" / "shard-000004.tar", path / "shards")
        expected = [f"{path}/shards/shard-000004.tar: belongs to no sample that is recorded"]
    found = faults(path)
    assert "incomplete" in found[0] and len(found) == 1 + len(expected)
    for text in expected:
        assert any(fault.startswith(text) for fault in found)


def test_twenty_strangers_are_named_in_order_and_the_others_counted(copy):
    path = copy("tree")
    for n in range(15):
        stray(f"fg_bg/bg_00/more_{n:02d}.jpg")(path)
        stray(f"fg_bg_masks/bg_01/more_{n:02d}.jpg")(path)
    found = faults(path)
    assert [Path(fault.partition(":")[0]).name for fault in found[:20]] == [
        f"more_{n:02d}.jpg" for n in (*range(15), *range(5))
    ]
    assert found[20:] == ["10 more files belong to no sample"]


def zipped(path: Path, call: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Write dataset.zip anew with other members."""
    with zipfile.ZipFile(path / "dataset.zip") as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with (
        warnings.catch_warnings(),  # of names that are there twice
        zipfile.ZipFile(path / "dataset.zip", "w", zipfile.ZIP_STORED) as archive,
    ):
        warnings.simplefilter("ignore")
        for name, data in call(members):
            archive.writestr(zipfile.ZipInfo(name), data)


COMPOSITE = f"fg_bg/bg_01/{SAMPLE}.jpg"
ZIP = {
    "as it is": (lambda m: m, []),
    "one more": (lambda m: [*m, ("fg_bg/bg_00/x.jpg", b"x")], ["fg_bg/bg_00/x.jpg: belongs to no sample"]),
    "one more at the front": (lambda m: [("more.txt", b"x"), *m], ["more.txt: belongs to no sample"]),
    "one twice": (
        lambda m: [*m[:30], m[25], *m[30:]], [f"{'fg_bg'}", "is there twice, or not in its place"],
    ),
    "none of a sample": (
        lambda m: [x for x in m if SAMPLE not in x[0]], [f"{COMPOSITE} is missing", "1 more files are missing"],
    ),
    "no labels": (lambda m: [x for x in m if "labels/" not in x[0]], [f"{FIRST} is missing", "2 more files are"]),
    "other labels": (
        lambda m: [(n, d.replace(b"T_", b"F_") if n == FIRST else d) for n, d in m], [f"{FIRST}: differs from"],
    ),
    "another table": (
        lambda m: [(n, d + b"x" if n == "labels.parquet" else d) for n, d in m], ["labels.parquet: differs from"],
    ),
    "another asset": (lambda m: [(n, d[:-1] if n == "fg/fg_01.png" else d) for n, d in m], ["fg_01.png: differs"]),
    "another description": (
        lambda m: [(n, d + b" " if n == "dataset.json" else d) for n, d in m], ["dataset.json: differs from"],
    ),
    "a changed picture": (
        lambda m: [(n, d[:-9] + b"?" + d[-8:] if n == COMPOSITE else d) for n, d in m], ["checksum differs"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "messages"), ZIP.values(), ids=ZIP)
def test_what_a_zip_holds(copy, change, messages):
    path = copy("zip")
    zipped(path, change)
    found = faults(path)
    assert bool(found) == bool(messages), found
    for message in messages:
        assert any(message in fault for fault in found) or "more files" in message, found


def test_a_zip_that_is_gone_or_no_zip(copy):
    path = copy("zip")
    data = (path / "dataset.zip").read_bytes()
    (path / "dataset.zip").unlink()
    assert any(f"{path / 'dataset.zip'}: is missing" in fault for fault in faults(path))
    for wrong in (b"", b"x" * 1000, data[:-30], data[: len(data) // 2], data[:-22] + data[-10:] + bytes(12)):
        (path / "dataset.zip").write_bytes(wrong)
        found = faults(path)
        assert found and all(f"{path / 'dataset.zip'}: can't be read" in fault for fault in found)


# -- dataset.json ---------------------------------------------------------------------------------------

NUMBERS = {
    "a sum": (lambda c: c["statistics"]["composite"]["sum"].__setitem__(1, 7), "statistics.composite.sum: says ["),
    "pixels": (lambda c: c["statistics"]["composite_mask"].__setitem__("pixels", 7), "composite_mask.pixels: says 7"),
    "a mean": (lambda c: c["statistics"]["composite"]["mean"].__setitem__(1, 0.5), "statistics.composite.mean: says"),
    "no mean": (lambda c: c["statistics"]["composite"].pop("mean"), "statistics.composite.mean: says None"),
    "of backgrounds": (lambda c: c["statistics"]["background"].__setitem__("images", 4), "background.images: says 4"),
    "bytes": (lambda c: c["bytes"].__setitem__("composite", 7), "bytes.composite: says 7, its files and records"),
    "bytes of assets": (lambda c: c["bytes"].__setitem__("foreground", 7), "bytes.foreground: says 7"),
    "done": (lambda c: c["counts"].__setitem__("done", 47), "says 47 samples, its shards have 48"),
    "not complete": (lambda c: c.__setitem__("complete", False), "complete: says false, has 48 of 48 samples"),
    "a checksum": (lambda c: c["shards"][1].__setitem__("sha256", "0" * 64), "its checksum differs from data"),
    "a shard less": (lambda c: c["shards"].pop(), "incomplete: 48 of 48 samples are there, 44 of them"),
}  # fmt: skip


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize(("damage", "message"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_in_dataset_json(copy, sink, damage, message):
    path = copy(sink)
    edit(path, damage)
    found = faults(path)
    assert any(message in fault and str(path) in fault for fault in found), found


@pytest.mark.parametrize("sink", SINKS)
def test_a_set_that_says_it_is_complete(copy, sink):
    path = copy(sink, samples=(0, 20))
    edit(path, lambda c: c.__setitem__("complete", True))
    found = faults(path)
    assert any("incomplete: 20 of 48 samples are there" in fault for fault in found)
    assert any("complete: says true, has 20 of 48 samples" in fault for fault in found)


def test_deleted_numbers_are_a_damaged_description(copy, run):
    for name in ("statistics", "bytes"):
        path = copy("tree", name)
        edit(path, lambda c, name=name: c.pop(name))
        code, printed, error = run("verify", path)
        assert (code, printed) == (2, "") and f"damaged or not ours: {name} is missing" in error
        path = copy("tree", f"{name}-of-composites")
        edit(path, lambda c, name=name: c[name].pop("composite"))
        code, printed, error = run("verify", path)
        assert (code, printed) == (2, "") and f"damaged or not ours: {name}.composite is missing" in error


def test_records_that_are_gone_or_damaged(copy):
    path = copy("tree")
    records = sorted((path / ".gpufgbg" / "shards").iterdir())
    records[2].unlink()
    (fault,) = faults(path)
    assert f"{path / '.gpufgbg' / 'shards'}: no records of samples 12:16: generate makes these" in fault
    records[3].write_text("{")
    (fault,) = faults(path)
    assert f"{records[3]}: damaged" in fault
    for record in records:
        record.unlink(missing_ok=True)
    records[0].parent.rmdir()
    assert faults(path) == []


# -- runs that did not end ------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill at an exact place."""


def places(sink: str) -> list[tuple[object, str]]:
    from gpufgbg import files, labels
    from gpufgbg.sinks import stored_zip, tar, tree

    owner = {"tree": tree.TreeSink, "tar": tar.TarSink, "zip": stored_zip.ZipSink}[sink]
    return [
        (Manifest, "record"), (Manifest, "forget_pieces"), (Manifest, "write"), (dataset, "write_labels"),
        (dataset, "publish_labels"), (owner, "publish"), (owner, "finish"), (labels, "sync_file_system"),
        (labels, "fsync_folder"), (files, "fsync_folder"),
        *([(stored_zip._ZipFile, "close")] if sink == "zip" else []),
    ]  # fmt: skip


ALLOWED = re.compile(
    r": incomplete: |: not all samples have their depth maps|belongs to no sample that is recorded: a run did not end"
    r"|\d more files belong to no sample|: its samples are in shard-\d+\.tar too: the same command removes it"
    r"|parts: is left by a run that did not end: the same command removes it"
    r"|a run did not end; the same command puts the zip together again"
)


@pytest.mark.parametrize(("sink", "depth"), [("tree", True), ("zip", True), ("zip", False), ("tar", True)])
def test_a_run_that_did_not_end_is_told_as_that_and_nothing_else(folders, tmp_path, monkeypatch, sink, depth):
    """Killed before and after every step: a person learns that it did not end, not that files are wrong."""
    if depth:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")

    def make(out: Path, part: tuple[int, int] | None = None) -> None:
        generate(out, **folders, recipe=SMALL, sink=sink, samples=part, workers=1, device="cpu")

    if depth:
        make(tmp_path / "begun", (0, 20))
        make(tmp_path / "begun", (17, 40))
    seen = set()
    for number, (owner, name) in enumerate(places(sink)):
        often = not depth or name in ("record", "publish", "write")
        for after in (False, True):
            for call in (1, 2)[: 1 + often]:
                out = tmp_path / f"out{number}{after}{call}"
                if depth:
                    shutil.copytree(tmp_path / "begun", out)
                calls = 0
                original = getattr(owner, name)

                def killing(*args, original=original, after=after, call=call, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls == call and not after:
                        raise Killed
                    result = original(*args, **kwargs)
                    if calls == call and after:
                        raise Killed
                    return result

                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, killing)
                    try:
                        if depth:
                            add_depth(out, "demo", device="cpu", workers=1)
                        else:
                            make(out, (0, 20))
                            make(out, (17, 40))
                            make(out)
                    except Killed:
                        pass
                if not (out / "dataset.json").is_file():
                    continue
                found = faults(out)
                place = (getattr(owner, "__name__", owner), name, after, call)
                assert all(ALLOWED.search(fault) for fault in found), (place, found)
                seen |= {ALLOWED.search(fault)[0] for fault in found}
                if not depth:
                    make(out)
                    assert faults(out) == [], place
                shutil.rmtree(out)
    assert ": not all samples have their depth maps" in seen if depth else ": incomplete: " in seen


# -- large ones -----------------------------------------------------------------------------------------


def account(folder: Path, per_pair: int, monkeypatch) -> tuple[Books, np.ndarray]:
    """A complete data set's books, with label files and nothing else."""
    plan = Plan(Recipe(size=(64, 48), foreground_height=20, per_pair=per_pair), 1, [10, 30], [20, 20])
    areas = np.array([40, 50], np.int32)
    monkeypatch.setattr(labels, "_ROWS", 1000)
    monkeypatch.setattr(verify_labels, "_ROWS", 1000)
    labels.write_labels(folder, plan, areas, [Shard(0, len(plan))])
    grey = Moments(1, 1, (1,), (1,))
    record = ShardRecord(
        Shard(0, len(plan)),
        "0" * 64,
        {"composite": 1, "composite_mask": 1},
        {"composite": grey, "composite_mask": grey},
    )
    content = {
        "bytes": {"composite": 1, "composite_mask": 1}, "depth": None,
        "shards": [{"start": 0, "stop": len(plan), "sha256": "0" * 64}],
    }  # fmt: skip
    return Books(Manifest(folder), content, plan, Layout.of(plan), [record]), areas


def test_memory_does_not_grow_with_the_samples(tmp_path, monkeypatch):
    def most(per_pair: int) -> int:
        books, areas = account(tmp_path / "labels", per_pair, monkeypatch)
        known = Known(books.plan, books.layout, books.done)
        report = VerifyReport()
        tracemalloc.start()
        try:
            verify_labels.check_labels(report, books, areas)
            for start in range(0, len(books.plan), 1000):
                names = [(f"bg_00_fg_00_T_{n:06d}.jpg", False) for n in range(start, start + 1000)]
                assert len(list(known.judge(names, Shard(0, len(books.plan))))) == 1000
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            assert report.faults == []

    most(500)  # what is loaded once
    assert most(8000) < 1.3 * most(1000)
