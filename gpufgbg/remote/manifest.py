"""A data set's bookkeeping in a store, where there are no locks and no renames.

Names are those of `gpufgbg.manifest`. In place of locks there are leases: a run keeps an object below
``.gpufgbg/runs/`` fresh; one that no longer changes is of a run that died. Leases only keep two runs from making the
same samples twice. Where they fail to, nothing is lost: both write the same bytes under the same names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from gpufgbg.exceptions import DatasetError, StorageError, printable
from gpufgbg.files import local_prefix, process_is_gone, remove_orphans, this_machine
from gpufgbg.manifest import STATE, Manifest, ShardRecord, inside, kept
from gpufgbg.recipe import Shard
from gpufgbg.remote.store import RemotePath, Store

__all__ = ["RemoteManifest"]

BEAT_S = 5.0  # between two signs of life
DEAD_S = 30.0  # without one


class RemoteManifest(Manifest):
    """The bookkeeping of a data set in a store.

    Parameters
    ----------
    url : str
        Root of the data set.
    """

    claims_wait = True

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        super().__init__(cast(Path, RemotePath(self.store)))  # it has what is used of a path
        self._local = Path(tempfile.gettempdir(), f"{local_prefix()}{uuid.uuid4().hex}")
        self._remove = weakref.finalize(self, shutil.rmtree, self._local, ignore_errors=True)
        self.scratch = self._local / "scratch"
        self.disk = self._local.parent
        self.journal = None  # it would be one more request a map
        self._known: dict[str, ShardRecord] = {}
        self._looked: frozenset[str] = frozenset()  # names of the records at the last call of `settled`

    def check_free(self) -> None:
        """Raise where the store can't be written, or holds something else under the URL."""
        self.store.check()
        found = self.store.list("")
        if found and STATE not in found and self.file.name not in found:
            raise DatasetError(
                f"--out {printable(self.out)}: exists and is not a data set of ours (no dataset.json): "
                "choose another path or empty it"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nothing is locked; see the module."""
        yield

    def settled(self, content: dict[str, Any]) -> bool:
        """Whether dataset.json lists all records that count: another run may have added some meanwhile.

        Also where nothing has changed since the last call, which looking again would not change either.
        """
        names = frozenset(self.store.list(f"{STATE}/shards"))
        counting = kept(Shard.from_name(name.removesuffix(".json")) for name in names)
        if counting == [Shard(entry["start"], entry["stop"]) for entry in content["shards"]]:
            return True
        unchanged, self._looked = names == self._looked, names
        return unchanged

    # -- leases -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, part: Shard) -> Iterator[Path]:
        """Claim samples for this run; gives a folder of this machine for its unfinished shards.

        Raises
        ------
        DatasetError
            A living run is making some of these samples.
        """
        remove_orphans()
        others = self._overlapping(part)
        self._wait_for_death(others)
        self.store.remove(others)
        lease = _Lease(self.store, f"{STATE}/runs/{part.name}-{uuid.uuid4().hex}.json")
        try:
            for other in self._overlapping(part):
                if other != lease.key:
                    self._settle(lease.key, other)
            lease.hold()
            folder = self._local / "run"
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            lease.end()

    def _overlapping(self, part: Shard) -> list[str]:
        found = []
        for name in self.store.list(f"{STATE}/runs"):
            theirs = Shard.from_name(name.rpartition("-")[0])
            if theirs.start < part.stop and part.start < theirs.stop:
                found.append(f"{STATE}/runs/{name}")
        return found

    def _wait_for_death(self, keys: list[str]) -> None:
        """Return once these leases are found stale; `DatasetError` as soon as one lives."""
        first = {key: self._look(key) for key in keys}
        waiting = [key for key, seen in first.items() if seen is not None and not _died_here(seen)]
        until = time.monotonic() + DEAD_S
        while waiting and time.monotonic() < until:
            time.sleep(min(BEAT_S, DEAD_S) / 4)
            for key in list(waiting):
                now = self._look(key)
                if now is None:
                    waiting.remove(key)  # it has ended
                elif now != first[key]:
                    self._refuse(key)

    def _settle(self, own: str, other: str) -> None:
        """Return once ``other``, begun at the same moment, has given way; `DatasetError` where this run has to.

        A lease is written as one that claims, then others are looked for, then it holds. Of two that claim, the
        greater key gives way; but it may have looked before the smaller was there. So the smaller waits until the
        greater holds or is gone, and never do both go on.
        """
        seen, since = None, time.monotonic()
        while (now := self._look(other)) is not None and not _died_here(now):
            if other < own or not now.get("claims"):
                self._refuse(other)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() > since + DEAD_S:
                return
            time.sleep(min(BEAT_S, DEAD_S, 0.4) / 4)

    def _look(self, key: str) -> Any:
        try:
            return json.loads(self.store.read(key))
        except (FileNotFoundError, ValueError):
            return None

    def _refuse(self, key: str) -> None:
        theirs = Shard.from_name(key.rpartition("/")[2].rpartition("-")[0])
        raise DatasetError(
            f"{printable(self.out)}: another process is making samples {theirs.start}:{theirs.stop}: wait for it, or "
            "choose other --samples"
        )

    # -- files --------------------------------------------------------------------------------------

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write files of the data set, each whole."""
        self.store.write_many(files)

    def record(self, records: Iterable[ShardRecord]) -> None:
        """Commit: from here on these shards count as made."""
        records = list(records)
        ranges = {
            f"{STATE}/depth/{r.shard.name}.f32": r.depth_ranges.astype("<f4").tobytes()
            for r in records
            if r.depth_ranges is not None and self.keeps_ranges
        }
        self.store.write_many(ranges)  # they are there before their record is
        self.store.write_many({f"{STATE}/shards/{r.shard.name}.json": r.to_json() for r in records})
        self._known.update({f"{r.shard.name}.json": dataclasses.replace(r, depth_ranges=None) for r in records})

    def forget_pieces(self, joined: Iterable[ShardRecord]) -> None:
        """Remove the records of pieces that lie in these joined ones."""
        whole = sorted(record.shard for record in joined)
        for folder, ending in (("depth", ".f32"), ("shards", ".json")):
            names = self.store.list(f"{STATE}/{folder}")
            pieces = inside(whole, (Shard.from_name(name.removesuffix(ending)) for name in names))
            gone = [f"{piece.name}{ending}" for piece in pieces]
            self.store.remove(f"{STATE}/{folder}/{name}" for name in gone)
            for name in gone:
                self._known.pop(name, None)

    def _floats(self, wanted: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        return self.store.read_parts(
            (f"{STATE}/depth/{name}", 4 * first, 4 * (first + n)) for name, first, n in wanted
        )

    def _read_records(self) -> Iterator[ShardRecord]:
        """Records never change once they are written: each is read once."""
        names = [name for name in self.store.list(f"{STATE}/shards") if name.endswith(".json")]
        new = [name for name in names if name not in self._known]
        found = self.store.read_many(f"{STATE}/shards/{name}" for name in new)
        for name, data in zip(new, found, strict=True):
            self._known[name] = self._parsed(f"{self.out}/{STATE}/shards/{name}", data)
        yield from (self._known[name] for name in names)


def _died_here(seen: dict[str, Any]) -> bool:
    """Whether a lease is of a process of this machine that is no more."""
    if seen.get("machine") != this_machine():
        return False
    return process_is_gone(int(seen["process"]))


class _Lease:
    """An object that changes for as long as this process lives."""

    def __init__(self, store: Store, key: str) -> None:
        self.key = key
        self._store = store
        self._beats = 0
        self._claims = True
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        with self._lock:
            self._beats += 1
            content = {"machine": this_machine(), "process": os.getpid(), "beats": self._beats}
            if self._claims:
                content["claims"] = True
            self._store.write(self.key, json.dumps(content).encode())

    def hold(self) -> None:
        """No other claims these samples: from here on none may."""
        self._claims = False
        self._write()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(StorageError):  # the next may do; the run's own writes tell what is wrong
                self._write()

    def end(self) -> None:
        """No longer."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(StorageError):  # then it goes stale
            self._store.remove([self.key])
