"""The CUDA backend: composites, moments and JPEG files made in the card's memory by the kernels in ``kernels/``.

Arrays are CuPy's, from CuPy's stream-ordered pool, and every launch goes to CuPy's current stream. Nothing waits for
the card but where a result's size is needed (`CudaBackend.encode`) or handed to the host (`Pending`).

One fixed order for each operation: check, allocate, launch, return.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpufgbg.backends import blended_mask_sums
from gpufgbg.backends.cuda_blend import CardBlend
from gpufgbg.exceptions import DeviceError, InputError
from gpufgbg.moments import Moments
from gpufgbg.recipe import Placements, Recipe

if TYPE_CHECKING:
    from gpufgbg.assets import Assets
    from gpufgbg.blend import Blend

__all__ = ["CudaBackend", "CudaJpeg", "count_devices", "moments"]

_MODULES = ("composite", "depth", "jpeg", "moments", "normalise")
_FLIP_MODES = {"never": 0, "always": 1, "both": 2}
_COMPOSITE_THREADS, _MOMENTS_THREADS = 256, 192
# kernels/jpeg.cu: MCUs of a chunk, and sampling factors, by mode
_MODES = {"grey": (192, 1, 1), "444": (64, 1, 1), "422": (32, 2, 1), "420": (32, 2, 2)}
_CLASS_ENTRIES, _HEADER_STRIDE, _SETUP_BYTES, _RECONSTRUCT_THREADS = 272, 640, 4096, 128
_SETUPS = 64  # of the sizes and streams met last
MAX_SIDE = 65_500  # libjpeg's limit
_DLPACK_CARD = (2, 13)  # kDLCUDA, kDLCUDAManaged
_modules: dict[tuple[int, str], Any] = {}
_lock = threading.Lock()


def why_not(index: int = 0) -> str | None:
    """What keeps this machine from CUDA device ``index``, with what to do, or None where nothing does."""
    if sys.platform != "linux":
        return f"the CUDA engine needs Linux, this is {sys.platform}"
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install 'gpufgbg[cuda13]' or 'gpufgbg[cuda12]')"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA driver or device is found ({str(error).partition(':')[0]})"
    if index >= count:
        return f"there is no device {index}: this machine has {count}, 0 to {count - 1}"
    missing = [stem for stem in _MODULES if not _fatbin(stem).is_file()]
    if missing:
        return "this build carries no kernels: install gpufgbg where nvcc or the package nvidia-cuda-nvcc can be had"
    return None


def count_devices() -> int:
    """Number of CUDA devices that can be used; 0 where there are none or CuPy is missing."""
    if why_not() is not None:
        return 0
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def warm(index: int) -> None:
    """Load CuPy and make the context on CUDA device ``index``, where it can be used."""
    if why_not(index) is None:
        import cupy

        with cupy.cuda.Device(index):
            cupy.cuda.runtime.free(0)


def _fatbin(stem: str) -> Path:
    return Path(str(resources.files("gpufgbg") / "_kernels" / f"{stem}.fatbin"))


def kernel(stem: str, name: str) -> Any:
    """A kernel of ``kernels/<stem>.cu`` on the current device."""
    import cupy

    device = cupy.cuda.Device().id
    with _lock:
        module = _modules.get((device, stem))
        if module is None:
            path = _fatbin(stem)
            if not path.is_file():
                raise DeviceError(f"no kernels in this build ({path.name} is missing): install gpufgbg where nvcc is")
            module = _modules[device, stem] = cupy.RawModule(path=str(path))
        return module.get_function(name)


def _pointer(array: Any) -> Any:
    return np.uint64(0) if array is None else array


def is_on_card(array: Any) -> bool:
    """Whether an object is an array in a card's memory, by ``__cuda_array_interface__`` or DLPack."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) in _DLPACK_CARD


