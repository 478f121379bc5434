"""Data sets in an object store, or in any file system that fsspec knows by a URL.

Shards are made on this machine's disk and uploaded whole: a reader sees a shard with all its bytes, or none.
"""

__all__: list[str] = []
