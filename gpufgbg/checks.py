"""Checks of options, each with one line for the user where it fails."""

from __future__ import annotations

import numpy as np

from gpufgbg.exceptions import OptionError

__all__ = ["choice", "is_whole", "whole"]


def is_whole(value: object) -> bool:
    """Whether a value is an integer of Python's or NumPy's, and no truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def whole(option: str, value: object, low: int, high: int) -> int:
    """``value`` as an int from ``low`` to ``high``, or `OptionError`."""
    if not is_whole(value):
        raise OptionError(option, f"got {value!r}, expected a whole number from {low} to {high}")
    if not low <= value <= high:  # type: ignore[operator]
        raise OptionError(option, f"got {value}, expected {low} to {high}")
    return int(value)  # type: ignore[call-overload]


def choice(option: str, value: object, choices: tuple[str, ...]) -> str:
    """``value``, one of ``choices``, or `OptionError`."""
    if value not in choices:
        raise OptionError(option, f"got {value!r}, expected one of {', '.join(choices)}")
    return str(value)
