"""Tar shards in a store: made on this machine's disk, uploaded whole, and removed here.

The names are those of `gpufgbg.sinks.tar`, but that pieces of a shard lie in ``shards/parts/``, so that looking for
them lists nothing else.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from gpufgbg.files import local_prefix
from gpufgbg.layout import Layout
from gpufgbg.recipe import Plan, Shard
from gpufgbg.remote.store import RemotePath
from gpufgbg.sinks.tar import UNFINISHED, TarSink

__all__ = ["RemoteTarSink"]


class RemoteTarSink(TarSink):
    """Keeps whole shards as tar files in a store; see the module."""

    uploads = 8

    def __init__(self, out: RemotePath, plan: Plan, layout: Layout, kinds: Sequence[str]) -> None:
        super().__init__(cast(Path, out), plan, layout, kinds)  # it has what is used of a path
        self.out = out
        self.parts = self.folder / "parts"

    def path(self, shard: Shard) -> Path:
        """Where a shard, or a piece of one, is kept."""
        path = super().path(shard)
        return self.parts / path.name if ".part-" in path.name else path

    def sync(self) -> None:
        """An upload is durable once it is answered."""

    def publish(self, folder: Path, shard: Shard) -> None:
        """Upload the shard."""
        local = folder / UNFINISHED
        self._upload(local, self.path(shard))
        local.unlink()

    @contextlib.contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=local_prefix()) as folder:
            local = Path(folder, UNFINISHED)
            yield local
            self._upload(local, path)

    def _upload(self, local: Path, target: Path) -> None:
        assert isinstance(target, RemotePath)
        target.store.upload(local, target.key)
