"""Two files of results against each other: what became slower, faster, or is missing."""

from __future__ import annotations

from dataclasses import dataclass

from gpufgbg.benchmarks.results import WHOLE_JOBS, Results, Row, identity
from gpufgbg.exceptions import InputError

__all__ = ["Change", "changes", "changes_table", "check_alike", "head"]


@dataclass(frozen=True)
class Change:
    """A row of two files.

    Attributes
    ----------
    old, new : Row or None
        None, or not measured, where a file has no time of it.
    ran : bool
        Whether the new file has anything of the row's suite on its device.
    """

    old: Row | None
    new: Row | None
    ran: bool = True

    @property
    def row(self) -> Row:
        """The row, as one of the files has it."""
        found = self.old or self.new
        assert found is not None
        return found

    @property
    def ratio(self) -> float | None:
        """The new file's rate over the old one's: above 1 is faster. None where either has no time of the same."""
        if self.old is None or self.new is None or not (self.old.measured and self.new.measured):
            return None
        return self.new.rate / self.old.rate if self._of_the_same(self.old, self.new) else None

    @staticmethod
    def _of_the_same(old: Row, new: Row) -> bool:
        """Whether both did the same work: rows that were set aside since did other work, or were timed otherwise."""
        return old.aside == new.aside and (old.suite not in WHOLE_JOBS or old.count == new.count)

    @property
    def noise(self) -> float:
        """How far the ratio may be from 1 by chance: what the medians of both files may be off by."""
        return sum(row.uncertainty for row in (self.old, self.new) if row is not None and row.measured)

    @property
    def verdict(self) -> str:
        """What came of it.

        ``slower`` or ``faster`` beyond the noise, ``same``, ``lost`` (measured in the old file alone), ``not run``
        (the new file has nothing of its suite there), ``not compared`` (both did not do the same), ``new``.
        """
        ratio = self.ratio
        if ratio is None:
            if self.new is not None and self.new.measured:
                return "not compared" if self.old is not None and self.old.measured else "new"
            return "lost" if self.ran else "not run"
        # Symmetric: as many times slower as it would have to be faster.
        if ratio < 1 / (1 + self.noise):
            return "slower"
        return "faster" if ratio > 1 + self.noise else "same"

    @property
    def is_regression(self) -> bool:
        """A row of ours that is slower beyond the noise, or lost."""
        return self.row.ours and self.verdict in ("slower", "lost")


def changes(old: Results, new: Results) -> list[Change]:
    """All rows that were measured in either file, in the old one's order. Limits count as rivals: not ours."""
    keys = [*old.rows, *(key for key in new.rows if key not in old.rows)]
    # A suite that failed as a whole did run.
    ran = {(row.suite, device) for row in new.rows.values() for device in _devices(row)}
    found = []
    for key in keys:
        known = old.rows.get(key), new.rows.get(key)
        row = known[0] or known[1]
        assert row is not None
        found.append(Change(*known, ran=not new.rows or (row.suite, row.device) in ran))
    return [c for c in found if any(row is not None and row.measured for row in (c.old, c.new))]


def _devices(row: Row) -> tuple[str, ...]:
    return ("cpu", "cuda") if row.status == "failed" else (row.device,)


def head(results: Results) -> str:
    """A line: machine, and scale, commit and date of each run."""
    runs = [results.runs[run] for run in results.used_runs]
    told = [f"{run['scale']}, {run.get('commit') or 'no commit'}, {run['date']}" for run in runs]
    return "; ".join([identity(results.machine), *told])


def check_alike(old: Results, new: Results) -> None:
    """Refuse results that can't be compared.

    Raises
    ------
    InputError
        They are of different machines or scales.
    """
    machines = [identity(found.machine) for found in (old, new)]
    scales = [", ".join(found.scales) for found in (old, new)]
    for what, (one, other) in (("machines", machines), ("scales", scales)):
        if one != other and old.rows and new.rows:
            raise InputError(f"results of different {what}: {one} and {other}; --force compares them all the same")


def changes_table(found: list[Change]) -> str:
    """The changes as a Markdown table."""
    lines = ["| suite | work | who | new rate / old rate | noise | verdict |", "|---|---|---|---|---|---|"]
    for change in found:
        row = change.row
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        verdict = f"**{change.verdict}**" if change.is_regression else change.verdict
        who = f"{row.name} ({row.device})"
        lines.append(f"| {row.suite} | {row.work} | {who} | {ratio} | +-{100 * change.noise:.0f} % | {verdict} |")
    return "\n".join(lines)
