"""A folder of a store: few operations, each tried again where the store falters.

Stores answer with errors, late, or not at all, and connections are cut, also after a request was carried out. All
operations here may be carried out twice without harm: objects are written whole, with bytes that depend on their
name alone or by one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import functools
import importlib
import inspect
import io
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from gpufgbg.exceptions import OptionError, StorageError, printable
from gpufgbg.urls import checked_url

__all__ = ["RemotePath", "Store"]

_ATTEMPTS = 8  # over some two minutes, beside those that the store's own package makes
_FIRST_ATTEMPTS = 2  # of the first access, which tells of wrong names
_SILENT_ATTEMPTS = 2  # that end without any answer, each after its deadline
_DEADLINE_S = 60.0  # for a request's answer, besides
_SLOWEST = 100_000  # bytes a second, at which large ones are sent and read
_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_REQUESTS = 32  # at a time
_REMOVED = 1000  # objects by a request, where the store takes several
PART_BYTES = 32 << 20  # of a multipart upload: each is a request, and stores limit those a second
_LISTED_BYTES = 60 << 20  # of a long list: its requests follow one another
_READ_BYTES = 16 << 20  # at a time, of an object that is read front to back
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # extras of ours that have the scheme's package
#: stores that show an object once its upload is complete; elsewhere it is uploaded aside and renamed
_WHOLE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "memory")
_IN_BULK = ("s3", "s3a")  # that remove many objects by one request, and none of them is gone
_IN_PARTS = ("s3", "s3a", "gs", "gcs")  # uploads that take a part's size
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "RefreshError",
                   "DefaultCredentialsError")  # fmt: skip
_SECRETS = re.compile(r"//[^/\s@]*@|[?&][^\s\"']*")

_T = TypeVar("_T")


class Store:
    """A folder by its URL; nothing is connected before the first operation.

    Picklable, like its paths: the URL is all that is sent. Credentials are those of the machine where it is used.

    Parameters
    ----------
    url : str
        ``s3://BUCKET/FOLDER`` or of any other scheme that fsspec knows.

    Raises
    ------
    OptionError
        There is a credential in the URL, or more than a folder.
    """

    def __init__(self, url: str) -> None:
        self.url = checked_url(url)
        self.scheme = self.url.partition("://")[0].lower()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    @functools.cached_property
    def _opened(self) -> tuple[Any, str]:
        try:
            fsspec = importlib.import_module("fsspec")
            fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(self.scheme, "s3")
            package = error.name or "the scheme's package"
            raise OptionError(
                "out", f"{printable(self.url)}: {package} is not installed (pip install 'gpufgbg[{extra}]')"
            ) from None
        except ValueError as error:
            raise OptionError("out", f"{printable(self.url)}: {_reason(error)}") from None
        return fs, root.rstrip("/")

    @functools.cached_property
    def _read_options(self) -> dict[str, Any]:
        """Of reading: versions of s3fs that know of several requests at a time ask for the length before them."""
        if self.scheme not in ("s3", "s3a"):
            return {}
        known = inspect.signature(type(self._opened[0])._cat_file).parameters
        return {"max_concurrency": 1} if "max_concurrency" in known else {}

    def _path(self, key: str) -> str:
        root = self._opened[1]
        return f"{root}/{key}" if key else root

    def _call(self, name: str, *given: Any, size: int = 0, **options: Any) -> Any:
        """Call a method of the file system; `TimeoutError` where a request of ``size`` bytes finds no answer."""
        fs = self._opened[0]
        if not getattr(fs, "async_impl", False) or not hasattr(fs, f"_{name}"):
            return getattr(fs, name)(*given, **options)
        deadline_s = _DEADLINE_S + size / _SLOWEST
        begun = time.monotonic()
        try:
            return _sync()(fs.loop, getattr(fs, f"_{name}"), *given, timeout=deadline_s, **options)
        except (TimeoutError, asyncio.TimeoutError):
            if time.monotonic() - begun < deadline_s - 1:
                raise  # of the store's own package
            raise _Silent(f"no answer within {deadline_s:.0f} s") from None

    def _tried(self, call: Callable[[], _T], attempts: int = 0, absent: bool = True) -> _T:
        """What ``call`` gives, tried again after failures that may pass.

        ``absent``: `FileNotFoundError` is an answer. Of an upload it is not: the retry of one that was complete finds
        it gone.
        """
        attempts = attempts or _ATTEMPTS
        silent = 0
        for attempt in range(1, attempts + 1):
            try:
                return call()
            except _Silent as error:
                reason, silent = str(error), silent + 1
                if silent >= _SILENT_ATTEMPTS:
                    attempts = attempt
                    break
            except FileNotFoundError:
                if absent:
                    raise
                reason = "the store says that there is no such object"
            except TypeError:
                raise  # of a package of another version, or a mistake: it does not pass
            except PermissionError as error:
                raise StorageError(
                    f"{printable(self.url)}: access denied: {_reason(error)}: check the credentials, which come from "
                    "the environment or their usual files, and what they allow"
                ) from None
            except Exception as error:
                if type(error).__name__ in _NO_CREDENTIALS:
                    raise StorageError(
                        f"{printable(self.url)}: no credentials: {_reason(error)}: set them in the environment or in "
                        "their usual files"
                    ) from None
                reason = _reason(error)
            if attempt < attempts:
                time.sleep(min(_LONGEST_WAIT_S, _WAIT_S * 2**attempt) * random.uniform(0.5, 1))
        raise StorageError(f"{printable(self.url)}: {reason} ({attempts} attempts): run the same command again")

    def check(self) -> None:
        """Raise `StorageError` where the folder can't be written: no bucket, no rights, nobody there."""
        key = self._path(f".gpufgbg/probe-{uuid.uuid4().hex}")

        def probe() -> None:
            if self.scheme not in _WHOLE:
                self._call("makedirs", key.rpartition("/")[0], exist_ok=True)
            self._call("pipe_file", key, b"?")

        try:
            self._tried(probe, _FIRST_ATTEMPTS)
        except FileNotFoundError as error:
            raise StorageError(
                f"{printable(self.url)}: no such bucket: {_reason(error)}: create it, or choose another"
            ) from None
        self._tried(lambda: self._call("rm_file", key), absent=False)

    # -- objects ------------------------------------------------------------------------------------

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """An object's bytes, or those from ``start`` to ``stop``; `FileNotFoundError` where there is none."""
        path, options = self._path(key), self._read_options
        size = stop - (start or 0) if stop is not None else _READ_BYTES

        def whole() -> bytes:
            data: bytes = self._call("cat_file", path, start=start, end=stop, size=size, **options)
            if start is not None and stop is not None and len(data) != stop - start:
                raise OSError(f"got {len(data)} bytes of {stop - start}")
            return data

        return self._tried(whole)

    def read_many(self, keys: Iterable[str]) -> Iterator[bytes]:
        """The bytes of several objects, in order."""
        return self.read_parts((key, None, None) for key in keys)

    def read_parts(self, parts: Iterable[tuple[str, int | None, int | None]]) -> Iterator[bytes]:
        """The bytes of several (object, start, stop), in order; some are on their way at a time."""
        parts = list(parts)
        if not parts:
            return
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from pool.map(lambda part: self.read(*part), parts)

    def size(self, key: str) -> int:
        """An object's length in bytes; `FileNotFoundError` where there is none."""
        path = self._path(key)
        return int(self._tried(lambda: self._call("info", path))["size"])

    def list(self, key: str) -> dict[str, int]:
        """Names and lengths of what is in a folder, sorted; folders have -1. Nothing where there is no folder."""
        path = self._path(key)
        try:
            found = self._tried(lambda: self._call("ls", path, detail=True, size=_LISTED_BYTES))
        except FileNotFoundError:
            return {}
        names = {}
        for entry in found:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if name and entry["name"].strip("/") != path.strip("/"):
                names[name] = -1 if entry["type"] == "directory" else int(entry["size"] or 0)
        return dict(sorted(names.items()))

    def write(self, key: str, data: bytes) -> None:
        """Write an object, whole."""
        self._put(key, lambda path: self._call("pipe_file", path, data, size=len(data)))

    def write_many(self, items: Mapping[str, bytes]) -> None:
        """Write several objects; all are there when it returns."""
        self._each(lambda item: self.write(*item), items.items())

    def upload(self, source: Path, key: str) -> None:
        """Write a file's bytes as an object, in parts where it is large; it appears whole."""
        options = {"chunksize": PART_BYTES} if self.scheme in _IN_PARTS else {}
        size = source.stat().st_size
        self._put(key, lambda path: self._call("put_file", str(source), path, size=size, **options))

    def upload_many(self, items: Mapping[str, Path]) -> None:
        """Upload several files; all are there when it returns."""
        self._each(lambda item: self.upload(item[1], item[0]), items.items())

    def _put(self, key: str, put: Callable[[str], Any]) -> None:
        path = self._path(key)
        if self.scheme in _WHOLE:
            self._tried(lambda: put(path), absent=False)
            return
        aside = self._path(f".gpufgbg/scratch/{uuid.uuid4().hex}")

        def moved() -> None:
            for folder in (aside, path):
                self._call("makedirs", folder.rpartition("/")[0], exist_ok=True)
            put(aside)
            self._opened[0].mv(aside, path)

        self._tried(moved, absent=False)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects; nothing happens where one is gone."""
        keys = list(keys)
        if len(keys) > 1 and self.scheme in _IN_BULK and not any(c in self.url for c in "*?["):
            groups = [keys[at : at + _REMOVED] for at in range(0, len(keys), _REMOVED)]
            self._each(lambda group: self._gone("rm", [self._path(key) for key in group]), groups)
        else:
            self._each(lambda key: self._gone("rm_file", self._path(key)), keys)

    def _gone(self, call: str, what: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda: self._call(call, what))

    @staticmethod
    def _each(call: Callable[[_T], None], items: Iterable[_T]) -> None:
        items = list(items)
        if len(items) < 2:
            for item in items:
                call(item)
            return
        with ThreadPoolExecutor(_REQUESTS) as pool:
            for _ in pool.map(call, items):
                pass


class _Silent(Exception):
    """A request that found no answer before its deadline."""


def _sync() -> Callable[..., Any]:
    """What runs a coroutine of fsspec to its end, with a deadline."""
    sync: Callable[..., Any] = importlib.import_module("fsspec.asyn").sync
    return sync


def _reason(error: BaseException) -> str:
    """An error's first line, without what may be secret."""
    text = (str(error).strip().splitlines() or [""])[0]
    return printable(_SECRETS.sub("", text)[:200]).rstrip(".") or type(error).__name__


