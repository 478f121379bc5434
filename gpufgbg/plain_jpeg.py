"""Which JPEG files every decoder reads alike, told from their bytes, without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpufgbg.compiling import compiled
from gpufgbg.pictures import MAX_PIXELS

__all__ = ["Shape", "plain_jpegs"]

#: width, height, channels
Shape = tuple[int, int, int]

_ADOBE = np.frombuffer(b"Adobe", np.uint8)


@compiled
def _inspect(file, adobe, shape):  # type: ignore[no-untyped-def]
    """file (bytes) uint8, adobe (5) uint8; shape (3) int64: width, height and channels, written for a plain file.

    Markers are walked up to the start of the scan; then no byte 0xFF of the scan may begin anything but data or a
    restart marker until the file's end.
    """
    size = file.size
    if size < 4 or file[0] != 0xFF or file[1] != 0xD8 or file[size - 2] != 0xFF or file[size - 1] != 0xD9:
        return
    width = height = channels = 0
    at, scan = 2, 0
    while not scan:
        if at + 4 > size or file[at] != 0xFF:
            return
        marker = file[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        behind = at + 2 + (np.int64(file[at + 2]) << 8) + np.int64(file[at + 3])
        if behind > size or behind < at + 4:
            return
        if marker == 0xDA:
            scan = behind
        elif marker == 0xC0 or marker == 0xC1:  # baseline and extended, Huffman coded, one pass
            if channels or behind < at + 13 or file[at + 4] != 8:
                return
            height = (np.int64(file[at + 5]) << 8) + np.int64(file[at + 6])
            width = (np.int64(file[at + 7]) << 8) + np.int64(file[at + 8])
            channels = np.int64(file[at + 9])
            if channels == 3:
                if behind < at + 19:
                    return
                luma = file[at + 11]
                for c in range(3):  # components 1, 2, 3 are Y, Cb, Cr; 4:4:4, 4:2:2 or 4:2:0
                    if file[at + 10 + 3 * c] != c + 1 or (c and file[at + 11 + 3 * c] != 0x11):
                        return
                if luma != 0x11 and luma != 0x21 and luma != 0x22:
                    return
            elif channels != 1:
                return
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xCC:
            return  # progressive, arithmetic, lossless
        elif 0xD0 <= marker <= 0xD9 or marker <= 0x01:
            return
        elif marker == 0xEE and behind >= at + 9:  # Adobe's segment may say that these are other colours
            same = True
            for i in range(5):
                same &= file[at + 4 + i] == adobe[i]
            if same:
                return
        at = behind
    for i in range(scan, size - 2):
        if file[i] == 0xFF:
            following = file[i + 1]
            if following and (following < 0xD0 or following > 0xD7):
                return
    shape[0], shape[1], shape[2] = width, height, channels


@compiled
def _inspect_all(data, ends, adobe, shapes):  # type: ignore[no-untyped-def]
    """data (bytes) uint8: N files in a row; ends (N) int64; shapes (N, 3) int64: those of plain files are written."""
    start = 0
    for n in range(ends.size):
        _inspect(data[start : ends[n]], adobe, shapes[n])
        start = ends[n]


def plain_jpegs(files: Sequence[bytes]) -> list[Shape | None]:
    """(width, height, channels) of each JPEG file that every decoder reads alike, None for any other file.

    Such a file is baseline or one-pass JPEG of 8 bits, grey or YCbCr with chroma 4:4:4, 4:2:2 or 4:2:0. Its scan has
    no marker where none belongs, and reaches the file's end: truncated files and many damaged ones are not such.
    """
    ends = np.cumsum([len(file) for file in files], dtype=np.int64)
    shapes = np.zeros((len(files), 3), np.int64)
    _inspect_all(np.frombuffer(b"".join(files), np.uint8), ends, _ADOBE, shapes)
    return [
        (width, height, channels) if 0 < width * height <= MAX_PIXELS else None
        for width, height, channels in shapes.tolist()
    ]
