"""Bookkeeping of very many shards: the records of some thousand neighbours as one.

A segment is a record like any other, of all its shards together: one range of samples, their sums, and a checksum
over the shards' checksums. So whoever adds up, looks for gaps, or resumes sees few records, however many samples
there are. What is known of each shard lies in a list beside it, ``.gpufgbg/segments/START-STOP.parquet``, for those
who look at single shards.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.exceptions import DatasetError, StorageError, printable
from gpufgbg.manifest import STATE, Manifest, ShardRecord
from gpufgbg.moments import Moments
from gpufgbg.recipe import Plan, Shard

__all__ = ["CompactingRecorder", "has_segments", "pack_segments", "shards_of", "unpack_segments"]

SEGMENT_SHARDS = 4096  # of a segment; fewer shards at the end of a data set stay single records


def has_segments(plan: Plan) -> bool:
    """Whether a data set is so large that it has segments once it is complete."""
    return plan.cells >= SEGMENT_SHARDS


def pack_segments(
    manifest: Manifest,
    plan: Plan,
    records: Sequence[ShardRecord],
    ranges: Mapping[Shard, npt.NDArray[np.float32]] | None = None,
) -> list[ShardRecord]:
    """``records`` (all, sorted) with those of whole segments as one each. Call it with the lock held.

    ``ranges`` are least and greatest depths that need not be read again.
    """
    if len(records) < SEGMENT_SHARDS:
        return list(records)
    groups: dict[int, list[ShardRecord]] = {}
    for record in records:
        groups.setdefault(plan.cell(record.shard.start)[1] // SEGMENT_SHARDS, []).append(record)
    packed: list[ShardRecord] = []
    new: list[ShardRecord] = []
    for group, found in sorted(groups.items()):
        if len(found) != SEGMENT_SHARDS or (group + 1) * SEGMENT_SHARDS > plan.cells:
            packed += found
            continue
        whole = Shard(plan.cell_at(group * SEGMENT_SHARDS).start, plan.cell_at((group + 1) * SEGMENT_SHARDS - 1).stop)
        kinds = found[0].moments
        if sum(len(r.shard) for r in found) != len(whole) or any(r.moments.keys() != kinds.keys() for r in found):
            packed += found
            continue
        segment = ShardRecord(
            whole,
            _checksum(found),
            {kind: sum(r.size_bytes[kind] for r in found) for kind in kinds},
            {kind: Moments.total(r.moments[kind] for r in found) for kind in kinds},
            _ranges_of(manifest, found, ranges or {}) if "depth" in kinds and manifest.keeps_ranges else None,
            len(found),
        )
        manifest.put({_list_path(whole): _to_parquet(found)})  # it is there before the record says so
        manifest.record([segment])
        packed.append(segment)
        new.append(segment)
    if new:
        manifest.forget_pieces(new)
    return packed


def _ranges_of(
    manifest: Manifest, records: Sequence[ShardRecord], known: Mapping[Shard, npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """(samples, 2) least and greatest depth of neighbours; those that are not known are read."""
    parts: list[npt.NDArray[np.float32]] = []
    for is_known, group in itertools.groupby(records, key=lambda record: record.shard in known):
        some = list(group)
        if is_known:
            parts += [known[record.shard] for record in some]
        else:
            parts.append(manifest.depth_ranges(Shard(some[0].shard.start, some[-1].shard.stop), some))
    return np.concatenate(parts)


def shards_of(manifest: Manifest, record: ShardRecord) -> list[ShardRecord]:
    """The single shards' records of a record.

    Raises
    ------
    DatasetError
        The list of a segment is gone or is not what it was.
    """
    if record.shards == 1:
        return [record]
    path = manifest.out / _list_path(record.shard)
    try:
        found = _from_parquet(path.read_bytes())
    except StorageError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{printable(path)}: can't be read: {error}") from None
    if _checksum(found) != record.checksum:
        raise DatasetError(f"{printable(path)}: changed since it was written: its checksum differs from the record's")
    return found


def unpack_segments(manifest: Manifest, records: Iterable[ShardRecord]) -> None:
    """Make single records of those that are segments. Call it with the lock held."""
    for record in records:
        if record.shards > 1:
            found = shards_of(manifest, record)
            if "depth" in record.moments:
                raise ValueError("segments with depth maps are not taken apart")
            manifest.record(found)
            manifest.forget(record)


class CompactingRecorder:
    """Records for a manifest, and packs segments as soon as there may be some.

    Parameters
    ----------
    manifest : Manifest
    plan : Plan
    """

    def __init__(self, manifest: Manifest, plan: Plan) -> None:
        self.out = manifest.out
        self.journal = manifest.journal
        self._manifest = manifest
        self._plan = plan
        self._new = 0
        self._ranges: dict[Shard, npt.NDArray[np.float32]] = {}  # of shards that may still be packed, the newest

    def record(self, records: Iterable[ShardRecord]) -> None:
        """Commit: from here on these shards count as made."""
        records = list(records)
        self._manifest.record(records)
        self._new += len(records)
        if self._manifest.keeps_ranges:
            self._ranges.update({r.shard: r.depth_ranges for r in records if r.depth_ranges is not None})
        if self._new >= SEGMENT_SHARDS:
            with self._manifest.locked():
                left = pack_segments(self._manifest, self._plan, self._manifest.records(), self._ranges)
            self._new = 0
            single = {record.shard for record in left if record.shards == 1}
            kept = [shard for shard in self._ranges if shard in single][-2 * SEGMENT_SHARDS :]
            self._ranges = {shard: self._ranges[shard] for shard in kept}


def _list_path(whole: Shard) -> str:
    return f"{STATE}/segments/{whole.name}.parquet"


def _checksum(records: Iterable[ShardRecord]) -> str:
    """SHA-256 over the shards' own, as bytes, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(bytes.fromhex(record.checksum))
    return digest.hexdigest()


def _columns(records: Sequence[ShardRecord]) -> Iterator[tuple[str, list[Any]]]:
    yield "start", [r.shard.start for r in records]
    yield "stop", [r.shard.stop for r in records]
    yield "sha256", [bytes.fromhex(r.checksum) for r in records]
    for kind in records[0].moments:
        yield f"{kind}.bytes", [r.size_bytes[kind] for r in records]
        for name in ("images", "pixels", "sum", "sum_of_squares"):
            values = [getattr(r.moments[kind], name) for r in records]
            yield f"{kind}.{name}", [list(v) if isinstance(v, tuple) else v for v in values]


def _to_parquet(records: Sequence[ShardRecord]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"sha256": pa.binary(32), "sum": pa.list_(pa.int64()), "sum_of_squares": pa.list_(pa.int64())}
    columns = {
        name: pa.array(values, types.get(name.rpartition(".")[2], pa.int64())) for name, values in _columns(records)
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def _from_parquet(data: bytes) -> list[ShardRecord]:
    import pyarrow.parquet as pq

    columns = pq.read_table(io.BytesIO(data)).to_pydict()
    kinds = [name.removesuffix(".bytes") for name in columns if name.endswith(".bytes")]
    return [
        ShardRecord(
            Shard(columns["start"][n], columns["stop"][n]),
            columns["sha256"][n].hex(),
            {kind: columns[f"{kind}.bytes"][n] for kind in kinds},
            {
                kind: Moments(
                    columns[f"{kind}.images"][n],
                    columns[f"{kind}.pixels"][n],
                    tuple(columns[f"{kind}.sum"][n]),
                    tuple(columns[f"{kind}.sum_of_squares"][n]),
                )
                for kind in kinds
            },
        )
        for n in range(len(columns["start"]))
    ]
