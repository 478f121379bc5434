"""Batches for a training loop: shuffled, normalised, where they are trained on."""

from __future__ import annotations

from collections.abc import Iterator

from contenders import Case
from contenders import cases as taking_part
from ours import OURS
from rivals import RIVALS
from settings import Settings
from work import StreamWork

from gpufgbg.compositor import default_workers

WORK = f"shuffled batches of {StreamWork.BATCH}, float32 NCHW normalised, and masks"


def cases(settings: Settings) -> Iterator[Case]:
    scale = settings.scale
    for who, offer, device, workers in taking_part(
        "stream", (OURS, *RIVALS), settings.device, settings.card, scale.compiled
    ):
        size = scale.stream if who.ours and device != "cpu" else scale.stream // 10
        # Worker processes finish their batches together: calls of fewer would wait in turns, or not at all.
        together = 1 if who.ours else default_workers()
        yield Case("stream", WORK, "samples", who, offer, device, workers, StreamWork.whole(size, together))


def test_stream(case: Case, settings: Settings, measure) -> None:
    measure(case, lambda: StreamWork(settings, case.device, case.size))
