"""A worker: one device that makes whole shards, as the driver gives them out.

``python -m gpufgbg.scaleout.worker SOCKET JOB DEVICE`` serves a driver of this machine; a Ray actor calls `serve`.

Messages to the driver, and its answers:

- ``("ready", name, engine)``: everything is loaded; ``engine`` describes what predicts depth, or is None. The answer,
  now or later, is ``("begin", folder)``.
- ``("next",)``: asks for a shard; the answer is a `Shard`, or None where there is none now.
- ``("made", count)``: so many more samples are on their way.
- ``("alive",)``: depth maps are on their way, of which a batch can take minutes; sent after one is predicted.
- ``("closed", record)``: a shard is published.
- ``("done", timeline, memory, transferred)``: all shards since ``begin`` are published. Another ``begin`` may come.
- ``("tell", text)`` and ``("warning", text)``: for the user.
- ``("failed", error)``: one that another worker would meet too, for the driver to raise; the worker ends.

The driver ends a worker by closing its channel. A worker takes nothing with it but what it holds unpublished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import pickle
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gpufgbg import sinks
from gpufgbg.backends import warm
from gpufgbg.children import parent_of, portable_error
from gpufgbg.compositor import Compositor
from gpufgbg.depth.options import DEMO
from gpufgbg.exceptions import DatasetError, GpufgbgWarning, printable
from gpufgbg.files import local_prefix, remove_tree
from gpufgbg.layout import SAMPLE_KINDS
from gpufgbg.remote.store import RemotePath

if TYPE_CHECKING:
    from gpufgbg.assets import Assets
    from gpufgbg.depth.model import DepthModel
    from gpufgbg.depth.options import DepthOptions
    from gpufgbg.manifest import ShardRecord
    from gpufgbg.recipe import Recipe, Shard

__all__ = ["Channel", "Job", "serve"]

_ALIVE_S = 1.0  # between two signs of life


class Channel(Protocol):
    """Messages between a worker and the driver, in order; `multiprocessing`'s connection is one."""

    def send(self, message: Any, /) -> None:
        """Send a message; `OSError` where the driver is gone."""

    def recv(self) -> Any:
        """Wait for the next message; `EOFError` or `OSError` where the driver is gone."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know, picklable.

    Attributes
    ----------
    assets : Assets
    recipe : Recipe
    sink : str
    out : Path
        The data set; a folder that driver and workers share.
    workers : int
        Threads or writer processes of one worker.
    batch_size : int, optional
    depth : DepthOptions, optional
    weights : dict of str to bytes, optional
        The files of the network that ``depth`` names, by their names in one folder, where the worker may be on
        another machine; the one that it names comes first.
    """

    assets: Assets
    recipe: Recipe
    sink: str
    out: Path
    workers: int
    batch_size: int | None = None
    depth: DepthOptions | None = None
    weights: dict[str, bytes] | None = None

    def carrying_weights(self) -> Job:
        """The job for other machines, with the bytes of the files of weights."""
        if self.depth is None or self.depth.weights == DEMO:
            return self
        from gpufgbg.depth.sources import files_of

        files = {name: path.read_bytes() for name, path in files_of(self.depth.weights).items()}
        return dataclasses.replace(self, weights=files)


def serve(channel: Channel, job: Job, device: str) -> None:
    """Load ``job`` on ``device`` and make the driver's shards until the channel ends."""
    link = _Link(channel)
    try:
        with _warnings_sent(link):
            with _depth_options(job) as depth:  # the file is gone before work begins, since actors are killed
                worker = _Worker(job, device, depth, link)
            link.send("ready", worker.name, worker.engine)
            while True:
                _, folder = channel.recv()
                worker.run(Path(folder))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the driver is gone, or has no more to do
    except BaseException as error:
        with contextlib.suppress(OSError):
            link.send("failed", portable_error(error, "a worker"))


