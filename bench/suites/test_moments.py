"""Mean and standard deviation of each channel of pictures in the device's memory."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import Case
from contenders import cases as taking_part
from ours import OURS
from rivals import RIVALS
from settings import Settings
from work import RECIPE, MomentsWork

WORK = f"mean and std, RGB, {RECIPE.width}x{RECIPE.height}"


def cases(settings: Settings) -> Iterator[Case]:
    scale = settings.scale
    for who, offer, device, workers in taking_part(
        "moments", (OURS, *RIVALS), settings.device, settings.card, scale.compiled
    ):
        size = scale.threaded(workers) if device == "cpu" else scale.card_pictures
        if who.name == "NumPy":
            size = min(size, scale.slow_pictures)
        yield Case("moments", WORK, "pictures", who, offer, device, workers, size)


def test_moments(case: Case, settings: Settings, measure) -> None:
    measure(case, lambda: MomentsWork(settings, case.device, case.size))
