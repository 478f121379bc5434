"""Assets: folders of pictures -> validated, prepared and packed, ready to be composited.

Preparation writes nothing by itself. It gives the files that a data set keeps in bg/, fg/ and fg_mask/, and the
pixels that those files decode to, because they are what is composited: so a data set can be re-rendered from
itself, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from gpufgbg.exceptions import GpufgbgWarning, InputError, printable
from gpufgbg.pictures import (
    MAX_PIXELS,
    Picture,
    PictureError,
    list_pictures,
    quiet_decoding,
    raise_all,
    read_file,
    read_picture,
)
from gpufgbg.recipe import Recipe

__all__ = ["AssetFile", "Assets", "Sources", "find_sources", "prepare"]

SAVED_QUALITY = 95  # of backgrounds and masks that can't be kept as they came; 4:4:4


@dataclass(frozen=True)
class AssetFile:
    """A file of the data set's own bg/, fg/ or fg_mask/.

    Attributes
    ----------
    data : bytes
        The file.
    source : str
        Name of the picture it was made from, printable.
    """

    data: bytes
    source: str


@dataclass(frozen=True)
class Sources:
    """The input of a data set: which pictures, paired, in order.

    Attributes
    ----------
    backgrounds, foregrounds : tuple of Path
        Sorted by name.
    masks : tuple of Path or None
        One a foreground, or None where the alpha is the mask.
    notes : tuple of str
        Warnings about the folders.
    problems : tuple of str
        What can't be used and is not among the pictures, a line each: it is raised once they were looked at, too.
    """

    backgrounds: tuple[Path, ...]
    foregrounds: tuple[Path, ...]
    masks: tuple[Path, ...] | None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def checksums(self) -> dict[str, list[str]]:
        """SHA-256 of every source file, by kind, in order; `InputError` names all that can't be read."""
        problems = list(self.problems)

        def digest(path: Path) -> str:
            try:
                return hashlib.sha256(read_file(path)).hexdigest()
            except PictureError as error:
                problems.append(f"{printable(path)}: {error}")
                return ""

        sums = {
            "backgrounds": [digest(p) for p in self.backgrounds],
            "foregrounds": [digest(p) for p in self.foregrounds],
            "masks": [digest(p) for p in self.masks or ()],
        }
        raise_all(problems)
        return sums


