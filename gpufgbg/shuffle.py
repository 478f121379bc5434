"""A shuffled order of any size that is never written down: a keyed permutation, computed where it is looked at.

A Feistel network over the bits of a position, with cycle walking where the size is no power of two (Black and Rogaway
2002, Ciphers with arbitrary finite domains). Its round keys come from Philox, its round function is SplitMix64's
finaliser (Steele, Lea, Flood 2014). It takes no memory but the result's, and gives the same on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gpufgbg.recipe import philox4x32_10

__all__ = ["Permutation"]

_ROUNDS = 8
_TAG = 0x53485546  # in the counter, so that no word is one that a placement is made of
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A pseudorandom permutation of 0 to ``size - 1``.

    Parameters
    ----------
    size : int
        1 to 2**62.
    seed : int
        0 to 2**64 - 1.
    epoch : int
        0 to 2**64 - 1. Each (seed, epoch) is another permutation.

    Examples
    --------
    >>> sorted(Permutation(5, seed=1, epoch=0)(range(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self.size = size
        bits = (size - 1).bit_length()
        self._low = np.uint64(bits - bits // 2)
        self._low_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)
        words = philox4x32_10(
            (np.arange(_ROUNDS), _TAG, epoch & 0xFFFFFFFF, epoch >> 32), (seed & 0xFFFFFFFF, seed >> 32)
        )
        self._keys = words[0] | words[1] << np.uint64(32)

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """What stands at ``positions``.

        Parameters
        ----------
        positions : (N,) integers
            Each from 0 to ``size - 1``.

        Returns
        -------
        (N,) int64
            Numbers from 0 to ``size - 1``, different ones at different positions; a new array.
        """
        found = self._mixed(np.array(positions, np.uint64).reshape(-1))
        size = np.uint64(self.size)
        outside = np.flatnonzero(found >= size)
        while outside.size:  # fewer than half of them each time round
            again = self._mixed(found[outside])
            found[outside] = again
            outside = outside[again >= size]
        return found.astype(np.int64)

    def _mixed(self, value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The network: a permutation of the numbers of as many bits as ``size - 1`` has."""
        low, high = value & self._low_mask, value >> self._low
        for turn in range(0, _ROUNDS, 2):
            high ^= _hash(low, self._keys[turn]) & self._high_mask
            low ^= _hash(high, self._keys[turn + 1]) & self._low_mask
        return high << self._low | low


def _hash(value: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    value = value ^ key
    value ^= value >> np.uint64(30)
    value *= _M1
    value ^= value >> np.uint64(27)
    value *= _M2
    value ^= value >> np.uint64(31)
    return value
