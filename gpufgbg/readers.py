"""Reading data sets from disk: folder tree, zip or tar shards, ours or anybody's with these names.

A picture's kind is told by its folder (``fg_bg/``, wherever in the path it stands) or, in tar shards, by its ending
(``.composite.jpg``). Nothing is asked of a file before it is read, and a reader does few operations in Python: a data
set has a million files, and there is one interpreter lock.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from PIL import Image, UnidentifiedImageError

from gpufgbg.exceptions import DatasetError, printable
from gpufgbg.layout import KINDS, TAR_SUFFIXES
from gpufgbg.urls import is_url, local_path

__all__ = ["StoredPicture", "scan", "scan_labels"]

_LABELS = "labels"
_KIND_OF_FOLDER = {folder: kind for kind, folder in KINDS.items()}
_KIND_OF_SUFFIX = {f".{suffix}": kind for kind, suffix in TAR_SUFFIXES.items()}
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_READ_BYTES = 1 << 16  # asked for at once: a picture of a data set in most cases
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe is opened at once, too
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's member: signature, lengths of its name and of what follows


class StoredPicture(NamedTuple):
    """A picture of a data set, wherever it is stored.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    place : str
        The folder or archive that the path belongs to, with what stands between the two in a message.
    path : str
        In the data set, with slashes: ``fg_bg/bg_00/bg_00_fg_00_T_000000.jpg``.
    read : callable
        Gives the encoded picture's bytes; safe to call from any thread. Call `load`, whose errors are ours.
    """

    kind: str
    place: str
    path: str
    read: Callable[[], bytes]

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return printable(self.place + self.path)

    @property
    def key(self) -> str:
        """What the pictures of one sample share: the path below their kind's folder, without the ending."""
        for suffix in _KIND_OF_SUFFIX:
            if self.path.endswith(suffix):
                return self.path.removesuffix(suffix)
        below = f"/{self.path}".rpartition(f"/{KINDS[self.kind]}/")[2]
        return below.rpartition(".")[0]

    @property
    def portable(self) -> bool:
        """Whether another process of this machine can be given it, to read it there."""
        function = getattr(self.read, "func", None)
        return function in (read_file, _read_stored) or getattr(function, "__func__", None) is _File.read

    def load(self) -> bytes:
        """The encoded picture's bytes.

        Raises
        ------
        DatasetError
            It can't be read.
        """
        try:
            return self.read()
        except OSError as error:
            raise DatasetError(f"{self.name}: can't be read: {error.strerror or error}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise DatasetError(f"{self.name}: can't be read: {error}") from None


def _is_hidden(path: str) -> bool:
    """Whether a path in an archive is a system's own, as macOS writes them (``._NAME``, ``__MACOSX/``), or hidden."""
    path = "/" + path.removeprefix("./")
    return "/." in path or "/__MACOSX/" in path


def kind_of(path: str) -> str | None:
    """The kind of picture that a path in a data set names, or None."""
    if not path.lower().endswith(_ENDINGS) or _is_hidden(path):
        return None
    for suffix, kind in _KIND_OF_SUFFIX.items():
        if path.endswith(suffix):
            return kind
    for part in reversed(path.split("/")[:-1]):
        if part in _KIND_OF_FOLDER:
            return _KIND_OF_FOLDER[part]
    return None


def _is_labels(path: str) -> str | None:
    found = path.endswith(".txt") and _LABELS in path.split("/")[:-1] and not _is_hidden(path)
    return _LABELS if found else None


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
    found = False
    for picture in _scan(path, _KIND_OF_FOLDER, kind_of):
        found = True
        yield picture
    if not found:
        folders = ", ".join(f"{folder}/" for folder in KINDS.values())
        raise DatasetError(f"{printable(path)}: no pictures of a data set in it: expected {folders}")


def scan_labels(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes]]:
    """(where it is, content) of each text file in a data set's ``labels/``; nothing where there is none.

    Raises
    ------
    DatasetError
        A file can't be read, or an archive is damaged.
    """
    for file in _scan(path, {_LABELS: _LABELS}, _is_labels):
        if file.path.endswith(".txt"):
            yield file.name, file.load()


def _scan(
    path: str | os.PathLike[str], folders: dict[str, str], kind_of: Callable[[str], str | None]
) -> Iterator[StoredPicture]:
    """Files of a data set: in a tree those in ``folders`` (name to kind), in an archive those with a kind."""
    if is_url(path):
        from gpufgbg.remote.readers import scan_store

        yield from scan_store(str(path), folders, kind_of)
        return
    root = local_path(path)
    if root.is_file():
        yield from _archive(root, kind_of)
    elif root.is_dir():
        archives = [root / "dataset.zip"] if (root / "dataset.zip").is_file() else []
        zipped = bool(archives)
        if not zipped:  # beside tar shards stand the assets; a zip holds everything
            yield from _tree(root, folders)
            archives = [*sorted(root.glob("*.tar")), *sorted(root.glob("shards/*.tar"))]
        for archive in archives:
            yield from _archive(archive, kind_of)
    else:
        raise DatasetError(f"{printable(root)}: no such file or folder: expected a data set")


