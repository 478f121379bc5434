"""Whole data sets: from folders of pictures to files on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from contenders import Case
from contenders import cases as taking_part
from job_work import DATASETS, DatasetWork
from settings import Settings


def cases(settings: Settings) -> Iterator[Case]:
    scale = settings.scale
    for sink in ("tar", "tree"):
        work = f"data set to {sink}, composites and masks"
        for who, offer, device, workers in taking_part("pipeline", DATASETS, settings.device, settings.card, True):
            if not who.ours and sink != "tree":
                continue
            whole = DatasetWork.whole(settings, scale.card_job if device != "cpu" else scale.job)
            size = whole if who.ours else min(whole, scale.job)
            if offer.variant == "1 process":
                size = max(1, size // 5)
            yield Case("pipeline", work, "pairs", who, offer, device, workers, size, kind=sink)
            if who.ours and sink == "tree" and device != "cpu" and settings.device == "auto":
                # The rivals' size as well: without it there is no comparison, for starting is a part of the time.
                alike = DatasetWork.whole(settings, scale.job)
                if alike != size:
                    named = replace(offer, variant=f"{alike:,} pairs")
                    yield Case("pipeline", work, "pairs", who, named, device, workers, alike, kind=sink)
            if who.ours and sink == "tar":
                for size in scale.card_job_sizes if device != "cpu" else scale.job_sizes:
                    curve = f"{work}, {size:,} pairs"
                    yield Case("pipeline", curve, "pairs", who, offer, device, workers, size, curve=True, kind=sink)


def test_pipeline(case: Case, settings: Settings, measure) -> None:
    rounds = settings.scale.job_rounds if not case.curve else 1
    measure(case, lambda: DatasetWork(settings, case.device, case.size, case.kind), rounds)
