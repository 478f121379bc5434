"""The stream as a PyTorch data set: batches of tensors without a copy, with worker processes, ranks and state.

::

    dataset = StreamDataset("DATASET", batch_size=64, layout="float NCHW")
    for epoch in range(10):
        dataset.set_epoch(epoch)
        for batch in DataLoader(dataset, batch_size=None):
            step(batch["image"], batch["mask"])
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpufgbg.assets import Assets
from gpufgbg.backends import check_device, why_cpu
from gpufgbg.backends.cuda import as_stream
from gpufgbg.checks import whole
from gpufgbg.compositor import Compositor
from gpufgbg.depth.model import DepthModel
from gpufgbg.depth.options import DepthOptions
from gpufgbg.depth.processing import Triple
from gpufgbg.depth.sources import NetworkSource, open_source
from gpufgbg.exceptions import DeviceError, OptionError
from gpufgbg.integrations.convert import Conversion
from gpufgbg.recipe import Recipe
from gpufgbg.streaming import SampleStream, StrPath, stream

try:
    from torch.utils.data import IterableDataset as _IterableDataset
except ImportError:  # told when a data set is made
    _IterableDataset = object

__all__ = ["StreamDataset", "StreamIterator"]


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise DeviceError(
            "gpufgbg.integrations.torch: PyTorch is not installed: pip install 'gpufgbg[torch]'"
        ) from None
    return torch


class StreamDataset(_IterableDataset):  # type: ignore[misc]
    """Batches of `gpufgbg.stream` as tensors, for ``DataLoader(dataset, batch_size=None)`` or by itself.

    An iteration is one epoch, that of `set_epoch`: as with ``DistributedSampler``, call it before each, or all are
    the same. With ``num_workers`` n, worker k renders every n-th batch from the k-th on, so the loader gives the same
    batches in the same order for any n. A `StatefulDataLoader` of torchdata continues exactly: the iterators have
    ``state_dict`` and ``load_state_dict``.

    Parameters
    ----------
    source, foregrounds, masks, recipe
        As for `gpufgbg.stream`.
    epochs : int or None
        Epochs of one iteration; None for no end.
    layout : {"uint8 NHWC", "float NCHW", "float NHWC"}
        Of the images: as they are rendered, or normalised in one pass: ``(value / 255 - mean) / std``.
    mean, std : float or (float, float, float), optional
        Over values scaled to 0..1. Default: those of the composites, where ``source`` is a data set on disk.
    dtype : {"float32", "float16", "bfloat16"}
        Of float images.
    labels : bool
        Give background, foreground, repetition, flip, x, y and boxes too, on the images' device.
    as_tuple : bool
        Yield (image, mask), or (image, mask, depth), instead of a dictionary.
    rank, world : int, optional
        Default: those of ``torch.distributed`` if it is initialised when the data set is made, else 0 and 1.
    drop_last : bool, optional
        Default: where ``world`` is above 1.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        ``auto`` and ``cuda`` mean PyTorch's current card. There, everything is put on PyTorch's current stream when a
        batch is asked for, and ``num_workers`` is 0: a card needs no processes to feed it.
    depth : DepthOptions, DepthModel, path or "demo", optional
        With worker processes: options, not a model; each process makes its own.
    workers : int, optional
        Threads of each process on the CPU, by default one a core, in worker processes one.
    options
        The rest of `gpufgbg.stream`'s: ``batch_size``, ``shuffle``, ``seed``, ``metres``, ``reuse``, ``prefetch``. In
        worker processes every batch is new arrays, whatever ``reuse`` says.

    It can be copied and pickled, and so used with spawned worker processes; there a blend of the user's own has to be
    a function that a module defines at its top level.

    Yields
    ------
    dict of str to Tensor
        ``image`` (N, H, W, 3) uint8 or (N, 3, H, W) or (N, H, W, 3) of ``dtype``; ``mask`` (N, H, W) uint8; ``index``
        (N,) int64, in the host's memory. With depth: ``depth`` (N, H, W) uint8, ``depth_range`` (N, 2) float32,
        ``metres`` (N, H, W) float32. With labels: ``background``, ``foreground``, ``repetition``, ``x``, ``y`` (N,)
        int32, ``flip`` (N,) bool, and ``boxes`` (N, 4) int32: x0, y0, x1, y1 in pixels, the ends exclusive. All share
        the stream's memory; nothing is copied, but by worker processes, whose batches travel through shared memory.

    Raises
    ------
    DeviceError
        PyTorch is not installed, or the device can't be used.
    OptionError, InputError, DatasetError
        As for `gpufgbg.stream`; or ``mean`` and ``std`` are missing.
    """

    def __init__(
        self,
        source: Compositor | Assets | StrPath,
        foregrounds: StrPath | None = None,
        masks: StrPath | None = None,
        recipe: Recipe | None = None,
        *,
        epochs: int | None = 1,
        layout: str = "uint8 NHWC",
        mean: float | Triple | None = None,
        std: float | Triple | None = None,
        dtype: str = "float32",
        labels: bool = False,
        as_tuple: bool = False,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool | None = None,
        device: str = "auto",
        depth: DepthModel | DepthOptions | StrPath | None = None,
        workers: int | None = None,
        **options: Any,
    ) -> None:
        torch = _torch()
        super().__init__()
        for name in ("epoch", "start", "part", "cuda_stream"):
            if name in options:
                raise OptionError(name, "the data set sets it itself: leave it out")
        if (rank is None) != (world is None):
            raise OptionError("rank", "got one of rank and world, expected both or none")
        if rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._ranks: dict[str, Any] = {"rank": rank or 0, "world": 1 if world is None else world}
        self._options = options
        self._options["drop_last"] = self._ranks["world"] != 1 if drop_last is None else drop_last
        self._workers = workers
        self._epochs = None if epochs is None else whole("epochs", epochs, 1, 2**62)
        if not isinstance(as_tuple, bool):
            raise OptionError("as_tuple", f"got {as_tuple!r}, expected True or False")
        self._as_tuple = as_tuple
        if not isinstance(source, Compositor):
            device = _device(torch, device)
        first = stream(source, foregrounds, masks, recipe, device=device, workers=workers, **self._ranks, **options)
        self._compositor: Compositor | None = first.compositor
        self._assets, self._recipe, self._device = first.compositor.assets, first.compositor.recipe, first.device
        self._blend = first.compositor.blend
        self._threads = source.workers if isinstance(source, Compositor) else workers
        self._length = len(first)
        self._depth = depth if depth is None or isinstance(depth, DepthModel) else DepthOptions.of(depth)
        self._source: NetworkSource | None = None
        if isinstance(self._depth, DepthOptions):
            self._source = open_source(self._depth, self._recipe.size)  # what is amiss is told here
        self._model: tuple[int, DepthModel] | None = None
        known = first.statistics.get("composite")
        self.conversion = Conversion.of(layout, mean, std, dtype, labels, known)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # seen by workers that live on

    def __len__(self) -> int:
        """Batches of one iteration, of this rank.

        Raises
        ------
        TypeError
            It has no end.
        """
        if self._epochs is None:
            raise TypeError("an endless stream has no length")
        return self._epochs * self._length

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration begins with."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives this epoch's order; also seen by worker processes that are kept.

        Raises
        ------
        OptionError
            Not a whole number from 0 on.
        """
        self._epoch.fill_(whole("epoch", epoch, 0, 2**62))

    def __iter__(self) -> StreamIterator:
        """A new iteration; several may run side by side."""
        return StreamIterator(self)

    @property
    def compositor(self) -> Compositor:
        """What makes the samples, with assets, recipe and blend; in another process made again when first needed."""
        if self._compositor is None:
            self._compositor = Compositor(self._assets, self._recipe, self._device, self._threads, self._blend)
        return self._compositor

    def __getstate__(self) -> dict[str, Any]:
        """For copies, and processes that are not forked: without what lives in this process; it is made again there.

        Raises
        ------
        OptionError
            Depth is predicted by a `DepthModel`, or a blend's function has no name in another process.
        """
        if isinstance(self._depth, DepthModel):
            raise OptionError("depth", "got a DepthModel, which stays in its process: expected DepthOptions")
        return {**self.__dict__, "_compositor": None, "_source": None, "_model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # no copy is

    def _open(self, epoch: int, end: int | None, position: int) -> SampleStream:
        """The stream of an iteration in this process."""
        worker = _torch().utils.data.get_worker_info()
        options = {**self._options, **self._ranks}
        if worker is not None:
            if self._device != "cpu":
                raise DeviceError(
                    f"the samples are made on {self._device}: use DataLoader(..., num_workers=0), a card needs no "
                    "processes to feed it"
                )
            if isinstance(self._depth, DepthModel):
                raise OptionError("depth", "got a DepthModel, with worker processes expected DepthOptions")
            options.update(part=(worker.id, worker.num_workers), reuse=0)
        compositor = self.compositor
        if worker is not None and self._workers is None:
            compositor.workers = 1
        depth = self._depth
        if isinstance(depth, DepthOptions):
            if self._model is None or self._model[0] != os.getpid():
                made = DepthModel(depth, self._recipe.size, self._device, 1, source=self._source)
                self._model = os.getpid(), made
            depth = self._model[1]
        return stream(compositor, epoch=epoch, start=position, epochs=end, depth=depth, **options)


class StreamIterator:
    """One iteration over a `StreamDataset`, in one process; `state_dict` is that of the process."""

    def __init__(self, dataset: StreamDataset) -> None:
        self._dataset = dataset
        self._end = None if dataset._epochs is None else dataset.epoch + dataset._epochs
        self._stream = dataset._open(dataset.epoch, self._end, 0)

    def __iter__(self) -> StreamIterator:
        return self

    def __next__(self) -> Any:
        """The next batch, as `StreamDataset` says."""
        torch = _torch()
        conversion = self._dataset.conversion
        with _current_stream(torch, self._stream.device):
            arrays = conversion.arrays(next(self._stream))
            tensors = {name: _tensor(torch, array) for name, array in arrays.items()}
        if conversion.is_bfloat16:
            tensors["image"] = tensors["image"].view(torch.bfloat16)
        if not self._dataset._as_tuple:
            return tensors
        return tuple(tensors[name] for name in ("image", "mask", "depth") if name in tensors)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is, as JSON values: after batch k, that the next one is k + 1."""
        return {**self._stream.state_dict(), "end": self._end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the iteration was whose `state_dict` this is.

        Raises
        ------
        OptionError
            As `SampleStream.load_state_dict`.
        """
        if not isinstance(state, dict) or "end" not in state:
            raise OptionError("state", f"got {state!r}, expected what state_dict gives")
        end = state["end"]
        if end is not None and (isinstance(end, bool) or not isinstance(end, int) or end < 0):
            raise OptionError("state", f"end is {end!r}, expected an epoch, or None for no end")
        self._stream.load_state_dict(state)  # a state that is refused changes nothing
        opened = self._dataset._open(state["epoch"], end, 0)
        opened.load_state_dict(state)
        self._stream.close()
        self._stream, self._end = opened, end

    def close(self) -> None:
        """End it, and its threads."""
        self._stream.close()


def _device(torch: Any, device: str) -> str:
    """``auto`` and ``cuda`` as PyTorch's current card; ``auto`` as the CPU where one of us can't use a card."""
    if check_device(device) == "cpu" or (device == "auto" and why_cpu(device) is not None):
        return "cpu"
    if not torch.cuda.is_available():
        if device == "auto":
            return "cpu"
        raise DeviceError(
            f"device {device}: this build of PyTorch, or this machine, has no CUDA; or use device='cpu'"
        )
    return device if ":" in device else f"cuda:{torch.cuda.current_device()}"


@contextlib.contextmanager
def _current_stream(torch: Any, device: str) -> Iterator[None]:
    """PyTorch's current stream as CuPy's current one."""
    if device == "cpu":
        yield
        return
    import cupy

    index = int(device.partition(":")[2])
    with cupy.cuda.Device(index), as_stream(torch.cuda.current_stream(index).cuda_stream):
        yield


def _tensor(torch: Any, array: Any) -> Any:
    """An array's memory as a tensor."""
    if array.dtype == np.bool_:  # as bytes: not every speaker of DLPack knows it
        return _tensor(torch, array.view(np.uint8)).view(torch.bool)
    if array.dtype == np.uint16:  # the bits of bfloat16, in a type that every DLPack knows
        array = array.view(np.int16)
    return torch.from_dlpack(array) if hasattr(array, "__cuda_array_interface__") else torch.from_numpy(array)
