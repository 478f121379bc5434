"""Depth maps of pictures by DenseDepth, whose weights are random here."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import Case
from contenders import cases as taking_part
from depth_work import CONTENDERS, DepthWork
from settings import Settings

from gpufgbg.compositor import default_workers


def cases(settings: Settings) -> Iterator[Case]:
    scale = settings.scale
    for who, offer, device, workers in taking_part(
        "depth", CONTENDERS, settings.device, settings.card, scale.compiled
    ):
        side, size = scale.card_depth, scale.depth_pictures
        if device == "cpu":
            side, size = scale.depth, max(2, default_workers())
        work = f"pictures {side // 2}x{side // 2} to depth maps, DenseDepth at {side}x{side}"
        yield Case("depth", work, "pictures", who, offer, device, workers, size, kind=str(side))


def test_depth(case: Case, settings: Settings, measure) -> None:
    rounds = 2 if case.device == "cpu" and settings.scale.compiled else None
    measure(case, lambda: DepthWork(settings, case.device, case.size, int(case.kind)), rounds)
