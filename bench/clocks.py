"""Timers for pytest-benchmark: each gives something whose difference is seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from contenders import EVENTS, HOST, SYNCHRONISED

__all__ = ["CLOCKS", "synchronise"]


def synchronise() -> None:
    """Wait for the card."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


class Moment:
    """A point in the work of the card's current stream."""

    def __init__(self) -> None:
        import cupy

        self.event = cupy.cuda.get_current_stream().record()

    def __sub__(self, earlier: Moment) -> float:
        """Seconds between two points; waits for the later one."""
        import cupy

        self.event.synchronize()
        return float(cupy.cuda.get_elapsed_time(earlier.event, self.event)) / 1e3


def _synchronised() -> float:
    synchronise()
    return time.perf_counter()


#: by name, as `Job.clock` has it
CLOCKS: dict[str, Callable[[], Any]] = {HOST: time.perf_counter, EVENTS: Moment, SYNCHRONISED: _synchronised}
