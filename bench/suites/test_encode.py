"""JPEG files of pictures in the device's memory: composites in colour, masks in grey."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import Case
from contenders import cases as taking_part
from ours import OURS
from rivals import RIVALS
from settings import Settings
from work import RECIPE, EncodeWork


def cases(settings: Settings) -> Iterator[Case]:
    scale = settings.scale
    for kind in ("RGB", "grey"):
        colours = "RGB 4:2:0" if kind == "RGB" else "grey"
        work = f"{colours} to JPEG, quality {RECIPE.quality}, {RECIPE.width}x{RECIPE.height}"
        for who, offer, device, workers in taking_part(
            "encode", (OURS, *RIVALS), settings.device, settings.card, scale.compiled
        ):
            size = scale.threaded(workers) if device == "cpu" else scale.card_pictures
            if device != "cpu" and not who.ours:
                size = min(size, scale.slow_pictures)
            yield Case("encode", work, "pictures", who, offer, device, workers, size, kind=kind)
            if who.ours and workers == 1 and kind == "RGB":
                for size in scale.sizes[:-1] if device == "cpu" else scale.card_sizes[:-1]:
                    curve = f"{work}, {size:,} at a time"
                    yield Case("encode", curve, "pictures", who, offer, device, workers, size, curve=True, kind=kind)


def test_encode(case: Case, settings: Settings, measure) -> None:
    measure(case, lambda: EncodeWork(settings, case.device, case.size, case.kind))
