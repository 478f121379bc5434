"""Files that appear whole or not at all, and the file system's refusals as errors of ours."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gpufgbg.exceptions import StorageError, printable

__all__ = [
    "atomic_path",
    "fsync_folder",
    "local_prefix",
    "process_is_gone",
    "remove_orphans",
    "remove_tree",
    "storage_errors",
    "sync_file_system",
    "this_machine",
    "write_atomic",
]


def write_atomic(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write a file that appears under its name only once it is whole and on the disk.

    Parameters
    ----------
    path : Path
        Its folder is created if needed. Whatever had the name is replaced.
    data : bytes
    scratch : Path, optional
        Folder on the same file system where the unfinished file lies, so that a kill leaves nothing beside ``path``;
        by default the folder of ``path``.
    """
    with atomic_path(path, scratch) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_path(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A name to write a file to inside the block; after it the file is made durable and renamed to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = scratch or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    # In a scratch folder, which is one run's at a time, the next takes the place of what a killed one left. Elsewhere
    # several may write the same: other machines have our process's number too.
    other = "" if scratch else f".{secrets.token_hex(4)}"
    temporary = folder / f".{path.name}{other}.tmp"
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries durable, where the platform knows how."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_syncfs() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)


_syncfs = _find_syncfs()


def sync_file_system(folder: Path) -> None:
    """Make everything written so far on the folder's file system durable, with one call for many files."""
    if _syncfs is None:
        if hasattr(os, "sync"):
            os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if _syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fspath(folder))
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours and all in it; nothing happens where it is gone already."""
    shutil.rmtree(folder, ignore_errors=True)


def this_machine() -> str:
    """This machine since it was started, as far as processes see each other."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        name += Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        name += str(Path("/proc/self/ns/pid").readlink())
    return name


def process_is_gone(number: int) -> bool:
    """Whether this machine surely has no process of this number."""
    if os.name == "nt":  # where signal 0 is none
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def local_prefix(process: int | str | None = None) -> str:
    """With what names of this process's folders in TMPDIR begin, so that they can be told from a dead one's."""
    machine = hashlib.sha256(this_machine().encode()).hexdigest()[:8]
    return f"gpufgbg-{machine}-{os.getpid() if process is None else process}-"


def remove_orphans() -> None:
    """Remove folders in TMPDIR that processes of this machine left which were killed."""
    for path in Path(tempfile.gettempdir()).glob(local_prefix("*") + "*"):
        number = path.name.split("-")[2]
        if number.isdecimal() and process_is_gone(int(number)):
            remove_tree(path)


_REFUSALS = {
    errno.ENOSPC: "no space left on the disk of {path}; {kept}free some and run the same command again",
    errno.EDQUOT: "the disk quota is used up at {path}; {kept}free some and run the same command again",
    errno.EACCES: "no permission to write {path}: choose another folder or change its permissions",
    errno.EPERM: "no permission to write {path}: choose another folder or change its permissions",
    errno.ENOTDIR: "{path}: a part of this path is not a folder: choose another",
    errno.EROFS: "{path} is on a read-only file system: choose another folder",
    errno.ENAMETOOLONG: "{path}: the name is too long for this file system: choose a shorter folder",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n) or use fewer workers",
    errno.EFBIG: "{path}: larger than its file system or ulimit -f allows; {kept}raise it, or choose another folder",
    errno.EIO: "{path}: the disk reports an input/output error; {kept}run the same command again",
}


@contextlib.contextmanager
def storage_errors(out: Path, kept: Callable[[], str] | str = "") -> Iterator[None]:
    """Turn the file system's refusals inside the block into one-line `StorageError`.

    Parameters
    ----------
    out : Path
        Named where the error names no file.
    kept : str or callable
        What is safe so far, for messages about a run that can go on; ends in ``"; "`` or is empty.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        text = kept() if callable(kept) else kept
        named = error.filename2 or error.filename
        where = printable(os.fsdecode(named) if isinstance(named, (str, bytes, os.PathLike)) else out)
        reason = _REFUSALS.get(error.errno or 0, f"{{path}}: {printable(error.strerror or error)}; {{kept}}")
        if error.errno in (errno.EACCES, errno.EPERM) and os.access(where, os.F_OK) > os.access(where, os.R_OK):
            reason = "no permission to read {path}: change its permissions"
        raise StorageError(reason.format(path=where, kept=text).removesuffix("; ")) from error
