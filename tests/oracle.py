"""The oracle that nobody here wrote: Pillow, used plainly, for one sample at a time."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image


def paste(
    background: Image.Image, foreground: Image.Image, mask: Image.Image, flip: bool, at: tuple[int, int]
) -> tuple[Image.Image, Image.Image]:
    """The original's recipe: composite and composite mask of one sample."""
    composite = background.copy()
    if flip:
        foreground = foreground.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    composite.paste(foreground, at, foreground)
    frame = Image.new("L", composite.size)
    frame.paste(mask, at, mask)
    return composite, frame


def jpeg(image: Image.Image, quality: int = 65, subsampling: str = "420", optimize: bool = True) -> bytes:
    """A JPEG file as Pillow writes it."""
    file = io.BytesIO()
    options = {} if image.mode == "L" else {"subsampling": ":".join(subsampling)}
    image.save(file, "JPEG", quality=quality, optimize=optimize, **options)
    return file.getvalue()


def samples_of(dataset: Path) -> list[tuple[str, int, int]]:
    """(file name, x, y) of every sample that a data set's label files list."""
    lines = [
        line.split("\t") for path in sorted((dataset / "labels").iterdir()) for line in path.read_text().splitlines()
    ]
    return [(name, int(x), int(y)) for name, x, y in lines]


def expected_files(dataset: Path, name: str, x: int, y: int, **options) -> dict[str, bytes]:
    """What the files of a sample must be, from the data set's own bg/, fg/, fg_mask/ and its label alone."""
    background, foreground = name.split("_fg_")[0], "fg_" + name.split("_fg_")[1].split("_")[0]
    composite, mask = paste(
        Image.open(dataset / "bg" / f"{background}.jpg").convert("RGB"),
        Image.open(dataset / "fg" / f"{foreground}.png").convert("RGBA"),
        Image.open(dataset / "fg_mask" / f"{foreground}.jpg").convert("L"),
        name.rsplit("_", 2)[1] == "T",
        (x, y),
    )
    return {
        f"fg_bg/{background}/{name}": jpeg(composite, **options),
        f"fg_bg_masks/{background}/{name}": jpeg(mask, **options),
    }


def tree_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but for locks."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }
