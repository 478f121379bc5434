"""Composites and masks, out of prepared pictures, in the device's memory."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import Case
from contenders import cases as taking_part
from ours import OURS
from rivals import RIVALS
from settings import Settings
from work import RECIPE, RenderWork

WORK = f"composite + mask, {RECIPE.width}x{RECIPE.height}"


def cases(settings: Settings) -> Iterator[Case]:
    scale = settings.scale
    for who, offer, device, workers in taking_part(
        "render", (OURS, *RIVALS), settings.device, settings.card, scale.compiled
    ):
        size = scale.pairs if device == "cpu" else scale.card_pairs
        slow = who.name in ("albumentations", "kornia") and device == "cpu"
        yield Case(
            "render", WORK, "pairs", who, offer, device, workers, min(size, scale.slow_pictures) if slow else size
        )
        if who.ours and workers == 1 and not offer.variant:
            for size in scale.sizes if device == "cpu" else scale.card_sizes:
                work = f"{WORK}, {size:,} at a time"
                yield Case("render", work, "pairs", who, offer, device, workers, size, curve=True)


def test_render(case: Case, settings: Settings, measure) -> None:
    measure(case, lambda: RenderWork(settings, case.device, case.size))
