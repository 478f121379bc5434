"""Tables and pictures about a data set: the statistics as the original's page prints them, and its strips."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from gpufgbg.checks import whole
from gpufgbg.exceptions import OptionError, printable
from gpufgbg.files import storage_errors, write_atomic
from gpufgbg.layout import KINDS
from gpufgbg.moments import Moments
from gpufgbg.readers import StoredPicture, decode, scan
from gpufgbg.statistics import KindStatistics
from gpufgbg.urls import is_url, local_path

__all__ = ["contact_sheet", "format_bytes", "format_table", "preview"]

TITLES = {
    "background": "background",
    "foreground": "foreground",
    "foreground_mask": "foreground mask",
    "composite": "composite",
    "composite_mask": "composite mask",
    "depth": "depth map",
}
_GAP, _PAPER = 4, (255, 255, 255)


def format_bytes(count: float) -> str:
    """A length as ``du -h`` prints it: 2.5M, 404K, in powers of 1,024."""
    for unit in ("B", "K", "M", "G", "T"):
        if count < 1024 or unit == "T":
            digits = 1 if unit != "B" and count < 10 else 0
            return f"{count:.{digits}f}{unit}"
        count /= 1024
    raise AssertionError


def _channels(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}".removeprefix("0") for value in values)


def format_table(counts: Mapping[str, int], size_bytes: Mapping[str, int], moments: Mapping[str, Moments]) -> str:
    """The original's table: kind, folder, count, size on disk, mean, std; over pixels scaled to 0..1."""
    rows = [("kind", "folder", "count", "size", "mean", "std")]
    for kind, folder in KINDS.items():
        if counts.get(kind):
            m = moments.get(kind, Moments())
            size = format_bytes(size_bytes.get(kind, 0))
            rows.append((TITLES[kind], f"{folder}/", f"{counts[kind]:,}", size, _channels(m.mean), _channels(m.std)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    right = (2, 3)
    return "\n".join(
        "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    )


def statistics_table(statistics: Mapping[str, KindStatistics]) -> str:
    """The table of `gpufgbg.statistics.statistics`' result."""
    return format_table(
        {kind: s.images for kind, s in statistics.items()},
        {kind: s.size_bytes for kind, s in statistics.items()},
        {kind: s.moments for kind, s in statistics.items()},
    )


# -- pictures -------------------------------------------------------------------------------------------


def contact_sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures as one RGB picture, in columns; transparency is shown over a checkerboard."""
    heights = [max(image.height for image in row) for row in rows]
    cell = max(image.width for row in rows for image in row) + _GAP
    width = cell * max(len(row) for row in rows) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            x = _GAP + column * cell + (cell - _GAP - image.width) // 2
            at = (x, y + (height - image.height) // 2)
            if image.mode == "RGBA":
                sheet.paste(_checkerboard(image.size), at)
                sheet.paste(image, at, image)
            else:
                sheet.paste(image.convert("RGB"), at)
        y += height + _GAP
    return sheet


def _checkerboard(size: tuple[int, int], cell: int = 8) -> Image.Image:
    rows, columns = np.indices((size[1], size[0])) // cell
    return Image.fromarray(np.where((rows + columns) % 2, 236, 208).astype(np.uint8))


def _fitted(image: Image.Image, height: int) -> Image.Image:
    if image.height == height:
        return image
    width = max(1, round(image.width * height / image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def preview(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, columns: int = 10) -> Path:
    """The strips of the original's page as one PNG: a row a kind, ``columns`` pictures each.

    Parameters
    ----------
    path : path
        A data set of any form that `gpufgbg.readers.scan` reads.
    out : path, optional
        The PNG, by default ``preview.png`` in the data set's folder (beside an archive).
    columns : int
        Samples shown, evenly spread over the data set; 1 to 100.

    Returns
    -------
    Path
        The PNG that was written.

    Raises
    ------
    OptionError, DatasetError, StorageError
    """
    columns = whole("columns", columns, 1, 100)
    if is_url(path):
        raise OptionError("DATASET", f"{printable(path)}: preview shows data sets on this machine alone")
    root = local_path(path)
    target = Path(out) if out else (root if root.is_dir() else root.parent) / "preview.png"
    if target.suffix.lower() != ".png":
        raise OptionError("out", f"got {printable(target)}, expected a name ending in .png")
    if target.is_dir():
        raise OptionError("out", f"{printable(target)} is a folder, expected a file")
    rows = []
    for pictures in _spread(root, columns):
        images = [decode(picture) for picture in pictures]
        height = max(image.height for image in images)
        rows.append([_fitted(_shown(image), height) for image in images])
    with storage_errors(target):
        if not target.parent.is_dir():
            raise OptionError("out", f"no such folder: {printable(target.parent)}")
        file = io.BytesIO()
        contact_sheet(rows).save(file, "PNG", optimize=True)
        write_atomic(target, file.getvalue())
    return target


def _shown(image: Image.Image) -> Image.Image:
    """What a person should see of it: depth and masks stay grey, palettes and the like become colour."""
    return image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGBA")


def _spread(root: Path, columns: int) -> Iterator[list[StoredPicture]]:
    """For each kind that is there, ``columns`` pictures: of sample kinds those of the same samples.

    They are counted first and then picked, so that no more of them than these are in memory.
    """
    counts = Counter(picture.kind for picture in scan(root))
    wanted = {}
    for kind, count in counts.items():
        shown = min(columns, count)
        # evenly spread, each a golden section further into its part: not the same foreground every time
        wanted[kind] = Counter(int((i + i * 0.6180339887 % 1) * count / shown) for i in range(shown))
    kinds: dict[str, list[StoredPicture]] = {kind: [] for kind in counts}
    met: Counter[str] = Counter()
    for picture in scan(root):
        if picture.kind in wanted:
            kinds[picture.kind] += [picture] * wanted[picture.kind][met[picture.kind]]
            met[picture.kind] += 1
    for kind in KINDS:
        if pictures := kinds.get(kind):
            yield pictures
