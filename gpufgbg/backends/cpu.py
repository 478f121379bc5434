"""The CPU backend: Numba composites and counts, imagecodecs' libjpeg-turbo encodes.

Every call releases the interpreter's lock while it works, so callers get their parallelism from plain threads, a
chunk of samples each. Twins: ``kernels/composite.cu``, ``kernels/blend.cuh``. Judge: Pillow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from gpufgbg.assets import Assets
from gpufgbg.backends import blended_mask_sums
from gpufgbg.compiling import compiled
from gpufgbg.moments import Moments
from gpufgbg.recipe import Placements, Recipe

if TYPE_CHECKING:
    from gpufgbg.blend import Blend

__all__ = ["Counter", "CpuBackend", "encode_jpeg", "moments", "reconstruct_jpeg"]

_TABLE_BYTES = 128 << 20  # tables of more foregrounds than fit are made again for every chunk
_PIXEL_BYTES = 10  # of a foreground's pixel in the tables
_u16, _i32, _u32 = np.uint16, np.int32, np.uint32


@compiled
def _copy(to, source):  # type: ignore[no-untyped-def]
    # A loop over two slices becomes a vectorised copy; an assignment of slices does not.
    for i in range(to.size):
        to[i] = source[i]


@compiled
def _clear(to):  # type: ignore[no-untyped-def]
    for i in range(to.size):
        to[i] = 0


@compiled
def _make_table(pixels, mask, width, flip, keep, add, matte, spans):  # type: ignore[no-untyped-def]
    """A foreground as the blend wants it, a byte lane each: 255 - alpha, foreground * alpha + 128, blended mask.

    pixels (h * w, 4) uint8, mask (h * w) uint8 -> keep (h * w * 3) uint8, add (h * w * 3) uint16,
    matte (h * w) uint8, spans (h, 2) int32: the columns of each row outside which alpha is 0.
    """
    for start in range(0, mask.size, width):
        first, last = width, 0
        for column in range(width):
            to = start + column
            at = start + width - 1 - column if flip else to
            alpha = _u16(pixels[at, 3])
            for c in range(3):
                keep[3 * to + c] = 255 - alpha
                add[3 * to + c] = _u16(pixels[at, c]) * alpha + _u16(128)
            v = _u16(mask[at]) * _u16(mask[at]) + _u16(128)
            matte[to] = (v + (v >> _u16(8))) >> _u16(8)
            if alpha:
                first, last = min(first, column), column + 1
        spans[start // width, 0], spans[start // width, 1] = min(first, last), last


@compiled
def _lay_background(picture, frame, behind, width, held, background):  # type: ignore[no-untyped-def]
    """Make a composite its background and a mask empty; of ``held``, see `_render`, only what changed is written."""
    if held[0] == background:
        # The frame still holds this background: put back what the last foreground covered.
        x, y, w, h = held[1], held[2], held[3], held[4]
        for row in range(y, y + h):
            at = 3 * (row * width + x)
            _copy(picture[at : at + 3 * w], behind[at : at + 3 * w])
            at = row * width + x
            _clear(frame[at : at + w])
    else:
        _copy(picture, behind)
        _clear(frame)


@compiled
def _add_lanes(sums, plus, square):  # type: ignore[no-untyped-def]
    """Add a row of sums, a byte of RGB each, and of sums of squares, to ``sums`` (2, 3)."""
    for c in range(3):
        total, squares = 0, 0
        for i in range(c, plus.size, 3):
            total += plus[i]
            squares += square[i]
        sums[0, c] += total
        sums[1, c] += squares


@compiled
def _render(  # type: ignore[no-untyped-def]
    backgrounds, background_of, keep, add, matte, spans, start_of, span_of, width_of, height_of, x_of, y_of,
    frame_width, held, composites, masks, sums,
):  # fmt: skip
    """Composite a chunk and count it.

    backgrounds (B, H * W * 3) uint8; keep, add, matte: tables, sample n's at pixel start_of[n]; spans:
    likewise, its first row's at span_of[n]; held (N, 5) int64:
    what each frame of the chunk holds (background, x, y, width, height), background -1 for nothing; composites
    (N, H * W * 3) uint8, masks (N, H * W) uint8; sums (2, 3) int64: what is added to the backgrounds' own sums and
    sums of squares, a channel.
    """
    stride = 3 * frame_width
    added = np.empty(stride, np.int32)
    squared = np.empty(stride, np.int32)
    for n in range(background_of.size):
        picture, frame, behind = composites[n], masks[n], backgrounds[background_of[n]]
        _lay_background(picture, frame, behind, frame_width, held[n], background_of[n])
        x, y, w, h = x_of[n], y_of[n], width_of[n], height_of[n]
        held[n, 0], held[n, 1], held[n, 2], held[n, 3], held[n, 4] = background_of[n], x, y, w, h
        lanes = 3 * w
        plus, square = added[:lanes], squared[:lanes]
        for block in range(0, h, 256):  # 256 rows of differences fit 32 bits
            _clear(plus)
            _clear(square)
            for row in range(block, min(h, block + 256)):
                at = start_of[n] + row * w
                to = (y + row) * frame_width + x
                _copy(frame[to : to + w], matte[at : at + w])
                first, last = spans[span_of[n] + row, 0], spans[span_of[n] + row, 1]
                at, to = 3 * (at + first), 3 * (to + first)
                inside = 3 * (last - first)
                k, a = keep[at : at + inside], add[at : at + inside]
                part = picture[to : to + inside]
                p, q = plus[3 * first : 3 * last], square[3 * first : 3 * last]
                for i in range(inside):
                    old = _u16(part[i])
                    v = _u16(old * _u16(k[i]) + a[i])
                    new = _u16(_u16(v + _u16(v >> _u16(8))) >> _u16(8))
                    part[i] = new
                    change = _i32(new) - _i32(old)
                    p[i] += change
                    q[i] += change * (_i32(new) + _i32(old))
            _add_lanes(sums, plus, square)


# Pixels side by side that are counted together: their sums stay in the cache, and compilers vectorise the loop.
_LANES = 128
_RUNS = (2**32 - 1) // 255**2  # squares of bytes that a lane of 32 bits holds


@compiled
def _count(values, sums):  # type: ignore[no-untyped-def]
    """values (pixels * C) uint8; sums (2, C) int64: their sum and sum of squares a channel are added."""
    channels = sums.shape[1]
    lanes = _LANES * channels
    total, squares = np.zeros(lanes, np.uint32), np.zeros(lanes, np.uint32)
    runs = 0
    for start in range(0, values.size, lanes):
        run = values[start : start + lanes]
        for i in range(run.size):
            value = _u32(run[i])
            total[i] += value
            squares[i] += value * value
        runs += 1
        if runs == _RUNS or start + lanes >= values.size:
            for i in range(lanes):
                sums[0, i % channels] += total[i]
                sums[1, i % channels] += squares[i]
            total[:] = 0
            squares[:] = 0
            runs = 0


class Counter:
    """Adds up moments of pictures one after the other, of one number of channels."""

    def __init__(self, channels: int) -> None:
        self._sums = np.zeros((2, channels), np.int64)
        self._images = self._pixels = 0

    def add(self, pictures: npt.NDArray[np.uint8], images: int = 1) -> None:
        """So many more pictures, in one array of any shape, pixel by pixel; without the interpreter's lock."""
        values = np.ascontiguousarray(pictures).reshape(-1)
        _count(values, self._sums)
        self._images += images
        self._pixels += values.size // self._sums.shape[1]

    @property
    def moments(self) -> Moments:
        """Of all so far; empty without any."""
        if not self._images:
            return Moments()
        return Moments(self._images, self._pixels, tuple(self._sums[0].tolist()), tuple(self._sums[1].tolist()))


