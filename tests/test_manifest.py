"""A data set's bookkeeping: claims, records, and the lists of samples that they are worked with."""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gpufgbg import DatasetError, Moments, manifest
from gpufgbg.manifest import Manifest, ShardRecord, inside, kept, missing, within
from gpufgbg.merging import _new_ones
from gpufgbg.recipe import Shard
from gpufgbg.remote.manifest import RemoteManifest

SOON_S = 30.0  # for what takes no time


def record_of(shard: Shard, depth: bool = False) -> ShardRecord:
    """A record with plausible sums."""
    count = len(shard)
    grey = Moments(count, count, (1,), (2,))
    moments = {"composite": Moments(count, count, (1, 2, 3), (4, 5, 6)), "composite_mask": grey}
    ranges = None
    if depth:
        moments["depth"] = grey
        ranges = np.arange(2 * count, dtype=np.float32).reshape(-1, 2)
    return ShardRecord(shard, "ab" * 32, dict.fromkeys(moments, 7), moments, ranges)


def row_of(count: int, length: int = 7) -> list[Shard]:
    return [Shard(n * length, (n + 1) * length) for n in range(count)]


# -- lists of samples -----------------------------------------------------------------------------------


def test_within_covers_what_missing_leaves():
    chance = random.Random(3)
    for _ in range(300):
        cuts = sorted(chance.sample(range(60), 2 * chance.randint(0, 8)))
        done = [Shard(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=True)]
        whole = Shard(*sorted(chance.sample(range(60), 2)))
        plain = {n for shard in done for n in range(shard.start, shard.stop)} & set(range(whole.start, whole.stop))
        assert [n for shard in within(whole, done) for n in range(shard.start, shard.stop)] == sorted(plain)
        assert within(whole, done) == missing(whole, missing(whole, done))


def test_inside_and_kept_say_what_a_plain_loop_says():
    chance = random.Random(4)
    for _ in range(300):
        cuts = sorted(chance.sample(range(60), 2 * chance.randint(0, 8)))
        whole = [Shard(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=True)]
        pieces = {Shard(*sorted(chance.sample(range(60), 2))) for _ in range(chance.randint(0, 20))}
        pieces |= set(chance.sample(whole, len(whole) // 2))
        assert inside(whole, pieces) == sorted(
            piece
            for piece in pieces
            if piece not in whole and any(w.start <= piece.start and piece.stop <= w.stop for w in whole)
        )
        counting = kept(pieces)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(counting))
        for piece in pieces:  # whatever does not count meets something that does
            assert any(piece.start < shard.stop and shard.start < piece.stop for shard in counting)


def test_very_many_shards_take_no_time():
    shards = row_of(60_000)
    records = [record_of(shard) for shard in shards]
    part = type("Part", (), {"records": records})()
    begun = time.perf_counter()
    there: list[Shard] = []
    assert [record.shard for record in _new_ones(part, there, Path("out"))] == shards == there
    assert list(_new_ones(part, there, Path("out"))) == []
    remote, store = remote_with(shards)
    assert remote.settled({"shards": [{"start": s.start, "stop": s.stop} for s in shards]})
    assert inside(shards, (Shard(s.start, s.start + 3) for s in shards)) == [
        Shard(s.start, s.start + 3) for s in shards
    ]
    assert time.perf_counter() - begun < SOON_S
    assert store.looks == 1


# -- records --------------------------------------------------------------------------------------------


def test_the_folder_of_depth_ranges_is_synced_before_records_appear(tmp_path, monkeypatch):
    """Else a power cut could leave a record whose ranges of depth are gone with their folder."""
    made = Manifest(tmp_path)
    made.scratch.mkdir(parents=True)
    seen = []

    def sync(folder: Path) -> None:
        seen.append(((tmp_path / ".gpufgbg" / "depth").is_dir(), list((tmp_path / ".gpufgbg" / "shards").iterdir())))

    monkeypatch.setattr(manifest, "sync_file_system", sync)
    made.record([record_of(Shard(0, 5), depth=True)])
    assert seen == [(True, [])]
    assert made.depth_ranges(Shard(1, 3), made.records()).tolist() == [[2, 3], [4, 5]]


def test_depth_ranges_of_several_shards(tmp_path):
    made = Manifest(tmp_path)
    made.scratch.mkdir(parents=True)
    made.record(record_of(shard, depth=True) for shard in row_of(5))
    records = made.records()
    whole = np.concatenate([np.arange(14, dtype=np.float32).reshape(-1, 2)] * 5)
    for start in range(35):
        for stop in range(start + 1, 36):
            assert np.array_equal(made.depth_ranges(Shard(start, stop), records), whole[start:stop])


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: text.replace('"start": 0', '"start": "0"'),
        lambda text: text.replace('"stop": 5', '"stop": 0'),
        lambda text: text.replace("abab", "xyzz", 1),
        lambda text: text.replace('"bytes"', '"bites"'),
        lambda text: text.replace('"images": 5', '"images": 4'),
        lambda text: '{"moments": []}',
        lambda text: text.replace("[\n    1,\n    2,\n    3\n   ]", "[1]").replace("[1, 2, 3]", "[1]"),
        lambda text: "[" * 100_000,
        lambda text: "[]",
    ],
)
def test_a_damaged_record_is_named(tmp_path, damage):
    made = Manifest(tmp_path)
    made.scratch.mkdir(parents=True)
    made.record([record_of(Shard(0, 5))])
    (path,) = (tmp_path / ".gpufgbg" / "shards").iterdir()
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(DatasetError, match=f"{path.name}: damaged: remove it and run generate again"):
        made.records()


