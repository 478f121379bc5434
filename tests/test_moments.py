"""Moments are exact, merge without rounding in any order, and agree with NumPy's floats."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gpufgbg import Moments
from gpufgbg.backends import cpu


@pytest.mark.parametrize("count", [Moments.of, cpu.moments])
@pytest.mark.parametrize("shape", [(3, 17, 5), (2, 8, 9, 3), (1, 1, 1, 1), (4, 1, 7), (3, 50, 41, 3)])
def test_against_numpy(count, shape):
    pictures = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    m = count(pictures)
    flat = pictures.reshape(-1, shape[3] if len(shape) == 4 else 1).astype(np.int64)
    assert m.images == shape[0] and m.pixels == len(flat)
    assert m.sum == tuple(flat.sum(axis=0)) and m.sum_of_squares == tuple((flat**2).sum(axis=0))
    np.testing.assert_allclose(m.mean, flat.mean(axis=0) / 255, rtol=1e-12)
    np.testing.assert_allclose(m.std, flat.std(axis=0) / 255, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_white_pixels_overflow_no_lane(channels):
    pixels = cpu._LANES * (cpu._RUNS + 2) + 5
    white = np.full((1, pixels, 1, channels), 255, np.uint8)
    m = cpu.moments(white)
    assert m.sum == (255 * pixels,) * channels and m.sum_of_squares == (255**2 * pixels,) * channels


def test_merging_is_exact_in_any_order_and_for_huge_sets():
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
    whole = Moments.of(pictures)
    parts = [Moments.of(pictures[i : i + 7]) for i in range(0, 30, 7)]
    assert Moments.total(parts) == Moments.total(reversed(parts)) == whole
    # 40 G samples of 224x224: beyond 64 bits
    huge = Moments(1, 50176, (50176 * 200,), (50176 * 40000,))
    for _ in range(36):
        huge = huge + huge
    assert huge.sum_of_squares[0] > 2**64
    assert huge.mean == (200 / 255,) and huge.std == (0.0,)


def test_flat_pictures_have_no_deviation():
    assert Moments.of(np.full((2, 3, 3), 77, np.uint8)).std == (0.0,)


def test_empty_moments_are_neutral_and_channels_must_agree():
    grey = Moments.of(np.zeros((1, 2, 2), np.uint8))
    assert Moments() + grey == grey + Moments() == grey
    assert Moments().mean == () == Moments().std
    with pytest.raises(ValueError, match="1 and 3 channels"):
        grey + Moments.of(np.zeros((1, 2, 2, 3), np.uint8))


def test_json_keeps_them_exact():
    m = Moments(3, 10**24, (2**80 + 1,), (2**85 + 1,))
    assert Moments.from_dict(json.loads(json.dumps(m.to_dict(summary=True)))) == m
