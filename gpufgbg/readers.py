"""Reading data sets from disk: folder tree, zip or tar shards, ours or anybody's with these names.

A picture's kind is told by its folder (``fg_bg/``, wherever in the path it stands) or, in tar shards, by its ending
(``.composite.jpg``).
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gpufgbg.exceptions import DatasetError, printable
from gpufgbg.layout import KINDS, TAR_SUFFIXES
from gpufgbg.urls import is_url, local_path

__all__ = ["StoredPicture", "scan"]

_KIND_OF_FOLDER = {folder: kind for kind, folder in KINDS.items()}
_KIND_OF_SUFFIX = {f".{suffix}": kind for kind, suffix in TAR_SUFFIXES.items()}
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class StoredPicture:
    """A picture of a data set, wherever it is stored.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    name : str
        Where it is, for messages.
    size_bytes : int
        Length of the encoded picture.
    read : callable
        Gives the encoded picture's bytes; safe to call from any thread.
    """

    kind: str
    name: str
    size_bytes: int
    read: Callable[[], bytes]


def kind_of(path: str) -> str | None:
    """The kind of picture that a path in a data set names, or None."""
    if not path.lower().endswith(_ENDINGS):
        return None
    for suffix, kind in _KIND_OF_SUFFIX.items():
        if path.endswith(suffix):
            return kind
    for part in reversed(path.split("/")[:-1]):
        if part in _KIND_OF_FOLDER:
            return _KIND_OF_FOLDER[part]
    return None


def scan(path: str | os.PathLike[str]) -> Iterator[StoredPicture]:
    """All pictures of a data set, sorted within each folder or archive; none is read yet.

    Parameters
    ----------
    path : path or URL
        A folder with a tree, with ``dataset.zip`` or with tar shards in it, or a zip or tar file itself.

    Raises
    ------
    DatasetError
        There is nothing of a data set at the path, or an archive is damaged.
    """
    root = local_path(path)
    if is_url(path):
        from gpufgbg.remote.readers import scan_store

        sources = [scan_store(str(path))]
    elif root.is_file():
        sources = [_archive(root)]
    elif root.is_dir():
        archives = [root / "dataset.zip"] if (root / "dataset.zip").is_file() else []
        if not archives:
            archives = [*sorted(root.glob("*.tar")), *sorted(root.glob("shards/*.tar"))]
        in_archives = bool(archives)
        zipped = in_archives and archives[0].suffix == ".zip"
        sources = [_archive(archive) for archive in archives]
        if not zipped:  # beside tar shards stand the assets; a zip holds everything
            sources.insert(0, _tree(root))
    else:
        raise DatasetError(f"{printable(root)}: no such file or folder: expected a data set")
    found = False
    for source in sources:
        for picture in source:
            found = True
            yield picture
    if not found:
        folders = ", ".join(f"{folder}/" for folder in KINDS.values())
        raise DatasetError(
            f"{printable(path if is_url(path) else root)}: no pictures of a data set in it: expected {folders}"
        )


def _tree(root: Path) -> Iterator[StoredPicture]:
    for folder in sorted(_data_folders(root)):
        kind = _KIND_OF_FOLDER[folder.name]
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(_ENDINGS) and not name.startswith("."):
                    path = Path(parent, name)
                    yield StoredPicture(kind, os.fspath(path), path.stat().st_size, path.read_bytes)


def _data_folders(root: Path) -> list[Path]:
    """The folders of KINDS in ``root``, or one level below it as in an unpacked archive."""
    here = [root / name for name in _KIND_OF_FOLDER if (root / name).is_dir()]
    if here:
        return here
    return [
        child / name
        for child in root.iterdir()
        if child.is_dir() and not child.name.startswith(".")
        for name in _KIND_OF_FOLDER
        if (child / name).is_dir()
    ]


def _archive(path: Path) -> Iterator[StoredPicture]:
    try:
        if zipfile.is_zipfile(path):
            yield from _zip(path)
        elif tarfile.is_tarfile(path):
            yield from _tar(path)
        else:
            raise DatasetError(
                f"{printable(path)}: neither a zip nor a tar file: expected a data set's folder or archive"
            )
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{printable(path)}: damaged: {error}") from None


def _zip(path: Path) -> Iterator[StoredPicture]:
    archive = zipfile.ZipFile(path)
    for info in archive.infolist():
        kind = kind_of(info.filename)
        if kind and not info.is_dir():
            yield StoredPicture(
                kind,
                f"{path}:{info.filename}",
                info.file_size,
                functools.partial(archive.read, info),
            )


def _tar(path: Path) -> Iterator[StoredPicture]:
    def read(offset: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115
    except tarfile.ReadError:
        raise DatasetError(f"{printable(path)}: a compressed tar file: unpack it first") from None
    with archive:
        for info in archive:
            kind = kind_of(info.name)
            archive.members = []  # type: ignore[attr-defined]  # or it keeps all, and memory grows with the archive
            if kind and info.isfile():
                yield StoredPicture(
                    kind, f"{path}:{info.name}", info.size, functools.partial(read, info.offset_data, info.size)
                )


def decode(picture: StoredPicture) -> Image.Image:
    """A stored picture as a loaded PIL image.

    Raises
    ------
    DatasetError
        It can't be decoded.
    """
    try:
        image = Image.open(io.BytesIO(picture.read()))
        image.load()
        return image
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{printable(picture.name)}: can't be decoded: {error}") from None
