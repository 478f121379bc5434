"""The machine's own limits, which the other suites' rows are set against."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import Case
from contenders import cases as taking_part
from limits import LIMITS, LimitWork
from settings import Settings


def cases(settings: Settings) -> Iterator[Case]:
    # The host's belong to every run: what a card makes goes through it to the disk.
    for limit, (unit, contender) in LIMITS.items():
        device = "auto" if settings.device.startswith("cuda") else settings.device
        for who, offer, where, workers in taking_part("limits", (contender,), device, settings.card, True):
            size = LimitWork(settings, limit).size
            yield Case("limits", limit, unit, who, offer, where, workers, size, kind=limit)


def test_limit(case: Case, settings: Settings, measure) -> None:
    rounds = None
    if case.kind.startswith("disk"):
        full = 9 if case.kind.endswith("files") else 5  # small files' rounds are far apart
        rounds = full if settings.scale.compiled else 3 if settings.scale.seconds else 1
    measure(case, lambda: LimitWork(settings, case.kind), rounds)
