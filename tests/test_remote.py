"""Data sets in an object store: the bytes of a folder, whatever the store does; needs moto and s3fs."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import crews
import faults
import oracle
import pytest

from gpufgbg import DatasetError, OptionError, Recipe, StorageError, dataset, files, generate, merge, stream
from gpufgbg.manifest import open_manifest
from gpufgbg.recipe import Shard
from gpufgbg.remote import manifest as remote_manifest
from gpufgbg.remote import store as remote_store
from gpufgbg.remote.manifest import RemoteManifest
from gpufgbg.remote.store import RemotePath, Store
from gpufgbg.sinks.tar import TarSink
from gpufgbg.statistics import statistics
from gpufgbg.verify import verify

logging.getLogger("werkzeug").setLevel(logging.WARNING)
fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=8)  # 192 samples
SECRET = "nobody-may-see-this"


@pytest.fixture(scope="module")
def server():
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """An empty bucket, the environment that leads to it, and quick retries."""
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    options = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1, "retries": {"max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    monkeypatch.setattr(remote_store, "_WAIT_S", 0.01)
    _forget()
    yield url
    _forget()


def _forget() -> None:
    """The next store connects anew, where the environment says."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def short_shards(monkeypatch):
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", crews.SHARD)


@pytest.fixture
def make(folders, tmp_path):
    def call(out, **options):
        out = out if "://" in str(out) else tmp_path / out
        return generate(out, **folders, **{"recipe": SMALL, "sink": "tar", "workers": 2, "device": "cpu", **options})

    return call


def tree_of(url: str) -> dict[str, bytes]:
    """Every object below a URL."""
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def test_the_bytes_of_a_folder(make, s3, tmp_path, short_shards, capfd):
    make("whole")
    whole = oracle.tree_of(tmp_path / "whole")
    url = "s3://bucket/a/set"
    assert make(url, samples=(5, 100)).samples == 95
    assert any("shards/parts/" in name for name in tree_of(url))
    report = make(url)
    assert report.complete and str(report.out) == url
    found = tree_of(url)
    assert found == whole
    assert make(url).samples == 0
    assert not any(SECRET.encode() in data or b"someone" in data for data in found.values())
    assert SECRET not in "".join(capfd.readouterr())


def test_it_is_read_from_there(make, s3, tmp_path, run):
    make("whole")
    url = "s3://bucket/set"
    make(url)
    assert statistics(url) == statistics(tmp_path / "whole")
    report = verify(url, rerender=20)
    assert (report.faults, report.samples, report.files, report.rerendered) == ([], 192, 384, 20)
    with (
        stream(url, batch_size=8, epochs=1, device="cpu") as there,
        stream(tmp_path / "whole", batch_size=8, epochs=1, device="cpu") as here,
    ):
        assert there.statistics == here.statistics
        for ours, theirs in zip(there, here, strict=True):
            assert (ours.image == theirs.image).all() and (ours.mask == theirs.mask).all()
    code, printed, _ = run("stats", url)
    assert code == 0 and "composite mask" in printed
    path = RemotePath(Store(url), "shards/shard-000000.tar")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"\xff\xda") + 20] ^= 1
    path.store.write(path.key, bytes(damaged))
    code, printed, _ = run("verify", url)
    assert code == 1 and "the checksum differs" in printed
    path.unlink()
    assert any("can't be read" in fault for fault in verify(url).faults)


