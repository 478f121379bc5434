"""Rows of measurements and the JSON file that keeps them, put together from any number of runs on one machine."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gpufgbg.exceptions import InputError, OptionError, printable
from gpufgbg.files import storage_errors, write_atomic

__all__ = ["FORMAT", "STATES", "WHOLE_JOBS", "Results", "Row", "by_work", "identity"]

FORMAT = 1  # of the file; raise it where older files can't be read any more
STATES = ("measured", "absent", "failed")
LEAST_NOISE = 0.03  # two runs of the same code differ by as much on a quiet machine
NOTCH_ROUNDS = 5  # from which the middle half says how far a median may be off
UNKNOWN_NOISE = 0.1  # of a single round
#: suites whose calls have a start and an end of their own: rates of different sizes can't be compared
WHOLE_JOBS = ("pipeline", "stats")

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
    workers : int
        Threads or processes that it works with on the CPU; 0 where nobody said.
    needs : dict of str to float
        What a call can't do without, by limit: the bytes that it must move, the files that it must write, ...
    check : str
        How the outputs were judged in the same run, and what came of it.
    note : str
        What else to know, above all where the work is not quite the same.
    aside : str
        Why the row is not set against others or against a limit, where that would say nothing; empty where it is.
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
    workers: int = 0
    needs: dict[str, float] = field(default_factory=dict)
    check: str = ""
    note: str = ""
    aside: str = ""
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
        return max(LEAST_NOISE, self._middle_half / self.median)

    @property
    def _middle_half(self) -> float:
        ordered = sorted(self.seconds)
        cut = len(ordered) // 4
        return ordered[-1 - cut] - ordered[cut]

    @cached_property
    def uncertainty(self) -> float:
        """How far the median may be off, as a part of it, and never under 3 %: notches of a box plot.

        1.57 times the middle half's width over the root of the number of rounds (McGill, Tukey and Larsen, 1978);
        of fewer than five rounds, `noise`.
        """
        if len(self.seconds) < NOTCH_ROUNDS:
            return self.noise
        return max(LEAST_NOISE, 1.57 * self._middle_half / len(self.seconds) ** 0.5 / self.median)

    @property
    def alone(self) -> bool:
        """Whether one thread or process does it, on the CPU."""
        if self.workers:
            return self.workers == 1
        return self.name.endswith((", 1 thread", ", 1 process"))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Row:
        """The row of `dataclasses.asdict`'s result.

        Raises
        ------
        ValueError, TypeError
            A field is missing, or is not what it should be.
        """
        known = {f.name: f.type for f in dataclasses.fields(cls)}
        values = {name: value for name, value in fields.items() if name in known}
        values["seconds"] = tuple(values.get("seconds", ()))
        row = cls(**values)
        for name in values:
            _check(f"row {row.name!r}: {name}", getattr(row, name), _TYPES[known[name]])
        if row.status not in STATES or (row.measured and not (row.seconds and min(row.seconds) > 0)):
            raise ValueError(f"row {row.name}: status {row.status!r} with {len(row.seconds)} times")
        if row.measured and not row.count > 0:
            raise ValueError(f"row {row.name}: count {row.count!r} of a row with times")
        return row


#: how a field of `Row` is annotated -> what a file may have there
_TYPES: dict[Any, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "float": lambda value: _is_number(value),
    "tuple[float, ...]": lambda value: all(_is_number(part) for part in value),
    "dict[str, float]": lambda value: isinstance(value, dict) and all(_is_number(part) for part in value.values()),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _check(what: str, value: Any, right: Callable[[Any], bool]) -> None:
    if not right(value):
        raise ValueError(f"{what} is {str(value)[:40]!r}")


@dataclass
class Results:
    """All rows of one machine.

    Attributes
    ----------
    machine : dict
        As `machine.describe` tells it.
    runs : list of dict
        Each with date, command, interpreter, versions, scale, input, the rates of the limits that it measured, and,
        where something was found out about its rows afterwards, ``remarks``.
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
        self.runs.append(run | {"limits": {}})

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
        self._keep_limit(row)

    def of_suite(self, suite: str, *, curve: bool = False) -> list[Row]:
        """A suite's rows, those of a curve or the others."""
        return [row for row in self.rows.values() if row.suite == suite and row.curve == curve]

    def _keep_limit(self, row: Row) -> None:
        """A later run has other limits, and its rows replace these; those of this run stay its own."""
        if row.suite == "limits" and row.measured:
            self.runs[row.run].setdefault("limits", {})[row.work] = row.rate

    def share(self, row: Row) -> tuple[float, str] | None:
        """What part of the machine's limit a row reaches, and which limit that is: the one that binds first.

        The limits are those of the row's own run. None where that measured none, and for a row that is set aside.
        """
        limits = self.runs[row.run].get("limits", {})
        floors = [(need / limits[name], name) for name, need in row.needs.items() if name in limits]
        if not floors or not row.measured or row.aside:
            return None
        floor, name = max(floors)
        return floor / row.median, name

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; runs of which no row is left are dropped."""
        used = self.used_runs
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
            found = cls(content["machine"], content["runs"], rows, content["profile"])
            found._validate()
        except OSError as error:
            raise InputError(f"{printable(path)}: can't be read: {error.strerror}") from None
        except RecursionError:
            raise InputError(f"{printable(path)}: no results of gpufgbg bench (nested too deeply)") from None
        except KeyError as error:
            raise InputError(f"{printable(path)}: no results of gpufgbg bench (no {printable(error)})") from None
        except (ValueError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{printable(path)}: no results of gpufgbg bench ({printable(error)})") from None
        for row in found.rows.values():
            found._keep_limit(row)
        return found

    def _validate(self) -> None:
        """ValueError or KeyError where something is not what reports and comparisons take it for."""
        _check("machine", self.machine, lambda value: isinstance(value, dict))
        _check("runs", self.runs, lambda value: isinstance(value, list))
        _check("profile", self.profile, lambda value: isinstance(value, list))
        for name in ("cpu", "cores", "system"):
            _check(f"machine: {name}", self.machine[name], lambda value: isinstance(value, (str, int)))
        for run in self.runs:
            _check("a run", run, lambda value: isinstance(value, dict))
            for name in ("date", "command", "python", "gpufgbg", "scale", "input"):
                _check(f"run: {name}", run[name], _TYPES["str"])
            _check("run: versions", run["versions"], lambda value: isinstance(value, dict))
            _check("run: limits", run.get("limits", {}), _TYPES["dict[str, float]"])
        for entry in self.profile:
            _check("an entry of the profile", entry, lambda value: isinstance(value, dict))
        for number in [row.run for row in self.rows.values()] + [entry["run"] for entry in self.profile]:
            if not 0 <= number < len(self.runs):
                raise ValueError(f"a row is of run {number} of {len(self.runs)}")

    @property
    def scales(self) -> list[str]:
        """Of the runs that rows are left of; one, but for files that were put together by hand."""
        return sorted({self.runs[run]["scale"] for run in self.used_runs})

    @property
    def used_runs(self) -> list[int]:
        """The runs that rows are left of, in order."""
        return sorted({row.run for row in self.rows.values()} | {entry["run"] for entry in self.profile})

    @classmethod
    def open(cls, path: Path, machine: dict[str, Any], scale: str | None = None) -> Results:
        """The results in ``path`` to be added to, or new ones where there is no file.

        Raises
        ------
        InputError
            The file can't be read.
        OptionError
            It is of another machine, or of another scale than the one given.
        """
        if not path.exists():
            return cls(machine)
        found = cls.load(path)
        there, here = (identity(m) for m in (found.machine, machine))
        if there != here:
            raise OptionError(
                "out", f"{printable(path)} has results of {there}, this is {here}: choose another folder"
            )
        if scale is not None and (others := [name for name in found.scales if name != scale]):
            raise OptionError(
                "out",
                f"{printable(path)} has results of scale {', '.join(others)}, this is {scale}: choose another folder",
            )
        # What one run could not find out, another may have.
        found.machine = found.machine | {name: value for name, value in machine.items() if value is not None}
        return found


def identity(machine: dict[str, Any]) -> str:
    """What results of two machines must have in common to be of one."""
    return ", ".join(str(machine[name]) for name in ("gpu", "cpu", "cores") if machine.get(name) is not None)


def by_work(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows under the work that they do, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.work, []).append(row)
    return found
