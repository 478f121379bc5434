"""Archives are what others' tools expect: tarfile, zipfile, unzip and the WebDataset convention."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile

import oracle
import pytest

from gpufgbg import Plan, Recipe, generate
from gpufgbg.layout import Layout
from gpufgbg.recipe import Shard
from gpufgbg.sinks import stored_zip, tar

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=2)


@pytest.fixture(scope="module")
def sets(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for sink in ("tree", "zip", "tar"):
        generate(root / sink, **folders, recipe=SMALL, sink=sink)
    return root


def test_zip_holds_the_tree(sets):
    tree = oracle.tree_of(sets / "tree")
    with zipfile.ZipFile(sets / "zip" / "dataset.zip") as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        found = {info.filename: archive.read(info) for info in archive.infolist()}
    description = json.loads(found.pop("dataset.json"))
    expected = {path: data for path, data in tree.items() if not path.startswith(".") and path != "dataset.json"}
    assert found == expected
    assert description["shards"] == json.loads(tree["dataset.json"])["shards"]


def test_unzip_accepts_it(sets, tmp_path):
    if not shutil.which("unzip"):
        pytest.skip("no unzip on this machine")
    subprocess.run(["unzip", "-q", sets / "zip" / "dataset.zip", "-d", tmp_path], check=True)
    assert (tmp_path / "fg_bg" / "bg_00" / "bg_00_fg_00_T_000000.jpg").is_file()
    assert not os.access(tmp_path / "bg" / "bg_00.jpg", os.X_OK)


def test_zip_beyond_4_gib_and_65535_files(tmp_path):
    writer = stored_zip._ZipFile(tmp_path / "temporary")
    for n in range(70_000):
        data = b"%d" % n
        writer.add(f"{n}.txt", data, stored_zip.entry(f"{n}.txt", data)[: stored_zip._LOCAL.size])
    writer.file.seek(5 << 30)  # a hole of zeros in place of 5 GiB of pictures
    for n in range(3):
        writer.add(f"far{n}.txt", b"far", stored_zip.entry(f"far{n}.txt", b"far")[: stored_zip._LOCAL.size])
    writer.close(tmp_path / "big.zip")
    assert (tmp_path / "big.zip").stat().st_size > 5 << 30
    with zipfile.ZipFile(tmp_path / "big.zip") as archive:
        names = archive.namelist()
        assert len(names) == 70_003
        assert archive.read("69999.txt") == b"69999"
        assert archive.read("far2.txt") == b"far"
        assert archive.getinfo("far0.txt").header_offset >= 5 << 30
        with (tmp_path / "big.zip").open("rb") as file:
            for found, info in zip(stored_zip.Directory(file).entries(), archive.infolist(), strict=True):
                assert found[:5] == (info.filename, 0, info.CRC, info.file_size, info.header_offset)
            assert b"".join(stored_zip.contents(file, found)) == b"far"
            (again, *_) = stored_zip.Directory(file).entries(found.at)
            assert again == found
    assert [path.name for path in tmp_path.iterdir()] == ["big.zip"]


def test_a_zip_that_others_added_to(sets, tmp_path):
    """A comment, and members of other kinds: ours are read as before."""
    path = tmp_path / "dataset.zip"
    shutil.copy(sets / "zip" / "dataset.zip", path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = b"PK" * 500
        archive.writestr("more.txt", b"x" * 1000)
    with path.open("rb") as file, zipfile.ZipFile(path) as archive:
        for found, info in zip(stored_zip.Directory(file).entries(), archive.infolist(), strict=True):
            assert found[:2] == (info.filename, info.compress_type)
            if found.method == 0:
                with path.open("rb") as another:
                    assert b"".join(stored_zip.contents(another, found)) == archive.read(info)
        with pytest.raises(zipfile.BadZipFile, match=r"more\.txt: compressed, expected stored"):
            list(stored_zip.contents(file, found))


def test_the_directory_of_a_zip_is_not_kept_in_memory(tmp_path):
    """The standard library's reader would take 500 bytes a picture."""
    count = 30_000
    writer = stored_zip._ZipFile(tmp_path / "temporary")
    for n in range(count):
        name = f"fg_bg/bg_00/bg_00_fg_00_T_{n:06d}.jpg"
        writer.add(name, b"x", stored_zip.entry(name, b"x")[: stored_zip._LOCAL.size])
    writer.close(tmp_path / "dataset.zip")
    plan = Plan(Recipe(size=(8, 8), foreground_height=4, per_pair=count, flip="always"), 1, [4], [4])
    sink = stored_zip.ZipSink(tmp_path, plan, Layout.of(plan), ["composite"])
    tracemalloc.start()
    try:
        for start in range(0, count, 5000):
            assert sum(1 for _ in sink.read(Shard(start, start + 4999))) == 4999
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_tar_follows_the_webdataset_convention(sets):
    tree = oracle.tree_of(sets / "tree")
    labels = {name: (x, y) for name, x, y in oracle.samples_of(sets / "tar")}
    shards = sorted((sets / "tar" / "shards").iterdir())
    assert [path.name for path in shards] == ["shard-000000.tar"]
    with tarfile.open(shards[0]) as archive:
        members = archive.getmembers()
        assert all(m.isfile() and m.mtime == 0 and m.mode == 0o644 and m.uid == m.gid == 0 for m in members)
        contents = [(m.name, archive.extractfile(m).read()) for m in members]
    for sample in itertools.batched(contents, 3) if hasattr(itertools, "batched") else zip(*[iter(contents)] * 3):  # noqa: B905
        keys = {name.partition(".")[0] for name, _ in sample}
        assert len(keys) == 1
        (key,) = keys
        assert [name.partition(".")[2] for name, _ in sample] == ["composite.jpg", "mask.jpg", "json"]
        background = key.partition("_fg_")[0]
        assert sample[0][1] == tree[f"fg_bg/{background}/{key}.jpg"]
        assert sample[1][1] == tree[f"fg_bg_masks/{background}/{key}.jpg"]
        label = json.loads(sample[2][1])
        assert (label["x"], label["y"]) == labels[f"{key}.jpg"]
        assert f"{label['background']}_{label['foreground']}_{'T' if label['flip'] else 'F'}" in key
        assert label["index"] == int(key.rpartition("_")[2])


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 70_000])
def test_tar_members_equal_the_standard_librarys(size):
    data = os.urandom(size)
    info = tarfile.TarInfo("a_name-" + "x" * 60 + ".composite.jpg")
    info.size = size
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    found = tar.member(info.name, data)
    with tarfile.open(fileobj=io.BytesIO(found + bytes(1024))) as archive:
        (member,) = archive.getmembers()
        assert member.name == info.name and archive.extractfile(member).read() == data
    assert found == file.getvalue()[: len(found)]
    assert list(tar.members(io.BytesIO(found + bytes(1024)))) == [(info.name, data)]


def test_tar_refuses_names_that_do_not_fit():
    with pytest.raises(ValueError, match="at most 100"):
        tar.member("x" * 101, b"")


def test_manifests_agree_whatever_the_sink(sets):
    contents = [json.loads((sets / sink / "dataset.json").read_text()) for sink in ("tree", "zip", "tar")]
    for content in contents:
        content.pop("sink")
    assert contents[0] == contents[1] == contents[2]
