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
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from gpufgbg.assets import Assets, prepare
from gpufgbg.backends.cuda import as_stream, is_on_card
from gpufgbg.checks import whole
from gpufgbg.compositor import Compositor, check_workers
from gpufgbg.dataset import load_assets
from gpufgbg.depth.model import DepthMaps, DepthModel
from gpufgbg.depth.options import DepthOptions
from gpufgbg.exceptions import OptionError, printable
from gpufgbg.manifest import open_dataset
from gpufgbg.moments import Moments
from gpufgbg.recipe import Placements, Plan, Recipe
from gpufgbg.shuffle import Permutation

__all__ = ["SampleStream", "StreamBatch", "aligned", "stream"]

_CHUNK = 32  # samples that a thread renders at a time: their frames (6 MB at 224x224) stay in the cache
_ALIGNMENT = 64  # bytes
_UPLOAD_ALIGNMENT = 256  # bytes, as of memory of its own on a card: some libraries ask for it
_LOOK_AHEAD = 16_384  # positions of the shuffled order that are computed at a time
_MOST = 2**62  # epochs, positions
_DECIDING = ("per_pair", "flip", "size", "seed")  # of a recipe: what decides samples, beside the prepared pictures
_fingerprints: WeakKeyDictionary[Assets, str] = WeakKeyDictionary()

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
    _cuda_stream: Any = field(default=None, repr=False)
    _workers: int = field(default=1, repr=False)  # threads for what is made of it
    _room: dict[Any, Any] | None = field(default=None, repr=False)  # arrays for that, valid as long as its own

    @cached_property
    def labels(self) -> Placements:
        """Index, background, foreground, repetition, flip, x and y of each sample; in the host's memory, NumPy.

        Made when first asked for, as are the two below.
        """
        return self._plan.placements(self.index)

    @property
    def device_labels(self) -> Placements:
        """The fields of `labels`, of the same dtypes, in the images' memory: on the CPU `labels` itself.

        On a card CuPy's arrays. They and `boxes` are copied there in one piece when one of them is first asked for,
        on the stream's `cuda_stream` or, without one, on CuPy's current stream.
        """
        return self._there[0]

    @property
    def boxes(self) -> Any:
        """(N, 4) int32, in the images' memory: x0, y0, x1, y1 of each foreground in pixels, the ends exclusive.

        It is the rectangle of the foreground's whole picture, also where its mask is empty at the edge.
        """
        return self._there[1]

    @cached_property
    def _there(self) -> tuple[Placements, Any]:
        labels, f = self.labels, self.labels.foreground
        right, bottom = labels.x + self._plan.foreground_widths[f], labels.y + self._plan.foreground_heights[f]
        boxes = np.stack([labels.x, labels.y, right, bottom], axis=1).astype(np.int32)
        if not is_on_card(self.image):
            return labels, boxes
        with self.image.device, _current(self._cuda_stream):
            return _uploaded(labels, boxes)

    def __len__(self) -> int:
        return len(self.index)


