"""What all contenders share, gpufgbg and its rivals: what they offer, where, and the job that is timed.

A module of ``rivals/`` (or ``ours.py``) defines one `Contender` with an `Offer` for each operation that it can do.
An offer makes a `Job` out of the operation's work (``work.py``): all that can be done once is done there, untimed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

from gpufgbg.backends import cuda
from gpufgbg.compositor import default_workers

__all__ = [
    "EVENTS", "HOST", "SYNCHRONISED", "Case", "Contender", "Job", "Offer", "Tolerance", "Unsupported", "cases",
    "in_threads", "started_processes", "why_no_card",
]  # fmt: skip

#: how time is taken: on the host; between two events of the card's current stream; on the host, waiting for the card
HOST, EVENTS, SYNCHRONISED = "host clock", "device events", "host clock, card synchronised"


class Unsupported(Exception):
    """A contender can't do this work on this device; the row says so."""


@dataclass(frozen=True)
class Tolerance:
    """How far a contender's output may be from the reference, and why at all.

    Attributes
    ----------
    greatest : float
        Of any value, in grey levels (or in the unit that the check names).
    mean : float
        Of all values.
    why : str
    """

    greatest: float = 0
    mean: float = 0
    why: str = ""


@dataclass
class Job:
    """A contender's way of doing an operation, ready to be timed.

    Attributes
    ----------
    run : callable
        ``run(turn)`` does batch number ``turn``; on a card it may return before the card is done.
    output : callable
        ``output(turn, picks)`` gives, in host memory, what the samples ``picks`` of that batch come out as.
    clock : str
    note : str
    tolerance : Tolerance
    aside : str
        As in `Row`: why the row is not set against others.
    close : callable
        Frees what the job holds.
    """

    run: Callable[[int], Any]
    output: Callable[..., Any]
    clock: str = HOST
    note: str = ""
    tolerance: Tolerance = field(default_factory=Tolerance)
    aside: str = ""
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Offer:
    """An operation that a contender can do.

    Attributes
    ----------
    make : callable
        ``make(work, device, workers)`` gives the `Job`.
    devices : tuple of str
        On all of them where there is a card, else on the CPU alone.
    threads : bool
        On the CPU, a row with one thread and one with as many as there are cores.
    all_cores : bool
        Whether it takes all cores by itself, on the CPU; else it takes one, or as many as it has threads.
    variant : str
        Tells rows of one contender apart.
    compiled : bool
        Whether it takes tens of seconds to get ready, so that only full runs have it.
    missing : callable
        ``missing(device)`` says what else keeps it from running, or None.
    """

    make: Callable[[Any, str, int], Job]
    devices: tuple[str, ...] = ("cpu",)
    threads: bool = False
    all_cores: bool = False
    variant: str = ""
    compiled: bool = False
    missing: Callable[[str], str | None] = lambda device: None


@dataclass(frozen=True)
class Contender:
    """gpufgbg or a rival.

    Attributes
    ----------
    name : str
    modules : tuple of str
        Modules without which it is absent.
    install : str
        What to install to have it.
    offers : mapping of str to tuple of Offer
        By operation.
    ours : bool
    """

    name: str
    modules: tuple[str, ...]
    install: str
    offers: Mapping[str, tuple[Offer, ...]]
    ours: bool = False

    def why_absent(self, offer: Offer, device: str) -> str | None:
        """What keeps it from running here, with what to do, or None where nothing does."""
        if device.startswith("cuda") and (reason := why_no_card(device)):
            return reason
        for name in self.modules:
            try:
                importlib.import_module(name)
            except ImportError as error:
                first = str(error).strip().partition("\n")[0]
                return f"{name} can't be imported ({first}): pip install {self.install}"
            except Exception as error:  # a package that fails while it is loaded must not end the run
                return f"{name} fails while it is imported: {type(error).__name__}: {error}"
        return offer.missing(device)


@lru_cache
def why_no_card(device: str) -> str | None:
    """What keeps this machine from a card, or None."""
    return cuda.why_not(int(device.partition(":")[2] or 0))


@dataclass(frozen=True)
class Case:
    """A row to be measured: who does which work, where, with how many threads.

    Attributes
    ----------
    suite, work, unit : str
        As in `Row`.
    contender, offer
    device : str
        ``cpu`` or ``cuda:N``.
    workers : int
        Threads or processes, on the CPU.
    size : int
        Units a call.
    curve : bool
        See `Row`.
    kind : str
        What the suite likes to tell its works apart by.
    """

    suite: str
    work: str
    unit: str
    contender: Contender
    offer: Offer
    device: str
    workers: int
    size: int
    curve: bool = False
    kind: str = ""

    @property
    def name(self) -> str:
        """Who, as the report shows it."""
        parts = [self.contender.name, self.offer.variant]
        if self.offer.threads and self.device == "cpu":
            parts.append("1 thread" if self.workers == 1 else f"{self.workers} threads")
        return ", ".join(part for part in parts if part)

    @property
    def row(self) -> dict[str, Any]:
        """What of the row is known before it is measured."""
        return {
            "suite": self.suite, "work": self.work, "name": self.name, "device": self.device.partition(":")[0],
            "ours": self.contender.ours, "unit": self.unit, "count": self.size, "curve": self.curve,
            "workers": self.workers if self.device == "cpu" and self.suite != "limits" else 0,
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.work}: {self.name} ({self.device.partition(':')[0]})"


def cases(
    operation: str, contenders: tuple[Contender, ...], device: str, card: str, compiled: bool
) -> Iterator[tuple[Contender, Offer, str, int]]:
    """Who takes part in an operation: (contender, offer, device, workers), what is absent included."""
    allowed = {"auto": ("cpu", "cuda"), "cpu": ("cpu",)}.get(device, ("cuda",))
    for contender in contenders:
        for offer in contender.offers.get(operation, ()):
            devices = [d for d in offer.devices if d in allowed]
            if offer.compiled and not compiled:
                continue
            if not contender.ours and len(devices) > 1 and why_no_card(card):
                devices = ["cpu"]  # that there is no card is said by those that need one
            for where in devices:
                counts = [1]
                if where == "cpu" and offer.all_cores:
                    counts = [default_workers()]
                elif where == "cpu" and offer.threads and default_workers() > 1:
                    counts = [1, default_workers()]
                for workers in counts:
                    yield contender, offer, card if where == "cuda" else "cpu", workers


@lru_cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


def in_threads(function: Callable[[int, int], Any], count: int, chunk: int, workers: int) -> None:
    """Call ``function(start, stop)`` for all chunks of ``count`` items, in as many threads as ``workers``."""
    cuts = [(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    if workers == 1:
        for start, stop in cuts:
            function(start, stop)
    else:
        for _ in _pool(workers).map(lambda cut: function(*cut), cuts):
            pass


_START_S = 100.0  # for all processes of a pool


def _start(barrier: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(*arguments)
    barrier.wait(_START_S)


def _nothing(*_: Any) -> None:
    """What a process has to do to be there."""


def started_processes(workers: int, function: Callable[..., Any] = _nothing, *arguments: Any) -> ProcessPoolExecutor:
    """A pool whose processes are all there, each having called ``function(*arguments)``: no start is timed."""
    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (context.Barrier(workers), function, arguments))
    # None is free before all have started, so every call starts one more.
    for future in [pool.submit(_nothing) for _ in range(workers)]:
        future.result()
    return pool