class _Pointer:
    """A CUDA stream's pointer, in the form of the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def as_stream(pointer: int) -> Any:
    """Another library's CUDA stream, which stays its own, as CuPy's on the current device."""
    import cupy

    if pointer in (0, 1):  # 1: as DLPack names the legacy default stream
        return cupy.cuda.Stream.null
    if pointer == 2:
        return cupy.cuda.Stream.ptds
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 on
        return cupy.cuda.Stream.from_external(_Pointer(pointer))
    return cupy.cuda.ExternalStream(pointer)


def as_array(array: Any) -> Any:
    """An array of any kind as NumPy's or, where it lies in a card's memory, as CuPy's, without a copy.

    What CuPy's current stream on that card is given next sees the array as its maker's current stream leaves it.

    Raises
    ------
    DeviceError
        It is in a card's memory, and CuPy is missing.
    InputError
        Its maker refuses to hand it over.
    """
    if not is_on_card(array):
        by_dlpack = hasattr(array, "__dlpack__") and not hasattr(array, "__array__")
        return np.from_dlpack(array) if by_dlpack else np.asarray(array)
    try:
        import cupy
    except ImportError:
        raise DeviceError(f"an array is in a card's memory: {why_not()}") from None
    if isinstance(array, cupy.ndarray):
        return array
    if not hasattr(array, "__dlpack_device__"):
        return cupy.asarray(array)
    # By DLPack its maker is told our stream, and makes it wait; PyTorch's __cuda_array_interface__ names no stream.
    try:
        return cupy.from_dlpack(array)
    except BufferError as error:
        raise InputError(f"array: got {type(array).__name__} that DLPack can't hand over: {error}") from None


def moments(pictures: Any) -> Moments:
    """Moments of pictures (N, H, W) or (N, H, W, 3), uint8, contiguous in the card's memory. Waits for the result."""
    import cupy

    return start_moments(cupy.ascontiguousarray(cupy.asarray(pictures))).get()


class Mark:
    """The point in the work of CuPy's current stream that is after all that it has been given so far."""

    def __init__(self) -> None:
        import cupy

        self._event = cupy.cuda.Event(disable_timing=True)
        self._event.record()

    def get(self, array: Any) -> Any:
        """An array on the card, as it is at this point, copied to the host by whichever stream is current now.

        It waits for this point, but not for what the marked stream was given after it.
        """
        import cupy

        with array.device:
            cupy.cuda.get_current_stream().wait_event(self._event)
            return array.get()


class PendingSums:
    """Moments of pictures that the card may still be counting, on the stream that is current when this is made."""

    def __init__(self, images: int, pixels: int, sums: Any) -> None:
        self._images = images
        self._pixels = pixels
        self._sums = sums
        self._made = Mark()

    def get(self) -> Moments:
        """The moments; waits for them, whichever stream is current."""
        found = [int(v) for v in self._made.get(self._sums)]
        channels = len(found) // 2
        return Moments(self._images, self._pixels, tuple(found[:channels]), tuple(found[channels:]))


