"""Are a data set's label files what its plan says? They are made again, a part at a time, and compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpufgbg.exceptions import DatasetError, StorageError, printable
from gpufgbg.labels import DepthRanges, TableRows, label_lines, row_groups, table_schema
from gpufgbg.manifest import within
from gpufgbg.recipe import Shard
from gpufgbg.verify_books import Books, united
from gpufgbg.verify_report import Faults, VerifyReport

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["LabelState", "check_labels", "label_states"]

_SHOWN = 80  # characters of a line that a message shows
_READ_BYTES = 1 << 20  # of what is too long, at a time
_ROWS = 1 << 16  # of the table, at a time


@dataclass(frozen=True)
class LabelState:
    """What the label files may be of: these samples (sorted, disjoint), with or without their ranges of depth."""

    done: list[Shard]
    depth: bool


def label_states(books: Books) -> list[LabelState]:
    """The samples of dataset.json; and, where a run did not end, also those that it was writing labels of."""
    states = [LabelState(books.done, "depth" in books.kinds)]
    if not books.is_current:
        depth = bool(books.records) and all("depth" in record.moments for record in books.records)
        states.append(LabelState(united([*books.done, *books.recorded]), depth))
    return states


def check_labels(report: VerifyReport, books: Books, areas: npt.NDArray[np.int32]) -> None:
    """Compare labels/ and labels.parquet with what the plan says.

    Parameters
    ----------
    report : VerifyReport
    books : Books
    areas : (F,) int32
        Those of `gpufgbg.labels.mask_areas`.
    """
    states = label_states(books)
    _check_lines(report, books, states)
    _check_table(report, books, areas, states)


# -- labels/ --------------------------------------------------------------------------------------------


def _check_lines(report: VerifyReport, books: Books, states: Sequence[LabelState]) -> None:
    plan, layout, out = books.plan, books.layout, books.manifest.out
    wrong = Faults(report, "label files are wrong")
    lines = expected_lines = 0
    for b in range(plan.n_backgrounds):
        whole = Shard(b * plan.per_background, (b + 1) * plan.per_background)
        path = out / layout.label_file(b)
        faults = []
        for state in states:
            present = within(whole, state.done)
            fault, count = _compared(path, (label_lines(plan, layout, rows) for rows in row_groups(present)))
            faults.append((fault, count, sum(map(len, present))))
            if fault is None:
                break
        fault, count, expected = faults[-1] if faults[-1][0] is None else faults[0]
        if fault is not None:
            wrong.add(fault)
        lines += count
        expected_lines += expected
    wrong.close()
    if lines != expected_lines:
        report.faults.append(f"{printable(out / 'labels')}: {lines} lines, expected {expected_lines}")


def _compared(path: Path, chunks: Iterable[bytes]) -> tuple[str | None, int]:
    """What is wrong with a label file that should be these ``chunks``, by its first wrong line; and its lines."""
    lines, name = 0, printable(path)
    made = iter(chunks)
    first = next(made, None)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return (None if first is None else f"{name}: is missing"), 0
    except StorageError:
        raise
    except OSError as error:
        return f"{name}: can't be read: {error.strerror}", 0
    with file:
        if first is None:
            return f"{name}: belongs to no sample", 0
        while first is not None:
            found = file.read(len(first))
            if found != first:
                return _first_fault(name, lines, first, found, file)
            lines += first.count(b"\n")
            first = next(made, None)
        if more := file.read(_READ_BYTES):
            return _first_fault(name, lines, b"", more, file)
    return None, lines


def _first_fault(name: str, lines: int, expected: bytes, found: bytes, file: Any) -> tuple[str, int]:
    """The first line in which two chunks behind ``lines`` lines differ, and the number of lines of the whole file."""
    length = min(len(expected), len(found))
    differ = np.flatnonzero(np.frombuffer(expected, np.uint8, length) != np.frombuffer(found, np.uint8, length))
    at = int(differ[0]) if len(differ) else length
    begin = max(expected.rfind(b"\n", 0, at), found.rfind(b"\n", 0, at)) + 1
    number = lines + found.count(b"\n", 0, begin) + 1
    here = _line(found[begin:] + file.read(_SHOWN))
    text = f"{name}: line {number}: got {here}, expected {_line(expected[begin:])}"
    file.seek(0)
    count, last = 0, b"\n"
    while data := file.read(_READ_BYTES):
        count, last = count + data.count(b"\n"), data[-1:]
    return text, count + (last != b"\n")


def _line(data: bytes) -> str:
    line = data.partition(b"\n")[0].decode("utf-8", "replace")
    return repr(line[:_SHOWN]) if data else "the end of the file"


# -- labels.parquet -------------------------------------------------------------------------------------


def _check_table(
    report: VerifyReport, books: Books, areas: npt.NDArray[np.int32], states: Sequence[LabelState]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = books.manifest.out / "labels.parquet"
    name = printable(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        if states[0].done:
            report.faults.append(f"{name}: is missing")
        return
    except StorageError:
        raise
    except OSError as error:
        report.faults.append(f"{name}: can't be read: {error.strerror}")
        return
    try:
        with file, pq.ParquetFile(file) as table:
            rows = table.metadata.num_rows
            state = next((state for state in states if _fits(table, state)), states[0])
            expected = sum(map(len, state.done))
            faults = _differences(table.schema_arrow, table_schema(state.depth))
            if rows != expected:
                faults.append(f"{rows} rows, expected {expected}")
            report.faults += [f"{name}: {fault}" for fault in faults]
            if not faults:
                _check_rows(report, name, table, books, areas, state)
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        report.faults.append(f"{name}: can't be read: {printable(reason)}")


def _fits(table: Any, state: LabelState) -> bool:
    return table.metadata.num_rows == sum(map(len, state.done)) and not _differences(
        table.schema_arrow, table_schema(state.depth)
    )


def _differences(found: pa.Schema, expected: pa.Schema) -> list[str]:
    """In what two schemas differ, by the first column that does."""
    columns = [[f"{field.name} {field.type}" for field in schema] for schema in (found, expected)]
    if columns[0] == columns[1]:
        return []
    n = next((n for n, pair in enumerate(zip(*columns, strict=False)) if pair[0] != pair[1]), min(map(len, columns)))
    shown = [names[n] if n < len(names) else "none" for names in columns]
    return [f"column {n + 1}: got {shown[0]}, expected {shown[1]}"]


def _check_rows(
    report: VerifyReport, name: str, table: Any, books: Books, areas: npt.NDArray[np.int32], state: LabelState
) -> None:
    """The first wrong row of each column."""
    made = TableRows(books.plan, areas)
    wrong: dict[str, str] = {}
    depth: DepthRanges | None = books.depth_ranges if state.depth and books.records else None
    for first, rows, batch in _batches(table, state.done):
        try:
            expected = made.columns(rows, depth)
        except DatasetError as error:
            wrong["ranges of depth"] = str(error)
            depth = None
            expected = made.columns(rows, depth)
        for column, values in enumerate(expected):
            field = table.schema_arrow.names[column]
            if field not in wrong and (fault := _first_difference(batch.column(column), values)):
                n, found, value = fault
                wrong[field] = f"{name}: row {first + n}: {field} is {found!r}, expected {value!r}"
    report.faults += wrong.values()


def _batches(table: Any, done: Sequence[Shard]) -> Iterator[tuple[int, Shard, Any]]:
    """(number of the first row, its samples, rows) of a table of the samples ``done``, as many as are in memory."""
    parts = row_groups(done)
    rows, first = Shard(0, 0), 0
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group]):
            at = 0
            while at < batch.num_rows:
                rows = rows if len(rows) else next(parts, rows)
                count = min(len(rows), batch.num_rows - at)
                if not count:
                    return
                yield first, Shard(rows.start, rows.start + count), batch.slice(at, count)
                rows, at, first = Shard(rows.start + count, rows.stop), at + count, first + count


def _first_difference(found: pa.Array, expected: pa.Array) -> tuple[int, object, object] | None:
    """(place, value found, value expected) of the first difference between two arrays of one length."""
    import pyarrow as pa

    if isinstance(expected, pa.DictionaryArray):
        found, expected = found.cast(pa.string()), expected.cast(pa.string())
    if found.equals(expected):
        return None
    pairs = zip(found.to_pylist(), expected.to_pylist(), strict=True)
    return next(((n, a, b) for n, (a, b) in enumerate(pairs) if a != b and not (a != a and b != b)), None)
