"""The CPU backend's loops for a blend of the user's own. Twin: ``kernels/composite.cu`` with GPUFGBG_USER_BLEND.

They take what ``_make_table`` and ``_render`` in ``cpu.py`` take, so that all around them is the same.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from gpufgbg.backends.cpu import _add_lanes, _clear, _copy, _i32, _lay_background, _u16
from gpufgbg.compiling import compiled

__all__ = ["make_render", "make_table"]


@compiled
def make_table(pixels, mask, width, flip, alphas, colours, matte, spans):  # type: ignore[no-untyped-def]
    """A foreground as the user's blend wants it: of each byte of a composite the alpha and the colour.

    pixels (h * w, 4) uint8, mask (h * w) uint8 -> alphas (h * w * 3) uint8, colours (h * w * 3) uint16,
    matte (h * w) uint8, spans (h, 2) int32: all columns of each row, as the blend has a say in all of them.
    """
    for start in range(0, mask.size, width):
        for column in range(width):
            to = start + column
            at = start + width - 1 - column if flip else to
            for c in range(3):
                alphas[3 * to + c] = pixels[at, 3]
                colours[3 * to + c] = pixels[at, c]
            v = _u16(mask[at]) * _u16(mask[at]) + _u16(128)
            matte[to] = (v + (v >> _u16(8))) >> _u16(8)
        spans[start // width, 0], spans[start // width, 1] = 0, width


def make_render(blend: Any) -> Any:
    """``_render`` of ``cpu.py`` with the user's blend inlined, and `make_table`'s tables. Compiled at its first call.

    Parameters
    ----------
    blend : Numba's dispatcher
        `gpufgbg.blend.Blend.cpu`.
    """

    @numba.njit(nogil=True, boundscheck=False, error_model="numpy")
    def render(  # type: ignore[no-untyped-def]
        backgrounds, background_of, alphas, colours, matte, spans, start_of, span_of, width_of, height_of, x_of, y_of,
        frame_width, held, composites, masks, sums,
    ):  # fmt: skip
        stride = 3 * frame_width
        added = np.empty(stride, np.int32)
        squared = np.empty(stride, np.int32)
        column_of = np.empty(stride, np.int32)  # in the frame, of each byte of a foreground's row
        for n in range(background_of.size):
            picture, frame, behind = composites[n], masks[n], backgrounds[background_of[n]]
            _lay_background(picture, frame, behind, frame_width, held[n], background_of[n])
            x, y, w, h = x_of[n], y_of[n], width_of[n], height_of[n]
            held[n, 0], held[n, 1], held[n, 2], held[n, 3], held[n, 4] = background_of[n], x, y, w, h
            lanes = 3 * w
            plus, square, columns = added[:lanes], squared[:lanes], column_of[:lanes]
            for column in range(w):
                for c in range(3):
                    columns[3 * column + c] = x + column
            for block in range(0, h, 256):  # 256 rows of differences fit 32 bits
                _clear(plus)
                _clear(square)
                for row in range(block, min(h, block + 256)):
                    at = start_of[n] + row * w
                    to = (y + row) * frame_width + x
                    _copy(frame[to : to + w], matte[at : at + w])
                    part = picture[3 * to : 3 * to + lanes]
                    colour, alpha = colours[3 * at : 3 * at + lanes], alphas[3 * at : 3 * at + lanes]
                    line = _i32(y + row)
                    for i in range(lanes):
                        old = _i32(part[i])
                        new = blend(_i32(colour[i]), old, _i32(alpha[i]), columns[i], line)
                        part[i] = new
                        change = _i32(new) - old
                        plus[i] += change
                        square[i] += change * (_i32(new) + old)
                _add_lanes(sums, plus, square)

    return render
