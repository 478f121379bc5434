"""Two files of results against each other: what became slower, faster, or is missing."""

from __future__ import annotations

from dataclasses import dataclass

from gpufgbg.benchmarks.results import Results, Row

__all__ = ["Change", "changes", "changes_table"]


@dataclass(frozen=True)
class Change:
    """A row of two files.

    Attributes
    ----------
    old, new : Row or None
        None, or not measured, where a file has no time of it.
    """

    old: Row | None
    new: Row | None

    @property
    def row(self) -> Row:
        """The row, as one of the files has it."""
        found = self.old or self.new
        assert found is not None
        return found

    @property
    def ratio(self) -> float | None:
        """The new file's rate over the old one's: above 1 is faster. None where either has no time."""
        if self.old is None or self.new is None or not (self.old.measured and self.new.measured):
            return None
        return self.new.rate / self.old.rate

    @property
    def noise(self) -> float:
        """How far the ratio may be from 1 by chance: the rounds' spread in both files together."""
        return sum(row.noise for row in (self.old, self.new) if row is not None and row.measured)

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` beyond the noise, ``same``, ``lost`` (measured in the old file alone), ``new``."""
        ratio = self.ratio
        if ratio is None:
            return "lost" if self.old is not None and self.old.measured else "new"
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
    found = [Change(old.rows.get(key), new.rows.get(key)) for key in keys]
    return [c for c in found if any(row is not None and row.measured for row in (c.old, c.new))]


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