@dataclass(frozen=True, eq=False)
class Assets:
    """Prepared pictures in memory: backgrounds as one array, foregrounds and masks packed end to end.

    Attributes
    ----------
    backgrounds : (B, H, W, 3) uint8
        RGB.
    foregrounds : (P, 4) uint8
        RGBA pixels with straight alpha; foreground f's rows are at ``offsets[f]:offsets[f + 1]``.
    masks : (P,) uint8
        Grey masks, laid out like the foregrounds.
    offsets : (F + 1,) int64
        In pixels.
    widths, heights : (F,) int32
        Sizes of the foregrounds in pixels.
    files : mapping of str to tuple of AssetFile
        What the data set keeps, under ``background``, ``foreground`` and ``foreground_mask``.
    """

    backgrounds: npt.NDArray[np.uint8]
    foregrounds: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    files: Mapping[str, tuple[AssetFile, ...]] = field(default_factory=dict, repr=False)

    @property
    def n_backgrounds(self) -> int:
        """Number of backgrounds."""
        return len(self.backgrounds)

    @property
    def n_foregrounds(self) -> int:
        """Number of foregrounds."""
        return len(self.widths)

    def foreground(self, f: int) -> npt.NDArray[np.uint8]:
        """Foreground f as (h, w, 4) uint8; a view."""
        part = self.foregrounds[self.offsets[f] : self.offsets[f + 1]]
        return part.reshape(int(self.heights[f]), int(self.widths[f]), 4)

    def mask(self, f: int) -> npt.NDArray[np.uint8]:
        """Mask of foreground f as (h, w) uint8; a view."""
        part = self.masks[self.offsets[f] : self.offsets[f + 1]]
        return part.reshape(int(self.heights[f]), int(self.widths[f]))

    def fingerprint(self) -> str:
        """SHA-256 of all pixels and sizes: equal exactly where the samples are equal."""
        digest = hashlib.sha256()
        for array in (self.backgrounds, self.foregrounds, self.masks, self.widths, self.heights):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        return digest.hexdigest()

    @classmethod
    def from_arrays(
        cls,
        backgrounds: npt.ArrayLike,
        foregrounds: Sequence[npt.ArrayLike],
        masks: Sequence[npt.ArrayLike] | None = None,
        files: Mapping[str, tuple[AssetFile, ...]] | None = None,
    ) -> Assets:
        """Assets from pictures in memory; everything is copied.

        Parameters
        ----------
        backgrounds : (B, H, W, 3) uint8
        foregrounds : sequence of (h, w, 4) uint8
            Sizes may differ.
        masks : sequence of (h, w) uint8, optional
            The foregrounds' alpha, where not given.

        Raises
        ------
        InputError
            A shape or dtype is another, or nothing or an empty picture was given.
        """
        try:
            frames = np.array(backgrounds, order="C")
        except ValueError:
            raise InputError("backgrounds: got several sizes, expected uint8 (B, H, W, 3)") from None
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise InputError(f"backgrounds: got {frames.dtype} {frames.shape}, expected uint8 (B, H, W, 3)")
        cutouts = [np.asarray(f) for f in foregrounds]
        if not cutouts:
            raise InputError("foregrounds: got none, expected at least one")
        for i, cutout in enumerate(cutouts):
            if cutout.dtype != np.uint8 or cutout.ndim != 3 or cutout.shape[2] != 4 or not cutout.size:
                raise InputError(f"foreground {i}: got {cutout.dtype} {cutout.shape}, expected uint8 (h, w, 4)")
        mattes = [c[..., 3] for c in cutouts] if masks is None else [np.asarray(m) for m in masks]
        if len(mattes) != len(cutouts):
            raise InputError(f"masks: got {len(mattes)}, expected {len(cutouts)}, one a foreground")
        for i, (cutout, matte) in enumerate(zip(cutouts, mattes, strict=True)):
            if matte.dtype != np.uint8 or matte.shape != cutout.shape[:2]:
                raise InputError(f"mask {i}: got {matte.dtype} {matte.shape}, expected uint8 {cutout.shape[:2]}")
        return cls(
            frames,
            np.concatenate([c.reshape(-1, 4) for c in cutouts]),
            np.concatenate([m.reshape(-1) for m in mattes]),
            np.cumsum([0, *(m.size for m in mattes)], dtype=np.int64),
            np.array([m.shape[1] for m in mattes], np.int32),
            np.array([m.shape[0] for m in mattes], np.int32),
            files or {},
        )

    @classmethod
    def from_files(cls, files: Mapping[str, tuple[AssetFile, ...]]) -> Assets:
        """Assets from the files of a data set: exactly what they decode to."""

        def pixels(kind: str, mode: str) -> list[npt.NDArray[np.uint8]]:
            return [np.asarray(_open(file.data).convert(mode)) for file in files[kind]]

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of odd metadata and large frames
                return cls.from_arrays(
                    pixels("background", "RGB"), pixels("foreground", "RGBA"), pixels("foreground_mask", "L"), files
                )
        except Image.DecompressionBombError:
            raise InputError(f"size: expected a frame of at most {2 * MAX_PIXELS:,} pixels") from None


