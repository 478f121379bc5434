"""Data sets that have a URL: which texts are URLs, and which URLs are not taken."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gpufgbg.exceptions import CONTAINERS, OptionError, printable

__all__ = ["checked_url", "is_url", "local_path"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^/]*)?://")


def is_url(path: Any) -> bool:
    """Whether a data set's place is a store's URL; ``file://`` is a path in another spelling."""
    return isinstance(path, str) and _URL.match(path) is not None and not path.lower().startswith("file://")


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path of a data set on this machine, also of a ``file://`` URL."""
    if isinstance(path, str) and path.lower().startswith("file://"):
        from urllib.request import url2pathname  # brings HTTP and TLS with it

        parts = urlsplit(path)
        if parts.netloc not in ("", "localhost"):
            raise OptionError(
                "out",
                f"{printable(path)}: names the host {printable(parts.hostname)}: expected file:///FOLDER, with three "
                "slashes, or the folder's path alone",
            )
        if "?" in path or "#" in path:
            raise OptionError(
                "out",
                f"{printable(path)}: a file URL with ? or # in it: write %3F or %23, or the folder's path alone",
            )
        return Path(url2pathname(parts.path))
    return Path(path)


def checked_url(url: str) -> str:
    """The URL without a slash at its end, or `OptionError` that shows no secret of it."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    container = scheme.lower() in CONTAINERS and ":" not in host
    if ("@" in host and not container) or (":" in host and "@" in path) or "?" in url or "#" in url:
        shown = f"{scheme}://{printable(url).partition('://')[2].partition('/')[0]}/..."
        raise OptionError(
            "out",
            f"{printable(shown)}: a URL with a credential, ? or # in it: expected SCHEME://BUCKET/FOLDER alone; "
            "credentials come from the environment or their usual files",
        )
    if "::" in url:
        raise OptionError("out", f"{printable(url)}: a chain of file systems: expected SCHEME://BUCKET/FOLDER")
    if not host and not path:
        raise OptionError("out", f"{printable(url)}: names no bucket: expected SCHEME://BUCKET/FOLDER")
    url = url.rstrip("/")
    if "//" in url.partition("://")[2].lstrip("/") or path.startswith("/"):
        raise OptionError("out", f"{printable(url)}: an empty name between two slashes: leave one slash out")
    return url