def test_what_verify_finds_there(make, s3, short_shards):
    url = "s3://bucket/set"
    make(url, samples=(5, 60), labels=False)
    assert any(name.startswith("shards/parts/") for name in tree_of(url))
    store = Store(url)
    (incomplete,) = verify(url).faults
    assert incomplete.endswith(": incomplete: 55 of 192 samples are there")
    strangers = {
        "README.md": None,
        "shards/more.tar": "belongs to no sample",
        "shards/shard-000099.tar": "belongs to no sample",
        "shards/shard-000029.tar": "belongs to no sample that is recorded: a run did not end",
        "shards/parts/shard-000001.tar": "belongs to no sample",
        "bg/more.jpg": "does not belong to the data set",
        "labels.parquet": "does not belong to the data set",
    }
    store.write_many(dict.fromkeys((*strangers, "fg_bg/bg_00/more.jpg"), b"?"))
    faults = verify(url).faults
    for key, text in {**strangers, "fg_bg": "does not belong to the data set"}.items():
        assert any(fault.startswith(f"{url}/{key}: {text}") for fault in faults) == (text is not None), key
    assert len(faults) == 1 + len(strangers)
    store.remove([*strangers, "fg_bg/bg_00/more.jpg"])
    description = json.loads(tree_of(url)["dataset.json"])
    description["bytes"]["composite"] += 1
    store.write("dataset.json", json.dumps(description).encode())
    assert any("dataset.json: bytes.composite: says" in fault for fault in verify(url).faults)
    del description["bytes"]
    store.write("dataset.json", json.dumps(description).encode())
    with pytest.raises(DatasetError, match=f"{url}/dataset.json: damaged or not ours: bytes is missing"):
        verify(url)


def test_labels_are_verified_there(make, s3):
    url = "s3://bucket/set"
    make(url)
    store, files = Store(url), tree_of(url)

    def found(key: str, data: bytes | None) -> list[str]:
        store.remove([key]) if data is None else store.write(key, data)
        faults = verify(url).faults
        store.write(key, files[key])
        return faults

    key = "labels/bg_01_label_info.txt"
    first, _, rest = files[key].partition(b"\n")
    (fault,) = found(key, first + b"0\n" + rest)
    assert fault.startswith(f"{url}/{key}: line 1: got 'bg_01_fg_00_T_000064.jpg\\t")
    assert f"{url}/{key}: is missing" in found(key, None)
    assert found("labels/bg_01_label_info.txt", files[key]) == []
    cut = files[key][: files[key].rindex(b"\n", 0, -1) + 1]
    assert f"{url}/{key}: line 64: got the end of the file, expected" in found(key, cut)[0]
    assert found("labels.parquet", None) == [f"{url}/labels.parquet: is missing"]
    (fault,) = found("labels.parquet", files["labels.parquet"][:-8])
    assert fault.startswith(f"{url}/labels.parquet: can't be read")


def test_an_object_is_read_at_any_place(tmp_path, s3, monkeypatch):
    monkeypatch.setattr(remote_store, "_READ_BYTES", 100)
    data = os.urandom(1000)
    store = Store("s3://bucket/set")
    store.write("x", data)
    with RemotePath(store, "x").open() as file:
        for place, count in ((0, 10), (990, 20), (5, 250), (500, 1), (0, 1000), (999, 5), (2000, 5), (300, 99)):
            assert file.seek(place) == place and file.read(count) == data[place : place + count]
        assert file.seek(-10, os.SEEK_END) == 990 and file.read() == data[-10:]
        file.seek(100)
        assert file.seek(50, os.SEEK_CUR) == 150 and file.tell() == 150


def test_two_hundred_faults(make, server, s3, tmp_path, monkeypatch, short_shards, luck):
    """Errors, slow answers and cut connections, before, after and inside: the same bytes."""
    from gpufgbg.scaleout import processes

    monkeypatch.setattr(processes, "COMMAND", crews.WORKER)
    monkeypatch.setattr(remote_store, "PART_BYTES", 5 << 20)
    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=20)  # 480 samples, 72 shards
    make("whole", recipe=recipe)
    proxy = faults.FaultyProxy(server.get_host_and_port()[1], 200, 1.2, luck.randrange(2**31))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("FSSPEC_S3", json.dumps(fsspec.config.conf["s3"]))
    _forget()
    try:
        report = make("s3://bucket/set", device="cpu,cpu", recipe=recipe)
        assert report.samples == 480 and report.complete
        assert sum(proxy.made.values()) == 200 and set(proxy.made) == set(faults.KINDS)
    finally:
        proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    _forget()
    assert tree_of("s3://bucket/set") == oracle.tree_of(tmp_path / "whole")