def find_sources(
    backgrounds: str | os.PathLike[str],
    foregrounds: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
) -> Sources:
    """The pictures of the given folders, paired and in order.

    Parameters
    ----------
    backgrounds, foregrounds : path
        Folders of pictures; each is sorted by name.
    masks : path, optional
        Folder of masks: a foreground's stem, also with the prefix ``mask_`` or the suffix ``_mask``.

    Raises
    ------
    InputError
        A folder is missing or empty. Of single entries (two files share a stem, a foreground has no mask or two, a
        link leads nowhere) the result's ``problems`` tell.
    """
    missing = False
    problems: list[str] = []
    notes: list[str] = []

    def listed(folder: str | os.PathLike[str], option: str) -> list[Path]:
        nonlocal missing
        try:
            paths, more = list_pictures(folder, option, problems)
        except InputError as error:
            missing = True
            problems.extend(error.problems)
            return []
        notes.extend(more)
        return paths

    behind = listed(backgrounds, "backgrounds")
    before = listed(foregrounds, "foregrounds")
    before_masks = len(problems)
    by_stem = {} if masks is None else {_stem(path): path for path in listed(masks, "masks")}
    masks_told = len(problems) > before_masks  # then a foreground's may be among those that can't be used
    if missing:
        raise InputError(*problems)
    if masks is None:
        return Sources(tuple(behind), tuple(before), None, tuple(notes), tuple(problems))
    cut_out: list[Path] = []
    paired: list[Path] = []
    for path in before:
        names = (_stem(path), f"mask_{_stem(path)}", f"{_stem(path)}_mask")
        found = [by_stem.pop(name) for name in names if name in by_stem]
        if len(found) == 1:
            cut_out.append(path)
            paired.append(found[0])
        elif found:
            both = " and ".join(printable(p.name) for p in found)
            problems.append(f"{printable(path)}: two masks: {both}; remove one")
        elif not masks_told:
            expected = " or ".join(printable(name) for name in names)
            problems.append(
                f"{printable(path)}: a foreground without a mask in {printable(masks)} "
                f"(expected {expected}); add it or remove the foreground"
            )
    if by_stem and not problems:
        strays = ", ".join(printable(p.name) for p in by_stem.values())
        notes.append(f"masks: no foreground for {strays}; not used")
    return Sources(tuple(behind), tuple(cut_out), tuple(paired), tuple(notes), tuple(problems))


def _stem(path: Path) -> str:
    """A file's stem in one spelling: file systems differ in how they compose accents."""
    return unicodedata.normalize("NFC", path.stem)


def prepare(
    backgrounds: str | os.PathLike[str],
    foregrounds: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
    workers: int = 1,
) -> Assets:
    """Validated and prepared assets of the given folders; nothing is written.

    Parameters
    ----------
    backgrounds, foregrounds, masks : path
        As for `find_sources`.
    recipe : Recipe, optional
        Gives the frame's size and the foregrounds' height.
    workers : int
        Threads that decode.

    Raises
    ------
    InputError
        Some pictures can't be used: all of them are named.

    Warns
    -----
    GpufgbgWarning
        About what is odd but usable.
    """
    sources = find_sources(backgrounds, foregrounds, masks)
    return prepare_sources(sources, recipe or Recipe(), workers)


def prepare_sources(sources: Sources, recipe: Recipe, workers: int = 1) -> Assets:
    """Like `prepare`, for sources that are already found."""
    for note in sources.notes:
        warnings.warn(note, GpufgbgWarning, stacklevel=2)
    masks: Sequence[Path | None] = sources.masks or [None] * len(sources.foregrounds)
    pairs = list(zip(sources.foregrounds, masks, strict=True))
    with quiet_decoding, ThreadPoolExecutor(max(1, workers)) as pool:
        behind = list(pool.map(lambda path: _background(path, recipe), sources.backgrounds))
        before = list(pool.map(lambda pair: _foreground(pair[0], pair[1], recipe), pairs))
    raise_all([*sources.problems, *(p for _, problems, _ in (*behind, *before) for p in problems)])
    for _, _, notes in (*behind, *before):
        for note in notes:
            warnings.warn(note, GpufgbgWarning, stacklevel=2)
    return Assets.from_files(
        {
            "background": tuple(files[0] for files, _, _ in behind),
            "foreground": tuple(files[0] for files, _, _ in before),
            "foreground_mask": tuple(files[1] for files, _, _ in before),
        }
    )


_Prepared = tuple[tuple[AssetFile, ...], list[str], list[str]]  # files, problems, notes


def _read(path: Path, problems: list[str], notes: list[str]) -> Picture | None:
    try:
        picture = read_picture(path)
    except PictureError as error:
        problems.append(f"{printable(path)}: {error}")
        return None
    notes.extend(picture.notes)
    return picture


