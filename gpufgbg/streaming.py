"""The samples live: batches in the device's memory, shuffled, shared between ranks, resumable, without end.

Every batch is what `Compositor.render` gives for the same indices, and so what a data set on disk was encoded from.
On the CPU, threads render a bounded number of batches ahead; on a card everything is put on a stream and nothing
waits for it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.assets import Assets, prepare
from gpufgbg.backends.cuda import as_stream
from gpufgbg.checks import whole
from gpufgbg.compositor import Compositor, check_workers
from gpufgbg.depth.model import DepthMaps, DepthModel
from gpufgbg.depth.options import DepthOptions
from gpufgbg.exceptions import OptionError
from gpufgbg.manifest import open_dataset
from gpufgbg.moments import Moments
from gpufgbg.pipeline import load_assets
from gpufgbg.recipe import Placements, Plan, Recipe
from gpufgbg.shuffle import Permutation

__all__ = ["SampleStream", "StreamBatch", "aligned", "stream"]

_CHUNK = 32  # samples that a thread renders at a time: their frames (6 MB at 224x224) stay in the cache
_ALIGNMENT = 64  # bytes
_LOOK_AHEAD = 16_384  # positions of the shuffled order that are computed at a time
_MOST = 2**62  # epochs, positions

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """A batch of N samples, in the device's memory: NumPy on the CPU, CuPy on a card.

    Arrays belong to the caller, but for those of a stream with ``reuse``, which are valid for as long as it says. All
    of them speak DLPack, on a card ``__cuda_array_interface__`` too: ``torch.from_dlpack(batch.image)``.

    Attributes
    ----------
    image : (N, H, W, 3) uint8
        Composites, RGB.
    mask : (N, H, W) uint8
        Their masks.
    index : (N,) int64
        The samples' numbers in the whole data set; in the host's memory.
    epoch : int
        The epoch that they belong to.
    depth : DepthMaps or None
        Depth, where the stream has a model. Always new arrays.
    """

    image: Any
    mask: Any
    index: npt.NDArray[np.int64]
    epoch: int
    depth: DepthMaps | None
    _plan: Plan = field(repr=False)
    _workers: int = field(default=1, repr=False)  # threads for what is made of it
    _room: dict[Any, Any] | None = field(default=None, repr=False)  # arrays for that, valid as long as its own

    @cached_property
    def labels(self) -> Placements:
        """Background, foreground, repetition, flip, x and y of each sample; in the host's memory."""
        return self._plan.placements(self.index)

    def __len__(self) -> int:
        return len(self.index)


class _Deferred:
    """Stands for `Placements` on a card, which needs no more than the indices; makes the rest if it is asked for."""

    def __init__(self, plan: Plan, index: npt.NDArray[np.int64]) -> None:
        self.index = index
        self._plan = plan

    def __len__(self) -> int:
        return len(self.index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan.placements(self.index), name)


@dataclass(frozen=True)
class _Span:
    """What one batch takes of an epoch's order: ``count`` positions from ``first``, every ``stride``-th."""

    epoch: int
    first: int
    stride: int
    count: int


