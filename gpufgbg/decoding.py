"""Decoding the pictures of a data set: on the CPU exactly as Pillow does, on a card by DALI.

A decoder takes any number of stored pictures and gives them back in batches: what each is, and the exact sums over
the pixels of all. `select` is the only place that knows which decoders there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import imagecodecs
import numpy as np
import numpy.typing as npt

from gpufgbg import backends
from gpufgbg.backends.cpu import Counter
from gpufgbg.compositor import check_workers
from gpufgbg.exceptions import DatasetError, DeviceError
from gpufgbg.helpers import Helpers
from gpufgbg.moments import Moments
from gpufgbg.pictures import PictureError, eight_bit, has_end
from gpufgbg.readers import StoredPicture, decode_bytes

__all__ = ["CpuDecoder", "Decoded", "Decoder", "Form", "select"]

#: width, height, mode and format of a stored picture; mode and format as Pillow calls them
Form = tuple[int, int, str, str]

CHUNK = 64  # pictures that a thread takes at a time
ONE_LOCK = 3  # threads that one interpreter's lock is enough for
_GREY = ("foreground_mask", "composite_mask", "depth")
_JPEG = b"\xff\xd8"
_Item = TypeVar("_Item")
_Started = TypeVar("_Started")


@dataclass
class Decoded:
    """A batch of pictures of one kind, decoded.

    Attributes
    ----------
    pictures : list of StoredPicture
    forms : list of Form or None
        What each picture is; None for one that can't be decoded.
    size_bytes : int
        Length of all encoded pictures that could be decoded.
    moments : Moments
        Sums over the pixels of all, RGB or grey as their kind is.
    faults : list of str
        One line for each picture that can't be decoded; the line names it.
    """

    pictures: list[StoredPicture]
    forms: Sequence[Form | None]
    size_bytes: int = 0
    moments: Moments = field(default_factory=Moments)
    faults: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The kind of all its pictures."""
        return self.pictures[0].kind


class Decoder(Protocol):
    """What decodes on a device.

    Attributes
    ----------
    name : str
        The device: ``cpu`` or ``cuda:N``.
    """

    name: str

    def decode(self, pictures: Iterable[StoredPicture]) -> Generator[Decoded, None, None]:
        """Decode all, in batches of a kind, in no fixed order; close the iterator where it is not exhausted."""


def select(device: str = "auto", workers: int | None = None) -> Decoder:
    """The decoder for ``device``.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda", "cuda:N"}
        ``auto`` takes the first CUDA device where there is one and DALI is installed, and the CPU elsewhere.
    workers : int, optional
        Threads, by default one a core.

    Raises
    ------
    OptionError
        No such device's name; or ``workers`` is out of range.
    DeviceError
        The device is not there, or DALI is not installed or can't use it.
    """
    threads = check_workers(workers)
    kind, _, number = backends.check_device(device).partition(":")
    if kind == "cpu" or why_cpu(device) is not None:
        return CpuDecoder(threads)
    from gpufgbg.backends import cuda
    from gpufgbg.decoding_dali import DaliDecoder, why_not

    index = int(number or 0)
    reason = cuda.why_not(index) or why_not()
    if reason is not None:
        raise DeviceError(f"device cuda:{index}: {reason}; or use device cpu")
    return DaliDecoder(index, threads)


def why_cpu(device: str) -> str | None:
    """Why ``auto`` decodes on the CPU here; None where it does not, or where another device is named."""
    if backends.check_device(device) != "auto":
        return None
    from gpufgbg.decoding_dali import why_not

    return backends.why_cpu(device) or why_not()


# -- one picture ----------------------------------------------------------------------------------------


def mode_of(kind: str) -> str:
    """What pictures of a kind are counted as: ``L`` or ``RGB``."""
    return "L" if kind in _GREY else "RGB"