def moments(pictures: npt.NDArray[np.uint8]) -> Moments:
    """Moments of pictures (N, H, W) or (N, H, W, C), uint8, without the interpreter's lock."""
    counter = Counter(pictures.shape[3] if pictures.ndim == 4 else 1)
    counter.add(pictures, len(pictures))
    return counter.moments


def encode_jpeg(pictures: npt.NDArray[np.uint8], quality: int, subsampling: str, optimize: bool) -> list[bytes]:
    """Pictures (N, H, W, 3) RGB or (N, H, W) grey, uint8, as baseline JPEG files, equal to Pillow's.

    Pillow's own encoder holds the interpreter's lock; imagecodecs' calls the same library without it.
    """
    chroma = subsampling if pictures.ndim == 4 else None
    encode = imagecodecs.jpeg8_encode
    return [bytes(encode(picture, level=quality, subsampling=chroma, optimize=optimize)) for picture in pictures]


def decode_jpeg(files: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    """Pictures of one size out of JPEG files, (N, H, W, 3) or (N, H, W), as Pillow decodes them."""
    return np.stack([imagecodecs.jpeg8_decode(file) for file in files])


def reconstruct_jpeg(pictures: npt.NDArray[np.uint8], quality: int, subsampling: str) -> npt.NDArray[np.uint8]:
    """The pixels that a decoder gets from `encode_jpeg`'s files, shaped as the pictures; equal to Pillow's.

    Huffman tables, optimal or not, don't change them.
    """
    decoded = np.empty(pictures.shape, np.uint8)
    for to, file in zip(decoded, encode_jpeg(pictures, quality, subsampling, False), strict=True):
        imagecodecs.jpeg8_decode(file, out=to)
    return decoded


# keep, add, matte, spans; and the pixel and the row where each (foreground, flip) starts
_Tables = tuple[tuple[npt.NDArray[Any], ...], npt.NDArray[np.int64], npt.NDArray[np.int64]]


class Done:
    """Moments that are there; the twin of the CUDA backend's `Pending`."""

    def __init__(self, moments: dict[str, Moments]) -> None:
        self._moments = moments

    def get(self) -> dict[str, Moments]:
        """The moments, by kind."""
        return self._moments


class CpuBackend:
    """Composites, counts and encodes in host memory. Safe to share between threads.

    Parameters
    ----------
    assets : Assets
        Kept by reference.
    recipe : Recipe
        Gives the frame's size; the backgrounds have it.
    blend : Blend, optional
        In place of the foreground's alpha.
    """

    name = "cpu"

    def __init__(self, assets: Assets, recipe: Recipe, blend: Blend | None = None) -> None:
        self.assets = assets
        self.recipe = recipe
        self._make_table, self._render = _make_table, _render
        if blend is not None:
            from gpufgbg.backends import cpu_blend

            self._make_table, self._render = cpu_blend.make_table, blend.cpu_render()
        frames = assets.backgrounds
        self._backgrounds = frames.reshape(len(frames), -1)
        parts = [moments(frame[None]) for frame in frames]
        self._background_sums = np.array([m.sum for m in parts], np.int64)
        self._background_squares = np.array([m.sum_of_squares for m in parts], np.int64)
        self._mask_sums, self._mask_squares = blended_mask_sums(assets)
        self._tables: _Tables | None = None
        self._local = threading.local()
        pixels = len(assets.masks)
        if 2 * pixels * _PIXEL_BYTES <= _TABLE_BYTES:
            turns = [(f, flip) for flip in (False, True) for f in range(assets.n_foregrounds)]
            self._tables = self._make_tables(turns)

    def _make_tables(self, turns: list[tuple[int, bool]]) -> _Tables:
        """Tables of (foreground, flip) one after the other, and the pixel and the row where each starts."""
        assets = self.assets
        counts = [int(assets.offsets[f + 1] - assets.offsets[f]) for f, _ in turns]
        starts = np.cumsum([0, *counts], dtype=np.int64)
        keep = np.empty(3 * starts[-1], np.uint8)
        add = np.empty(3 * starts[-1], np.uint16)
        matte = np.empty(starts[-1], np.uint8)
        rows = np.cumsum([0, *(int(assets.heights[f]) for f, _ in turns)], dtype=np.int64)
        spans = np.empty((rows[-1], 2), np.int32)
        for i, (f, flip) in enumerate(turns):
            start, count = int(starts[i]), counts[i]
            source = slice(int(assets.offsets[f]), int(assets.offsets[f + 1]))
            wide = slice(3 * start, 3 * (start + count))
            self._make_table(
                assets.foregrounds[source], assets.masks[source], int(assets.widths[f]), flip,
                keep[wide], add[wide], matte[start : start + count], spans[rows[i] : rows[i + 1]],
            )  # fmt: skip
        return (keep, add, matte, spans), starts, rows

    def frames(self, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Uninitialised composites (count, H, W, 3) and masks (count, H, W), owned by the caller."""
        shape = (count, self.recipe.height, self.recipe.width)
        return np.empty((*shape, 3), np.uint8), np.empty(shape, np.uint8)

    def render(
        self,
        placements: Placements,
        composites: npt.NDArray[np.uint8],
        masks: npt.NDArray[np.uint8],
        held: npt.NDArray[np.int64] | None = None,
    ) -> Done:
        """Fill composites (N, H, W, 3) and masks (N, H, W) of N placements, and give their moments.

        Parameters
        ----------
        held : (N, 5) int64, optional
            What an earlier call left in these very arrays; updated. It saves copying a background again where a
            frame gets the one that it holds. Fill it with -1 for arrays that hold nothing yet.
        """
        assets, count = self.assets, len(placements)
        foreground = placements.foreground
        if self._tables is not None:
            tables, starts, rows = self._tables
            turn = foreground + assets.n_foregrounds * placements.flip
        else:
            key = foreground.astype(np.int64) * 2 + placements.flip
            used, turn = np.unique(key, return_inverse=True)
            tables, starts, rows = self._make_tables([(k // 2, bool(k % 2)) for k in used.tolist()])
        if held is None:
            held = np.full((count, 5), -1, np.int64)
        sums = np.zeros((2, 3), np.int64)
        self._render(
            self._backgrounds, placements.background, *tables, starts[turn], rows[turn],
            assets.widths[foreground], assets.heights[foreground], placements.x, placements.y,
            self.recipe.width, held, composites.reshape(count, -1), masks.reshape(count, -1), sums,
        )  # fmt: skip
        total = self._background_sums[placements.background].sum(axis=0) + sums[0]
        squares = self._background_squares[placements.background].sum(axis=0) + sums[1]
        pixels = count * self.recipe.width * self.recipe.height
        mask_sum, mask_squares = self._mask_sums[foreground].sum(), self._mask_squares[foreground].sum()
        return Done(
            {
                "composite": Moments(count, pixels, tuple(total.tolist()), tuple(squares.tolist())),
                "composite_mask": Moments(count, pixels, (int(mask_sum),), (int(mask_squares),)),
            }
        )

    render_placed = render  # placements are taken as they are, whoever made them

    def render_reusing(
        self, placements: Placements, capacity: int
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], dict[str, Moments]]:
        """Like `render`, into frames that belong to the calling thread and are valid until its next call.

        The frames stay in the cache and keep their backgrounds, which is what makes this the fast way.
        """
        local, count = self._local, len(placements)
        if getattr(local, "capacity", 0) < count:
            local.capacity = max(capacity, count)
            local.composites, local.masks = self.frames(local.capacity)
            local.held = np.full((local.capacity, 5), -1, np.int64)
        composites, masks = local.composites[:count], local.masks[:count]
        return composites, masks, self.render(placements, composites, masks, local.held[:count]).get()

    def encode(self, pictures: npt.NDArray[np.uint8]) -> list[bytes]:
        """Pictures (N, H, W, 3) or (N, H, W), uint8, as JPEG files with the recipe's options."""
        return encode_jpeg(pictures, self.recipe.quality, self.recipe.subsampling, self.recipe.optimize)
