"""The driver: hands out shards to workers one by one, records what they publish, and gives out again what is lost."""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gpufgbg.exceptions import DeviceError, GpufgbgWarning
from gpufgbg.files import remove_tree
from gpufgbg.labels import LabelJob, write_labels
from gpufgbg.manifest import Recorder, merged
from gpufgbg.recipe import Plan, Shard
from gpufgbg.shards import Committer

__all__ = ["Crew", "Driver", "Member"]

HANG_S = 300.0  # silence of a worker that has work, after which it is given up
START_S = 900.0  # for loading everything; building a depth engine takes minutes
GRACE_S = 60.0  # in which all workers may get ready before those that are begin
_TICK_S = 1.0
_TRIES = 3  # workers that a shard may take with it; also that are lost in one place before their first shard


@dataclass(eq=False)
class Member:
    """The driver's side of a worker.

    Attributes
    ----------
    name : str
        For people: its device, and its machine where there are several.
    link : Any
        The crew's own.
    """

    name: str
    link: Any
    engine: dict[str, Any] | None = None
    ready: bool = False
    running: bool = False
    folder: Path | None = None
    held: set[Shard] = field(default_factory=set)
    made: int = 0  # samples of shards that it holds
    shards: int = 0  # that it has published
    silent_s: float = 0.0
    loading_s: float = 0.0  # until it is ready
    barren: int = 0  # workers in its place that were lost one after the other before their first shard


class Crew(Protocol):
    """Workers of one kind, and the way to them."""

    def start(self) -> list[Member]:
        """Start the workers; they say when they are ready."""

    def wait(self, timeout_s: float) -> list[tuple[Member, tuple[Any, ...]]]:
        """Messages of workers, in order; ``("lost", reason)`` of one that is gone. Members may be new."""

    def send(self, member: Member, message: Any) -> None:
        """Send a message; nothing happens where the worker is gone: `wait` tells."""

    def drop(self, member: Member) -> None:
        """End a worker, whatever it does."""

    def replace(self, member: Member) -> Member | None:
        """Start a worker in the place of one that was dropped, where that is this crew's part."""

    def close(self) -> None:
        """End all workers."""


class _Published:
    """In the place of a sink: workers have published what the driver records."""

    uploads = 0

    def sync(self) -> None:
        """Nothing to do."""

    def publish(self, folder: Path, shard: Shard) -> None:
        """Nothing to do."""