def test_large_shards_go_in_parts_and_appear_whole(s3, server, tmp_path, monkeypatch):
    """Some 40 faults at the uploads of a file of three parts: at any moment it is not there, or whole."""
    proxy = faults.FaultyProxy(server.get_host_and_port()[1], 40, 1.5, 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(remote_store, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(remote_store, "_ATTEMPTS", 40)
    _forget()
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(13 << 20))
    try:
        Store("s3://bucket/set").upload(path, "shard")
    finally:
        proxy.close()
    assert proxy.requests["POST"] >= 2  # a multipart upload's begin and end
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    _forget()
    assert tree_of("s3://bucket/set") == {"shard": path.read_bytes()}


def test_resuming_reads_no_shard(make, server, s3, tmp_path, monkeypatch, short_shards):
    make("s3://bucket/set", samples=(0, 150))
    read = []
    original = Store.read
    monkeypatch.setattr(Store, "read", lambda self, key, *part: (read.append(key), original(self, key, *part))[1])
    make("s3://bucket/set")
    # but for those that a slice had cut in two, which are joined
    assert len({key for key in read if key.startswith("shards/")}) <= 2
    assert len([key for key in read if "/shards/" in key]) == len({key for key in read if "/shards/" in key})


def test_killed_and_started_again(folders, make, s3, tmp_path, monkeypatch):
    """At once on this machine; the dead run's lease is not waited for."""
    recipe = Recipe(size=(192, 144), foreground_height=20, per_pair=15)
    command = [
        *crews.CLI, "generate", *(f"--{name}={folder}" for name, folder in folders.items()),
        "--out=s3://bucket/set", "--size=192x144", "--foreground-height=20", "--per-pair=15", "--sink=tar",
        "--device=cpu", "--json",
    ]  # fmt: skip
    store = Store("s3://bucket/set")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(store.list(".gpufgbg/shards")) < 10:
            pass
        process.kill()
    assert 0 < len(RemoteManifest(store.url).records()) < 54
    assert len(store.list(".gpufgbg/runs")) == 1
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", crews.SHARD)
    make("whole", recipe=recipe)
    assert tree_of("s3://bucket/set") == oracle.tree_of(tmp_path / "whole")


def test_leases(make, s3, monkeypatch):
    monkeypatch.setattr(remote_manifest, "BEAT_S", 0.1)
    monkeypatch.setattr(remote_manifest, "DEAD_S", 1.0)
    url = "s3://bucket/set"
    make(url, samples=(0, 10))
    with RemoteManifest(url).claim(Shard(20, 30)):
        with pytest.raises(DatasetError, match="another process is making samples 20:30"):
            make(url, samples=(25, 40))
        assert make(url, samples=(30, 40)).samples == 10
    assert Store(url).list(".gpufgbg/runs") == {}
    # of a machine that is gone: the lease no longer changes
    stale = json.dumps({"machine": "elsewhere", "process": 1, "beats": 7}).encode()
    Store(url).write(f".gpufgbg/runs/{Shard(5, 60).name}-x.json", stale)
    assert make(url, samples=(10, 20)).samples == 10
    assert Store(url).list(".gpufgbg/runs") == {}


def test_two_runs_finish_at_the_same_time(make, s3, tmp_path, monkeypatch, short_shards):
    """One writes dataset.json without having seen the other's last records: it looks again."""
    make("whole")
    url = "s3://bucket/set"
    make("donor", samples=(96, 192))
    make(url, samples=(0, 48))
    original = RemoteManifest.write
    late = []

    def write(self, content):
        if content["counts"]["done"] == 96 and not late:
            late.append(make(url, samples=(96, 192)))
        original(self, content)

    monkeypatch.setattr(RemoteManifest, "write", write)
    make(url, samples=(48, 96))
    assert late
    assert tree_of(url) == oracle.tree_of(tmp_path / "whole")


def test_merge_from_and_to_a_store(make, s3, tmp_path, short_shards):
    make("whole")
    make("s3://bucket/a", samples=(0, 50))
    make("b", samples=(50, 192))
    merge("s3://bucket/out", ["s3://bucket/a", tmp_path / "b"])
    assert tree_of("s3://bucket/out") == oracle.tree_of(tmp_path / "whole")
    merge(tmp_path / "out", ["s3://bucket/a/", "s3://bucket/out"][1:])
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    with pytest.raises(OptionError, match="is also OUT"):
        merge("s3://bucket/a", ["s3://bucket/a/"])


def test_wrong_names_are_one_line_before_any_work(arguments, run, s3, server, tmp_path, monkeypatch):
    def refusal(url: str, *more: str) -> str:
        _forget()
        given = [argument for argument in arguments if not argument.startswith("--out")]
        code, printed, error = run(*given, "--sink=tar", f"--out={url}", *more)
        assert (code, printed) == (2, ""), error
        assert error.count("\n") == 1 and error.startswith("gpufgbg: error: ") and SECRET not in error
        return error

    monkeypatch.setattr("gpufgbg.pipeline.prepare_sources", lambda *a: pytest.fail("work was done"))
    assert "no such bucket: " in refusal("s3://other/set")
    error = refusal(f"s3://someone:{SECRET}@bucket/set")
    assert "--out: s3://bucket/...: a URL with a credential" in error
    assert "a URL with a credential" in refusal(f"s3://bucket/set?secret={SECRET}")
    assert "names no bucket" in refusal("s3://")
    assert "got 'tree' with a URL as --out, expected tar" in refusal("s3://bucket/set", "--sink=tree")
    assert "rotocol" in refusal("nosuch://bucket/set")
    assert "a chain of file systems" in refusal("simplecache::s3://bucket/set")
    Store("s3://bucket/other").write("mine.txt", b"x")
    assert "is not a data set of ours" in refusal("s3://bucket/other")
    assert tree_of("s3://bucket/other") == {"mine.txt": b"x"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "Could not connect" in refusal("s3://bucket/set")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert "no credentials: " in refusal("s3://bucket/set")


def test_a_wrong_credential(arguments, run, s3, monkeypatch):
    """The server checks who asks from here on."""
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)
    monkeypatch.setattr("gpufgbg.pipeline.prepare_sources", lambda *a: pytest.fail("work was done"))
    given = [argument for argument in arguments if not argument.startswith("--out")]
    code, _, error = run(*given, "--sink=tar", "--out=s3://bucket/set")
    assert code == 2 and error.count("\n") == 1 and SECRET not in error
    assert "s3://bucket/set: access denied: " in error and "check the credentials" in error
    code, _, error = run("verify", "s3://bucket/set")
    assert code == 2 and error.count("\n") == 1 and "access denied" in error


def test_what_a_store_is_not_for(run, s3, make):
    url = "s3://bucket/set"
    make(url, samples=(0, 10))
    code, _, error = run("depth", url, "--weights=demo")
    assert code == 2 and "go into a store with generate --depth" in error
    code, _, error = run("preview", url)
    assert code == 2 and "preview shows data sets on this machine alone" in error


def test_depth_goes_there_too(make, s3, tmp_path):
    pytest.importorskip("onnxruntime")
    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=1)
    make("whole", depth="demo", recipe=recipe)
    make("s3://bucket/set", depth="demo", recipe=recipe, samples=(0, 10))
    make("s3://bucket/set", depth="demo", recipe=recipe)
    assert tree_of("s3://bucket/set") == oracle.tree_of(tmp_path / "whole")


