"""Reading pictures of every common kind into 8-bit RGB or RGBA, without losing true alpha.

Anything that can't be read says why in one line; nothing is guessed in silence.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from gpufgbg.exceptions import InputError, printable

__all__ = ["Picture", "PictureError", "list_pictures", "read_picture", "walk_pictures"]

#: extension -> Pillow's name of the format; what the tool reads
FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG",
    ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".dib": "BMP", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip
_SAME_FORMAT = {"MPO": "JPEG", "DIB": "BMP"}  # a camera's multi-picture JPEG; a BMP without file header
_LITTER = {"thumbs.db", "desktop.ini", "license", "license.txt", "readme", "readme.md", "readme.txt"}
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
_MAGIC = {
    "JPEG": (b"\xff\xd8",), "PNG": (b"\x89PNG\r\n\x1a\n",), "WEBP": (b"RIFF",), "BMP": (b"BM",),
    "TIFF": (b"II*\0", b"MM\0*"),
}  # fmt: skip
_PNG_END, _JPEG_END = b"\0\0\0\0IEND\xaeB`\x82", b"\xff\xd9"
#: EXIF orientation -> what sets the picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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
        return self.format == "JPEG" and _start_of_frame(self.data)[0] == _BASELINE


def list_pictures(
    folder: str | os.PathLike[str], option: str, problems: list[str] | None = None
) -> tuple[list[Path], list[str]]:
    """The pictures of a folder, sorted by name, and warnings about what else is in it.

    Parameters
    ----------
    folder : path
        Not searched in depth; symbolic links are followed.
    option : str
        What the folder was given as, for messages.
    problems : list of str, optional
        Takes what is wrong with single entries, a line each, so that the others can be looked at, too; by default
        it is raised.

    Returns
    -------
    paths : list of Path
    warnings : list of str

    Raises
    ------
    InputError
        No such folder, not a folder, not readable, no pictures, or two pictures with one stem.
    """
    if not os.fspath(folder):
        raise InputError(f"{option}: got an empty name, expected a folder")
    folder = Path(folder)
    try:
        entries = sorted(folder.iterdir(), key=lambda p: unicodedata.normalize("NFC", p.name))
        if entries:
            entries[0].lstat()  # refused where the folder may be listed but not entered
    except FileNotFoundError:
        raise InputError(f"{option}: no such folder: {printable(folder)}") from None
    except NotADirectoryError:
        raise InputError(f"{option}: not a folder: {printable(folder)}") from None
    except PermissionError:
        raise InputError(f"{option}: no permission to read {printable(folder)}") from None
    except OSError as error:
        raise InputError(f"{option}: can't read {printable(folder)}: {error.strerror}") from None
    paths: list[Path] = []
    subfolders: list[str] = []
    others: list[str] = []
    found: list[str] = []
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            continue
        try:
            kind = entry.stat().st_mode
        except OSError:  # a link whose target is missing, forbidden or the link itself
            kind = 0
        if stat.S_ISDIR(kind):
            subfolders.append(printable(entry.name))
        elif entry.suffix.lower() not in FORMATS:
            others.append(printable(entry.name))
        elif not kind:
            found.append(f"{printable(entry)}: a symbolic link to nothing that can be read")
        elif not stat.S_ISREG(kind):
            found.append(f"{printable(entry)}: neither a file nor a folder: remove it")
        else:
            paths.append(entry)
    stems: dict[str, Path] = {}
    twins: set[Path] = set()
    for path in paths:
        first = stems.setdefault(unicodedata.normalize("NFC", path.stem), path)
        if first is not path:
            twins |= {first, path}
            found.append(f"{printable(first)} and {printable(path.name)} share one stem: rename or remove one")
    if problems is None:
        raise_all(found)
    else:
        problems.extend(found)
        paths = [path for path in paths if path not in twins]
    notes = []
    if subfolders:
        notes.append(f"{option}: subfolders are not read: {', '.join(subfolders)}")
    if others:
        notes.append(f"{option}: not pictures by their extension, not read: {', '.join(others)}")
    if not paths and not found:
        why = "; ".join(n.split(": ", 1)[1] for n in notes) or "it is empty"
        raise InputError(
            f"{option}: no pictures in {printable(folder)} ({why}); "
            f"expected files ending in {', '.join(sorted(FORMATS))}"
        )
    return paths, notes


def walk_pictures(root: Path, problems: list[str], without: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """The pictures in a folder and below it, in a fixed order, but for hidden ones.

    Folders below for which ``without`` is true are left out. What can't be read, or is no file, is added to
    ``problems``, a line each.
    """

    def refused(error: OSError) -> None:
        problems.append(f"{printable(error.filename or root)}: can't be read: {error.strerror}")

    for parent, folders, names in os.walk(root, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if without is not None:
            folders[:] = [name for name in folders if not without(Path(parent, name))]
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() not in FORMATS or name.startswith("."):
                continue
            if path.exists() and not path.is_file():
                problems.append(f"{printable(path)}: neither a file nor a folder: remove it")
            else:
                yield path


class _Quiet:
    """A filter of Pillow's warnings, for as long as anybody wants it: filters belong to the process, not a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.__exit__(None, None, None)


#: around calls of `read_picture`, in as many threads as you like: Pillow's remarks about odd metadata are dropped
quiet_decoding = _Quiet()