def decode_picture(picture: StoredPicture, data: bytes) -> tuple[npt.NDArray[np.uint8], Form]:
    """Pixels (H, W, 3) or (H, W), as the picture's kind is, and the form, on the CPU.

    JPEG goes through the decoder that Pillow uses, without its lock; other files, and JPEG of another mode, through
    Pillow. 16-bit pictures count with their upper byte.

    Raises
    ------
    DatasetError
        It can't be decoded, has pixels of 32 bits, or is a JPEG file without an end: decoders make up what lacks.
    """
    wanted = mode_of(picture.kind)
    if data[:2] == _JPEG:
        if not has_end(data, "JPEG"):
            raise DatasetError(f"{picture.name}: can't be decoded: damaged or truncated JPEG: its end is not there")
        try:
            pixels = imagecodecs.jpeg8_decode(data)
        except (imagecodecs.Jpeg8Error, ValueError) as error:
            raise DatasetError(f"{picture.name}: can't be decoded: {error}") from None
        if pixels.ndim == (2 if wanted == "L" else 3) and pixels.shape[2:] in ((), (3,)):
            return pixels, (pixels.shape[1], pixels.shape[0], wanted, "JPEG")
    image = decode_bytes(picture.name, data)
    form = (image.width, image.height, image.mode, image.format or "")
    if image.mode[0] in "IF":  # 16 bits and more, which `convert` would cut off at 255
        try:
            image = eight_bit(image, data)
        except PictureError as error:
            raise DatasetError(f"{picture.name}: {error}") from None
    return np.asarray(image.convert(wanted)), form


# -- batches --------------------------------------------------------------------------------------------


def load(pictures: Iterable[StoredPicture]) -> list[bytes | DatasetError]:
    """Each picture's bytes, or why they can't be had."""
    files: list[bytes | DatasetError] = []
    for picture in pictures:
        try:
            files.append(picture.load())
        except DatasetError as error:
            files.append(error)
    return files


def decode_files(pictures: Sequence[StoredPicture], files: Sequence[bytes | DatasetError]) -> Decoded:
    """Decode pictures of one kind, one by one, on the CPU."""
    forms: list[Form | None] = []
    batch = Decoded(list(pictures), forms)
    counter = Counter(len(mode_of(batch.kind)))
    for picture, data in zip(pictures, files, strict=True):
        form = None
        try:
            if isinstance(data, DatasetError):
                raise data
            pixels, form = decode_picture(picture, data)
            counter.add(pixels)
            batch.size_bytes += len(data)
        except DatasetError as error:
            batch.faults.append(str(error))
        forms.append(form)
    batch.moments = counter.moments
    return batch


def as_colour(grey: Moments) -> Moments:
    """Moments of grey pictures as those of the same pictures in RGB."""
    return Moments(grey.images, grey.pixels, 3 * grey.sum, 3 * grey.sum_of_squares)


def batches(pictures: Iterable[StoredPicture], size: Callable[[], int]) -> Iterator[list[StoredPicture]]:
    """Pictures in batches of one kind; ``size`` says how many a batch may have by now."""
    waiting: dict[str, list[StoredPicture]] = {}
    for picture in pictures:
        batch = waiting.setdefault(picture.kind, [])
        batch.append(picture)
        if len(batch) >= size():
            yield waiting.pop(picture.kind)
    yield from waiting.values()


def overlapped(items: Iterable[_Item], start: Callable[[_Item], _Started], depth: int) -> Iterator[_Started]:
    """What ``start`` gives for each item, handed on once it has been called for ``depth`` items more."""
    pending: deque[_Started] = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) > depth:
            yield pending.popleft()
    yield from pending


@contextmanager
def threads_for(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; what has not begun when the block ends is dropped."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def decode_stored(pictures: Sequence[StoredPicture]) -> Decoded:
    """Read and decode pictures of one kind, on the CPU."""
    return decode_files(pictures, load(pictures))


def _decode_away(pictures: Sequence[StoredPicture]) -> Decoded:
    """The same for another process, which knows the pictures."""
    return replace(decode_stored(pictures), pictures=[])


def decode_apart(helpers: Helpers, pictures: list[StoredPicture]) -> Decoded:
    """The same, in a helper where one is ready and can have the pictures."""
    if not pictures[0].portable:
        return decode_stored(pictures)
    return replace(helpers.call(_decode_away, pictures, len(pictures)), pictures=pictures)


class CpuDecoder:
    """Decodes on the CPU, exactly as Pillow does: in threads, and in a process for each where they are many.

    Parameters
    ----------
    threads : int
    """

    name = "cpu"

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def decode(self, pictures: Iterable[StoredPicture]) -> Generator[Decoded, None, None]:
        """See `Decoder`."""
        helpers = Helpers(self._threads if self._threads > ONE_LOCK else 0)
        with helpers, threads_for(self._threads) as pool:
            chunks = batches(pictures, lambda: CHUNK)

            def submit(chunk: list[StoredPicture]) -> Future[Decoded]:
                return pool.submit(decode_apart, helpers, chunk)

            for future in overlapped(chunks, submit, 2 * self._threads):
                yield future.result()
