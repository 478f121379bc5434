"""Baseline JPEG files of pictures, made on the CPU or in a card's memory: the bytes of libjpeg-turbo.

And the pixels that it decodes from them, which on a card need no files.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from gpufgbg.arrays import Pictures, is_sequence, read_arrays
from gpufgbg.backends import check_device, cuda
from gpufgbg.exceptions import DeviceError
from gpufgbg.recipe import Recipe

__all__ = ["EncodedImages", "JpegEncoder"]


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """N JPEG files, one after the other. An index or a slice copies files to the host, as bytes.

    Attributes
    ----------
    buffer : (bytes,) uint8
        The files, in the encoder's memory: NumPy on the CPU, CuPy on a card. Owned by this object.
    offsets : (N + 1,) int64
        Where each file starts and the last one ends, beside ``buffer``.
    """

    buffer: Any
    offsets: Any
    _made: Any = field(default=None, repr=False)  # on a card, when they are there

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> list[int]:
        """Bytes of each file. On a card it waits for the files' lengths."""
        sizes: list[int] = np.diff(self._on_host(self.offsets)).tolist()
        return sizes

    def __iter__(self) -> Iterator[bytes]:
        data, ends = self._on_host(self.buffer), self._on_host(self.offsets).tolist()
        for start, end in itertools.pairwise(ends):
            yield data[start:end].tobytes()

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        count = len(self)
        if isinstance(index, slice):
            return self._files(range(count)[index])
        number = operator.index(index)
        if not -count <= number < count:
            raise IndexError(f"file {number} of {count}")
        return self._files(range(number % count, number % count + 1))[0]

    def _files(self, numbers: range) -> list[bytes]:
        if not numbers:
            return []
        first, last = sorted((numbers[0], numbers[-1]))
        ends = self._on_host(self.offsets[first : last + 2]).tolist()
        data = self._on_host(self.buffer[ends[0] : ends[-1]])
        starts = [end - ends[0] for end in ends]
        return [bytes(data[starts[n - first] : starts[n - first + 1]].tobytes()) for n in numbers]

    def _on_host(self, array: Any) -> Any:
        if self._made is not None:
            return self._made.get(array)
        return array.get() if cuda.is_on_card(array) else array