def _background(path: Path, recipe: Recipe) -> _Prepared:
    problems: list[str] = []
    notes: list[str] = []
    picture = _read(path, problems, notes)
    if picture is None:
        return (), problems, notes
    image = picture.image
    if picture.has_alpha and np.asarray(image)[..., 3].min() < 255:
        notes.append(f"{printable(path)}: a background's transparency is not used, only its colours")
    source = printable(path.name)
    kept = picture.as_is and picture.is_baseline_jpeg and image.mode == "RGB"
    if kept and image.size == recipe.size:
        return (AssetFile(picture.data, source),), problems, notes
    return (AssetFile(_jpeg(_resized(image.convert("RGB"), recipe.size)), source),), problems, notes


def _foreground(path: Path, mask_path: Path | None, recipe: Recipe) -> _Prepared:
    problems: list[str] = []
    notes: list[str] = []
    picture = _read(path, problems, notes)
    mask = _read(mask_path, problems, notes) if mask_path else None
    if picture is None or (mask_path and mask is None):
        return (), problems, notes
    name, image = printable(path), picture.image
    if mask is None and not picture.has_alpha:
        problems.append(f"{name}: no alpha and no mask: expected a cut-out with transparency, or a folder of masks")
    if mask is not None and mask.image.size != image.size:
        problems.append(
            f"{printable(mask.path)}: the mask is {_size(mask.image)}, its foreground "
            f"{printable(path.name)} is {_size(image)}: expected one size"
        )
    width, height = _scaled(image.size, recipe.foreground_height)
    if width > recipe.width:
        problems.append(
            f"{name}: {_size(image)} is {width}x{height} when scaled, which does not fit the frame of "
            f"{recipe.width}x{recipe.height}: lower foreground_height or raise size"
        )
    if problems:
        return (), problems, notes
    grey = None if mask is None else _grey(mask.image)
    if not picture.has_alpha:  # then there is a mask, and it cuts the foreground out
        image = image.convert("RGB")
        image.putalpha(grey if grey is not None else 255)
    size, source = (width, height), printable(path.name)
    scaled = _resized(image, size)
    alpha = image.getchannel("A")
    if scaled.getchannel("A").getextrema()[1] == 0:
        when = " when scaled" if alpha.getextrema()[1] else ""
        problems.append(f"{name}: fully transparent{when}: nothing of it would be seen; remove it")
    elif alpha.getextrema()[0] == 255:
        notes.append(f"{name}: opaque everywhere: it is pasted as a rectangle")
    matte = _resized(alpha if grey is None else grey, size)
    if mask is not None and matte.getextrema()[1] == 0:
        when = " when scaled" if grey is not None and grey.getextrema()[1] else ""
        problems.append(f"{printable(mask.path)}: black everywhere{when}: a mask needs some white")
    if problems:
        return (), problems, notes
    own = picture.as_is and picture.format == "PNG" and picture.image.mode == "RGBA"
    cutout = AssetFile(picture.data if own and image.size == size else _png(scaled), source)
    if mask is None:
        return (cutout, AssetFile(_jpeg(matte), source)), problems, notes
    kept = mask.as_is and mask.is_baseline_jpeg and mask.image.mode == "L" and mask.image.size == size
    return (cutout, AssetFile(mask.data if kept else _jpeg(matte), printable(mask.path.name))), problems, notes


def _grey(mask: Image.Image) -> Image.Image:
    """A mask's grey: its luma, black where it is fully transparent; its alpha where the colour says nothing."""
    if mask.mode != "RGBA":
        return mask.convert("L")
    luma = np.asarray(mask.convert("L"))
    alpha = np.asarray(mask)[..., 3]
    seen = luma[alpha > 0]
    if seen.size and alpha.min() < alpha.max() and seen.min() == seen.max():
        return Image.fromarray(alpha)
    return Image.fromarray(np.where(alpha > 0, luma, 0).astype(np.uint8))


def _scaled(size: tuple[int, int], height: int) -> tuple[int, int]:
    """Size in proportion at the given height; the width rounds half up, in whole numbers."""
    return max(1, (2 * size[0] * height + size[1]) // (2 * size[1])), height


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=SAVED_QUALITY, subsampling="4:4:4", exif=b"")
    return file.getvalue()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image
