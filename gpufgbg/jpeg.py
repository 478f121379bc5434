"""Baseline JPEG files for batches of pictures, on the CPU or in a card's memory: the bytes of libjpeg-turbo.

And the pixels that it decodes from them, which on a card need no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.backends import check_device
from gpufgbg.exceptions import DeviceError, InputError
from gpufgbg.recipe import Recipe

__all__ = ["EncodedImages", "JpegEncoder"]


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """N JPEG files, one after the other. Indexing copies a file to the host.

    Attributes
    ----------
    buffer : (bytes,) uint8
        The files, in the encoder's memory: NumPy on the CPU, CuPy on a card. Owned by this object.
    offsets : (N + 1,) int64
        Where each file starts and the last one ends, beside ``buffer``.
    """

    buffer: Any
    offsets: Any

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[bytes]:
        data, ends = _on_host(self.buffer), _on_host(self.offsets).tolist()
        for start, end in itertools.pairwise(ends):
            yield data[start:end].tobytes()

    def __getitem__(self, index: int) -> bytes:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"file {index} of {count}")
        start, end = _on_host(self.offsets[index % count : index % count + 2]).tolist()
        return bytes(_on_host(self.buffer[start:end]).tobytes())


class JpegEncoder:
    """Encodes batches of pictures of one size, or shows what is left of them in the files.

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
    >>> files = JpegEncoder(quality=90, device="cpu").encode(np.zeros((2, 8, 8, 3), np.uint8))
    >>> len(files), files[0][:2]
    (2, b'\\xff\\xd8')
    >>> red = np.full((1, 8, 8, 3), (255, 0, 0), np.uint8)
    >>> JpegEncoder(quality=90, device="cpu").reconstruct(red)[0, 0, 0].tolist()
    [254, 0, 0]
    """

    def __init__(
        self, quality: int = 75, subsampling: str = "420", optimize: bool = False, device: str = "auto"
    ) -> None:
        checked = Recipe(quality=quality, subsampling=subsampling, optimize=optimize)
        self.quality, self.subsampling, self.optimize = checked.quality, checked.subsampling, checked.optimize
        from gpufgbg.backends import cuda

        kind, _, number = check_device(device).partition(":")
        reason = None if kind == "cpu" else cuda.why_not(int(number or 0))
        if kind == "cuda" and reason:
            raise DeviceError(f"device {device}: {reason}; or use device cpu")
        self.device = "cpu" if kind == "cpu" or reason else f"cuda:{int(number or 0)}"
        self._cuda = None if self.device == "cpu" else cuda.CudaJpeg(quality, subsampling, optimize)

    def encode(self, images: Any) -> EncodedImages:
        """Encode a batch.

        Parameters
        ----------
        images : (N, H, W, 3) or (N, H, W) uint8
            RGB or grey. On a card: a CuPy array, or any object with ``__cuda_array_interface__`` or DLPack, is taken
            without a copy where it is contiguous; NumPy arrays are copied to the card. Runs on CuPy's current stream.

        Returns
        -------
        EncodedImages

        Raises
        ------
        InputError
            Another shape or dtype.
        """
        if self._cuda is None:
            from gpufgbg.backends.cpu import encode_jpeg

            files = encode_jpeg(_checked(images), self.quality, self.subsampling, self.optimize)
            ends = np.cumsum([0, *map(len, files)], dtype=np.int64)
            return EncodedImages(np.frombuffer(b"".join(files), np.uint8), ends)
        import cupy

        with cupy.cuda.Device(int(self.device.partition(":")[2])):
            return EncodedImages(*self._cuda.encode(_on_card(images)))

    def reconstruct(self, images: Any) -> Any:
        """The pixels that a decoder (libjpeg-turbo, as in Pillow) gets from `encode`'s files.

        For whoever has to see what is saved, not what was drawn, a network for instance. On a card no file is made,
        and nothing waits: the result is there for what follows on CuPy's current stream.

        Parameters
        ----------
        images : (N, H, W, 3) or (N, H, W) uint8
            RGB or grey, taken as `encode` takes them; left as they are.

        Returns
        -------
        pixels : as ``images``, uint8
            RGB or grey, byte for byte what `encode` and libjpeg-turbo's decoder with its default options give
            (integer DCT, triangle upsampling); ``optimize`` does not change them. A new array in the encoder's
            memory, NumPy on the CPU, CuPy on a card, owned by the caller.

        Raises
        ------
        InputError
            Another shape or dtype.
        """
        if self._cuda is None:
            from gpufgbg.backends.cpu import reconstruct_jpeg

            return reconstruct_jpeg(_checked(images), self.quality, self.subsampling)
        import cupy

        with cupy.cuda.Device(int(self.device.partition(":")[2])):
            return self._cuda.reconstruct(_on_card(images))


def _checked(images: Any) -> npt.NDArray[np.uint8]:
    """Pictures as a contiguous array in the host's memory, or `InputError`."""
    pictures = np.asarray(images)
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or pictures.shape[3:] not in ((), (3,)):
        raise InputError(f"images: got {pictures.dtype} {pictures.shape}, expected uint8 (N, H, W, 3) or (N, H, W)")
    return np.ascontiguousarray(pictures)


def _on_card(images: Any) -> Any:
    """Pictures as a contiguous CuPy array on the current device."""
    import cupy

    from gpufgbg.backends.cuda import as_array

    return cupy.ascontiguousarray(cupy.asarray(as_array(images)))


def _on_host(array: Any) -> Any:
    return array if isinstance(array, np.ndarray) else array.get()