def read_file(path: Path) -> bytes:
    """A file's bytes, or `PictureError`."""
    try:
        return path.read_bytes()
    except PermissionError:
        raise PictureError("no permission to read it") from None
    except OSError as error:
        raise PictureError(f"can't be read: {error.strerror}") from None


def read_picture(path: Path) -> Picture:
    """A picture file, decoded in full.

    Raises
    ------
    PictureError
        Empty, unreadable, truncated, mislabelled, too large, or of a depth that has no 8-bit meaning.
    """
    data = read_file(path)
    if not data:
        raise PictureError("zero bytes long")
    expected = FORMATS[path.suffix.lower()]
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > MAX_PIXELS:  # Pillow warns, or raises from twice as many on
                raise Image.DecompressionBombError
            found = _SAME_FORMAT.get(opened.format or "", opened.format or "")
            if found != expected:
                raise PictureError(f"mislabelled: the name says {expected}, the content is {found}; rename it")
            picture = _decode(path, opened, data, found)
        if not has_end(data, found):
            raise PictureError(f"damaged or truncated {found}: its end is not there")
        return picture
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(
            f"too large to decode safely: expected at most {MAX_PIXELS:,} pixels; scale it down"
        ) from None
    except UnidentifiedImageError:
        if data.startswith(_MAGIC[expected]):
            raise PictureError(f"damaged, truncated or unusual {expected}: restore it or convert it") from None
        raise PictureError(f"not a picture: expected {expected} by its name") from None
    except MemoryError:
        raise PictureError("too large for this machine's memory") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        reason = printable(error).strip() or type(error).__name__
        raise PictureError(f"damaged or truncated {expected}: {reason}") from None


def _decode(path: Path, opened: Image.Image, data: bytes, found: str) -> Picture:
    notes = []
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":
        notes.append(f"{printable(path)}: {frames} frames, only the first is used")
    opened.load()
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above; the pixels are whole
        orientation = 1
        notes.append(f"{printable(path)}: its EXIF can't be read, it is taken as upright")
    method = _UPRIGHT.get(orientation)
    if found == "TIFF":
        _check_tiff(opened)
    image = eight_bit(opened, data)
    image = image.copy() if method is None else image.transpose(method)
    image.info = {}  # nothing of the source's metadata goes into what is saved
    as_is = method is None and frames == 1 and opened.mode == image.mode
    return Picture(path, image, data, found, as_is, tuple(notes))


def _check_tiff(opened: Image.Image) -> None:
    """Refuse the grey kinds that Pillow hands over unscaled or upside down."""
    if not opened.mode.startswith("I"):
        return
    tags = opened.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(ExifTags.Base.BitsPerSample, (1,))[0]
    signed = tags.get(ExifTags.Base.SampleFormat, (1,))[0] != 1
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation, 1) == 0
    if bits != 16 or signed or inverted:
        odd = f"{'signed ' if signed else ''}{bits}-bit grey{' with white as zero' if inverted else ''}"
        raise PictureError(f"{odd}: expected 8 or 16 bits a channel, unsigned, black as zero; convert it")


def eight_bit(image: Image.Image, data: bytes) -> Image.Image:
    """Any mode as L, RGB or RGBA; 16-bit samples keep their upper byte, as Pillow does for 16-bit RGB.

    ``data`` is the file. Raises `PictureError` of 32-bit and floating-point pixels.
    """
    mode = image.mode
    keyed = image.info.pop("transparency", None) if mode != "P" else None
    if keyed is not None:
        coloured = eight_bit(image, data).convert("RGB")
        coloured.putalpha(Image.fromarray(_keyed_alpha(data)))
        return coloured
    if mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if mode in ("I", "F"):
        kind = "floating-point" if mode == "F" else "32-bit"
        raise PictureError(f"{kind} pixels: expected 8 or 16 bits a channel; convert it")
    if mode == "La":
        return image.convert("LA").convert("RGBA")
    if mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("RGBA")
    return image if mode in ("RGB", "L") else image.convert("L" if mode == "1" else "RGB")


def _keyed_alpha(png: bytes) -> npt.NDArray[np.uint8]:
    """The alpha of a PNG in which one grey or one colour is transparent.

    libpng's own, because Pillow compares the key with samples that it has scaled to 8 bits already, and so
    finds nothing at 2, 4 and 16 bits.
    """
    alpha = imagecodecs.png_decode(png)[..., -1]
    return (alpha > 0).astype(np.uint8) * np.uint8(255)


def has_end(data: bytes, form: str) -> bool:
    """Whether the file has its end marker. Pillow often does without, other readers of a kept file would not."""
    if form == "PNG":
        return _PNG_END in data
    # At the file's end it stands behind any frame; elsewhere it may be a thumbnail's, in front of the frame.
    return form != "JPEG" or data.endswith(_JPEG_END) or data.find(_JPEG_END, _start_of_frame(data)[1]) >= 0


def _start_of_frame(data: bytes) -> tuple[int | None, int]:
    """The second byte of a JPEG's start-of-frame marker (0xC0 baseline, 0xC2 progressive, ...) and its place."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker, at
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None, 0


def raise_all(problems: Sequence[str]) -> None:
    """Raise one `InputError` with every problem in it, if there are any."""
    if problems:
        raise InputError(*problems)
