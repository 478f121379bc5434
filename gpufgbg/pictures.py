"""Reading pictures of every common kind into 8-bit RGB or RGBA, without losing true alpha.

Anything that can't be read says why in one line; nothing is guessed in silence.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from gpufgbg.exceptions import InputError, StorageError, printable

__all__ = ["Picture", "PictureError", "list_pictures", "read_picture"]

#: extension -> Pillow's name of the format; what the tool reads
FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG",
    ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".dib": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}  # a camera's multi-picture JPEG; a BMP without file header
_LITTER = {"thumbs.db", "desktop.ini", "license", "license.txt", "readme", "readme.md", "readme.txt"}
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
# What Pillow's decoders raise on damaged files
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error)
_BASELINE, _STANDALONE = 0xC0, {0x01, *range(0xD0, 0xD9)}


class PictureError(ValueError):
    """A picture can't be used; the message says why, without the file's name."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright, 8 bits a channel.

    Attributes
    ----------
    path : Path
    image : PIL.Image.Image
        Mode L, RGB or, where the file has transparency of any kind, RGBA with straight alpha.
    data : bytes
        The file as it is.
    as_is : bool
        A reader that knows nothing of EXIF gets the same picture from the file itself.
    notes : tuple of str
        What the user should know, for example that only the first of several frames is used.
    """

    path: Path
    image: Image.Image
    data: bytes
    format: str
    as_is: bool
    notes: tuple[str, ...] = ()

    @property
    def has_alpha(self) -> bool:
        """Whether the file has transparency of any kind, even if it is opaque everywhere."""
        return self.image.mode == "RGBA"

    @property
    def is_baseline_jpeg(self) -> bool:
        """Whether the file is a baseline (not progressive, not arithmetic) JPEG."""
        return self.format == "JPEG" and _start_of_frame(self.data) == _BASELINE


def list_pictures(folder: str | os.PathLike[str], option: str) -> tuple[list[Path], list[str]]:
    """The pictures of a folder, sorted by name, and warnings about what else is in it.

    Parameters
    ----------
    folder : path
        Not searched in depth; symbolic links are followed.
    option : str
        What the folder was given as, for messages.

    Returns
    -------
    paths : list of Path
    warnings : list of str

    Raises
    ------
    InputError
        No such folder, not a folder, not readable, no pictures, or two pictures with one stem.
    """
    folder = Path(folder)
    try:
        entries = sorted(folder.iterdir(), key=lambda p: unicodedata.normalize("NFC", p.name))
    except FileNotFoundError:
        raise InputError(f"{option}: no such folder: {printable(folder)}") from None
    except NotADirectoryError:
        raise InputError(f"{option}: not a folder: {printable(folder)}") from None
    except PermissionError:
        raise StorageError(f"{option}: no permission to read {printable(folder)}") from None
    paths: list[Path] = []
    subfolders: list[str] = []
    others: list[str] = []
    problems: list[str] = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            continue
        if entry.is_dir():
            subfolders.append(printable(entry.name))
        elif entry.suffix.lower() not in FORMATS:
            others.append(printable(entry.name))
        elif not entry.exists():
            problems.append(f"{printable(entry)}: a symbolic link to nothing")
        else:
            paths.append(entry)
    stems: dict[str, Path] = {}
    for path in paths:
        first = stems.setdefault(unicodedata.normalize("NFC", path.stem), path)
        if first is not path:
            problems.append(f"{printable(first)} and {printable(path.name)} share one stem: rename or remove one")
    if problems:
        raise InputError(*problems)
    notes = []
    if subfolders:
        notes.append(f"{option}: subfolders are not read: {', '.join(subfolders)}")
    if others:
        notes.append(f"{option}: not pictures by their extension, not read: {', '.join(others)}")
    if not paths:
        found = "; ".join(n.split(": ", 1)[1] for n in notes) or "it is empty"
        raise InputError(
            f"{option}: no pictures in {printable(folder)} ({found}); "
            f"expected files ending in {', '.join(sorted(FORMATS))}"
        )
    return paths, notes


@contextlib.contextmanager
def quiet_decoding() -> Iterator[None]:
    """Around calls of `read_picture`, in as many threads as you like: Pillow's remarks about odd metadata are
    dropped, and its remark about a decompression bomb is an error. (Warning filters belong to the process, so
    this can't be done by each thread.)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_picture(path: Path) -> Picture:
    """A picture file, decoded in full.

    Raises
    ------
    PictureError
        Empty, unreadable, truncated, mislabelled, too large, or of a depth that has no 8-bit meaning.
    """
    try:
        data = path.read_bytes()
    except PermissionError:
        raise PictureError("no permission to read it") from None
    except OSError as error:
        raise PictureError(f"can't be read: {error.strerror}") from None
    if not data:
        raise PictureError("zero bytes long")
    expected = FORMATS[path.suffix.lower()]
    try:
        with Image.open(io.BytesIO(data)) as opened:
            found = _SAME_FORMAT.get(opened.format or "", opened.format or "")
            if found != expected:
                raise PictureError(f"mislabelled: the name says {expected}, the content is {found}; rename it")
            return _decode(path, opened, data, found)
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(
            f"too large to decode safely: expected at most {MAX_PIXELS:,} pixels; scale it down"
        ) from None
    except UnidentifiedImageError:
        raise PictureError(f"not a picture: expected {expected} by its name") from None
    except MemoryError:
        raise PictureError("too large for this machine's memory") from None
    except _DAMAGED as error:
        reason = printable(error).strip() or type(error).__name__
        raise PictureError(f"damaged or truncated {expected}: {reason}") from None


def _decode(path: Path, opened: Image.Image, data: bytes, found: str) -> Picture:
    notes = []
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":
        notes.append(f"{printable(path)}: {frames} frames, only the first is used")
    opened.load()
    orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    mode, rotated = opened.mode, orientation in range(2, 9)
    upright = ImageOps.exif_transpose(opened) if rotated else opened
    image = _eight_bit(upright).copy()
    image.info = {}  # nothing of the source's metadata goes into what is saved
    as_is = not rotated and frames == 1 and mode == image.mode
    return Picture(path, image, data, found, as_is, tuple(notes))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any mode as L, RGB or RGBA; 16-bit samples keep their upper byte, as Pillow does for 16-bit RGB."""
    mode, transparent = image.mode, image.info.get("transparency")
    if mode in ("RGB", "L") and transparent is None:
        return image
    if mode.startswith("I;16") or mode == "I":
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise PictureError("32 bits a channel: expected 8 or 16; convert it")
        grey = Image.fromarray((wide >> 8).astype(np.uint8))
        if not isinstance(transparent, int):
            return grey
        alpha = Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, alpha)).convert("RGBA")
    if mode == "F":
        raise PictureError("floating-point pixels: expected 8 or 16 bits a channel; convert it")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or transparent is not None:
        return image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
    if mode == "1":
        return image.convert("L")
    return image.convert("RGB")


def _start_of_frame(data: bytes) -> int | None:
    """The second byte of a JPEG's start-of-frame marker: 0xC0 baseline, 0xC2 progressive, ..."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def raise_all(problems: Sequence[str]) -> None:
    """Raise one `InputError` with every problem in it, if there are any."""
    if problems:
        raise InputError(*problems)