def test_other_file_systems(make, tmp_path, short_shards):
    """One that shows half an object, and so gets them renamed; one in memory; a path in a URL's spelling."""
    make("whole")
    whole = oracle.tree_of(tmp_path / "whole")
    for url in (f"local://{tmp_path}/local", "memory://bucket/set"):
        make(url, samples=(0, 100))
        make(url)
        assert tree_of(url) == whole
    make(f"file://{tmp_path}/file%20set")
    assert oracle.tree_of(tmp_path / "file set") == whole


def test_the_packages_are_named(tmp_path):
    code = (
        "import sys; sys.modules['s3fs'] = None; from gpufgbg.cli import main; sys.exit(main(['stats', 's3://b/x']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and "pip install 'gpufgbg[s3]'" in result.stderr and result.stderr.count("\n") == 1


def test_temporary_files_go(make, s3, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    Path(tmp_path / "tmp").mkdir()
    make("s3://bucket/set")
    import gc

    gc.collect()
    assert not any((tmp_path / "tmp").iterdir())


def test_a_store_that_is_gone(s3, monkeypatch):
    monkeypatch.setattr(remote_store, "_ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _forget()
    with pytest.raises(StorageError, match=r"s3://bucket/set: .*\(2 attempts\): run the same command again$"):
        Store("s3://bucket/set").read("dataset.json")


def test_records_that_overlap_do_not_stop_a_run(make, s3, tmp_path, short_shards):
    """Of a run that was stopped for so long that another took its samples: one of the two counts."""
    make("whole")
    url = "s3://bucket/set"
    make(url, samples=(0, 25))
    make("donor", samples=(23, 60))
    late = "000000000023-000000000028.json"
    Store(url).write(f".gpufgbg/shards/{late}", (tmp_path / "donor" / ".gpufgbg" / "shards" / late).read_bytes())
    assert make(url).complete
    shards = {name: data for name, data in tree_of(url).items() if name.startswith("shards/")}
    assert shards == {k: v for k, v in oracle.tree_of(tmp_path / "whole").items() if k.startswith("shards/")}


def test_an_s3fs_without_max_concurrency(s3, monkeypatch):
    import s3fs

    store = Store("s3://bucket/set")
    store.write("x", b"0123456789")
    calls = []

    async def old(self, path, version_id=None, start=None, end=None):
        calls.append(path)
        return b"0123456789"[start:end]

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", old)
    assert Store("s3://bucket/set").read("x", 2, 5) == b"234"
    monkeypatch.setattr(Store, "_read_options", {"unknown": 1})
    monkeypatch.setattr(remote_store, "_WAIT_S", 1000.0)
    with pytest.raises(TypeError):  # at once
        store.read("x", 2, 5)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "url",
    [f"s3://user:{SECRET}@bucket/set", f"s3://user:a/{SECRET}@bucket/set", f"s3://user@bucket/set?token={SECRET}"],
)
def test_no_message_shows_a_credential(run, arguments, url):
    for command in (
        ("depth", url, "--weights=demo"), ("preview", url), ("verify", url), ("stats", url), ("merge", "out", url),
        (*arguments, f"--backgrounds={url}"), (*arguments, f"--depth={url}"),
        (*arguments, "--sink=tar", f"--out={url}"),
    ):  # fmt: skip
        code, printed, error = run(*command)
        assert code == 2 and error.count("\n") == 1, command
        assert SECRET not in printed + error and "user" not in error, command


def test_urls():
    for url, reason in {
        "s3://bucket//set": "an empty name between two slashes",
        "s3://bucket/a//b": "an empty name between two slashes",
        "s3://bucket/a::b": "a chain of file systems",
        "file://dataset": "names the host dataset: expected file:///FOLDER",
        "file:///tmp/a?b": "with [?] or # in it",
        "file:///tmp/a#b": "with [?] or # in it",
    }.items():
        with pytest.raises(OptionError, match=reason):
            open_manifest(url)
    assert Store("abfss://container@account.dfs.core.windows.net/set/").url.endswith(
        "@account.dfs.core.windows.net/set"
    )
    with pytest.raises(OptionError, match=r"^out: abfss://account/\.\.\.: a URL with a credential"):
        Store(f"abfss://container:{SECRET}@account/set")


@pytest.fixture
def slow_memory(monkeypatch):
    """A store in memory that takes some milliseconds a request."""
    from fsspec.implementations.memory import MemoryFileSystem

    def slowed(call):
        def late(*given, **options):
            time.sleep(random.uniform(0, 0.01))
            return call(*given, **options)

        return late

    for name in ("pipe_file", "put_file", "cat_file", "ls", "info", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, name, slowed(getattr(MemoryFileSystem, name)))
    return "memory://bucket/" + os.urandom(4).hex()


def test_of_two_claims_at_once_one_goes_on(slow_memory, monkeypatch):
    monkeypatch.setattr(remote_manifest, "BEAT_S", 0.2)
    monkeypatch.setattr(remote_manifest, "DEAD_S", 2.0)
    for trial in range(20):
        begin, end, held = threading.Barrier(2), threading.Barrier(2), []

        def claim(trial=trial, begin=begin, end=end, held=held):
            manifest = RemoteManifest(f"{slow_memory}/{trial}")
            begin.wait()
            time.sleep(random.uniform(0, 0.02))
            with contextlib.suppress(DatasetError), manifest.claim(Shard(0, 10)):
                held.append(trial)
                end.wait()
                return
            end.wait()

        threads = [threading.Thread(target=claim) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1


@pytest.mark.parametrize("until", [150, 192])
def test_what_was_made_while_a_claim_waited_is_not_made_again(make, s3, monkeypatch, until):
    url = "s3://bucket/set"
    original = RemoteManifest.claim
    first = []

    def claim(self, part):
        if not first:
            first.append(part)
            make(url, samples=(0, until))
        return original(self, part)

    monkeypatch.setattr(RemoteManifest, "claim", claim)
    report = make(url)
    assert (report.samples, report.complete) == (192 - until, True)


def test_two_slices_that_share_a_shard_end_together(make, slow_memory, tmp_path, monkeypatch, short_shards):
    """Both join its pieces; the one that is late finds them gone."""
    make("whole")
    make(slow_memory, samples=(0, 4))
    original = TarSink._join
    late = []

    def join(self, pieces, whole):
        if not late:
            late.append(whole)
            make(slow_memory)  # joins and removes them
        original(self, pieces, whole)

    monkeypatch.setattr(TarSink, "_join", join)
    make(slow_memory, samples=(4, 192))
    assert late and tree_of(slow_memory) == oracle.tree_of(tmp_path / "whole")
    url = f"{slow_memory}-records"
    make(url, samples=(0, 4))
    joined, late = dataset._joined, []

    def join_records(*given):
        if not late:
            late.append(1)
            make(url)
        return joined(*given)

    monkeypatch.setattr(dataset, "_joined", join_records)
    make(url, samples=(4, 192))
    assert late and tree_of(url) == oracle.tree_of(tmp_path / "whole")


def test_a_store_that_never_answers(arguments, run, s3, monkeypatch):
    """It takes connections and says nothing: one line in the end, before any work and after."""
    import socket

    monkeypatch.setattr(remote_store, "_DEADLINE_S", 1.0)
    monkeypatch.setattr("gpufgbg.pipeline.prepare_sources", lambda *a: pytest.fail("work was done"))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 600}})
    given = [argument for argument in arguments if not argument.startswith("--out")]
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        _forget()
        begun = time.monotonic()
        code, _, error = run(*given, "--sink=tar", "--out=s3://bucket/set")
        assert code == 2 and error.count("\n") == 1
        assert "s3://bucket/set: no answer within 1 s (2 attempts): run the same command again" in error
        with pytest.raises(StorageError, match="no answer within 1 s"):
            Store("s3://bucket/set").write_many({"a": b"", "b": b""})
        assert time.monotonic() - begun < 30


