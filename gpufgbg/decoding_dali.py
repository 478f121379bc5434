"""Decoding by NVIDIA DALI: JPEG files go to the card as they are, and the sums of their pixels come back.

Four stages overlap: threads, each with a process, read files ahead; DALI decodes the batches before those; CuPy
counts, on a stream of its own, what DALI has decoded; and the host adds up the sums of what was counted. Between the
first two, a file's header says where it goes: DALI gets those that every decoder reads alike (`plain_jpegs`),
together those of one number of channels. All else, and whatever DALI refuses, goes the CPU decoder's way, which also
tells what is wrong with a file.

The same class decodes with DALI's CPU decoder and counts with NumPy, so it is tested where there is no card.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import imagecodecs
import numpy as np

from gpufgbg.backends import cpu, cuda
from gpufgbg.decoding import (
    CHUNK,
    ONE_LOCK,
    Decoded,
    as_colour,
    batches,
    decode_files,
    load,
    mode_of,
    overlapped,
    threads_for,
)
from gpufgbg.exceptions import DatasetError, DeviceError, GpufgbgWarning, printable
from gpufgbg.helpers import Helpers
from gpufgbg.moments import Moments
from gpufgbg.plain_jpeg import Shape, plain_jpegs
from gpufgbg.readers import StoredPicture

__all__ = ["DaliDecoder", "why_not"]

_BATCH = 1024  # pictures that DALI gets at once
_FIRST_BATCH = 64  # before anything is known of their length
_ENCODED_BYTES, _DECODED_BYTES = 64 << 20, 256 << 20  # of a batch, at most; more only where one picture is more
_READERS = 8  # each with a process for it where there are so many cores
_READ_AHEAD, _DECODE_AHEAD, _COUNT_AHEAD = 2, 3, 1  # batches
_QUEUE = 2  # batches that DALI works on at a time
_PATIENCE = 8  # times that DALI may fail until the rest is left to the CPU

_Readings = list[tuple[StoredPicture, "bytes | DatasetError", "Shape | None"]]


def why_not() -> str | None:
    """What keeps this machine from DALI, with what to do, or None."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return "NVIDIA DALI is not installed (pip install 'gpufgbg[dali]')"
    return None


class _File(NamedTuple):
    picture: StoredPicture
    data: bytes | DatasetError


class _Jpeg(NamedTuple):
    """A file for DALI."""

    picture: StoredPicture
    data: bytes
    width: int
    height: int


class _Part(Protocol):
    """Files of one kind that go through the stages together."""

    def start(self) -> None:
        """Begin to decode."""

    def count(self) -> None:
        """Begin to count what was decoded."""

    def results(self) -> Iterator[Decoded]:
        """What came out; waits for it."""


class _Broken(Exception):
    """DALI has failed; its pipelines don't survive that."""