@dataclass
class _Schedule:
    """Which positions make the next batch of a rank. Pure arithmetic; ``epoch`` and ``position`` are all its state.

    position counts the samples of the epoch that all ranks took together; of those that are left, rank r takes the
    r-th, (r + world)-th, ...
    """

    samples: int
    batch_size: int
    rank: int
    world: int
    drop_last: bool
    epochs: int | None
    epoch: int = 0
    position: int = 0

    def take(self) -> _Span | None:
        """The next batch, or None after the last epoch."""
        step = self.batch_size * self.world
        while self.epochs is None or self.epoch < self.epochs:
            left = self.samples - self.position
            whole = left >= step
            count = self.batch_size if whole else -(-max(0, left - self.rank) // self.world)
            if count and (whole or not self.drop_last):
                span = _Span(self.epoch, self.position + self.rank, self.world, count)
                self.position += step
                if self.position >= self.samples:
                    self.epoch, self.position = self.epoch + 1, 0
                return span
            self.epoch, self.position = self.epoch + 1, 0
        return None

    @property
    def length(self) -> int:
        """Batches of a whole epoch."""
        if self.drop_last:
            return self.samples // (self.batch_size * self.world)
        mine = -(-(self.samples - self.rank) // self.world)
        return -(-mine // self.batch_size)


class _Order:
    """The samples at an epoch's positions. Looks some thousands ahead at a time, which is quicker by far."""

    def __init__(self, samples: int, seed: int, shuffle: bool) -> None:
        self._samples = samples
        self._seed = seed
        self._shuffle = shuffle
        self._permutation: tuple[int, Permutation] | None = None
        self._known = _Span(-1, 0, 1, 0)
        self._indices = np.empty(0, np.int64)

    def indices(self, span: _Span) -> npt.NDArray[np.int64]:
        """(count,) samples of a batch; the caller's."""
        if not self._shuffle:
            return _positions(span)
        known = self._known
        at, off = divmod(span.first - known.first, span.stride)
        there = (known.epoch, known.stride, 0) == (span.epoch, span.stride, off)
        if not there or not 0 <= at <= at + span.count <= known.count:
            if self._permutation is None or self._permutation[0] != span.epoch:
                self._permutation = span.epoch, Permutation(self._samples, self._seed, span.epoch)
            left = -(-(self._samples - span.first) // span.stride)
            self._known, at = replace(span, count=min(left, max(span.count, _LOOK_AHEAD))), 0
            self._indices = self._permutation[1](_positions(self._known))
        return self._indices[at : at + span.count].copy()


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A new array in the host's memory, not initialised, at an address that JAX too takes without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _aligned_frames(recipe: Recipe) -> Callable[[int], tuple[Any, Any]]:
    height, width = recipe.height, recipe.width
    return lambda n: (aligned((n, height, width, 3), np.uint8), aligned((n, height, width), np.uint8))


def _positions(span: _Span) -> npt.NDArray[np.int64]:
    return np.arange(span.first, span.first + span.count * span.stride, span.stride, dtype=np.int64)


class _CpuWork:
    """Renders a part of a batch, in any thread. Holds nothing of the stream, so that a forgotten one can go."""

    def __init__(self, compositor: Compositor, model: DepthModel | None, metres: bool) -> None:
        self._backend: Any = compositor.backend
        self._model = model
        self._metres = metres

    def depth(self, count: int, height: int, width: int) -> DepthMaps | None:
        """Room for a batch's depth maps."""
        if self._model is None:
            return None
        metres = aligned((count, height, width), np.float32) if self._metres else None
        return DepthMaps(aligned((count, height, width), np.uint8), aligned((count, 2), np.float32), metres)

    def render(self, placements: Placements, image: Any, mask: Any, depth: DepthMaps | None, part: slice) -> None:
        """Fill ``part`` of a batch's arrays."""
        placements, image = placements[part], image[part]
        self._backend.render(placements, image, mask[part])
        if depth is None or self._model is None:
            return
        if self._model.options.input == "saved":
            recipe = self._backend.recipe
            from gpufgbg.backends.cpu import reconstruct_jpeg

            image = reconstruct_jpeg(image, recipe.quality, recipe.subsampling)
        maps = self._model.maps(image, self._metres)
        _check_depth(self._model, maps.faults, placements.index)
        depth.grey[part], depth.range[part] = maps.grey, maps.range
        if self._metres:
            depth.metres[part] = maps.metres


def _check_depth(model: DepthModel, faults: npt.NDArray[np.int32], index: npt.NDArray[np.int64]) -> None:
    if faults.any():
        model.check(faults, 0, [f"sample {i}" for i in index.tolist()])


@dataclass
class _UnderWay:
    """A batch that threads render; ``state`` is the stream's once it is handed out."""

    batch: StreamBatch
    parts: list[Future[None]]
    state: tuple[int, int]


class SampleStream:
    """An iterator over batches of a data set's samples, in the device's memory. Made by `stream`.

    One thread at a time may use it. On the CPU its threads render ahead; they end with `close`, with the stream's
    last epoch, with an error, and when the stream is forgotten. A process that exits finishes what they have in hand,
    at most ``prefetch`` batches.

    Parameters
    ----------
    compositor : Compositor
        What makes the samples; kept by reference, may be shared by streams.
    depth : DepthModel, optional
        Makes depth maps; on the compositor's device.
    others
        As for `stream`.

    Attributes
    ----------
    compositor : Compositor
    statistics : dict of str to Moments
        Exact sums by kind over a data set on disk, where the stream was opened from one; else empty.

    Raises
    ------
    OptionError
        An option is out of range, or depth is predicted on another device.
    """

    def __init__(
        self,
        compositor: Compositor,
        *,
        batch_size: int = 64,
        epochs: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        epoch: int = 0,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        depth: DepthModel | None = None,
        metres: bool = True,
        reuse: int = 0,
        prefetch: int = 2,
        cuda_stream: Any = None,
    ) -> None:
        samples = len(compositor)
        self.compositor = compositor
        self.statistics: dict[str, Moments] = {}
        self.shuffle = _flag("shuffle", shuffle)
        self.seed = whole("seed", seed, 0, 2**64 - 1)
        world = whole("world", world, 1, samples)
        self._schedule = _Schedule(
            samples,
            whole("batch_size", batch_size, 1, 65_536),
            whole("rank", rank, 0, world - 1),
            world,
            _flag("drop_last", drop_last),
            None if epochs is None else whole("epochs", epochs, 0, _MOST),
            whole("epoch", epoch, 0, _MOST),
            whole("start", start, 0, samples),
        )
        if not self._schedule.length:
            raise OptionError(
                "batch_size",
                f"got {batch_size} for each of {world}, with drop_last: {samples} samples make no whole batch",
            )
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise OptionError("part", f"got {part!r}, expected (k, n) with 0 <= k < n")
        parts = whole("part", part[1], 1, 65_536)
        self._part = whole("part", part[0], 0, parts - 1), parts
        self._model = depth
        self._metres = _flag("metres", metres)
        self._reuse = int(reuse) if isinstance(reuse, bool) else whole("reuse", reuse, 0, 1024)
        self._prefetch = whole("prefetch", prefetch, 1, 1024)
        self._on_cpu = compositor.backend.name == "cpu"
        if depth is not None and depth.device != compositor.backend.name:
            raise OptionError(
                "depth",
                f"the model is on {depth.device}, the samples are on {compositor.backend.name}: give both one",
            )
        if cuda_stream is not None and self._on_cpu:
            raise OptionError("cuda_stream", f"got {cuda_stream!r}, the samples are made on the CPU")
        self._cuda_stream = None if cuda_stream is None else _as_cuda_stream(cuda_stream)
        self._work = _CpuWork(compositor, depth, self._metres)
        self._order = _Order(samples, self.seed, self.shuffle)
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[_UnderWay] = deque()
        self._ring: list[Any] = [None] * (self._reuse + (self._prefetch if self._on_cpu else 0) if self._reuse else 0)
        self._rooms: list[dict[Any, Any]] = [{} for _ in range(self._reuse)]
        self._turn = 0
        self._faults: deque[tuple[Any, Any, npt.NDArray[np.int64]]] = deque()
        self._aside: Any = None
        self._closed = False
        self._process = os.getpid()
        self._pass_over(self._part[0])
        self._state = self._schedule.epoch, self._schedule.position

    # -- where it is --------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Samples of a whole batch."""
        return self._schedule.batch_size

    @property
    def samples(self) -> int:
        """Samples of an epoch, of all ranks together."""
        return self._schedule.samples

    @property
    def device(self) -> str:
        """Where the batches are: ``"cpu"`` or ``"cuda:N"``."""
        return self.compositor.backend.name

    @property
    def depth(self) -> DepthModel | None:
        """The model that makes depth maps."""
        return self._model

    @property
    def reuses(self) -> bool:
        """Whether a batch's arrays are used again for a later one."""
        return self._reuse > 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._state[0]

    def __len__(self) -> int:
        """Batches of one whole epoch, of this rank."""
        return self._schedule.length

    def set_epoch(self, epoch: int) -> None:
        """Go on with the first batch of ``epoch``; what is rendered ahead is let go.

        Of a stream with ``part`` (k, n), with its k-th batch.

        Raises
        ------
        OptionError
            Not a whole number from 0 on.
        """
        epoch = whole("epoch", epoch, 0, _MOST)
        self._let_go()
        self._schedule.epoch, self._schedule.position = epoch, 0
        self._pass_over(self._part[0])
        self._state = self._schedule.epoch, self._schedule.position

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON values: after batch k, that the next one is k + 1.

        ``epoch``, and ``position``, how many of its samples all ranks together have taken. It is the same on every
        rank after as many batches, so one may keep it for all (without ``drop_last``, not in the last round of an
        epoch that gives some ranks no batch). The rest says what it goes with.
        """
        epoch, position = self._state
        return {"epoch": epoch, "position": position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream was whose `state_dict` this is; what is rendered ahead is let go.

        This stream may have another batch size, another number of ranks, or another device: it gives the samples
        that were left, in the same order.

        Raises
        ------
        OptionError
            The state is of another number of samples, seed or shuffling, or no state at all.
        """
        expected = self._identity()
        if not isinstance(state, dict) or not {"epoch", "position", *expected} <= state.keys():
            raise OptionError("state", f"got {state!r}, expected what state_dict gives")
        for name, value in expected.items():
            if state[name] != value:
                raise OptionError("state", f"{name} is {state[name]!r} there and {value!r} here")
        epoch, position = (whole("state", state[name], 0, _MOST) for name in ("epoch", "position"))
        if position > self.samples:
            raise OptionError("state", f"position is {position}, expected 0 to {self.samples}")
        self._let_go()
        self._schedule.epoch, self._schedule.position = self._state = epoch, position

    def _identity(self) -> dict[str, Any]:
        return {"samples": self.samples, "shuffle": self.shuffle, "seed": self.seed}

    def _pass_over(self, batches: int) -> None:
        """The next so many batches are other processes'."""
        for _ in range(batches):
            self._schedule.take()

    # -- batches ------------------------------------------------------------------------------------

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> StreamBatch:
        """The next batch.

        Raises
        ------
        StopIteration
            After the last epoch, or `close`.
        InputError
            The depth network gave values that are no numbers; on a card, told some batches later.
        """
        if self._closed:
            raise StopIteration
        try:
            batch = self._next_on_cpu() if self._on_cpu else self._next_on_card()
        except Exception:
            self.close()
            raise
        if batch is None:
            self._stop_threads()
            raise StopIteration
        return batch

    def synchronize(self) -> None:
        """Wait until all batches that were given are in memory: for readers that don't honour CUDA streams.

        On a card it waits for the stream's `cuda_stream` or, without one, for CuPy's current stream; on the CPU they
        are there.
        """
        if not self._on_cpu:
            import cupy

            backend: Any = self.compositor.backend
            with backend.device, self._current():
                cupy.cuda.get_current_stream().synchronize()

    def _take(self) -> tuple[_Span, npt.NDArray[np.int64], tuple[int, int]] | None:
        """The next batch's place and indices, and the state after it; the schedule moves on, to the next one."""
        span = self._schedule.take()
        if span is None:
            return None
        self._pass_over(self._part[1] - 1)
        return span, self._order.indices(span), (self._schedule.epoch, self._schedule.position)

    def _frames(self, count: int) -> tuple[Any, Any]:
        """Arrays for the next batch: new ones, or a whole batch's of the ring, cut to size."""
        frames = _aligned_frames(self.compositor.recipe) if self._on_cpu else self.compositor.backend.frames
        if not self._ring:
            return frames(count)
        slot = self._turn % len(self._ring)
        self._turn += 1
        if self._ring[slot] is None:
            self._ring[slot] = frames(self.batch_size)
        image, mask = self._ring[slot]
        return image[:count], mask[:count]

    def _next_on_cpu(self) -> StreamBatch | None:
        if self._process != os.getpid():  # in a forked process its threads are not there
            self._forget_threads()
        while len(self._ahead) <= self._prefetch and self._submit():
            pass
        if not self._ahead:
            return None
        under_way = self._ahead[0]
        for future in under_way.parts:
            future.result()
        self._ahead.popleft()
        self._state = under_way.state
        return under_way.batch

    def _submit(self) -> bool:
        """Let the threads begin another batch, if there is one."""
        taken = self._take()
        if taken is None:
            return False
        span, index, state = taken
        compositor = self.compositor
        if self._pool is None:
            self._pool = ThreadPoolExecutor(compositor.workers, "gpufgbg-stream")
        room = self._rooms[self._turn % self._reuse] if self._reuse else None
        image, mask = self._frames(span.count)
        depth = self._work.depth(span.count, *mask.shape[1:])
        batch = StreamBatch(image, mask, index, span.epoch, depth, compositor.plan, compositor.workers, room)
        step = max(1, min(_CHUNK, -(-span.count // compositor.workers)))
        cuts = [slice(at, at + step) for at in range(0, span.count, step)]
        parts = [self._pool.submit(self._work.render, batch.labels, image, mask, depth, cut) for cut in cuts]
        self._ahead.append(_UnderWay(batch, parts, state))
        return True

    def _next_on_card(self) -> StreamBatch | None:
        backend: Any = self.compositor.backend
        with backend.device, self._current():
            self._check_faults(wait=False)
            taken = self._take()
            if taken is None:
                self._check_faults(wait=True)
                return None
            span, index, state = taken
            image, mask = self._frames(span.count)
            backend.render(_Deferred(self.compositor.plan, index), image, mask)
            depth = None
            if self._model is not None:
                import cupy

                seen = backend.jpeg.reconstruct(image) if self._model.options.input == "saved" else image
                maps = self._model.maps(seen, self._metres)
                depth = DepthMaps(maps.grey, maps.range, maps.metres)
                self._faults.append((maps.faults, cupy.cuda.get_current_stream().record(), index))
        self._state = state
        return StreamBatch(image, mask, index, span.epoch, depth, self.compositor.plan)

    def _current(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._cuda_stream is None else self._cuda_stream

    def _check_faults(self, wait: bool) -> None:
        """Look for values that are no numbers in the depth of batches that the card is done with."""
        while self._faults and (wait or self._faults[0][1].done):
            faults, event, index = self._faults.popleft()
            event.synchronize()
            if self._aside is None:
                import cupy

                self._aside = cupy.cuda.Stream(non_blocking=True)  # the current stream may be far behind
            assert self._model is not None
            _check_depth(self._model, faults.get(stream=self._aside), index)

    # -- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the stream: what is rendered ahead is let go, its threads end. Batches that were given stay valid."""
        self._closed = True
        self._let_go()
        self._faults.clear()
        self._ring, self._rooms = [], []
        self._stop_threads()

    def _let_go(self) -> None:
        if self._process != os.getpid():
            self._forget_threads()
        parts = [future for under_way in self._ahead for future in under_way.parts]
        for future in parts:
            future.cancel()
        wait(parts)  # they may be writing to arrays that are used again
        self._forget_ahead()

    def _stop_threads(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown(wait=True)

    def _forget_threads(self) -> None:
        self._process, self._pool = os.getpid(), None
        self._forget_ahead()

    def _forget_ahead(self) -> None:
        if self._ring:  # the slots of batches that were given out stay the last to be used again
            self._turn -= len(self._ahead)
        self._ahead.clear()
        self._schedule.epoch, self._schedule.position = self._state

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream(
    source: Compositor | Assets | StrPath,
    foregrounds: StrPath | None = None,
    masks: StrPath | None = None,
    recipe: Recipe | None = None,
    *,
    batch_size: int = 64,
    epochs: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
    epoch: int = 0,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
    depth: DepthModel | DepthOptions | StrPath | None = None,
    metres: bool = True,
    reuse: int = 0,
    prefetch: int = 2,
    device: str = "auto",
    workers: int | None = None,
    cuda_stream: Any = None,
    tell: Callable[[str], None] | None = None,
) -> SampleStream:
    """Batches of a data set's samples, live, in the device's memory.

    An epoch is every sample once. Its order is a keyed permutation, a function of ``seed``, the epoch's number and
    the number of samples alone. Ranks share it in strides: of the samples that are left, rank r takes the r-th,
    (r + world)-th, ..., so a batch of all ranks together is a run of that order.

    Parameters
    ----------
    source : path, Assets or Compositor
        A folder of backgrounds, if ``foregrounds`` is given; the folder of a data set made by gpufgbg, of which
        recipe and prepared pictures are read; prepared pictures; or what renders them.
    foregrounds, masks : path
        Folders of pictures, as for `gpufgbg.prepare`.
    recipe : Recipe, optional
        For folders of pictures and for `Assets`.
    batch_size : int
        Samples of a batch, 1 to 65,536.
    epochs : int, optional
        Stop before epoch number ``epochs``, counted from 0. Default: never.
    shuffle : bool
        In a new order each epoch, or in order of the samples' numbers.
    seed : int
        Key of the shuffling, 0 to 2**64 - 1. (The recipe's own seed decides where foregrounds lie.)
    rank, world : int
        This process's number and the number of processes that share an epoch; ``world`` is at most the number of
        samples.
    drop_last : bool
        False: every sample of an epoch is given once, the last batch is shorter where need be, and ranks may differ
        by one sample and so by one batch. True: whole batches alone, as many on every rank, as distributed training
        wants it; the fewer than ``batch_size * world`` samples at the end of the order are left out of that epoch.
    epoch, start : int
        Where to begin: an epoch, and how many of its samples all ranks together leave out.
    part : (int, int)
        (k, n): every n-th batch alone, beginning with the k-th: for n processes that take turns at loading a rank's
        batches.
    depth : DepthModel, DepthOptions, path or "demo", optional
        Predict depth too. From the composite as its file would decode or as rendered, as ``DepthOptions.input`` says.
    metres : bool
        Give depth in metres too, (N, H, W) float32, not grey levels alone.
    reuse : int
        0: every batch is new arrays, owned by the caller. Else image and mask are of a ring, made once: a batch's are
        valid until the ``reuse``-th batch after it is asked for (on a card: to be overwritten then on the same
        stream, so work on them that is on another must be waited for). On the CPU so is what integrations make of
        the image.
    prefetch : int
        Batches that threads render ahead on the CPU. On a card nothing is waited for, and so nothing is fetched
        ahead.
    device : {"auto", "cpu", "cuda", "cuda:N"}
    workers : int, optional
        Threads that render on the CPU, by default one a core.
    cuda_stream : int or cupy.cuda.Stream, optional
        On a card: the CUDA stream (a pointer, or CuPy's) that all work is put on. Default: CuPy's current stream when
        a batch is asked for. The arrays are ready for whatever follows on that stream. DLPack's consumers name theirs
        (``__dlpack__(stream=...)``), and CuPy lets it wait for CuPy's *current* stream: where ``cuda_stream`` is
        another, hand arrays on inside ``with`` that stream.
    tell : callable, optional
        Called with a line of text when something takes minutes: building a TensorRT engine.

    Returns
    -------
    SampleStream

    Raises
    ------
    OptionError, InputError, DatasetError, DeviceError
        An option is out of range or contradicts another; pictures, data set or device can't be used.

    Examples
    --------
    >>> for batch in gpufgbg.stream("backgrounds", "foregrounds", epochs=1):   # doctest: +SKIP
    ...     images = torch.from_dlpack(batch.image)
    """
    statistics: dict[str, Moments] = {}
    if isinstance(source, (Compositor, Assets)):
        if foregrounds is not None or masks is not None:
            raise OptionError("foregrounds", f"got folders, {type(source).__name__} has its own: leave them out")
        if isinstance(source, Compositor):
            if recipe is not None or workers is not None or device not in ("auto", source.backend.name):
                raise OptionError("source", "a Compositor has its own recipe, device and workers: leave them out")
            compositor = source
        else:
            compositor = Compositor(source, recipe, device, workers)
    elif not isinstance(source, (str, os.PathLike)):
        raise OptionError("source", f"got {source!r}, expected a folder, Assets or a Compositor")
    elif foregrounds is not None:
        recipe = recipe or Recipe()
        compositor = Compositor(
            prepare(source, foregrounds, masks, recipe, check_workers(workers)), recipe, device, workers
        )
    else:
        if recipe is not None or masks is not None:
            option = "masks" if recipe is None else "recipe"
            raise OptionError(option, "a data set has its own: leave it out, or give foregrounds too")
        manifest, content, recipe = open_dataset(source)
        compositor = Compositor(load_assets(manifest.out, content), recipe, device, workers)
        statistics = {kind: Moments.from_dict(m) for kind, m in content["statistics"].items()}
    if depth is not None and not isinstance(depth, DepthModel):
        depth = DepthModel(DepthOptions.of(depth), compositor.recipe.size, compositor.backend.name, 1, tell)
    made = SampleStream(
        compositor, batch_size=batch_size, epochs=epochs, shuffle=shuffle, seed=seed, rank=rank, world=world,
        drop_last=drop_last, epoch=epoch, start=start, part=part, depth=depth, metres=metres, reuse=reuse,
        prefetch=prefetch, cuda_stream=cuda_stream,
    )  # fmt: skip
    made.statistics = statistics
    return made


def _flag(option: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise OptionError(option, f"got {value!r}, expected True or False")
    return bool(value)


def _as_cuda_stream(given: Any) -> Any:
    """A CUDA stream, CuPy's or a pointer, as CuPy's."""
    import cupy

    if isinstance(given, (cupy.cuda.Stream, cupy.cuda.ExternalStream)):
        return given
    return as_stream(whole("cuda_stream", given, 0, 2**64 - 1))