def test_removing_many(s3):
    store = Store("s3://bucket/set")
    store.write_many({f"a/{n}": b"" for n in range(40)})
    store.remove(f"a/{n}" for n in range(1, 50))  # also some that are not there
    assert list(store.list("a")) == ["0"]
    store.remove(["a/0", "a/1"])
    assert not store.list("a")


def test_what_a_killed_run_left_in_tmpdir_is_removed(make, s3, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    left, ours, others = (
        tmp_path / "tmp" / name
        for name in (f"{files.local_prefix(process.pid)}x", f"{files.local_prefix()}x", "gpufgbg-other-1-x")
    )
    for folder in (left, ours, others):
        (folder / "run").mkdir(parents=True)
    make("s3://bucket/set", samples=(0, 5))
    assert not left.exists() and ours.exists() and others.exists()


def test_a_full_tmpdir_is_named(arguments, run, s3, tmp_path, monkeypatch):
    def full(self, pack):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gpufgbg.sinks.FileShard.append", full)
    given = [argument for argument in arguments if not argument.startswith("--out")]
    code, _, error = run(*given, "--sink=tar", "--out=s3://bucket/set")
    assert code == 2 and f"no space left on the disk of {tempfile.gettempdir()}; 0 of 48 samples are safe" in error


def test_a_store_in_memory_is_for_one_process(make):
    with pytest.raises(OptionError, match="with several processes, each of which has its own memory"):
        make("memory://bucket/set", device="cpu,cpu")
