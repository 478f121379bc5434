"""Division by constants of a user's blend: the rewritten function gives what the function gives."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from gpufgbg.quick_division import quotient, with_quick_division

FACTOR = 3
compiled = numba.njit(inline="always")(quotient)


def feather(fg, bg, alpha, x, y):
    soft = alpha * alpha // 255
    return (fg * soft + bg * (255 - soft)) // 255


def negative(fg, bg, alpha, x, y):
    """Rounds down, below zero too."""
    return ((fg - bg) * alpha * FACTOR // 7 + 1000 * x) // 13


def large(fg, bg, alpha, x, y):
    return (fg * bg * alpha * x * y + 5) // 2147483647


def in_place(fg, bg, alpha, x, y):
    value = (fg - 100) * x
    value //= 10
    for _ in range(2):
        value = value // 3 if y % 2 else -value // 3
    return value


def made(divided):
    factor = 5

    def with_what_it_closes_over(fg, bg, alpha, x, y):
        return divided(fg * factor - bg) // 9

    return with_what_it_closes_over


@numba.njit
def halved(value):
    return value // 2


@pytest.mark.parametrize("function", [feather, negative, large, in_place, made(halved)], ids=lambda f: f.__name__)
def test_it_gives_the_same(function):
    quick = with_quick_division(function, compiled)
    assert quick is not None and quick.__name__ == function.__name__
    assert "_gpufgbg_quotient" in quick.__code__.co_names
    plain, quick = numba.njit(function), numba.njit(quick)
    rng = np.random.default_rng(0)
    edges = [(0, 0, 0, 0, 0), (255, 255, 255, 16383, 16383), (0, 255, 255, 16383, 16382), (255, 0, 1, 1, 0)]
    for values in [*edges, *rng.integers(0, [256, 256, 256, 16384, 16384], (2000, 5)).tolist()]:
        assert quick(*values) == plain(*values), values


@pytest.mark.parametrize("dividend", [0, 1, 254, 255, 2**31 - 1, 2**31, 2**40, -1, -255, -256, -(2**31), -(2**62)])
@pytest.mark.parametrize("divisor", [1, 2, 255, 65025, 2**31 - 1])
def test_quotients(dividend, divisor):
    assert compiled(dividend, divisor) == dividend // divisor


def without_division(fg, bg, alpha, x, y):
    return bg + ((fg - bg) * alpha >> 8)


def by_a_variable(fg, bg, alpha, x, y):
    return fg // (alpha + 1) + bg // -3


def test_what_is_left_as_it_is():
    for function in (without_division, by_a_variable, lambda fg, bg, alpha, x, y: fg // 255):
        assert with_quick_division(function, compiled) is None
    names: dict = {}
    exec("def typed_in(fg, bg, alpha, x, y):\n    return fg // 255", names)
    assert with_quick_division(names["typed_in"], compiled) is None


def test_a_source_that_has_changed_is_not_taken(monkeypatch):
    monkeypatch.setattr("inspect.getsource", lambda function: "def feather(fg, bg, alpha, x, y):\n    return fg // 9")
    assert with_quick_division(feather, compiled) is None
