"""Rivals against ours: which rows can be set against each other, and who is faster."""

from __future__ import annotations

from collections.abc import Iterable

from gpufgbg.benchmarks.results import WHOLE_JOBS, Results, Row, by_work
from gpufgbg.benchmarks.runner import SUITES

__all__ = ["Duel", "against", "comparable", "duels"]


class Duel:
    """A rival against the best of ours at the same work on the same kind of device.

    Attributes
    ----------
    ours, rival : Row
    """

    def __init__(self, ours: Row, rival: Row) -> None:
        self.ours = ours
        self.rival = rival

    @property
    def ratio(self) -> float:
        """Our rate over the rival's."""
        return self.ours.rate / self.rival.rate

    @property
    def noise(self) -> float:
        """How far the ratio may be from the true one: what both medians may be off by."""
        return self.ours.uncertainty + self.rival.uncertainty

    @property
    def verdict(self) -> str:
        """``ours``, ``rival`` or ``even``, within the noise."""
        if self.ratio > 1 + self.noise:
            return "ours"
        return "rival" if self.ratio < 1 / (1 + self.noise) else "even"


def duels(results: Results) -> list[Duel]:
    """Every rival that was measured beside us on the same kind of device, each against the best of ours there.

    One of one thread is set against ours of one thread where there is one, any other against ours of several. Whole
    jobs must be of the same size. Rows that are set aside take no part.
    """
    found = []
    for suite in SUITES[1:]:
        for rows in by_work(results.of_suite(suite)).values():
            for rival in rows:
                if not rival.ours and (duel := against(rival, [row for row in rows if row.device == rival.device])):
                    found.append(duel)
    return found


def against(rival: Row, rows: Iterable[Row]) -> Duel | None:
    """The duel of a rival with the best of ours among ``rows``, as `duels` counts them; None where there is none."""
    own = [row for row in rows if row.ours and comparable(row, rival)]
    alike = [row for row in own if row.alone == rival.alone] or own
    return Duel(max(alike, key=lambda row: row.rate), rival) if alike else None


def comparable(one: Row, other: Row) -> bool:
    """Whether two rows of a work can be set against each other."""
    if not (one.measured and other.measured) or one.aside or other.aside:
        return False
    return one.suite not in WHOLE_JOBS or one.count == other.count