class Driver:
    """Makes shards with a crew; takes a pipeline's place in a run.

    Parameters
    ----------
    crew : Crew
        Closed by `close`.
    plan : Plan
    manifest : Recorder
        Records what is published.
    depth : bool
        Whether there are depth maps; without, labels are written while samples are made.
    tell : callable, optional
        Takes lines for the user.

    Attributes
    ----------
    engines : list of dict
        Descriptions of what predicts depth, of all workers that got ready.
    timeline, memory, transferred : dict
        As a pipeline's; seconds of each worker's parts under its name, bytes of all together.
    """

    def __init__(
        self,
        crew: Crew,
        plan: Plan,
        manifest: Recorder,
        depth: bool,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.engines: list[dict[str, Any]] = []
        self._warned: set[str] = set()
        self.timeline: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.transferred: dict[str, int] = {}
        self._crew = crew
        self._plan = plan
        self._manifest = manifest
        self._depth = depth
        self._tell = tell
        self._members: list[Member] = []
        self._begun = 0  # folders given to workers
        self._again: deque[Shard] = deque()
        self._losses: Counter[Shard] = Counter()
        self._last_loss = ""
        self._worked = False  # whether any worker got ready: else none is tried again
        self._run: _Run | None = None

    @property
    def name(self) -> str:
        """The workers' devices: ``cuda:0, cuda:1``."""
        return ", ".join(member.name for member in self._members)

    def start(self) -> None:
        """Start the workers and wait until they are ready.

        Raises
        ------
        GpufgbgError
            What keeps a worker from its work; nothing has been written.
        """
        self._members = self._crew.start()
        begun = time.monotonic()
        while not all(member.ready for member in self._members):
            passed = time.monotonic() - begun
            if passed > GRACE_S and any(member.ready for member in self._members):
                break
            self._turn()
            if not self._members:
                raise DeviceError(f"no worker could be started: {self._last_loss}")

    def run(self, gaps: Iterable[Shard], folder: Path, made: Callable[[int], None], labels: LabelJob | None) -> bool:
        """Make the samples of ``gaps``; as a pipeline's ``run``."""
        ahead = labels is not None and not self._depth
        committer = Committer(_Published(), self._manifest)
        self._run = _Run(deque(gaps), self._plan, folder, made, committer)
        writing = _LabelWriter(labels, self._plan) if ahead and labels is not None else None
        try:
            for member in self._members:
                self._begin(member)
            while self._unfinished():
                self._turn()
                if not self._members:
                    raise DeviceError(f"no worker is left: {self._last_loss}: run the same command again")
            begun = time.perf_counter()
            committer.finish()
            self.timeline["samples: last records"] = time.perf_counter() - begun
            if writing is not None:
                writing.finish()
        except BaseException:
            self.close()
            with suppress(Exception):  # the first error is the one that counts
                committer.finish()
            raise
        return ahead

    def close(self) -> None:
        """End all workers."""
        self._crew.close()

    # -- the workers' messages ----------------------------------------------------------------------

    def _unfinished(self) -> bool:
        assert self._run is not None
        return self._run.more or bool(self._again) or any(member.running for member in self._members)

    def _turn(self) -> None:
        """Wait a moment for messages and answer them; look for workers that hang."""
        before = time.monotonic()
        for member, message in self._crew.wait(_TICK_S):
            if member not in self._members:
                if message[0] != "ready":
                    continue  # of one that was given up
                self._members.append(member)
            member.silent_s = 0.0
            getattr(self, f"_on_{message[0]}")(member, *message[1:])
        # No more than two ticks a turn count: this process may have been stopped itself.
        passed = min(time.monotonic() - before, 2 * _TICK_S)
        for member in list(self._members):
            member.silent_s += passed
            member.loading_s += 0.0 if member.ready else passed
            if member.loading_s > START_S and not member.ready:
                self._lose(member, f"not ready within {START_S:.0f} s", again=False)
            elif member.running and member.silent_s > HANG_S:
                self._lose(member, f"silent for {HANG_S:.0f} s")

    def _on_ready(self, member: Member, name: str, engine: dict[str, Any] | None) -> None:
        member.ready = self._worked = True
        if engine is not None and engine not in self.engines:
            self.engines.append(engine)
        self._begin(member)

    def _on_next(self, member: Member) -> None:
        assert self._run is not None
        shard = self._again.popleft() if self._again else self._run.next()
        if shard is not None:
            member.held.add(shard)
        self._crew.send(member, shard)

    def _on_made(self, member: Member, count: int) -> None:
        assert self._run is not None
        member.made += count
        self._run.show(sum(other.made for other in self._members))

    def _on_alive(self, member: Member) -> None:
        """It is no longer silent."""

    def _on_closed(self, member: Member, record: Any) -> None:
        assert self._run is not None and member.folder is not None
        member.held.discard(record.shard)
        member.made -= len(record.shard)
        member.shards += 1
        self._run.closed += len(record.shard)
        self._run.committer.submit(record, member.folder)

    def _on_done(
        self, member: Member, timeline: dict[str, float], memory: dict[str, int], transferred: dict[str, int]
    ) -> None:
        member.running = False
        for phase, seconds in timeline.items():
            key = f"{phase} ({member.name})"
            self.timeline[key] = self.timeline.get(key, 0.0) + seconds
        for total, part in ((self.memory, memory), (self.transferred, transferred)):
            for key, count in part.items():
                total[key] = total.get(key, 0) + count
        if self._again:
            self._begin(member)

    def _on_tell(self, member: Member, text: str) -> None:
        if self._tell:
            self._tell(f"{member.name}: {text}")

    def _on_warning(self, member: Member, text: str) -> None:
        if text not in self._warned:  # each worker may find the same
            self._warned.add(text)
            warnings.warn(text, GpufgbgWarning, stacklevel=2)

    def _on_failed(self, member: Member, error: Exception) -> None:
        raise error

    def _on_lost(self, member: Member, reason: str) -> None:
        self._lose(member, reason)

    # -- giving out ---------------------------------------------------------------------------------

    def _begin(self, member: Member) -> None:
        """Set a worker to work that is ready, where a run is under way."""
        if self._run is None or not member.ready or member.running:
            return
        self._begun += 1
        # A folder of its own: where a worker is given up but lives on, it loses the folder and can't publish. One
        # that outlives its driver, on another machine, must not find the next driver's there.
        member.folder = self._run.folder / f"worker-{self._begun}-{secrets.token_hex(4)}"
        member.running, member.made, member.silent_s = True, 0, 0.0
        self._crew.send(member, ("begin", str(member.folder)))

    def _lose(self, member: Member, reason: str, again: bool = True) -> None:
        """Go on without a worker, or with another in its place; what it held is given out again.

        Not ``again``: another would be lost likewise, for example on a card that does not answer.
        """
        self._last_loss = f"{member.name}: {reason}"
        self._members.remove(member)
        self._crew.drop(member)
        if member.folder is not None:
            left = member.folder.with_name(f"{member.folder.name}-left")
            with suppress(FileNotFoundError):
                member.folder.rename(left)
            remove_tree(left)
        self._losses.update(member.held)
        deadly = merged([shard for shard in member.held if self._losses[shard] >= _TRIES])
        if deadly:
            raise DeviceError(
                f"samples {deadly[0].start}:{deadly[-1].stop}: {_TRIES} workers were lost with them in hand, "
                f"the last was {self._last_loss}: make the others with --samples, and report this"
            )
        self._again.extend(sorted(member.held))
        if self._tell:
            count = len(member.held)
            self._tell(f"{self._last_loss}: {count} shards are given out again" if count else self._last_loss)
        barren = 0 if member.shards else member.barren + 1
        if again and self._worked and barren < _TRIES:
            replacement = self._crew.replace(member)
            if replacement is not None:
                replacement.barren = barren
                self._members.append(replacement)
        if self._again:
            for other in self._members:
                self._begin(other)


class _LabelWriter(threading.Thread):
    """Writes the label files meanwhile; left alone where the run fails."""

    def __init__(self, job: LabelJob, plan: Plan) -> None:
        super().__init__(name="labels", daemon=True)
        self._job = job
        self._plan = plan
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """In the thread."""
        try:
            write_labels(self._job.folder, self._plan, self._job.areas, self._job.done)
        except BaseException as error:  # raised again by finish
            self._error = error

    def finish(self) -> None:
        """Wait for the files; raises what writing them raised."""
        self.join()
        if self._error is not None:
            raise self._error


class _Run:
    """What is left to give out, and how far it is."""

    def __init__(
        self,
        gaps: deque[Shard],
        plan: Plan,
        folder: Path,
        made: Callable[[int], None],
        committer: Committer,
    ) -> None:
        self._shards = (cut for gap in gaps for cut in plan.shards(gap))
        self._made = made
        self._shown = 0
        self.folder = folder
        self.committer = committer
        self.more = True
        self.closed = 0

    def next(self) -> Shard | None:
        """The next shard that was not given out yet; None, and ``more`` is false, after the last."""
        shard = next(self._shards, None)
        self.more = shard is not None
        return shard

    def show(self, under_way: int) -> None:
        """Tell how many samples there are; the count never falls, whatever is lost."""
        count = self.closed + under_way
        if count > self._shown:
            self._made(count - self._shown)
            self._shown = count