class DaliDecoder:
    """Decodes JPEG by DALI and counts the pixels where they are; all else on the CPU.

    Parameters
    ----------
    index : int or None
        The CUDA device's number; None for DALI's CPU decoder.
    threads : int
        Of DALI, and of the decoder on the CPU.
    batch : int
        Pictures that DALI gets at once, at most.
    fancy_upsampling : bool
        On a card, interpolate chroma as libjpeg does by default.
    hardware : float
        On a card with JPEG engines, the part of the pictures that these get, 0 to 1.

    Raises
    ------
    DeviceError
        DALI can't decode there.
    """

    def __init__(
        self,
        index: int | None,
        threads: int,
        batch: int = _BATCH,
        fancy_upsampling: bool = True,
        hardware: float = 0.65,
    ) -> None:
        self.name = "cpu" if index is None else f"cuda:{index}"
        self._index, self._threads, self._batch = index, threads, batch
        self._take = min(_FIRST_BATCH, batch)
        self._stream: Any = None
        self._options: dict[str, Any] = {}
        if index is not None:
            import cupy

            self._options = {"jpeg_fancy_upsampling": fancy_upsampling, "hw_decoder_load": hardware}
            with cupy.cuda.Device(index):
                self._stream = cupy.cuda.Stream(non_blocking=True)
        self._failures = 0
        try:
            self._pipelines = {channels: self._new_pipeline(channels) for channels in (1, 3)}
        except _Broken as error:
            raise DeviceError(f"device {self.name}: DALI can't decode there: {error}; or use device cpu") from None

    def decode(self, pictures: Iterable[StoredPicture]) -> Generator[Decoded, None, None]:
        """See `gpufgbg.decoding.Decoder`."""
        reading_threads = min(_READERS, self._threads)
        helpers = Helpers(reading_threads if reading_threads > ONE_LOCK else 0)
        with helpers, threads_for(reading_threads) as readers, threads_for(self._threads) as workers:

            def read(batch: list[StoredPicture]) -> list[Future[_Readings]]:
                return [readers.submit(_read, helpers, chunk) for chunk in _chunks(batch)]

            def start(part: _Part) -> _Part:
                part.start()
                return part

            def count(part: _Part) -> _Part:
                part.count()
                return part

            reading = overlapped(batches(pictures, lambda: self._take), read, _READ_AHEAD)
            parts = (part for futures in reading for part in self._parts(futures, workers))
            try:
                for part in overlapped(overlapped(parts, start, _DECODE_AHEAD), count, _COUNT_AHEAD):
                    yield from part.results()
            finally:
                for pipeline in self._pipelines.values():
                    pipeline.drain()

    def _parts(self, reading: list[Future[_Readings]], workers: ThreadPoolExecutor) -> Iterator[_Part]:
        """What is to be decoded together of a batch that is being read."""
        others: list[_File] = []
        plain: dict[int, list[_Jpeg]] = {1: [], 3: []}
        size_bytes = count = 0
        for future in reading:
            for picture, data, shape in future.result():
                count += 1
                if isinstance(data, bytes):
                    size_bytes += len(data)
                    if shape is not None:
                        width, height, channels = shape
                        plain[channels].append(_Jpeg(picture, data, width, height))
                        continue
                others.append(_File(picture, data))
        self._take = max(1, min(self._batch, _ENCODED_BYTES * count // max(1, size_bytes)))
        for channels, files in plain.items():
            for group in _grouped(files, channels):
                yield _DaliPart(self, channels, group, workers)
        if others:
            yield _CpuPart(others, workers)

    def pipeline(self, channels: int) -> _Pipeline:
        """The pipeline for so many channels; a new one where the last has failed, unless too many have."""
        pipeline = self._pipelines[channels]
        if pipeline.failure is None or self._failures >= _PATIENCE:
            return pipeline
        self._failures += 1
        if self._failures == _PATIENCE:
            warnings.warn(
                f"DALI has failed {_PATIENCE} times on {self.name}, the last time with: {pipeline.failure}; the CPU "
                "decodes the rest",
                GpufgbgWarning,
                stacklevel=2,
            )
        else:
            self._pipelines[channels] = self._new_pipeline(channels)
        return self._pipelines[channels]

    def _new_pipeline(self, channels: int) -> _Pipeline:
        return _Pipeline(channels, self._index, self._threads, self._batch, self._options, self._stream)

    def here(self) -> AbstractContextManager[Any]:
        """Around CuPy's calls: the card, and the stream for counting."""
        stack = ExitStack()
        if self._stream is not None:
            import cupy

            stack.enter_context(cupy.cuda.Device(self._index))
            stack.enter_context(self._stream)
        return stack

    def synchronize(self) -> None:
        """Wait for what the stream for counting has been given, decoded pictures among it."""
        if self._stream is not None:
            self._stream.synchronize()


class _CpuPart:
    """What the CPU decodes."""

    def __init__(self, files: Sequence[_File | _Jpeg], workers: ThreadPoolExecutor) -> None:
        self._files, self._workers = files, workers
        self._futures: list[Future[Decoded]] = []

    def start(self) -> None:
        """See `_Part`."""
        for chunk in _chunks(self._files):
            pictures, files = [file.picture for file in chunk], [file.data for file in chunk]
            self._futures.append(self._workers.submit(decode_files, pictures, files))

    def count(self) -> None:
        """See `_Part`; decoding has counted."""

    def results(self) -> Iterator[Decoded]:
        """See `_Part`."""
        for future in self._futures:
            yield future.result()


class _DaliPart:
    """What DALI decodes, or the CPU where DALI fails."""

    def __init__(
        self, decoder: DaliDecoder, channels: int, files: Sequence[_Jpeg], workers: ThreadPoolExecutor
    ) -> None:
        self._decoder, self._channels, self._files = decoder, channels, files
        self._wanted = mode_of(files[0].picture.kind)
        self._on_cpu = _CpuPart(files, workers)
        self._pipeline: _Pipeline | None = None  # None: the CPU decodes
        self._tensors: list[Any] = []
        self._sums: list[Any] = []

    def start(self) -> None:
        """See `_Part`."""
        try:
            self._pipeline = self._decoder.pipeline(self._channels)
            self._pipeline.feed([file.data for file in self._files])
        except _Broken:
            self._leave_to_cpu()

    def count(self) -> None:
        """See `_Part`."""
        if self._pipeline is None:
            return
        try:
            self._tensors = self._pipeline.take(sum(file.width * file.height for file in self._files))
        except _Broken:
            self._leave_to_cpu()
            return
        with self._decoder.here():
            self._sums = [self._start_sums(_as_array(tensor)) for tensor in self._tensors]

    def _leave_to_cpu(self) -> None:
        self._pipeline = None
        self._on_cpu.start()

    def _start_sums(self, pixels: Any) -> Any:
        pixels = pixels.reshape(1, -1, 1, self._channels)
        if self._channels == 3 and self._wanted == "L":
            pixels = _luma(pixels)
        return cuda.start_moments(pixels) if cuda.is_on_card(pixels) else _Counted(cpu.moments(pixels))

    def results(self) -> Iterator[Decoded]:
        """See `_Part`."""
        if self._pipeline is None:
            yield from self._on_cpu.results()
            return
        with self._decoder.here():
            found = Moments.total(sums.get() for sums in self._sums)
        found = dataclasses.replace(found, images=len(self._files))
        if self._channels == 1 and self._wanted == "RGB":
            found = as_colour(found)
        mode = "L" if self._channels == 1 else "RGB"
        yield Decoded(
            [file.picture for file in self._files],
            [(file.width, file.height, mode, "JPEG") for file in self._files],
            sum(len(file.data) for file in self._files),
            found,
        )


class _Counted(NamedTuple):
    """Moments that are there; the twin of the CUDA backend's `PendingSums`."""

    moments: Moments

    def get(self) -> Moments:
        """The moments."""
        return self.moments


class _Pipeline:
    """A DALI pipeline of JPEG files of one number of channels. Every call may raise `_Broken`.

    Attributes
    ----------
    failure : str or None
        Why it can't be used any more.
    """

    def __init__(
        self, channels: int, index: int | None, threads: int, batch: int, options: dict[str, Any], stream: Any
    ) -> None:
        self.failure: str | None = None
        self._under_way = 0
        self._channels, self._stream = channels, stream
        with self._guarded():
            from nvidia.dali import Pipeline, fn, types

            self._pipeline = Pipeline(batch, threads, index, prefetch_queue_depth=_QUEUE)
            with self._pipeline:
                pixels = fn.decoders.image(
                    fn.external_source(name="files", ndim=1, dtype=types.UINT8),
                    device="cpu" if index is None else "mixed",
                    output_type=types.GRAY if channels == 1 else types.RGB,
                    adjust_orientation=False,
                    **options,
                )
                self._pipeline.set_outputs(pixels)
            self._pipeline.build()
            # DALI's first run takes a batch for each place of its queue, later ones take one
            small = np.zeros((16, 16, 3) if channels == 3 else (16, 16), np.uint8)
            file = bytes(imagecodecs.jpeg8_encode(small))
            for _ in range(_QUEUE - 1):
                self._give([file])
        self.feed([file])
        self._under_way = _QUEUE
        self.drain()
        if self.failure is not None:
            raise _Broken(self.failure)

    def _give(self, files: Sequence[bytes]) -> None:
        from nvidia.dali.tensors import TensorCPU, TensorListCPU

        self._pipeline.feed_input("files", TensorListCPU([TensorCPU(file) for file in files]))

    def feed(self, files: Sequence[bytes]) -> None:
        """Begin to decode a batch."""
        with self._guarded():
            self._give(files)
            self._pipeline.schedule_run()
            self._under_way += 1

    def take(self, pixels: int) -> list[Any]:
        """The oldest batch, of so many pixels in all: one tensor where DALI has it in one piece, or one a picture.

        On a card they are there for what follows on the stream for counting. Keep them until that is done.
        """
        with self._guarded():
            self._under_way -= 1
            (pictures,) = self._pipeline.outputs(self._stream)
            found = sum(height * width for height, width, _ in pictures.shape())
            if found != pixels:
                raise ValueError(f"got {found} pixels, expected {pixels}")
            try:
                return [pictures.as_reshaped_tensor([pixels, self._channels])]
            except RuntimeError:  # not in one piece
                return [pictures[i] for i in range(len(pictures))]

    def drain(self) -> None:
        """Drop the batches that were fed and not taken, so that the next one taken is the next one fed."""
        with suppress(_Broken), self._guarded():
            while self._under_way:
                self._under_way -= 1
                self._pipeline.outputs(self._stream)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        if self.failure is not None:
            raise _Broken(self.failure)
        try:
            yield
        except Exception as error:  # DALI has no type of its own for most
            said = str(error).partition("encountered:")[2] or str(error)
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            self.failure = printable(lines[0]) if lines else type(error).__name__
            raise _Broken(self.failure) from error


def _read(helpers: Helpers, pictures: Sequence[StoredPicture]) -> _Readings:
    """Pictures' bytes and shapes, read in a helper where one is ready and can have the pictures."""
    away = pictures[0].portable
    files, shapes = helpers.call(_inspected, pictures, len(pictures)) if away else _inspected(pictures)
    return list(zip(pictures, files, shapes, strict=True))


def _inspected(pictures: Sequence[StoredPicture]) -> tuple[list[bytes | DatasetError], list[Shape | None]]:
    files = load(pictures)
    return files, plain_jpegs([b"" if isinstance(data, DatasetError) else data for data in files])


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[at : at + CHUNK] for at in range(0, len(items), CHUNK))


def _grouped(files: Sequence[_Jpeg], channels: int) -> Iterator[list[_Jpeg]]:
    """Files whose pixels together take a bounded part of the memory."""
    group: list[_Jpeg] = []
    pixel_bytes = 0
    for file in files:
        own = file.width * file.height * channels
        if group and pixel_bytes + own > _DECODED_BYTES:
            yield group
            group, pixel_bytes = [], 0
        group.append(file)
        pixel_bytes += own
    if group:
        yield group


def _as_array(tensor: Any) -> Any:
    """A tensor of DALI's as NumPy's or CuPy's; on a card it is there for the stream for counting already."""
    if not cuda.is_on_card(tensor):
        return cuda.as_array(tensor)
    import cupy

    return cupy.asarray(tensor)


def _luma(pixels: Any) -> Any:
    """(1, N, 1, 3) uint8 as grey (1, N, 1), with the arithmetic of Pillow's ``convert("L")``."""
    wide = pixels.astype(np.uint32)
    return ((19595 * wide[..., 0] + 38470 * wide[..., 1] + 7471 * wide[..., 2] + 32768) >> 16).astype(np.uint8)
