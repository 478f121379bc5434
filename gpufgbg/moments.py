"""Exact moments of 8-bit pictures: integer sums that merge without rounding, in any order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Sums over all pixels of a set of 8-bit pictures, per channel.

    Attributes
    ----------
    images : int
        Number of pictures.
    pixels : int
        Number of pixels in all of them.
    sum, sum_of_squares : tuple of int
        One entry a channel, over values 0..255; exact, of any size.
    """

    images: int = 0
    pixels: int = 0
    sum: tuple[int, ...] = ()
    sum_of_squares: tuple[int, ...] = ()

    @classmethod
    def of(cls, pictures: npt.NDArray[np.uint8]) -> Moments:
        """Moments of pictures (N, H, W) or (N, H, W, C), uint8."""
        channels = pictures.shape[3] if pictures.ndim == 4 else 1
        images, pixels = len(pictures), math.prod(pictures.shape[:3])
        total = np.zeros(channels, np.int64)
        squares = np.zeros(channels, np.int64)
        levels = np.arange(256, dtype=np.int64)
        for c in range(channels):
            plane = pictures[..., c] if pictures.ndim == 4 else pictures
            histogram = np.zeros(256, np.int64)
            for picture in plane:  # a picture at a time: bincount widens its input to 8 bytes a pixel
                histogram += np.bincount(picture.reshape(-1), minlength=256)
            total[c], squares[c] = histogram @ levels, histogram @ (levels * levels)
        return cls(images, pixels, tuple(total.tolist()), tuple(squares.tolist()))

    def __add__(self, other: Moments) -> Moments:
        if not self.images:
            return other
        if not other.images:
            return self
        if len(self.sum) != len(other.sum):
            raise ValueError(f"moments of {len(self.sum)} and {len(other.sum)} channels can't be merged")
        return Moments(
            self.images + other.images,
            self.pixels + other.pixels,
            tuple(a + b for a, b in zip(self.sum, other.sum, strict=True)),
            tuple(a + b for a, b in zip(self.sum_of_squares, other.sum_of_squares, strict=True)),
        )

    @classmethod
    def total(cls, parts: Iterable[Moments]) -> Moments:
        """All parts merged."""
        merged = cls()
        for part in parts:
            merged = merged + part
        return merged

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean a channel, over values scaled to 0..1; correctly rounded."""
        return tuple(float(Fraction(s, 255 * self.pixels)) for s in self.sum) if self.pixels else ()

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation a channel, over values scaled to 0..1."""
        if not self.pixels:
            return ()
        n = self.pixels
        return tuple(
            math.sqrt(Fraction(n * q - s * s, (255 * n) ** 2))
            for s, q in zip(self.sum, self.sum_of_squares, strict=True)
        )

    def to_dict(self, summary: bool = False) -> dict[str, Any]:
        """As JSON values; with ``summary`` also mean and std."""
        exact = {
            "images": self.images,
            "pixels": self.pixels,
            "sum": list(self.sum),
            "sum_of_squares": list(self.sum_of_squares),
        }
        return {**exact, "mean": list(self.mean), "std": list(self.std)} if summary else exact

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Moments:
        """The moments of ``to_dict``'s result."""
        return cls(
            int(fields["images"]),
            int(fields["pixels"]),
            tuple(int(v) for v in fields["sum"]),
            tuple(int(v) for v in fields["sum_of_squares"]),
        )