class JpegEncoder:
    """Encodes pictures, or shows what is left of them in the files.

    On a card it works on CuPy's current stream. Tensors of other libraries are taken by DLPack, so that this stream
    waits for what makes them.

    Parameters
    ----------
    quality : int
        As libjpeg scales it, 1 to 100.
    subsampling : {"444", "422", "420"}
        Of colour pictures.
    optimize : bool
        Optimal Huffman tables for each picture, or the standard's.
    device : {"auto", "cpu", "cuda", "cuda:N"}

    Raises
    ------
    OptionError, DeviceError

    Examples
    --------
    >>> import numpy as np
    >>> encoder = JpegEncoder(quality=90, device="cpu")
    >>> files = encoder.encode(np.zeros((2, 8, 8, 3), np.uint8))
    >>> len(files), files[0][:2]
    (2, b'\\xff\\xd8')
    >>> red = np.full((1, 8, 8, 3), (255, 0, 0), np.uint8)
    >>> encoder.reconstruct(red)[0, 0, 0].tolist()
    [254, 0, 0]
    >>> len(encoder.encode([np.zeros((3, 8, 9), np.uint8), np.zeros((40, 30), np.uint8)]))
    2
    """

    def __init__(
        self, quality: int = 75, subsampling: str = "420", optimize: bool = False, device: str = "auto"
    ) -> None:
        checked = Recipe(quality=quality, subsampling=subsampling, optimize=optimize)
        self.quality, self.subsampling, self.optimize = checked.quality, checked.subsampling, checked.optimize
        kind, _, number = check_device(device).partition(":")
        reason = None if kind == "cpu" else cuda.why_not(int(number or 0))
        if kind == "cuda" and reason:
            raise DeviceError(f"device {device}: {reason}; or use device cpu")
        self.device = "cpu" if kind == "cpu" or reason else f"cuda:{int(number or 0)}"
        options = self.quality, self.subsampling, self.optimize
        self._cuda = None if self.device == "cpu" else cuda.CudaJpeg(*options)

    def encode(self, images: Any, layout: str = "auto") -> EncodedImages:
        """Encode a batch, or pictures of any sizes.

        Parameters
        ----------
        images : array, or list or tuple of arrays
            uint8, RGB or grey, 1 to 65,500 pixels a side. One array is a batch of pictures: (N, H, W, 3),
            (N, 3, H, W) or (N, H, W). Of a list, each is a picture: (H, W, 3), (3, H, W), (H, W), (1, H, W) or
            (H, W, 1). NumPy's, CuPy's, or of any library with ``__cuda_array_interface__`` or DLPack, on the host or
            on a card; what is not where the encoder works is copied there. On a card, all pictures of one size are
            encoded as one batch, and an array that is there, contiguous and not (N, 3, H, W) is not copied.
        layout : {"auto", "HWC", "CHW", "HW"}
            A picture's axes, for shapes that can be read in two ways, which ``auto`` refuses: (5, 24, 3) is 5 grey
            pictures with ``"HW"``, one in colour with ``"HWC"``.

        Returns
        -------
        EncodedImages
            In the order of ``images``.

        Raises
        ------
        InputError
            Another shape, size or dtype.
        OptionError
            No such layout.
        """
        given = read_arrays("images", images, layout, cuda.MAX_SIDE)
        if self._cuda is None:
            from gpufgbg.backends.cpu import encode_jpeg

            options = self.quality, self.subsampling, self.optimize
            files = [file for one in given for file in encode_jpeg(_on_host(one.pixels), *options)]
            ends = np.cumsum([0, *map(len, files)], dtype=np.int64)
            return EncodedImages(np.frombuffer(bytearray().join(files), np.uint8), ends)
        import cupy

        with cupy.cuda.Device(int(self.device.partition(":")[2])):
            groups = _groups(given)
            parts = [self._cuda.encode(_on_card([given[i].pixels for i in group])) for group in groups]
            return EncodedImages(*_in_order(parts, groups), cuda.Mark())

    def reconstruct(self, images: Any, layout: str = "auto") -> Any:
        """The pixels that a decoder (libjpeg-turbo, as in Pillow) gets from `encode`'s files.

        For whoever has to see what is saved, not what was drawn, a network for instance. On a card no file is made,
        and nothing waits: the result is there for what follows on CuPy's current stream.

        Parameters
        ----------
        images : array, or list or tuple of arrays
        layout : {"auto", "HWC", "CHW", "HW"}
            Taken as `encode` takes them; left as they are.

        Returns
        -------
        pixels : array, or list of arrays, shaped as ``images``, uint8
            RGB or grey, byte for byte what `encode` and libjpeg-turbo's decoder with its default options give
            (integer DCT, triangle upsampling); ``optimize`` does not change them. New C-contiguous arrays in the
            encoder's memory, NumPy on the CPU, CuPy on a card, owned by the caller. On a card, those of one size of
            a list may share an allocation.

        Raises
        ------
        InputError
            Another shape, size or dtype.
        OptionError
            No such layout.
        """
        given = read_arrays("images", images, layout, cuda.MAX_SIDE)
        found: list[Any] = [None] * len(given)
        if self._cuda is None:
            from gpufgbg.backends.cpu import reconstruct_jpeg

            for i, one in enumerate(given):
                found[i] = one.in_form(reconstruct_jpeg(_on_host(one.pixels), self.quality, self.subsampling))
        else:
            import cupy

            with cupy.cuda.Device(int(self.device.partition(":")[2])):
                for group in _groups(given):
                    pixels = self._cuda.reconstruct(_on_card([given[i].pixels for i in group]))
                    for k, i in enumerate(group):
                        found[i] = given[i].in_form(pixels if len(group) == 1 else pixels[k : k + 1])
        return found if is_sequence(images) else found[0]


def _groups(given: Sequence[Pictures]) -> list[list[int]]:
    """The numbers of arrays whose pictures make one batch: those of one size, grey or in colour."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, one in enumerate(given):
        groups.setdefault(tuple(one.pixels.shape[1:]), []).append(i)
    return list(groups.values())


def _on_card(pixels: Sequence[Any]) -> Any:
    """Pictures of one size as one contiguous CuPy array on the current device."""
    import cupy

    if len(pixels) == 1:
        batch = cupy.asarray(pixels[0])
    elif any(map(cuda.is_on_card, pixels)):
        batch = cupy.concatenate([cupy.asarray(part) for part in pixels])
    else:
        batch = cupy.asarray(np.concatenate(pixels))
    return cupy.ascontiguousarray(batch)  # joined (3, H, W) may stay in that order


def _in_order(parts: Sequence[tuple[Any, Any]], groups: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Files and offsets, on the card, of groups of single pictures, in the pictures' order. One group has it."""
    import cupy

    if len(parts) == 1:
        return parts[0]
    files: dict[int, Any] = {}
    for (buffer, offsets), group in zip(parts, groups, strict=True):
        ends = itertools.pairwise(offsets.get().tolist())
        files.update((number, buffer[start:end]) for number, (start, end) in zip(group, ends, strict=True))
    ordered = [files[number] for number in range(len(files))]
    starts = np.cumsum([0, *map(len, ordered)], dtype=np.int64)
    return cupy.concatenate(ordered) if ordered else cupy.empty(0, np.uint8), cupy.asarray(starts)


def _on_host(array: Any) -> npt.NDArray[np.uint8]:
    """Pictures as a contiguous array in the host's memory."""
    return np.ascontiguousarray(array.get() if cuda.is_on_card(array) else array)
