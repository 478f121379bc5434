"""The pictures of a data set in a store: tar shards front to back, single files as they are asked for."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from gpufgbg.exceptions import DatasetError
from gpufgbg.readers import StoredPicture
from gpufgbg.remote.store import RemotePath, Store

__all__ = ["scan_store"]

_SHARDS = ("", "shards", "shards/parts")


def scan_store(url: str, folders: Iterable[str], kind_of: Callable[[str], str | None]) -> Iterator[StoredPicture]:
    """Files of a data set: of the store's ``folders``, and in tar shards, those with a kind.

    A picture of a tar shard holds its bytes, so let go of it when it is counted.

    Raises
    ------
    StorageError
        The store refuses.
    DatasetError
        A shard is damaged.
    """
    store = Store(url)
    names = store.list("")
    for folder in sorted(folders):
        if folder in names:
            yield from _files(store, folder, kind_of)
    for folder in _SHARDS:
        for name in store.list(folder) if folder else names:
            if name.endswith(".tar"):
                yield from _members(RemotePath(store, f"{folder}/{name}" if folder else name), kind_of)


def _files(store: Store, folder: str, kind_of: Callable[[str], str | None]) -> Iterator[StoredPicture]:
    for name, size in store.list(folder).items():
        key = f"{folder}/{name}"
        if size < 0:
            yield from _files(store, key, kind_of)
        elif (kind := kind_of(key)) is not None:
            yield StoredPicture(kind, f"{store.url}/", key, partial(store.read, key))


def _members(path: RemotePath, kind_of: Callable[[str], str | None]) -> Iterator[StoredPicture]:
    try:
        with path.open() as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps all
                kind = kind_of(info.name)
                member = archive.extractfile(info) if kind and info.isfile() else None
                if kind and member is not None:
                    yield StoredPicture(kind, f"{path}:", info.name, partial(bytes, member.read()))
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{path}: damaged: {error}") from None
