"""Mean and standard deviation of a data set on disk, by decoding all of it."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import Case
from contenders import cases as taking_part
from job_work import STATISTICS, StatisticsWork
from settings import Settings

WORK = "mean and std of a data set's files"


def cases(settings: Settings) -> Iterator[Case]:
    for who, offer, device, workers in taking_part("stats", STATISTICS, settings.device, settings.card, True):
        alone = device == "cpu" and (offer.variant == "1 process" or (offer.threads and workers == 1))
        count = settings.scale.stats // (5 if alone else 1)
        yield Case("stats", WORK, "pictures", who, offer, device, workers, 2 * count)


def test_stats(case: Case, settings: Settings, measure) -> None:
    rounds = settings.scale.job_rounds if settings.scale.compiled else None
    measure(case, lambda: StatisticsWork(settings, case.device, case.size // 2), rounds)
