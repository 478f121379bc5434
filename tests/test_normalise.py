"""Pictures as a network's input: plain NumPy judges the CPU's side, the kernel run on the CPU, and the card."""

from __future__ import annotations

import ctypes
import itertools
import threading

import host_build
import numpy as np
import pytest
from test_kernels_emulated import Guarded, address, placed_at

from gpufgbg import OptionError
from gpufgbg.backends import cuda
from gpufgbg.normalise import DTYPES, LAYOUTS, check, normalise

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHAPES = [(1, 1, 1), (2, 4, 6), (3, 5, 7), (1, 16, 16), (2, 47, 61), (1, 64, 48)]
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def as_float64(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def reference(images: np.ndarray, mean, std, dtype: str, layout: str) -> np.ndarray:
    mean, std = (np.broadcast_to(np.float64(v), 3) for v in (mean, std))
    scale, bias = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    with np.errstate(over="ignore"):
        values = images.astype(np.float32) * scale
        values = values + bias
        if dtype == "float16":
            values = values.astype(np.float16)
    if dtype == "bfloat16":  # the nearer of two neighbours, the even one of equally near ones
        low = values.view(np.uint32) >> 16
        below, above = (((low + k) << 16).astype(np.uint32).view(np.float32).astype(np.float64) for k in (0, 1))
        down, up = np.abs(values - below), np.abs(above - values)
        values = np.where((up < down) | ((up == down) & (low % 2 == 1)), low + 1, low).astype(np.uint16)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)) if layout == "NCHW" else values


class Cpu:
    def normalise(self, images, mean, std, dtype, layout):
        return normalise(images, mean, std, dtype=dtype, layout=layout)


class Card:
    def normalise(self, images, mean, std, dtype, layout):
        import cupy

        return normalise(cupy.asarray(images), mean, std, dtype=dtype, layout=layout).get()


