"""The pictures of a data set in a store: tar shards front to back, single files as they are asked for."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial

from gpufgbg.exceptions import DatasetError
from gpufgbg.layout import KINDS
from gpufgbg.readers import StoredPicture, kind_of
from gpufgbg.remote.store import RemotePath, Store

__all__ = ["scan_store"]

_SHARDS = ("", "shards", "shards/parts")


def scan_store(url: str) -> Iterator[StoredPicture]:
    """As `gpufgbg.readers.scan`; a picture of a tar shard holds its bytes, so let go of it when it is counted.

    Raises
    ------
    StorageError
        The store refuses.
    DatasetError
        A shard is damaged.
    """
    store = Store(url)
    names = store.list("")
    for folder in sorted(KINDS.values()):
        if folder in names:
            yield from _files(store, folder)
    for folder in _SHARDS:
        for name in store.list(folder) if folder else names:
            if name.endswith(".tar"):
                yield from _members(RemotePath(store, f"{folder}/{name}" if folder else name))


def _files(store: Store, folder: str) -> Iterator[StoredPicture]:
    for name, size in store.list(folder).items():
        key = f"{folder}/{name}"
        if size < 0:
            yield from _files(store, key)
        elif (kind := kind_of(key)) is not None:
            yield StoredPicture(kind, f"{store.url}/{key}", size, partial(store.read, key))


def _members(path: RemotePath) -> Iterator[StoredPicture]:
    try:
        with path.open() as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps all
                kind = kind_of(info.name)
                member = archive.extractfile(info) if kind and info.isfile() else None
                if kind and member is not None:
                    data = member.read()
                    yield StoredPicture(kind, f"{path}:{info.name}", len(data), partial(bytes, data))
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(f"{path}: damaged: {error}") from None
