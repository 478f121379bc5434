"""Rows of measurements and the JSON file that keeps them, put together from any number of runs on one machine."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gpufgbg.exceptions import InputError, OptionError, printable
from gpufgbg.files import storage_errors, write_atomic

__all__ = ["FORMAT", "STATES", "Results", "Row"]

FORMAT = 1  # of the file; raise it where older files can't be read any more
STATES = ("measured", "absent", "failed")
LEAST_NOISE = 0.03  # two runs of the same code differ by as much on a quiet machine
UNKNOWN_NOISE = 0.1  # of a single round

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Row:
    """What one contender needs for one piece of work.

    Attributes
    ----------
    suite : str
        The operation: render, encode, moments, ...
    work : str
        What is done; rows of the same work can be compared.
    name : str
        Who does it: gpufgbg or a rival, with what tells its rows apart (threads, precision).
    device : {"cpu", "cuda"}
    ours : bool
    status : {"measured", "absent", "failed"}
    reason : str
        Why it is absent, or what failed.
    unit : str
        What is counted: pairs, pictures, bytes, ...
    count : float
        How many of them a call makes.
    seconds : tuple of float
        Of one call, a value a round.
    clock : str
        How the time was taken.
    needs : dict of str to float
        What a call can't do without, by limit: the bytes that it must move, the files that it must write, ...
    check : str
        How the outputs were judged in the same run, and what came of it.
    note : str
        What else to know, above all where the work is not quite the same.
    curve : bool
        Whether the row is one of several sizes of the same, for the plot of cost against size, not for comparison.
    run : int
        Which of the file's runs measured it.
    """

    suite: str
    work: str
    name: str
    device: str
    ours: bool = False
    status: str = "measured"
    reason: str = ""
    unit: str = ""
    count: float = 0
    seconds: tuple[float, ...] = ()
    clock: str = ""
    needs: dict[str, float] = field(default_factory=dict)
    check: str = ""
    note: str = ""
    curve: bool = False
    run: int = 0

    @property
    def key(self) -> Key:
        """What tells rows of a file apart."""
        return self.suite, self.work, self.name, self.device

    @property
    def measured(self) -> bool:
        """Whether there is a time."""
        return self.status == "measured"

    @cached_property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """Units a second, by the median."""
        return self.count / self.median

    @cached_property
    def noise(self) -> float:
        """How far rounds are apart: the middle half's width over the median, and never under 3 %.

        Of two or three rounds, all of them; of a single one nobody knows, and it is taken for 10 %.
        """
        if len(self.seconds) == 1:
            return UNKNOWN_NOISE
        ordered = sorted(self.seconds)
        cut = len(ordered) // 4
        return max(LEAST_NOISE, (ordered[-1 - cut] - ordered[cut]) / self.median)

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Row:
        """The row of `dataclasses.asdict`'s result."""
        known = {f.name for f in dataclasses.fields(cls)}
        values = {name: value for name, value in fields.items() if name in known}
        values["seconds"] = tuple(values.get("seconds", ()))
        row = cls(**values)
        if row.status not in STATES or (row.measured and not (row.seconds and min(row.seconds) > 0)):
            raise ValueError(f"row {row.name}: status {row.status!r} with {len(row.seconds)} times")
        return row


@dataclass
class Results:
    """All rows of one machine.

    Attributes
    ----------
    machine : dict
        As `machine.describe` tells it.
    runs : list of dict
        Each with date, command, interpreter, versions, scale and input.
    rows : dict of key to Row
    profile : list of dict
        Our kernels under the profiler; see `profile`.
    """

    machine: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[Key, Row] = field(default_factory=dict)
    profile: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, run: dict[str, Any]) -> None:
        """Rows that are added from now on are of this run."""
        self.runs.append(run)

    def add(self, row: Row) -> None:
        """Add a row of the current run; the one that had its place goes.

        But a contender that this interpreter lacks keeps what another one measured of it.
        """
        row = dataclasses.replace(row, run=len(self.runs) - 1)
        old = self.rows.get(row.key)
        if old is not None and old.measured and row.status == "absent":
            mine, theirs = (self.runs[run].get("interpreter") for run in (row.run, old.run))
            if mine != theirs:
                return
        self.rows[row.key] = row

    def of_suite(self, suite: str, *, curve: bool = False) -> list[Row]:
        """A suite's rows, those of a curve or the others."""
        return [row for row in self.rows.values() if row.suite == suite and row.curve == curve]

    @property
    def limits(self) -> dict[str, Row]:
        """The machine's limits that were measured, by name."""
        return {row.work: row for row in self.of_suite("limits") if row.measured}

    def share(self, row: Row) -> tuple[float, str] | None:
        """What part of the machine's limit a row reaches, and which limit that is: the one that binds first.

        None where none of its limits was measured.
        """
        limits = self.limits
        floors = [(need / limits[name].rate, name) for name, need in row.needs.items() if name in limits]
        if not floors or not row.measured:
            return None
        floor, name = max(floors)
        return floor / row.median, name

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; runs of which no row is left are dropped."""
        used = sorted({row.run for row in self.rows.values()} | {p["run"] for p in self.profile})
        number = {old: new for new, old in enumerate(used)}
        rows = [dataclasses.asdict(row) | {"run": number[row.run]} for row in self.rows.values()]
        profile = [entry | {"run": number[entry["run"]]} for entry in self.profile]
        content = {
            "format": FORMAT,
            "machine": self.machine,
            "runs": [self.runs[run] for run in used],
            "rows": rows,
            "profile": profile,
        }
        with storage_errors(path):
            write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file.

        Raises
        ------
        InputError
            It is not there, or not such a file.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise InputError(
                    f"{printable(path)}: results of format {content['format']!r}, expected {FORMAT}: "
                    "measure again with this version"
                )
            rows = {row.key: row for row in map(Row.of, content["rows"])}
            return cls(content["machine"], content["runs"], rows, content["profile"])
        except OSError as error:
            raise InputError(f"{printable(path)}: can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{printable(path)}: no results of gpufgbg bench ({printable(error)})") from None

    @classmethod
    def open(cls, path: Path, machine: dict[str, Any]) -> Results:
        """The results in ``path`` to be added to, or new ones where there is no file.

        Raises
        ------
        InputError
            The file can't be read.
        OptionError
            It is of another machine.
        """
        if not path.exists():
            return cls(machine)
        found = cls.load(path)
        there, here = (_identity(m) for m in (found.machine, machine))
        if there != here:
            raise OptionError(
                "out", f"{printable(path)} has results of {there}, this is {here}: choose another folder"
            )
        # What one run could not find out, another may have.
        found.machine = found.machine | {name: value for name, value in machine.items() if value is not None}
        return found


def _identity(machine: dict[str, Any]) -> str:
    return ", ".join(str(machine[name]) for name in ("gpu", "cpu", "cores") if machine.get(name) is not None)


def by_work(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows under the work that they do, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.work, []).append(row)
    return found