def _uploaded(labels: Placements, boxes: npt.NDArray[np.int32]) -> tuple[Placements, Any]:
    """Labels and boxes as parts of one new array on the current device, by one copy on CuPy's current stream."""
    import cupy

    arrays: dict[str, Any] = {each.name: getattr(labels, each.name) for each in fields(labels)} | {"boxes": boxes}
    parts, size = {}, 0
    for name, array in arrays.items():
        parts[name] = slice(size, size + array.nbytes)
        size += -(-array.nbytes // _UPLOAD_ALIGNMENT) * _UPLOAD_ALIGNMENT
    packed = np.zeros(size, np.uint8)
    for name, array in arrays.items():
        packed[parts[name]] = array.reshape(-1).view(np.uint8)
    memory = cupy.asarray(packed)
    there = {name: memory[parts[name]].view(array.dtype).reshape(array.shape) for name, array in arrays.items()}
    found = there.pop("boxes")
    return Placements(**there), found


def _current(cuda_stream: Any) -> AbstractContextManager[Any]:
    """Makes a stream's `cuda_stream` CuPy's current one, where it has one."""
    return contextlib.nullcontext() if cuda_stream is None else cuda_stream


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


class _Place(NamedTuple):
    """Where a stream is: what its next batch is, and which arrays of the ring it gets. Replaced as a whole, or not.

    position counts the samples of the epoch that all ranks took together, turn the batches that the stream gave.
    """

    epoch: int
    position: int
    turn: int


@dataclass(frozen=True)
class _Schedule:
    """Which positions make a rank's batches. Pure arithmetic, which keeps nothing.

    Of the samples of an epoch that are left at a position, rank r takes the r-th, (r + world)-th, ...
    """

    samples: int
    batch_size: int
    rank: int
    world: int
    drop_last: bool
    epochs: int | None

    def take(self, epoch: int, position: int) -> tuple[_Span | None, int, int]:
        """The batch at a position, None after the last epoch, and the epoch and position of the one after it."""
        step = self.batch_size * self.world
        while self.epochs is None or epoch < self.epochs:
            left = self.samples - position
            whole = left >= step
            count = self.batch_size if whole else -(-max(0, left - self.rank) // self.world)
            if count and (whole or not self.drop_last):
                span = _Span(epoch, position + self.rank, self.world, count)
                position += step
                return (span, epoch, position) if position < self.samples else (span, epoch + 1, 0)
            epoch, position = epoch + 1, 0
        return None, epoch, position

    def pass_over(self, batches: int, epoch: int, position: int) -> tuple[int, int]:
        """The epoch and position after so many batches, which are other processes'."""
        for _ in range(batches):
            _, epoch, position = self.take(epoch, position)
        return epoch, position

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
        self._known = _Span(-1, 0, 1, 0), np.empty(0, np.int64)  # one value: Ctrl-C comes before it or after it

    def indices(self, span: _Span) -> npt.NDArray[np.int64]:
        """(count,) samples of a batch; the caller's."""
        if not self._shuffle:
            return _positions(span)
        known, found = self._known
        at, off = divmod(span.first - known.first, span.stride)
        there = (known.epoch, known.stride, 0) == (span.epoch, span.stride, off)
        if not there or not 0 <= at <= at + span.count <= known.count:
            if self._permutation is None or self._permutation[0] != span.epoch:
                self._permutation = span.epoch, Permutation(self._samples, self._seed, span.epoch)
            left = -(-(self._samples - span.first) // span.stride)
            known, at = replace(span, count=min(left, max(span.count, _LOOK_AHEAD))), 0
            found = self._permutation[1](_positions(known))
            self._known = known, found
        return found[at : at + span.count].copy()


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
    """A batch that threads render; ``after`` is where the stream is once it is handed out."""

    batch: StreamBatch
    parts: list[Future[None]]
    after: _Place


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
        )
        epoch, start = whole("epoch", epoch, 0, _MOST), whole("start", start, 0, samples)
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
        self._faults: deque[tuple[Any, Any, npt.NDArray[np.int64]]] = deque()
        self._aside: Any = None
        self._closed = ""  # or how it was
        self._process = os.getpid()
        self._place = _Place(*self._schedule.pass_over(self._part[0], epoch, start), 0)

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
        return self._place.epoch

    @property
    def ended(self) -> bool:
        """Whether its last batch was given; `set_epoch` and `load_state_dict` begin again."""
        return self._schedule.take(self._place.epoch, self._place.position)[0] is None

    def __len__(self) -> int:
        """Batches of one whole epoch, of this rank; with ``part``, those of an epoch that its turns begin with."""
        turn, turns = self._part
        return max(0, -(-(self._schedule.length - turn) // turns))

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
        self._place = _Place(*self._schedule.pass_over(self._part[0], epoch, 0), self._place.turn)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as JSON values: after batch k, that the next one is k + 1.

        ``epoch``, and ``position``, how many of its samples all ranks together have taken. It is the same on every
        rank after as many batches, so one may keep it for all (without ``drop_last``, not in the last round of an
        epoch that gives some ranks no batch). The rest says what it goes with: seed and shuffling, the recipe's
        fields that decide samples, and a fingerprint of the prepared pictures, which is computed once.
        """
        epoch, position, _ = self._place
        return {"epoch": epoch, "position": position, **self._identity(), **self._data()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream was whose `state_dict` this is; what is rendered ahead is let go.

        This stream may have another batch size, another number of ranks, or another device: it gives the samples
        that were left, in the same order.

        Raises
        ------
        OptionError
            The state is of another number of samples, seed or shuffling, of another recipe or other pictures, or no
            state at all. (States of versions that kept neither recipe nor pictures are not checked for them.)
        """
        expected = self._identity()
        if not isinstance(state, dict) or not {"epoch", "position", *expected} <= state.keys():
            raise OptionError("state", f"got {state!r}, expected what state_dict gives")
        for name, value in expected.items():
            if state[name] != value:
                raise OptionError("state", f"{name} is {state[name]!r} there and {value!r} here")
        self._check_data(state)
        epoch, position = (whole("state", state[name], 0, _MOST) for name in ("epoch", "position"))
        if position > self.samples:
            raise OptionError("state", f"position is {position}, expected 0 to {self.samples}")
        self._let_go()
        self._place = _Place(epoch, position, self._place.turn)

    def _identity(self) -> dict[str, Any]:
        return {"samples": self.samples, "shuffle": self.shuffle, "seed": self.seed}

    def _data(self) -> dict[str, Any]:
        """What decides the samples themselves, but for a blend of the user's own."""
        recipe, assets = self.compositor.recipe.to_dict(), self.compositor.assets
        if assets not in _fingerprints:
            _fingerprints[assets] = assets.fingerprint()[:16]
        return {"recipe": {name: recipe[name] for name in _DECIDING}, "pictures": _fingerprints[assets]}

    def _check_data(self, state: dict[str, Any]) -> None:
        """`OptionError` where a state says that it is of another recipe or of other pictures."""
        if not {"recipe", "pictures"} & state.keys():
            return
        here = self._data()
        recipe, pictures = (state.get(name, here[name]) for name in ("recipe", "pictures"))
        if not isinstance(recipe, dict):
            raise OptionError("state", f"got a recipe {recipe!r}, expected what state_dict gives")
        for name, value in here["recipe"].items():
            if recipe.get(name) != value:
                raise OptionError("state", f"the recipe's {name} is {recipe.get(name)!r} there and {value!r} here")
        if pictures != here["pictures"]:
            raise OptionError(
                "state",
                f"it is of other pictures: their fingerprint is {pictures!r} there and {here['pictures']!r} here",
            )

    # -- batches ------------------------------------------------------------------------------------

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> StreamBatch:
        """The next batch. An error closes the stream; Ctrl-C does not: the batch that was asked for comes next.

        Raises
        ------
        StopIteration
            After the last epoch.
        OptionError
            It was closed before, by `close` or an error; `state_dict` still says where it was.
        InputError
            The depth network gave values that are no numbers; on a card, told some batches later.
        """
        if self._closed:
            if self.ended:
                raise StopIteration
            raise OptionError("stream", f"{self._closed}, not at its end: make a new one and load this one's state")
        before = self._place
        try:
            found = self._next_on_cpu() if self._on_cpu else self._next_on_card()
            if found is not None:
                self._place = found[1]
        except Exception as error:
            self._close(f"closed by {printable(repr(error))}")
            raise
        except BaseException:  # Ctrl-C, between any two steps
            self._place = before
            self._let_go()
            self._stop_threads()
            raise
        if found is None:
            self._stop_threads()
            raise StopIteration
        return found[0]

    def synchronize(self) -> None:
        """Wait until all batches that were given are in memory: for readers that don't honour CUDA streams.

        On a card it waits for the stream's `cuda_stream` or, without one, for CuPy's current stream; on the CPU they
        are there.
        """
        if not self._on_cpu:
            import cupy

            backend: Any = self.compositor.backend
            with backend.device, _current(self._cuda_stream):
                cupy.cuda.get_current_stream().synchronize()

    def _take(self, place: _Place) -> tuple[_Span, npt.NDArray[np.int64], _Place] | None:
        """A place's batch, its indices, and the place after it; None after the last epoch. The stream stays there."""
        span, epoch, position = self._schedule.take(place.epoch, place.position)
        if span is None:
            return None
        epoch, position = self._schedule.pass_over(self._part[1] - 1, epoch, position)
        return span, self._order.indices(span), _Place(epoch, position, place.turn + 1)

    def _frames(self, count: int, turn: int) -> tuple[Any, Any]:
        """Arrays for a batch: new ones, or a whole batch's of the ring, cut to size."""
        frames = _aligned_frames(self.compositor.recipe) if self._on_cpu else self.compositor.backend.frames
        if not self._ring:
            return frames(count)
        slot = turn % len(self._ring)
        if self._ring[slot] is None:
            self._ring[slot] = frames(self.batch_size)
        image, mask = self._ring[slot]
        return image[:count], mask[:count]

    def _next_on_cpu(self) -> tuple[StreamBatch, _Place] | None:
        """The next batch, and where the stream is after it."""
        if self._process != os.getpid():  # in a forked process its threads are not there
            self._forget_threads()
        while len(self._ahead) <= self._prefetch and self._submit():
            pass
        if not self._ahead:
            return None
        for future in self._ahead[0].parts:
            future.result()
        under_way = self._ahead.popleft()
        return under_way.batch, under_way.after

    def _submit(self) -> bool:
        """Let the threads begin another batch, if there is one."""
        place = self._ahead[-1].after if self._ahead else self._place
        taken = self._take(place)
        if taken is None:
            return False
        span, index, after = taken
        compositor = self.compositor
        if self._pool is None:
            self._pool = ThreadPoolExecutor(compositor.workers, "gpufgbg-stream")
        room = self._rooms[place.turn % self._reuse] if self._reuse else None
        image, mask = self._frames(span.count, place.turn)
        depth = self._work.depth(span.count, *mask.shape[1:])
        plan, threads = compositor.plan, compositor.workers
        batch = StreamBatch(image, mask, index, span.epoch, depth, plan, _workers=threads, _room=room)
        step = max(1, min(_CHUNK, -(-span.count // compositor.workers)))
        cuts = [slice(at, at + step) for at in range(0, span.count, step)]
        parts = [self._pool.submit(self._work.render, batch.labels, image, mask, depth, cut) for cut in cuts]
        self._ahead.append(_UnderWay(batch, parts, after))
        return True

    def _next_on_card(self) -> tuple[StreamBatch, _Place] | None:
        """The next batch, and where the stream is after it."""
        backend: Any = self.compositor.backend
        with backend.device, _current(self._cuda_stream):
            self._check_faults(wait=False)
            taken = self._take(self._place)
            if taken is None:
                self._check_faults(wait=True)
                return None
            span, index, after = taken
            image, mask = self._frames(span.count, self._place.turn)
            backend.render(_Deferred(self.compositor.plan, index), image, mask)
            depth = None
            if self._model is not None:
                import cupy

                seen = backend.jpeg.reconstruct(image) if self._model.options.input == "saved" else image
                maps = self._model.maps(seen, self._metres)
                depth = DepthMaps(maps.grey, maps.range, maps.metres)
                self._faults.append((maps.faults, cupy.cuda.get_current_stream().record(), index))
        plan = self.compositor.plan
        return StreamBatch(image, mask, index, span.epoch, depth, plan, self._cuda_stream), after

    def _check_faults(self, wait: bool) -> None:
        """Look for values that are no numbers in the depth of batches that the card is done with."""
        while self._faults and (wait or self._faults[0][1].done):
            faults, event, index = self._faults[0]
            event.synchronize()
            if self._aside is None:
                import cupy

                self._aside = cupy.cuda.Stream(non_blocking=True)  # the current stream may be far behind
            assert self._model is not None
            _check_depth(self._model, faults.get(stream=self._aside), index)
            self._faults.popleft()

    # -- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the stream: what is rendered ahead is let go, its threads end. Batches that were given stay valid."""
        self._close("closed")

    def _close(self, how: str) -> None:
        self._closed = self._closed or how
        self._let_go()
        self._faults.clear()
        self._ring, self._rooms = [], []
        self._stop_threads()

    def _let_go(self) -> None:
        """Forget what is rendered ahead, and wait for the threads, which may be writing to arrays used again."""
        if self._process != os.getpid():
            self._forget_threads()
        parts = [future for under_way in self._ahead for future in under_way.parts]
        self._ahead.clear()
        for future in parts:
            future.cancel()
        wait(parts)

    def _stop_threads(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None and self._process == os.getpid():
            pool.shutdown(wait=True, cancel_futures=True)

    def _forget_threads(self) -> None:
        self._process, self._pool = os.getpid(), None
        self._ahead.clear()

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
            own = source.backend.name
            there = device in ("auto", own) or (device, own) == ("cuda", "cuda:0")
            if recipe is not None or workers is not None or not there:
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
