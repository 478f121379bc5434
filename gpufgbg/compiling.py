"""Numba's compiler as the whole package uses it."""

from __future__ import annotations

from typing import Any

import numba

__all__ = ["compiled"]


def compiled(function: Any, **options: Any) -> Any:
    """``function`` for Numba to compile, without the interpreter's lock and without checks of indices.

    Machine code is kept where Numba finds a folder for it: ``NUMBA_CACHE_DIR``, the package's own, or the user's.
    Where it can write to none of them, each process compiles for itself.

    Parameters
    ----------
    function : callable
        A module's own Python function.
    **options
        More of `numba.njit`'s.
    """
    options = {"nogil": True, "boundscheck": False, **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # "cannot cache function": nothing of it is compiled yet
        return numba.njit(**options)(function)
