"""Philox 4x32-10: the NumPy version and the kernels' header against Random123's known answers."""

from __future__ import annotations

import ctypes

import host_build
import numpy as np
import pytest

from gpufgbg.recipe import Plan, Recipe, philox4x32_10

# counter, key, words: kat_vectors of Random123 for philox4x32 10
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_build.load("arithmetic", tmp_path_factory.mktemp("host"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def on_host(host: ctypes.CDLL, counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    words = np.zeros_like(counters)
    host.philox(ctypes.c_int64(len(counters)), pointer(counters), pointer(np.array(key, np.uint32)), pointer(words))
    return words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_numpy_gives_the_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox4x32_10(counter, key)) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_header_gives_the_known_answers(host, counter, key, words):
    assert tuple(on_host(host, np.array([counter], np.uint32), key)[0]) == words


def test_header_equals_numpy_on_random_counters_and_keys(host):
    rng = np.random.default_rng(1)
    for _ in range(20):
        counters = rng.integers(0, 2**32, (500, 4), dtype=np.uint32)
        key = tuple(int(k) for k in rng.integers(0, 2**32, 2, dtype=np.uint64))
        expected = np.stack(philox4x32_10(tuple(counters.T), key), axis=-1)
        np.testing.assert_array_equal(on_host(host, counters, key), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_header_places_samples_where_the_plan_does(host, seed):
    widths, heights = np.array([1, 63, 64, 30, 17]), np.array([48, 1, 20, 31, 2])
    plan = Plan(Recipe(size=(64, 48), foreground_height=20, seed=seed, per_pair=10**6), 50, widths, heights)
    indices = np.random.default_rng(2).integers(0, len(plan), 4000)
    placements = plan.placements(indices)
    spans = np.stack([65 - widths, 49 - heights], axis=-1)[placements.foreground].astype(np.uint32)
    places = np.zeros((len(indices), 2), np.uint32)
    host.place(
        ctypes.c_int64(len(indices)),
        ctypes.c_uint64(seed),
        pointer(indices.astype(np.uint64)),
        pointer(spans),
        pointer(places),
    )
    np.testing.assert_array_equal(places, np.stack([placements.x, placements.y], axis=-1))
