"""Errors and warnings of gpufgbg.

::

    GpufgbgError                 every error that a user can cause or mend; one line, exit code 2
    ├── OptionError              an option or argument is out of range or contradicts another
    ├── InputError               a folder or picture that was handed in can't be used
    ├── DatasetError             a data set can't be opened, or another one stands at the output path
    ├── DeviceError              the device asked for is not there
    └── StorageError             the disk is full, read-only or forbidden
    Interrupted                  stopped by the user (Ctrl-C, SIGTERM); exit code 130
    GpufgbgWarning               something in the input that the user should know of

A message names the file or option, what was found, what was expected, and what to do.
"""

from __future__ import annotations

import os
import re
from typing import Any

__all__ = [
    "DatasetError",
    "DeviceError",
    "GpufgbgError",
    "GpufgbgWarning",
    "InputError",
    "Interrupted",
    "OptionError",
    "StorageError",
    "printable",
]


#: a URL's scheme, its user, and what follows the place; of ``s3://`` a `Path` leaves one slash
_URL = re.compile(r"(?<!\w)([A-Za-z][A-Za-z0-9+.-]+):(//?)([^\s/@:?#]*:[^\s@?#]*@|[^\s/@?#]*@)?([^\s?#]*)([?#]\S*)?")
CONTAINERS = ("abfs", "abfss", "az")  # schemes whose URL has CONTAINER@ACCOUNT, where others have a user


def printable(name: object) -> str:
    """A file name or value as one printable line, whatever bytes it holds; URLs without what may be secret."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else str(name)
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in os.fsdecode(text)
    )
    return _URL.sub(_public, text)


def _public(url: re.Match[str]) -> str:
    """A URL without user, query and fragment."""
    scheme, slashes, user, place, _ = url.groups(default="")
    if scheme.lower() in CONTAINERS and ":" not in user:
        place = user + place
    return f"{scheme}:{slashes}{place}"


class GpufgbgError(Exception):
    """Base of all errors that a user can cause or mend."""


class OptionError(GpufgbgError, ValueError):
    """An option has a value that it can't have.

    Attributes
    ----------
    option : str
        The option's name in Python spelling, for example ``"foreground_height"``.
    problem : str
        What was found and what was expected.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option = option
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.option, self.problem)


class InputError(GpufgbgError, ValueError):
    """One or more files that were handed in can't be used.

    Attributes
    ----------
    problems : tuple of str
        One entry a problem, each naming its file.
    """

    def __init__(self, *problems: str) -> None:
        count = f"{len(problems)} problems with the input: " if len(problems) > 1 else ""
        super().__init__(count + "; ".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.problems


class DatasetError(GpufgbgError, ValueError):
    """A data set can't be opened or continued."""


class DeviceError(GpufgbgError, RuntimeError):
    """The device that was asked for can't be used."""


class StorageError(GpufgbgError, OSError):
    """The file system refused: full, read-only, or not permitted."""


class Interrupted(GpufgbgError):
    """The user stopped the run; everything committed so far is kept."""


class GpufgbgWarning(UserWarning):
    """Something in the input that the user should know of."""
