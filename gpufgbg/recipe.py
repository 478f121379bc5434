"""What is made: the recipe, and the plan that turns a sample's index into its placement.

Both are pure: a placement depends on nothing but the recipe, the number of backgrounds, the foregrounds' sizes and
the sample's index. The device twin of the generator is ``kernels/philox.cuh``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.checks import choice, whole
from gpufgbg.exceptions import InputError, OptionError

__all__ = ["FLIPS", "SUBSAMPLINGS", "Placements", "Plan", "Recipe", "Shard", "philox4x32_10"]

FLIPS = ("both", "never", "always")
SUBSAMPLINGS = ("444", "422", "420")
MAX_FRAME = 16384  # pixels a side; JPEG itself ends at 65,535
_SHARD_SAMPLES = 4096  # of 224x224; larger frames make smaller shards
_SHARD_PIXELS = _SHARD_SAMPLES * 224 * 224
_BLOCK = 1 << 15  # samples planned at a time, so that the generator's words stay in the cache


@dataclass(frozen=True)
class Recipe:
    """Everything about a data set but its pictures.

    Parameters
    ----------
    per_pair : int
        Repetitions of each (background, foreground, orientation), 1 to 1,000,000.
    flip : {"both", "never", "always"}
        Orientations: each repetition flipped left to right and not flipped, or one of the two.
    size : int or (int, int)
        The frame as (width, height) in pixels; one number makes it square. 1 to 16,384 a side.
    foreground_height : int
        Height in pixels that foregrounds are scaled to, 1 to the frame's height.
    seed : int
        Key of the placement generator, 0 to 2**64 - 1.
    quality : int
        JPEG quality of composites and masks as libjpeg scales it, 1 to 100.
    subsampling : {"444", "422", "420"}
        Chroma subsampling of the composites.
    optimize : bool
        Per-image optimal Huffman tables (smaller files) instead of the standard's.

    Raises
    ------
    OptionError
        A value is out of range; the message names the field.
    """

    per_pair: int = 20
    flip: str = "both"
    size: tuple[int, int] = (224, 224)
    foreground_height: int = 105
    seed: int = 0
    quality: int = 65
    subsampling: str = "420"
    optimize: bool = True

    def __post_init__(self) -> None:
        size: Any = self.size
        if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
            size = (size, size)
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise OptionError("size", f"got {self.size!r}, expected one number or (width, height)")
        height = whole("size", size[1], 1, MAX_FRAME)
        fields = {
            "size": (whole("size", size[0], 1, MAX_FRAME), height),
            "per_pair": whole("per_pair", self.per_pair, 1, 1_000_000),
            "flip": choice("flip", self.flip, FLIPS),
            "seed": whole("seed", self.seed, 0, 2**64 - 1),
            "quality": whole("quality", self.quality, 1, 100),
            "subsampling": choice("subsampling", self.subsampling, SUBSAMPLINGS),
        }
        tall = self.foreground_height
        if isinstance(tall, (int, np.integer)) and tall > height:
            raise OptionError(
                "foreground_height",
                f"got {tall}, expected 1 to {height}, the frame's height: lower it or raise size",
            )
        fields["foreground_height"] = whole("foreground_height", tall, 1, height)
        if not isinstance(self.optimize, (bool, np.bool_)):
            raise OptionError("optimize", f"got {self.optimize!r}, expected True or False")
        fields["optimize"] = bool(self.optimize)
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def width(self) -> int:
        """Width of the frame in pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height of the frame in pixels."""
        return self.size[1]

    @property
    def orientations(self) -> int:
        """Orientations of each repetition, 1 or 2."""
        return 2 if self.flip == "both" else 1

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values; ``Recipe.from_dict`` is the way back."""
        return {**dataclasses.asdict(self), "size": list(self.size)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """The recipe of ``to_dict``'s result; `OptionError` names a field that is unknown."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise OptionError(name, "no such field of a recipe; it was made by a newer version")
        return cls(**{**fields, "size": tuple(fields.get("size", cls.size))})


@dataclass(frozen=True)
class Placements:
    """Where a batch of N samples goes; arrays of shape (N,), owned by the caller.

    Attributes
    ----------
    index : int64
        The sample's number in the whole data set.
    background, foreground, repetition : int32
    flip : bool
        True where foreground and mask are flipped left to right.
    x, y : int32
        Top-left corner of the foreground in the frame, in pixels.
    """

    index: npt.NDArray[np.int64]
    background: npt.NDArray[np.int32]
    foreground: npt.NDArray[np.int32]
    repetition: npt.NDArray[np.int32]
    flip: npt.NDArray[np.bool_]
    x: npt.NDArray[np.int32]
    y: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice) -> Placements:
        """A slice of the batch, without a copy."""
        return Placements(*(getattr(self, f.name)[part] for f in dataclasses.fields(self)))


@dataclass(frozen=True, order=True)
class Shard:
    """Samples ``start`` to ``stop - 1``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """``000000003960-000000007920``: sorts like the numbers."""
        return f"{self.start:012d}-{self.stop:012d}"

    @classmethod
    def from_name(cls, name: str) -> Shard:
        """The shard of ``name``."""
        start, stop = name.split("-")
        return cls(int(start), int(stop))


def philox4x32_10(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], key: tuple[int, int]
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Philox 4x32-10, vectorised over the counter.

    Parameters
    ----------
    counter : four arrays, broadcastable
        The 128-bit counters as 32-bit words, lowest first.
    key : (int, int)
        The 64-bit key as 32-bit words, lowest first.

    Returns
    -------
    tuple of four uint64 arrays
        32-bit random words.

    Notes
    -----
    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC '11.
    """
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * np.uint64(0xD2511F53)
        product1 = c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (product1 >> high) ^ c1 ^ np.uint64(k0), product1 & low
        c2, c3 = (product0 >> high) ^ c3 ^ np.uint64(k1), product0 & low
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


class Plan:
    """The index space of a data set and the placement of each sample in it.

    Samples are ordered by background, foreground, repetition, orientation (flipped first).

    Parameters
    ----------
    recipe : Recipe
    n_backgrounds : int
        Number of backgrounds, at least 1.
    foreground_widths, foreground_heights : (F,) integers
        Sizes of the prepared foregrounds in pixels; each fits the frame.

    Raises
    ------
    InputError
        A foreground is larger than the frame, or there are none.

    Attributes
    ----------
    n_backgrounds, n_foregrounds : int
    foreground_widths, foreground_heights : (F,) int64
    cell_length : int
        Samples in a cell of the shard grid. A cell holds whole backgrounds where they are small, or an equal part
        of one where it is large, so that it fills whole folders of the tree.
    """

    def __init__(
        self,
        recipe: Recipe,
        n_backgrounds: int,
        foreground_widths: npt.ArrayLike,
        foreground_heights: npt.ArrayLike,
    ) -> None:
        self.recipe = recipe
        self.n_backgrounds = n_backgrounds
        widths = np.asarray(foreground_widths, np.int64)
        heights = np.asarray(foreground_heights, np.int64)
        if n_backgrounds < 1 or not len(widths):
            raise InputError("a plan needs at least one background and one foreground")
        for f in np.flatnonzero((widths > recipe.width) | (heights > recipe.height))[:1]:
            raise InputError(
                f"foreground {f} is {widths[f]}x{heights[f]}, which does not fit the frame of "
                f"{recipe.width}x{recipe.height}"
            )
        self.n_foregrounds = len(widths)
        self.foreground_widths = widths
        self.foreground_heights = heights
        target = max(1, min(_SHARD_SAMPLES, _SHARD_PIXELS // (recipe.width * recipe.height)))
        if self.per_background <= target:
            self.cell_length = target // self.per_background * self.per_background
        else:
            self._parts = -(-self.per_background // target)
            self.cell_length = -(-self.per_background // self._parts)
        self._span_x = (recipe.width - widths + 1).astype(np.uint64)
        self._span_y = (recipe.height - heights + 1).astype(np.uint64)

    def __len__(self) -> int:
        """Number of samples in the whole data set."""
        return self.n_backgrounds * self.per_background

    @property
    def per_background(self) -> int:
        """Number of samples on each background."""
        return self.n_foregrounds * self.recipe.per_pair * self.recipe.orientations

    def cell(self, index: int) -> tuple[Shard, int]:
        """The cell of the shard grid that a sample lies in, and the cell's number.

        The grid depends on nothing but the plan, so that any runs that make all samples make the same shards.
        """
        length, per_background = self.cell_length, self.per_background
        if length >= per_background:
            number = index // length
            return Shard(number * length, min((number + 1) * length, len(self))), number
        background, within = divmod(index, per_background)
        part = within // length
        first = background * per_background
        stop = min(first + (part + 1) * length, first + per_background)
        return Shard(first + part * length, stop), background * self._parts + part

    @property
    def cells(self) -> int:
        """Number of cells of the shard grid."""
        return self.cell(len(self) - 1)[1] + 1

    def cell_at(self, number: int) -> Shard:
        """The cell of this number."""
        if self.cell_length >= self.per_background:
            return self.cell(number * self.cell_length)[0]
        background, part = divmod(number, self._parts)
        return self.cell(background * self.per_background + part * self.cell_length)[0]

    def shards(self, part: Shard) -> Iterator[Shard]:
        """The cells that cover ``part``, cut off at its ends."""
        at = part.start
        while at < part.stop:
            stop = min(self.cell(at)[0].stop, part.stop)
            yield Shard(at, stop)
            at = stop

    def placements(self, indices: npt.ArrayLike) -> Placements:
        """Placements of the samples ``indices``, in that order.

        Parameters
        ----------
        indices : (N,) integers
            Sample numbers, each from 0 to ``len(plan) - 1``; or one number.

        Returns
        -------
        Placements

        Raises
        ------
        OptionError
            Not integers, of another shape, or an index is outside the data set.

        Notes
        -----
        x is uniform in [0, W - w] and y in [0, H - h], both ends included: words 0 and 1 of Philox 4x32-10 at
        counter = index, key = seed, each scaled by the high half of word * span (Lemire 2019).
        """
        given = np.asarray(indices)
        if given.size and (given.dtype.kind not in "iu" or given.ndim > 1):
            expected = f"integers (N,) from 0 to {len(self) - 1}, for example a range, a list or an array"
            raise OptionError("indices", f"got {given.dtype} {given.shape}, expected {expected}")
        if given.size and not 0 <= int(given.min()) <= int(given.max()) < len(self):
            raise OptionError("indices", f"got {given.min()} to {given.max()}, expected 0 to {len(self) - 1}")
        index = np.ascontiguousarray(given, np.int64).reshape(-1)
        recipe, count = self.recipe, len(index)
        out = Placements(
            index,
            background=np.empty(count, np.int32),
            foreground=np.empty(count, np.int32),
            repetition=np.empty(count, np.int32),
            flip=np.empty(count, np.bool_),
            x=np.empty(count, np.int32),
            y=np.empty(count, np.int32),
        )
        key = (recipe.seed & 0xFFFFFFFF, recipe.seed >> 32)
        for start in range(0, count, _BLOCK):
            block = slice(start, start + _BLOCK)
            at = index[block]
            turn, orientation = np.divmod(at, recipe.orientations)
            pair, out.repetition[block] = np.divmod(turn, recipe.per_pair)
            out.background[block], foreground = np.divmod(pair, self.n_foregrounds)
            out.foreground[block] = foreground
            out.flip[block] = orientation == 0 if recipe.flip == "both" else recipe.flip == "always"
            wide = at.astype(np.uint64)
            words = philox4x32_10((wide & np.uint64(0xFFFFFFFF), wide >> np.uint64(32), 0, 0), key)
            out.x[block] = (words[0] * self._span_x[foreground]) >> np.uint64(32)
            out.y[block] = (words[1] * self._span_y[foreground]) >> np.uint64(32)
        return out