def _tree(root: Path, folders: dict[str, str]) -> Iterator[StoredPicture]:
    for folder in sorted(_data_folders(root, folders)):
        kind = folders[folder.name]
        place = os.path.join(folder.parent, "")  # noqa: PTH118  # with the separator
        met: set[str] = set()  # links may lead round in a circle
        for parent, subfolders, names in os.walk(folder, onerror=_refused, followlinks=True):
            real = os.path.realpath(parent)
            if real in met:
                subfolders.clear()
                continue
            met.add(real)
            subfolders[:] = sorted(name for name in subfolders if not _is_hidden(f"{name}/"))
            below = os.path.relpath(parent, folder.parent).replace(os.sep, "/")
            for name in sorted(names):
                if (kind == _LABELS or name.lower().endswith(_ENDINGS)) and not name.startswith("."):
                    reader = functools.partial(read_file, f"{parent}{os.sep}{name}")
                    yield StoredPicture(kind, place, f"{below}/{name}", reader)


def _refused(error: OSError) -> NoReturn:
    raise DatasetError(f"{printable(error.filename)}: can't be read: {error.strerror}") from None


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, quickly; `OSError` also where it is a pipe or a device, for which nobody waits."""
    descriptor = os.open(path, _READ_FLAGS)
    try:
        parts = [os.read(descriptor, _READ_BYTES)]
        if len(parts[0]) in (0, _READ_BYTES) and not stat.S_ISREG(os.fstat(descriptor).st_mode):  # empty, or endless
            raise OSError("neither a file nor a folder: remove it")
        while len(parts[-1]) == _READ_BYTES:  # a file gives less than asked for at its end alone
            parts.append(os.read(descriptor, _READ_BYTES))
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _data_folders(root: Path, names: Iterable[str]) -> list[Path]:
    """The folders called so in ``root``, or one level below it as in an unpacked archive."""
    try:
        parents = [root, *(c for c in root.iterdir() if c.is_dir() and not c.name.startswith("."))]
        found = [parent / name for parent in parents for name in names if (parent / name).is_dir()]
    except OSError as error:
        _refused(error)
    return [folder for folder in found if folder.parent == root] or found


# -- archives -------------------------------------------------------------------------------------------


class _File:
    """A file that any threads read parts of; closed when the last reader is gone. Pickled, it is opened again."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self._path,)

    def read(self, start: int, size: int) -> bytes:
        """``size`` bytes, fewer at the file's end."""
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, start)
        with self._lock:
            self._file.seek(start)
            return self._file.read(size)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never opened
            self._file.close()


@functools.lru_cache(maxsize=16)
def _opened(path: Path) -> _File:
    return _File(path)


def _archive(path: Path, kind_of: Callable[[str], str | None]) -> Iterator[StoredPicture]:
    try:
        if zipfile.is_zipfile(path):
            yield from _zip(path, kind_of)
        elif tarfile.is_tarfile(path):
            yield from _tar(path, kind_of)
        else:
            raise DatasetError(
                f"{printable(path)}: neither a zip nor a tar file: expected a data set's folder or archive"
            )
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{printable(path)}: damaged: {error}") from None
    except OSError as error:
        raise DatasetError(f"{printable(path)}: can't be read: {error.strerror or error}") from None


def _zip(path: Path, kind_of: Callable[[str], str | None]) -> Iterator[StoredPicture]:
    archive, file = zipfile.ZipFile(path), _File(path)
    for info in archive.infolist():
        kind = kind_of(info.filename)
        if kind and not info.is_dir():
            plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            reader = functools.partial(_read_stored, file, info) if plain else functools.partial(archive.read, info)
            yield StoredPicture(kind, f"{path}:", info.filename, reader)


def _read_stored(file: _File, info: zipfile.ZipInfo) -> bytes:
    """A stored member's bytes, without the lock of Python's reader."""
    header = file.read(info.header_offset, _LOCAL_HEADER.size)
    if len(header) == _LOCAL_HEADER.size:
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        data = file.read(info.header_offset + _LOCAL_HEADER.size + name + extra, info.file_size)
        if signature == b"PK\3\4" and len(data) == info.file_size and zlib.crc32(data) == info.CRC:
            return data
    raise zipfile.BadZipFile("damaged: its length or checksum is not what the archive says")


def _tar(path: Path, kind_of: Callable[[str], str | None]) -> Iterator[StoredPicture]:
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115
    except tarfile.ReadError:
        raise DatasetError(f"{printable(path)}: a compressed tar file: unpack it first") from None
    file = _File(path)
    with archive:
        for info in archive:
            kind = kind_of(info.name)
            archive.members = []  # type: ignore[attr-defined]  # or it keeps all, and memory grows with the archive
            if kind and info.isfile():
                reader = functools.partial(file.read, info.offset_data, info.size)
                yield StoredPicture(kind, f"{path}:", info.name, reader)


def decode(picture: StoredPicture) -> Image.Image:
    """A stored picture as a loaded PIL image.

    Raises
    ------
    DatasetError
        It can't be read or decoded.
    """
    return decode_bytes(picture.name, picture.load())


def decode_bytes(name: str, data: bytes) -> Image.Image:
    """An encoded picture as a loaded PIL image; ``name`` is for the message of `DatasetError`."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except UnidentifiedImageError:
        raise DatasetError(f"{name}: can't be decoded: not a picture, or its beginning is damaged") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        reason = printable(error).strip() or type(error).__name__
        raise DatasetError(f"{name}: can't be decoded: {reason}") from None