# -- claims ---------------------------------------------------------------------------------------------


def test_a_claim_that_ends_takes_nothing_from_the_next(tmp_path, monkeypatch):
    """One process has given its claim up and is still removing its folder when another asks for the same samples."""
    removing, removed = threading.Event(), threading.Event()
    original = manifest.remove_tree
    part, folders = Shard(0, 10), []

    def slowly(folder: Path) -> None:
        if threading.current_thread().name == "first" and folder.name == part.name:
            removing.set()
            removed.wait(SOON_S)
        original(folder)

    monkeypatch.setattr(manifest, "remove_tree", slowly)

    def first() -> None:
        mine = Manifest(tmp_path)
        with mine.locked():
            claim = mine.claim(part)
            claim.__enter__()
        claim.__exit__(None, None, None)

    def second() -> None:
        theirs = Manifest(tmp_path)
        with theirs.locked():
            claim = theirs.claim(part)
            folder = claim.__enter__()
        (folder / "unfinished").touch()
        folders.append((claim, folder))

    threads = [threading.Thread(target=first, name="first"), threading.Thread(target=second, name="second")]
    threads[0].start()
    assert removing.wait(SOON_S)
    threads[1].start()
    threads[1].join(0.5)  # in time where nothing keeps it
    removed.set()
    for thread in threads:
        thread.join(SOON_S)
    ((claim, folder),) = folders
    assert [path.name for path in sorted(folder.iterdir())] == ["lock", "unfinished"]
    claim.__exit__(None, None, None)
    assert not any((tmp_path / ".gpufgbg" / "runs").iterdir())


def test_a_claim_ends_where_the_data_set_is_gone(tmp_path):
    made = Manifest(tmp_path / "out")
    with made.locked():
        claim = made.claim(Shard(0, 10))
        claim.__enter__()
    shutil.rmtree(tmp_path / "out")
    claim.__exit__(None, None, None)
    assert not (tmp_path / "out").exists()


# -- in a store -----------------------------------------------------------------------------------------


class Listing:
    """Stands for a store that holds these records."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards, self.looks = shards, 0

    def list(self, key: str) -> dict[str, int]:
        assert key == ".gpufgbg/shards"
        self.looks += 1
        return {f"{shard.name}.json": 1 for shard in self.shards}


def remote_with(shards: list[Shard]) -> tuple[RemoteManifest, Listing]:
    remote = RemoteManifest("s3://bucket/set")
    store = Listing(shards)
    remote.store = store  # type: ignore[assignment]
    return remote, store


def listing(*shards: Shard) -> dict:
    return {"shards": [{"start": shard.start, "stop": shard.stop, "sha256": ""} for shard in shards]}


def test_settled_means_that_all_records_that_count_are_listed():
    remote, store = remote_with([Shard(0, 7), Shard(7, 14)])
    assert remote.settled(listing(Shard(0, 7), Shard(7, 14)))
    assert not remote.settled(listing(Shard(0, 7)))  # another run has added one meanwhile
    store.shards.append(Shard(14, 21))
    assert not remote.settled(listing(Shard(0, 7), Shard(7, 14)))
    assert remote.settled(listing(Shard(0, 7), Shard(7, 14), Shard(14, 21)))


def test_records_that_overlap_in_part_are_settled():
    """Two runs whose leases failed made some of the same samples; one of the two records counts."""
    remote, _ = remote_with([Shard(0, 7), Shard(5, 9), Shard(9, 14), Shard(10, 12)])
    assert remote.settled(listing(Shard(0, 7), Shard(9, 14)))


def test_looking_again_ends_where_nothing_changes():
    remote, _ = remote_with([Shard(0, 7), Shard(7, 14)])
    assert not remote.settled(listing())
    assert remote.settled(listing())