class Emulated:
    """off: bytes by which what the kernel reads and writes is misaligned; blocks: of a picture."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def normalise(self, images, mean, std, dtype, layout, off=(0, 0), blocks=2):
        n, height, width = images.shape[:3]
        out = Guarded((n, 3, height, width) if layout == "NCHW" else images.shape, STORED[dtype], off[1])
        images, values = placed_at(images, off[0]), np.concatenate(check(mean, std, dtype, layout))
        self.library.run_normalise(
            int(layout == "NCHW"), DTYPES.index(dtype), n, blocks, address(images), height * width, address(values),
            address(out.array),
        )  # fmt: skip
        return out.done()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_build.load("normalise_emulated", tmp_path_factory.mktemp("host"))


@pytest.fixture(params=["cpu", "emulated", "card"])
def engine(request: pytest.FixtureRequest):
    if request.param == "cpu":
        return Cpu()
    if request.param == "emulated":
        return Emulated(request.getfixturevalue("library"))
    if cuda.count_devices() == 0:
        pytest.skip(f"no CUDA device: {cuda.why_not()}")
    return Card()


def assert_same_bits(found: np.ndarray, expected: np.ndarray, what: object) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    bits = np.uint32 if found.itemsize == 4 else np.uint16
    np.testing.assert_array_equal(found.view(bits), expected.view(bits), err_msg=str(what))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_equals_numpy(engine, dtype, layout):
    for seed, shape in enumerate(SHAPES):
        for mean, std in (IMAGENET, (0.0, 1.0), (0.5, (0.1, 1 / 3, 7.0)), (0.0, 1 / 255)):
            images = noise(seed, shape)
            found = engine.normalise(images, mean, std, dtype, layout)
            assert_same_bits(found, reference(images, mean, std, dtype, layout), (shape, mean, std))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wherever_it_is_read_and_written_and_by_any_number_of_blocks(library, dtype, layout):
    engine, images = Emulated(library), noise(9, (2, 24, 32))
    expected = reference(images, *IMAGENET, dtype, layout)
    for read, written, blocks in itertools.product((0, 1, 4), (0, 4, 8), (1, 3)):
        found = engine.normalise(images, *IMAGENET, dtype, layout, off=(read, written), blocks=blocks)
        assert_same_bits(found, expected, (read, written, blocks))


# A value is at most (255 scale + |bias|) and is rounded thrice at most in fp32, then once more to its type.
@pytest.mark.parametrize(("dtype", "within"), [("float32", 2**-22), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_it_is_the_formula(engine, dtype, within):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    mean, std = (np.array(v) for v in IMAGENET)
    expected = (images / 255 - mean) / std
    found = as_float64(engine.normalise(images, *IMAGENET, dtype, "NHWC"), dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=within * 5)


def test_it_equals_torch(engine):
    torch = pytest.importorskip("torch")
    images = noise(1, (2, 20, 30))
    given = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    expected = ((given - mean) / std).numpy()
    np.testing.assert_allclose(engine.normalise(images, *IMAGENET, "float32", "NCHW"), expected, rtol=0, atol=1e-6)


def test_fp16_beyond_its_range_is_infinite(engine):
    images = np.array([[[[0, 1, 255]]]], np.uint8)
    found = engine.normalise(images, 0.0, 1e-6, "float16", "NHWC")
    assert_same_bits(found, reference(images, 0.0, 1e-6, "float16", "NHWC"), "fp16")
    assert np.isinf(found[..., 2]).all() and (found[..., 0] == 0).all()


def test_into_an_array_of_the_callers(engine):
    if isinstance(engine, Emulated):
        pytest.skip("the kernel alone has no arguments but these")
    images, xp = noise(2, (3, 8, 8)), np
    if isinstance(engine, Card):
        import cupy as xp
    out = xp.empty((3, 3, 8, 8), np.float16)
    assert normalise(xp.asarray(images), dtype="float16", out=out) is out
    expected = reference(images, 0.0, 1.0, "float16", "NCHW")
    assert_same_bits(out if xp is np else out.get(), expected, "out")
    assert normalise(xp.empty((0, 8, 8, 3), np.uint8)).shape == (0, 3, 8, 8)
    crop = xp.asarray(images)[:, 1:7, 2:5]
    found = normalise(crop)
    assert_same_bits(found if xp is np else found.get(), reference(images[:, 1:7, 2:5], 0, 1, "float32", "NCHW"), "")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_by_any_number_of_threads(monkeypatch, dtype, layout):
    monkeypatch.setattr("gpufgbg.normalise._SHARE", 500)
    for count in (1, 2, 5, 17):
        images = noise(count, (count, 11, 13))
        expected = reference(images, *IMAGENET, dtype, layout)
        for workers in (1, 2, 3, 32):
            found = normalise(images, *IMAGENET, dtype=dtype, layout=layout, workers=workers)
            assert_same_bits(found, expected, (count, workers))
            rows = normalise(images[:, ::2], *IMAGENET, dtype=dtype, layout=layout, workers=workers)
            assert_same_bits(rows, reference(images[:, ::2], *IMAGENET, dtype, layout), (count, workers))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("gpufgbg-normalise")]


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "mean": ("x", (1, 2), float("nan"), None),
        "std": (0, -1, (1, 1, 0), "x", (1, 2), float("inf"), 1e-320),
        "dtype": ("float64", None, np.float32),
        "layout": ("CHW", None, 3),
        "workers": (0, -1, 1025, None, "2", 1.5),
        "out": (np.empty((1, 3, 4, 4), np.float64), np.empty((1, 4, 4, 3), np.float32), [1]),
    }.items(),
)
def test_options_out_of_range_are_refused(option, values):
    images = np.zeros((1, 4, 4, 3), np.uint8)
    for value in values:
        with pytest.raises(OptionError) as refused:
            normalise(images, **{option: value})
        assert refused.value.option == option, value


def test_what_is_no_batch_of_pictures_is_refused():
    for images in (
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.float32),
        np.zeros((1, 4, 4, 1), np.uint8),
    ):
        with pytest.raises(OptionError, match="images"):
            normalise(images)