class RemotePath:
    """A place in a store, with what the rest of gpufgbg uses of `pathlib.Path`.

    Parameters
    ----------
    store : Store
    key : str
        Below the store's folder, which ``""`` is.
    """

    def __init__(self, store: Store, key: str = "") -> None:
        self.store = store
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self.store, self.key)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.store, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.store.url}/{self.key}" if self.key else self.store.url

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.key).stem

    def read_bytes(self) -> bytes:
        """The object's bytes; `FileNotFoundError` where there is none."""
        return self.store.read(self.key)

    def exists(self) -> bool:
        """Whether there is such an object."""
        return self.is_file()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.store.size(self.key)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return bool(self.store.list(self.key))

    def glob(self, pattern: str) -> list[RemotePath]:
        """The objects in this folder whose names match."""
        return [self / name for name, size in self.store.list(self.key).items()
                if size >= 0 and fnmatch.fnmatchcase(name, pattern)]  # fmt: skip

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        self.store.remove([self.key])

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """The object as a file to read."""
        assert mode == "rb"
        return io.BufferedReader(_Reader(self.store, self.key), 1 << 16)


class _Reader(io.RawIOBase):
    """An object, read in large pieces, for the most part front to back."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._size = store.size(key)
        self._at = self._start = 0
        self._piece = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        within = self._at - self._start
        if not 0 <= within < len(self._piece):
            self._start, within = self._at, 0
            self._piece = self._store.read(self._key, self._at, min(self._at + _READ_BYTES, self._size))
        count = min(len(buffer), len(self._piece) - within)
        buffer[:count] = self._piece[within : within + count]
        self._at += count
        return count
