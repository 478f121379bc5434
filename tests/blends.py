"""Blends that a process which is not forked can import, for tests of such processes."""

from __future__ import annotations

import numba


def inverted(fg, bg, alpha, x, y):
    return 255 - bg


@numba.njit
def darker(fg, bg, alpha, x, y):
    return bg // 2