def start_moments(pictures: Any) -> PendingSums:
    """Like `moments`, on the current stream, without waiting."""
    import cupy

    channels = pictures.shape[3] if pictures.ndim == 4 else 1
    sums = cupy.zeros(2 * channels, np.uint64)
    _launch_moments(pictures, channels, sums)
    return PendingSums(len(pictures), pictures.size // channels, sums)


def _launch_moments(pictures: Any, channels: int, sums: Any) -> None:
    import cupy

    resident = cupy.cuda.Device().attributes["MultiProcessorCount"] * 8
    blocks = max(1, min(resident, -(-pictures.size // 12_288)))
    arguments = (pictures, np.int64(pictures.size), np.int32(channels), sums)
    kernel("moments", "moments")((blocks,), (_MOMENTS_THREADS,), arguments)


def _checked(pictures: Any) -> tuple[int, int, int, int]:
    """(N, height, width, channels) of pictures that the kernels of ``kernels/jpeg.cu`` take, or `InputError`."""
    fits = pictures.ndim in (3, 4) and pictures.shape[3:] in ((), (3,)) and pictures.flags.c_contiguous
    if pictures.dtype != np.uint8 or not fits:
        raise InputError(
            f"pictures: got {pictures.dtype} {pictures.shape}, expected C-contiguous uint8 (N, H, W[, 3])"
        )
    n, height, width = pictures.shape[:3]
    if not 1 <= height <= MAX_SIDE or not 1 <= width <= MAX_SIDE:
        raise InputError(f"pictures: got {width}x{height}, expected 1 to {MAX_SIDE:,} pixels a side")
    return n, height, width, 3 if pictures.ndim == 4 else 1


class CudaJpeg:
    """Batched baseline JPEG encoding, and what a decoder makes of it, on the current device; see ``kernels/jpeg.cu``.

    Parameters
    ----------
    quality : int
        1 to 100.
    subsampling : {"444", "422", "420"}
        Of colour pictures.
    optimize : bool
        Optimal Huffman tables for each picture.
    """

    def __init__(self, quality: int, subsampling: str, optimize: bool) -> None:
        self.quality = quality
        self.subsampling = subsampling
        self.optimize = optimize
        self._setups: OrderedDict[tuple[int, ...], Any] = OrderedDict()  # the latest used last
        self._lock = threading.Lock()

    def geometry(self, height: int, width: int, channels: int) -> tuple[str, int, int, int]:
        """(mode, blocks of 8x8 an MCU, MCUs a picture, MCUs a chunk)."""
        mode = "grey" if channels == 1 else self.subsampling
        chunk, h, v = _MODES[mode]
        blocks = 1 if channels == 1 else h * v + 2
        return mode, blocks, -(-width // (8 * h)) * -(-height // (8 * v)), chunk

    def scratch_bytes(self, height: int, width: int, channels: int) -> int:
        """Bytes of scratch a picture, most of all for its tokens."""
        _, blocks, mcus, chunk = self.geometry(height, width, channels)
        chunks = -(-mcus // chunk)
        return mcus * blocks * 256 + chunks * 2400 + 4096

    def encode(self, pictures: Any) -> tuple[Any, Any]:
        """Encode a batch; waits once, for the files' total length.

        Parameters
        ----------
        pictures : (N, H, W, 3) or (N, H, W) uint8
            In the device's memory, C-contiguous.

        Returns
        -------
        files : (bytes,) uint8
            Complete files, one after the other.
        offsets : (N + 1,) int64
            Where each file starts, and the last one's end.
        """
        import cupy

        n, height, width, channels = _checked(pictures)
        if n == 0:
            return cupy.empty(0, np.uint8), cupy.zeros(1, np.int64)
        mode, blocks, mcus, chunk = self.geometry(height, width, channels)
        chunks, classes = -(-mcus // chunk), 1 if channels == 1 else 2
        entries, image_blocks, chunk_blocks = classes * _CLASS_ENTRIES, mcus * blocks, chunk * blocks
        if n * chunks >= 2**31:
            raise InputError(f"pictures: {n} of {width}x{height} at once, expected fewer: split the batch")
        setup = self._setup(height, width, channels)
        u32, i32 = np.uint32, np.int32
        tokens = cupy.empty((n, image_blocks * 64), u32)
        histograms, links = cupy.empty((n, chunks, entries), u32), cupy.empty((n, chunks, channels), np.uint64)
        token_counts, books = cupy.empty((n, chunks), u32), cupy.empty((n, entries), u32)
        headers, header_bytes = cupy.empty((n, _HEADER_STRIDE), np.uint8), cupy.empty(n, u32)
        leads, chunk_bytes, chunk_sizes, chunk_starts = (cupy.empty((n, chunks), u32) for _ in range(4))
        file_sizes, offsets = cupy.empty(n, u32), cupy.empty(n + 1, np.int64)
        per_chunk = (n * chunks,)

        def launch(name: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
            kernel("jpeg", name)(grid, (threads,), arguments)

        launch(f"jpeg_transform_{mode}", per_chunk, chunk_blocks, pictures, i32(width), i32(height), setup, tokens,
               histograms, links, token_counts)  # fmt: skip
        launch("jpeg_tables", (n,), 64 * classes, setup, i32(channels), i32(self.optimize), i32(chunks),
               i32(image_blocks), i32(chunk_blocks), links, token_counts, tokens, histograms, books, headers,
               header_bytes, leads)  # fmt: skip
        launch("jpeg_pack", per_chunk, 128, i32(channels), i32(chunks), i32(image_blocks), i32(chunk_blocks), books,
               token_counts, leads, tokens, chunk_bytes, chunk_sizes)  # fmt: skip
        launch("jpeg_sizes", (-(-n // 4),), 128, i32(n), i32(chunks), header_bytes, chunk_sizes, chunk_starts,
               file_sizes)  # fmt: skip
        launch("jpeg_offsets", (1,), 1024, i32(n), file_sizes, offsets)
        capacity = int(offsets[n].get())
        files = cupy.empty(capacity, np.uint8)
        launch("jpeg_write", per_chunk, 128, i32(chunks), i32(image_blocks), i32(chunk_blocks), headers, header_bytes,
               tokens, chunk_bytes, chunk_starts, offsets, np.int64(capacity), files)  # fmt: skip
        return files, offsets

    def reconstruct(self, pictures: Any, out: Any = None) -> Any:
        """The pixels that libjpeg-turbo decodes from the files that `encode` makes, without making these.

        Waits for nothing: the result is there for what follows on the current stream.

        Parameters
        ----------
        pictures : (N, H, W, 3) or (N, H, W) uint8
            In the device's memory, C-contiguous.
        out : as ``pictures``, optional
            Where the pixels go; memory of its own, not that of ``pictures``. Made where it is not given.

        Returns
        -------
        out : as ``pictures``
            Owned by the caller.

        Raises
        ------
        InputError
            Another shape, dtype or layout, of ``pictures`` or ``out``.
        """
        import cupy

        n, height, width, channels = _checked(pictures)
        if out is None:
            out = cupy.empty(pictures.shape, np.uint8)
        elif out.dtype != np.uint8 or out.shape != pictures.shape or not out.flags.c_contiguous:
            raise InputError(f"out: got {out.dtype} {out.shape}, expected C-contiguous uint8 {pictures.shape}")
        if n == 0:
            return out
        mode = "grey" if channels == 1 else self.subsampling
        _, h, v = _MODES[mode]
        across, down = -(-width // 8), -(-height // 8)
        chroma_blocks = 0 if channels == 1 else -(-width // (8 * h)) * -(-height // (8 * v))
        blocks = n * (across * down + 2 * chroma_blocks)
        setup, sizes = self._setup(height, width, channels), (np.int32(n), np.int32(width), np.int32(height))
        planes = out if channels == 1 else cupy.empty(64 * blocks, np.uint8)

        def launch(name: str, threads: int, *arguments: Any) -> None:
            grid = (-(-threads // _RECONSTRUCT_THREADS),)
            kernel("jpeg", f"{name}_{mode}")(grid, (_RECONSTRUCT_THREADS,), arguments)

        launch("jpeg_reconstruct", blocks, pictures, *sizes, setup, planes)
        if channels == 3:
            launch("jpeg_upsample", n * height * across, planes, *sizes, out)
        return out

    def _setup(self, height: int, width: int, channels: int) -> Any:
        import cupy

        code = 0 if channels == 1 else ("444", "422", "420").index(self.subsampling)
        key = (cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr, height, width, channels)
        with self._lock:
            setup = self._setups.get(key)  # one a stream: another stream could read it before it is made
            if setup is None:
                setup = cupy.empty(_SETUP_BYTES, np.uint8)
                arguments = [np.int32(v) for v in (width, height, channels, code, self.quality)]
                kernel("jpeg", "jpeg_setup")((1,), (32,), (*arguments, setup))
                self._setups[key] = setup
                if len(self._setups) > _SETUPS:  # launches that still read it go before any other use of its memory
                    self._setups.popitem(last=False)
            self._setups.move_to_end(key)
            return setup


class Pending:
    """Moments of a batch that the card may still be rendering, on the stream that is current when this is made."""

    def __init__(self, backend: CudaBackend, placements: Placements, changes: Any) -> None:
        self._backend = backend
        self._placements = placements
        self._changes = changes
        self._made = Mark()

    def get(self) -> dict[str, Moments]:
        """The moments, by kind; waits for them, whichever stream is current."""
        return self._backend.add_up(self._placements, self._changes, self._made)


class CudaBackend:
    """Renders and encodes in the memory of one card.

    Parameters
    ----------
    assets : Assets
        Copied to the card.
    recipe : Recipe
    index : int
        The CUDA device's number.
    blend : Blend, optional
        In place of the foreground's alpha.

    Raises
    ------
    DeviceError
        The device can't be used; the message says why and what to do.
    """

    def __init__(self, assets: Assets, recipe: Recipe, index: int = 0, blend: Blend | None = None) -> None:
        reason = why_not(index)
        if reason is not None:
            raise DeviceError(f"device cuda:{index}: {reason}; or use device cpu")
        import cupy

        self.name = f"cuda:{index}"
        self.index = index
        self.recipe = recipe
        self.assets = assets
        self.device = cupy.cuda.Device(index)
        self._blend = None if blend is None else CardBlend(blend, self.device)
        try:
            with self.device:
                self._load(assets)
        except cupy.cuda.memory.OutOfMemoryError:
            needed = sum(a.nbytes for a in (assets.backgrounds, assets.foregrounds, assets.masks)) >> 20
            free, total = self.device.mem_info
            raise DeviceError(
                f"device {self.name}: out of memory: the pictures take {needed} MB, {free >> 20} MB of "
                f"{total >> 20} MB are free: free some, or use device cpu"
            ) from None
        self._mask_sums, self._mask_squares = blended_mask_sums(assets)
        self.jpeg = CudaJpeg(recipe.quality, recipe.subsampling, recipe.optimize)

    def _load(self, assets: Assets) -> None:
        import cupy

        self._backgrounds = cupy.asarray(assets.backgrounds)
        self._foregrounds = cupy.asarray(assets.foregrounds)
        self._masks = cupy.asarray(assets.masks)
        self._offsets = cupy.asarray(assets.offsets)
        self._widths = cupy.asarray(assets.widths)
        self._heights = cupy.asarray(assets.heights)
        sums = cupy.zeros((len(assets.backgrounds), 6), np.uint64)
        for b in range(len(assets.backgrounds)):
            _launch_moments(self._backgrounds[b], 3, sums[b])
        self._background_sums = sums.get().astype(object)  # Python's integers: sums of them never overflow

    def frames(self, count: int) -> tuple[Any, Any]:
        """Uninitialised composites (count, H, W, 3) and masks (count, H, W), uint8, on the card."""
        import cupy

        shape = (count, self.recipe.height, self.recipe.width)
        with self.device:
            return cupy.empty((*shape, 3), np.uint8), cupy.empty(shape, np.uint8)

    def launch(self, placements: Placements, composites: Any, masks: Any) -> Pending:
        """Start rendering on the current stream; see `render`."""
        import cupy

        recipe, n = self.recipe, len(placements)
        with self.device:
            changes = cupy.zeros(6, np.uint64)
            if n:
                index = placements.index
                first = int(index[0])
                in_order = n == 1 or bool((np.diff(index) == 1).all())
                indices = None if in_order else cupy.asarray(index)
                self._kernel("composite")(
                    self._grid(n), (_COMPOSITE_THREADS,),
                    (*self._packed(), np.int32(self.assets.n_foregrounds), np.int32(recipe.per_pair),
                     np.int32(_FLIP_MODES[recipe.flip]), np.uint64(recipe.seed), _pointer(indices), np.int64(first),
                     np.int32(n), composites, masks, _pointer(None), changes),
                )  # fmt: skip
            return Pending(self, placements, changes)

    def _kernel(self, name: str) -> Any:
        """``composite`` or ``composite_placed``, with the user's blend where there is one."""
        return kernel("composite", name) if self._blend is None else self._blend.kernel(name)

    def _packed(self) -> tuple[Any, ...]:
        """The first arguments of both kernels: the assets and the frame's size."""
        return (
            self._backgrounds, self._foregrounds, self._masks, self._offsets, self._widths, self._heights,
            np.int32(self.recipe.width), np.int32(self.recipe.height),
        )  # fmt: skip

    def _grid(self, n: int) -> tuple[int, int]:
        """Samples and bands of rows: two a sample write fastest; more where there are too few to fill the card."""
        resident = self.device.attributes["MultiProcessorCount"] * 4
        return n, min(self.recipe.height, max(2, resident // n))

    def render(self, placements: Placements, composites: Any, masks: Any) -> Pending:
        """Fill composites (N, H, W, 3) and masks (N, H, W) of N placements, without waiting.

        The placements are made again on the card, from their indices alone.
        """
        return self.launch(placements, composites, masks)

    def render_placed(self, placements: Placements, composites: Any, masks: Any) -> Pending:
        """Like `render`, of the caller's placements, whose arrays are all the host's or all this card's.

        Nothing is checked: a placement outside the frame, or of a picture that is not there, writes to memory that
        is not the batch's. Placements in the card's memory stay there until their moments are asked for.
        """
        import cupy

        n = len(placements)
        columns = [placements.background, placements.foreground, placements.flip, placements.x, placements.y]
        with self.device:
            changes = cupy.zeros(6, np.uint64)
            if n:
                if is_on_card(placements.x):
                    table = cupy.empty((n, len(columns)), np.int32)
                    for i, column in enumerate(columns):
                        table[:, i] = column
                else:
                    table = cupy.asarray(np.stack(columns, 1, dtype=np.int32))
                self._kernel("composite_placed")(
                    self._grid(n), (_COMPOSITE_THREADS,),
                    (*self._packed(), table, np.int32(n), composites, masks, changes),
                )  # fmt: skip
            return Pending(self, placements, changes)

    def add_up(self, placements: Placements, changes: Any, made: Mark) -> dict[str, Moments]:
        """Exact moments from what the kernel changed of the backgrounds, as it is at ``made``."""
        count = len(placements)
        if not count:
            return {"composite": Moments(), "composite_mask": Moments()}
        pixels = count * self.recipe.width * self.recipe.height
        columns: list[Any] = [placements.background, placements.foreground]
        background, f = (made.get(column) if is_on_card(column) else column for column in columns)
        counts = np.bincount(background, minlength=len(self._background_sums)).tolist()
        old = [sum(c * row[k] for c, row in zip(counts, self._background_sums, strict=True)) for k in range(6)]
        changed = made.get(changes).view(np.int64)
        total = [int(o) + int(c) for o, c in zip(old, changed, strict=True)]
        return {
            "composite": Moments(count, pixels, tuple(total[:3]), tuple(total[3:])),
            "composite_mask": Moments(
                count, pixels, (int(self._mask_sums[f].sum()),), (int(self._mask_squares[f].sum()),)
            ),
        }

    def encode(self, pictures: Any) -> tuple[Any, Any]:
        """Pictures as JPEG files with the recipe's options: (files, offsets) on the card."""
        with self.device:
            return self.jpeg.encode(pictures)

    def sample_bytes(self) -> int:
        """Bytes of the card's memory that one sample of a batch takes while it is made."""
        height, width = self.recipe.height, self.recipe.width
        colour, grey = (self.jpeg.scratch_bytes(height, width, channels) for channels in (3, 1))
        return 4 * height * width + colour + grey + height * width
