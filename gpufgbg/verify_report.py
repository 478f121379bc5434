"""What `gpufgbg.verify` gives: counts, and a line for each fault."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Faults", "VerifyReport"]

NAMED = 20  # faults of one sort that are named one by one


@dataclass
class VerifyReport:
    """What `gpufgbg.verify.verify` found.

    Attributes
    ----------
    samples : int
        Samples that the data set has.
    files : int
        Files that were read and checked.
    rerendered : int
        Samples that were rendered again and compared.
    decoded : int
        Pictures that were decoded.
    faults : list of str
        One line each; empty where all is well.
    """

    samples: int = 0
    files: int = 0
    rerendered: int = 0
    decoded: int = 0
    faults: list[str] = field(default_factory=list)


class Faults:
    """Faults of one sort: the first are named in the report, of the others `close` tells the number.

    Parameters
    ----------
    report : VerifyReport
    sort : str
        What is wrong with the others, behind their number.
    """

    def __init__(self, report: VerifyReport, sort: str) -> None:
        self._report, self._sort, self._count = report, sort, 0

    def add(self, text: str, count: int = 1) -> None:
        """One fault more; or ``count`` of them, of which the text names one."""
        if self._count < NAMED:
            self._report.faults.append(text)
            self._count += 1
            count -= 1
        self._count += count

    def close(self) -> None:
        """All are known."""
        if self._count > NAMED:
            self._report.faults.append(f"{self._count - NAMED:,} more {self._sort}")