class _Link:
    """The worker's end of the channel; several threads send."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        with self._lock:
            self._channel.send(message)

    def shards(self) -> Iterator[Shard]:
        """Shards as the driver gives them, until it has none."""
        while True:
            self.send("next")
            shard = self._channel.recv()
            if shard is None:
                return
            yield shard


class _Reporter:
    """Stands for the manifest in a pipeline: the driver is who records."""

    journal = None  # of shards that another worker may get

    def __init__(self, out: Path, link: _Link) -> None:
        self.out = out
        self._link = link

    def record(self, records: Iterable[ShardRecord]) -> None:
        """Tell the driver of published shards."""
        for record in records:
            self._link.send("closed", record)


class _Alive:
    """Tells the driver that there is progress, but not all the time."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self._told = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._told >= _ALIVE_S:
            self._told = now
            self._link.send("alive")


class _Worker:
    """Everything loaded on one device."""

    def __init__(self, job: Job, device: str, depth: DepthOptions | None, link: _Link) -> None:
        self._job = job
        self._link = link
        self._compositor = Compositor(job.assets, job.recipe, device, job.workers)
        self.name = self._compositor.backend.name
        self._model: DepthModel | None = None
        self.engine: dict[str, Any] | None = None
        if depth is not None:
            from gpufgbg.depth.model import DepthModel

            self._model = DepthModel(depth, job.recipe.size, self.name, 1, lambda text: link.send("tell", text))
            self.engine = self._model.engine.description

    def run(self, folder: Path) -> None:
        """Make shards until the driver has none; unfinished ones lie in ``folder``."""
        from gpufgbg.pipeline import select_maker

        job, link, compositor = self._job, self._link, self._compositor
        kinds = SAMPLE_KINDS if self._model else SAMPLE_KINDS[:-1]
        sink = sinks.select(job.sink, job.out, compositor.plan, kinds)
        maker = select_maker(compositor, sink, _Reporter(job.out, link), job.workers, job.batch_size, self._model)
        if hasattr(maker, "alive"):
            maker.alive = _Alive(link)
        with _run_folder(job, folder) as path:
            maker.run(link.shards(), path, lambda count: link.send("made", count), None)
        link.send("done", maker.timeline, maker.memory, maker.transferred)


@contextlib.contextmanager
def _run_folder(job: Job, folder: Path) -> Iterator[Path]:
    """The folder for unfinished shards; on this machine's own disk where the shards go to a store."""
    if isinstance(job.out, RemotePath) and not folder.parent.is_dir():  # the driver is on another machine
        with tempfile.TemporaryDirectory(prefix=local_prefix()) as own:
            yield Path(own)
        return
    if not folder.parent.is_dir():
        raise DatasetError(
            f"--out {printable(job.out)}: not there on {socket.gethostname()}: expected a folder that all machines "
            "share under one path, or a store (s3://BUCKET/FOLDER)"
        )
    folder.mkdir()
    yield folder
    remove_tree(folder)


@contextlib.contextmanager
def _depth_options(job: Job) -> Iterator[DepthOptions | None]:
    """The job's options of depth, with its files of weights where it carries them."""
    if job.depth is None or job.weights is None:
        yield job.depth
        return
    with tempfile.TemporaryDirectory(prefix=local_prefix()) as folder:
        for name, data in job.weights.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield dataclasses.replace(job.depth, weights=str(Path(folder, next(iter(job.weights)))))


@contextlib.contextmanager
def _warnings_sent(link: _Link) -> Iterator[None]:
    """Our warnings go to the driver's user."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, GpufgbgWarning):
                link.send("warning", str(message))
            else:
                shown(message, category, *rest, **more)

        warnings.simplefilter("always", GpufgbgWarning)
        warnings.showwarning = show
        yield


def main(arguments: list[str]) -> int:
    """Serve a driver of this machine: `children.parent_of`'s arguments, the pickled job's descriptor, the device."""
    connection = parent_of(*arguments[:2])
    with contextlib.suppress(Exception):  # `serve` meets it again, and tells the driver
        warm(arguments[3])
    try:
        connection.recv()  # the job is there
    except (EOFError, OSError):
        return 0  # there is nothing to do
    with mmap.mmap(int(arguments[2]), 0, access=mmap.ACCESS_READ) as memory:
        job = pickle.loads(memory)
    serve(connection, job, arguments[3])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
