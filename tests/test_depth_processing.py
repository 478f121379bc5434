"""Before and after the depth network: plain NumPy judges the CPU's side, the kernels run on the CPU, and the card."""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import host_build
import numpy as np
import pytest
from test_kernels_emulated import Guarded, address, placed_at

from gpufgbg import OptionError
from gpufgbg.backends import cuda
from gpufgbg.depth import processing
from gpufgbg.depth.processing import NORMALISATIONS, Maps

KERNEL = Path(__file__).parents[1] / "kernels" / "depth.cu"
f32 = np.float32
LAYOUTS = [("NCHW", 3), ("NHWC", 3), ("NHWC", 4), ("NHWC", 8)]
DTYPES = [np.float16, np.float32]
MEANINGS = ["inverse", "metres", "relative", "disparity"]
# (H, W) -> (h, w)
RESIZES = [
    ((1, 1), (1, 1)), ((1, 1), (2, 2)), ((1, 7), (5, 3)), ((6, 1), (12, 2)), ((2, 2), (4, 4)), ((9, 14), (18, 28)),
    ((16, 24), (16, 24)), ((13, 17), (13, 17)), ((37, 29), (11, 8)), ((30, 40), (17, 22)), ((11, 10), (41, 37)),
    ((7, 12), (26, 44)), ((5, 90), (9, 600)), ((40, 3), (300, 4)), ((64, 64), (2, 1)),
]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------
# The reference


def resized(values: np.ndarray, size: tuple[int, int], border: str) -> np.ndarray:
    """(H, W, ...) float32 to (h, w, ...): rows first, then columns; a weight of 0 takes the first pixel as it is."""
    for axis in (0, 1):
        source, length = values.shape[axis], size[axis]
        pads = [(1, 1) if a == axis else (0, 0) for a in range(values.ndim)]
        padded = np.pad(values, pads, mode=border)
        lines = []
        for i in range(length):
            whole, rest = divmod((2 * i + 1) * source - length, 2 * length)
            first, second = padded.take(whole + 1, axis), padded.take(min(whole + 2, source + 1), axis)
            weight = f32(rest) / f32(2 * length)
            lines.append(first + (second - first) * weight if rest else first)
        values = np.stack(lines, axis)
    return values


def reference_input(images, size, layout, channels, dtype, scale, bias) -> np.ndarray:
    result = np.zeros((len(images), *size, channels), np.float32)
    for image, to in zip(images, result, strict=True):
        to[..., :3] = resized(image.astype(np.float32), size, "reflect") * np.array(scale, f32) + np.array(bias, f32)
    if layout == "NCHW":
        result = result.transpose(0, 3, 1, 2)
    with np.errstate(over="ignore"):
        return result.astype(dtype)


def reference_maps(prediction, size, meaning, scale) -> SimpleNamespace:
    n, scale = len(prediction), f32(scale)
    grey, metres = np.zeros((n, *size), np.uint8), np.zeros((n, *size), np.float32)
    ranges = np.full((n, 2), np.nan, np.float32)
    faults = (~np.isfinite(prediction)).sum(axis=(1, 2)).astype(np.int32)
    with np.errstate(all="ignore"):
        for i in range(n):
            p = resized(prediction[i].astype(np.float32), size, "edge")
            known = np.isfinite(p)
            if meaning == "inverse":
                d = np.clip(f32(1000) / p, f32(10), f32(1000)) / f32(1000)
            else:
                d = (-p if meaning == "disparity" else p) + f32(0)
            d = np.where(known, d, f32("nan"))
            metres[i] = np.where(known, d * scale, f32("nan"))
            if known.any():
                low, high = d[known].min(), d[known].max()
                ranges[i] = low * scale, high * scale
                q = (d - low) / (high - low)
                grey[i] = np.minimum(255, np.floor(np.where(q > 0, q, f32(0)) * f32(256)))
    return SimpleNamespace(grey=grey, range=ranges, faults=faults, metres=metres)


def assert_same_bits(found: np.ndarray, expected: np.ndarray, what: object) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    as_bits = {2: np.uint16, 4: np.uint32}.get(found.itemsize, found.dtype)
    bits = [np.ascontiguousarray(a).view(as_bits) for a in (found, expected)]
    np.testing.assert_array_equal(*bits, err_msg=str(what))


# -------------------------------------------------------------------------------------------------------------------
# What is judged


class Cpu:
    def preprocess(self, images, size, **options):
        return processing.preprocess(images, size, **options)

    def postprocess(self, prediction, size, **options):
        return processing.postprocess(prediction, size, **options)


class Card:
    def preprocess(self, images, size, **options):
        import cupy

        return processing.preprocess(cupy.asarray(images), size, **options).get()

    def postprocess(self, prediction, size, **options):
        import cupy

        maps = processing.postprocess(cupy.asarray(prediction), size, **options)
        return Maps(*(None if a is None else a.get() for a in (maps.grey, maps.range, maps.faults, maps.metres)))


class Emulated:
    """off: bytes by which what the kernel reads and writes is misaligned; blocks: of a picture."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def preprocess(self, images, size, *, layout, channels, dtype, scale, bias, off=0, blocks=None):
        n, height, width = images.shape[:3]
        out = Guarded((n, 3, *size) if layout == "NCHW" else (n, *size, channels), dtype, off)
        values = np.array([*scale, *bias], np.float32)
        images = placed_at(images, off % 7)
        self.library.run_preprocess(
            int(dtype == np.float16), n, blocks or -(-size[0] // 8), address(images), height, width, *size,
            0 if layout == "NCHW" else channels, address(values), address(out.array),
        )  # fmt: skip
        return out.done()

    def postprocess(self, prediction, size, *, meaning, scale=1.0, metres=False, off=0):
        n, half = len(prediction), prediction.dtype == np.float16
        grey, ranges = Guarded((n, *size), np.uint8, off), Guarded((n, 2), np.float32)
        faults, length = Guarded((n,), np.int32), Guarded((n, *size), np.float32, 4 * off % 16)
        given = placed_at(prediction, prediction.itemsize * (off // 2))
        code = {"inverse": 1, "disparity": 2}.get(meaning, 0)
        self.library.run_postprocess(
            int(half), n, address(given), *prediction.shape[1:], *size, code,
            ctypes.c_float(scale), address(grey.array), address(length.array if metres else None),
            address(ranges.array), address(faults.array),
        )  # fmt: skip
        return Maps(grey.done(), ranges.done(), faults.done(), length.done() if metres else None)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_build.load("depth_emulated", tmp_path_factory.mktemp("host"))


@pytest.fixture(params=["cpu", "emulated", "card"])
def engine(request: pytest.FixtureRequest):
    if request.param == "cpu":
        return Cpu()
    if request.param == "emulated":
        return Emulated(request.getfixturevalue("library"))
    if cuda.count_devices() == 0:
        pytest.skip(f"no CUDA device: {cuda.why_not()}")
    return Card()


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def check_input(engine, images, size, layout, channels, dtype, normalisation="unit", **how) -> None:
    scale, bias = NORMALISATIONS[normalisation]
    options = {"layout": layout, "channels": channels, "dtype": dtype, "scale": scale, "bias": bias}
    found = engine.preprocess(images, size, **options, **how)
    expected = reference_input(images, size, **options)
    assert_same_bits(found, expected, (images.shape, size, options, how))


def check_maps(engine, prediction, size, meaning, scale=1.0, metres=True, **how) -> SimpleNamespace:
    found = engine.postprocess(prediction, size, meaning=meaning, scale=scale, metres=metres, **how)
    expected = reference_maps(prediction, size, meaning, scale)
    for name in ("grey", "range", "faults") + (("metres",) if metres else ()):
        what = (name, prediction.shape, prediction.dtype, size, meaning, how)
        assert_same_bits(getattr(found, name), getattr(expected, name), what)
    assert metres or found.metres is None
    return expected


# -------------------------------------------------------------------------------------------------------------------
# Before the network


@pytest.mark.parametrize(("layout", "channels"), LAYOUTS, ids=["NCHW", "NHWC", "NHWC4", "NHWC8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_equal_numpy(engine, layout, channels, dtype):
    normalisations = itertools.cycle(NORMALISATIONS)
    for case, (source, size) in enumerate(RESIZES):
        images = noise(case, (1 + case % 5, *source, 3))
        check_input(engine, images, size, layout, channels, dtype, next(normalisations))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_the_original(engine, dtype):
    check_input(engine, noise(0, (2, 224, 224, 3)), (448, 448), "NCHW", 3, dtype)


def test_inputs_wherever_they_are_written(library):
    engine = Emulated(library)
    for (layout, channels), dtype, off in itertools.product(LAYOUTS, DTYPES, (2, 4, 8, 12)):
        if off % np.dtype(dtype).itemsize == 0:
            for size in ((10, 16), (9, 18), (3, 21)):
                check_input(engine, noise(off, (2, 8, 13, 3)), size, layout, channels, dtype, off=off)


def test_inputs_by_any_number_of_blocks(library):
    for blocks in (1, 2, 3, 8):
        check_input(Emulated(library), noise(0, (3, 20, 20, 3)), (40, 40), "NCHW", 3, np.float16, blocks=blocks)


def test_inputs_do_not_depend_on_the_batch(engine):
    images = noise(1, (5, 21, 33, 3))
    options = {
        "layout": "NHWC",
        "channels": 4,
        "dtype": np.float16,
        "scale": (0.1, 0.2, 0.3),
        "bias": (1.0, 2.0, 3.0),
    }
    whole = engine.preprocess(images, (42, 66), **options)
    for i in range(5):
        assert_same_bits(engine.preprocess(images[i : i + 1], (42, 66), **options), whole[i : i + 1], i)


def test_fp16_inputs_round_to_even_and_overflow(engine):
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    options = {"layout": "NCHW", "channels": 3, "scale": (300.0, 2.0**-33, 1 / 3), "bias": (0.0, 2.0**-25, -40.0)}
    found = engine.preprocess(images, (16, 16), dtype=np.float16, **options)
    assert_same_bits(found, reference_input(images, (16, 16), dtype=np.float16, **options), options)
    assert np.isinf(found).any() and (found[:, 1] == 2.0**-24).any() and (found[:, 1] == 0).any()


def test_doubling_mirrors_the_border_without_the_edge(engine):
    row = np.array([[0, 16, 64]], np.uint8).repeat(2, 0)[None, :, :, None].repeat(3, 3)
    options = {"layout": "NCHW", "channels": 3, "dtype": np.float32, "scale": (1.0,) * 3, "bias": (0.0,) * 3}
    found = engine.preprocess(row, (4, 6), **options)
    # 0 and 16 to the left of 0 as to its right, 16 to the right of 64
    assert (found == np.array([4, 4, 12, 28, 52, 52], np.float32)).all()


@pytest.mark.parametrize("source", [(12, 15), (2, 9), (1, 4)], ids=str)
def test_doubling_equals_skimage(engine, source):
    transform = pytest.importorskip("skimage.transform")
    picture = noise(3, (1, *source, 3))
    size = (2 * source[0], 2 * source[1])
    scale, bias = NORMALISATIONS["unit"]
    found = engine.preprocess(picture, size, layout="NHWC", channels=3, dtype=np.float32, scale=scale, bias=bias)
    expected = transform.resize(picture[0] / 255, size, order=1)
    np.testing.assert_allclose(found[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(7, 9), (31, 44), (12, 15)], ids=str)
def test_any_size_equals_skimage(engine, size):
    transform = pytest.importorskip("skimage.transform")
    picture = noise(4, (1, 12, 15, 3))
    scale, bias = NORMALISATIONS["unit"]
    found = engine.preprocess(picture, size, layout="NHWC", channels=3, dtype=np.float32, scale=scale, bias=bias)
    expected = transform.resize(picture[0] / 255, size, order=1, anti_aliasing=False)
    np.testing.assert_allclose(found[0], expected, atol=1e-6, rtol=0)


def test_imagenet_normalises_by_mean_and_std():
    scale, bias = (np.array(v) for v in NORMALISATIONS["imagenet"])
    values = np.arange(256)[:, None]
    expected = (values / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(values * scale + bias, expected, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------------
# After the network


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_equal_numpy(engine, meaning, dtype):
    for case, (source, size) in enumerate(RESIZES):
        rng = np.random.default_rng(case)
        prediction = rng.normal(80, 60, (1 + case % 5, *source)).astype(dtype)  # some below 0, some beyond 100
        check_maps(engine, prediction, size, meaning, scale=10.0, metres=case % 2 == 0)
        check_maps(engine, prediction, source, meaning, scale=1 / 3, metres=case % 2 == 1)


def test_maps_of_the_original(engine):
    """The original's depth maps as its notebooks made them."""
    prediction = np.random.default_rng(0).uniform(5, 130, (3, 224, 224)).astype(np.float32)
    depth = np.clip(1000 / prediction, 10, 1000) / 1000
    expected = []
    for d in depth:
        q = (d - d.min()) / (d.max() - d.min())
        expected.append(np.minimum(255, np.floor(256 * q)).astype(np.uint8))
    found = engine.postprocess(prediction, (224, 224), meaning="inverse", scale=10.0)
    np.testing.assert_array_equal(found.grey, np.stack(expected))
    np.testing.assert_allclose(found.range, np.stack([depth.min((1, 2)), depth.max((1, 2))], 1) * 10, rtol=1e-6)
    assert not found.faults.any() and found.metres is None


ODD_ONES = {
    "zero": [0.0, -0.0, 3.0, 50.0],
    "negative": [-5.0, -1e-3, 20.0, -0.0],
    "NaN": [np.nan, 30.0, 60.0, 90.0],
    "infinite": [np.inf, 30.0, -np.inf, 90.0],
    "NaN and infinite": [np.nan, np.inf, -np.inf, 12.0],
    "tiny": [6e-8, 1e-7, 0.0, 2e-7],
    "subnormal": [1e-45, 1e-40, 3e-39, 0.0],
    "large": [6e4, -6e4, 1.0, 0.0],
    "huge": [3e38, -3e38, 1.0, 0.0],
    "huge, one sign": [3e38, 1e38, 1.0, 0.0],
    "one step apart": [1.0, 1.0009765625, 1.0, 1.0],
}


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ODD_ONES.values(), ids=ODD_ONES)
def test_odd_values(engine, values, dtype, meaning):
    rng = np.random.default_rng(1)
    with np.errstate(over="ignore"):
        prediction = rng.choice(np.array(values).astype(dtype), (3, 9, 12))
    prediction[1] = rng.uniform(1, 99, (9, 12))
    prediction[1, 4, 5] = values[0] if abs(values[0]) < 65504 or np.isinf(values[0]) else 1
    for size in ((9, 12), (18, 24), (5, 7), (27, 36), (3, 4)):
        check_maps(engine, prediction, size, meaning, scale=2.0)


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("value", [0.0, -0.0, 7.3, -7.3, 150.0, np.nan, np.inf, -np.inf])
def test_flat_pictures_are_black(engine, value, meaning):
    prediction = np.full((2, 10, 13), value, np.float32)
    prediction[1] = np.arange(13)
    for size in ((10, 13), (37, 48), (4, 4)):
        expected = check_maps(engine, prediction, size, meaning)
        assert not expected.grey[0].any() and expected.grey[1].any()
        assert expected.faults.tolist() == [0 if np.isfinite(value) else 130, 0]
        assert np.isnan(expected.range[0]).all() == (not np.isfinite(value))


def test_zero_and_negative_inverse_depths(engine):
    prediction = np.array([[[0.0, -0.0, -3.0, 5.0, 1.0, 0.5, 99.0, 1e9]]], np.float32)
    found = engine.postprocess(prediction, (1, 8), meaning="inverse", scale=10.0, metres=True)
    expected = [10.0, 0.1, 0.1, 2.0, 10.0, 10.0, 10 / 99, 0.1]
    np.testing.assert_allclose(found.metres[0, 0], expected, rtol=1e-6)
    assert found.faults.tolist() == [0]


def test_disparity_is_nearest_where_it_is_largest(engine):
    prediction = np.array([[[0.0, 4000.0, 1000.0, -1000.0]]], np.float32)
    found = engine.postprocess(prediction, (1, 4), meaning="disparity", scale=2.0, metres=True)
    assert found.grey.tolist() == [[[204, 0, 153, 255]]]
    assert found.range.tolist() == [[-8000.0, 2000.0]]
    assert found.metres.tolist() == [[[0.0, -8000.0, -2000.0, 2000.0]]]


def test_faults_are_of_the_prediction_not_of_the_map(engine):
    prediction = np.ones((2, 4, 4), np.float32)
    prediction[1, 1, 2] = np.nan
    prediction[1, 3, 0] = np.inf
    for size in ((4, 4), (40, 40), (2, 2)):
        assert engine.postprocess(prediction, size, meaning="metres").faults.tolist() == [0, 2]


def test_maps_do_not_depend_on_the_batch(engine):
    prediction = np.random.default_rng(2).uniform(0, 120, (5, 20, 31)).astype(np.float16)
    prediction[3, 5, 5] = np.nan
    for size in ((20, 31), (40, 62)):
        whole = engine.postprocess(prediction, size, meaning="inverse", metres=True)
        for i in range(5):
            one = engine.postprocess(prediction[i : i + 1], size, meaning="inverse", metres=True)
            for name in ("grey", "range", "faults", "metres"):
                assert_same_bits(getattr(one, name), getattr(whole, name)[i : i + 1], (name, i))


def test_maps_wherever_they_are_written(library):
    prediction = np.random.default_rng(3).uniform(1, 99, (3, 8, 12))
    for dtype, off, size in itertools.product(DTYPES, range(5), ((8, 12), (9, 16), (8, 11))):
        check_maps(Emulated(library), prediction.astype(dtype), size, "inverse", off=off)
        check_maps(Emulated(library), prediction.astype(dtype), size, "metres", metres=False, off=off)


def test_the_order_of_threads_does_not_matter(library):
    prediction = np.random.default_rng(4).uniform(-1, 99, (3, 40, 50)).astype(np.float32)
    prediction[0, :20] = 0.0
    prediction[0, ::3] = -0.0
    for seed in range(5):
        library.reorder(seed)
        check_maps(Emulated(library), prediction, (40, 50), "metres")
        check_maps(Emulated(library), prediction, (63, 81), "inverse")
        check_input(Emulated(library), noise(seed, (2, 15, 15, 3)), (30, 30), "NHWC", 8, np.float16)


# -------------------------------------------------------------------------------------------------------------------
# The functions


def test_outputs_of_the_caller_are_used():
    images, prediction = noise(5, (3, 10, 12, 3)), np.random.default_rng(5).uniform(1, 99, (3, 10, 12))
    for (layout, channels), dtype in itertools.product(LAYOUTS, DTYPES):
        options = {"layout": layout, "channels": channels, "dtype": dtype}
        expected = processing.preprocess(images, (20, 24), **options)
        out = np.full_like(expected, 7)
        assert processing.preprocess(images, (20, 24), **options, out=out) is out
        assert_same_bits(out, expected, options)
    expected = processing.postprocess(prediction.astype(np.float32), (20, 24), meaning="metres", metres=True)
    given = Maps(*(np.full_like(a, 7) for a in (expected.grey, expected.range, expected.faults, expected.metres)))
    found = processing.postprocess(prediction.astype(np.float32), (20, 24), meaning="metres", metres=True, out=given)
    for name in ("grey", "range", "faults", "metres"):
        assert getattr(found, name) is getattr(given, name)
        assert_same_bits(getattr(found, name), getattr(expected, name), name)


def test_slices_and_empty_batches():
    images = noise(6, (4, 20, 24, 3))
    part = images[::2, 3:17, ::-1]
    part.flags.writeable = False
    expected = processing.preprocess(part.copy(), (28, 48))
    assert_same_bits(processing.preprocess(part, (28, 48)), expected, "a slice")
    assert processing.preprocess(images[:0], (5, 7), dtype="float16").shape == (0, 3, 5, 7)
    maps = processing.postprocess(np.empty((0, 3, 4), np.float16), (6, 8), meaning="inverse", metres=True)
    assert [a.shape for a in (maps.grey, maps.range, maps.faults, maps.metres)] == [
        (0, 6, 8),
        (0, 2),
        (0,),
        (0, 6, 8),
    ]


def test_one_scale_for_all_channels():
    images = noise(7, (1, 4, 4, 3))
    one = processing.preprocess(images, (8, 8), scale=0.5, bias=-1)
    assert_same_bits(one, processing.preprocess(images, (8, 8), scale=(0.5,) * 3, bias=(-1.0,) * 3), "scale")


IMAGES, PREDICTION = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("images", {"images": IMAGES[0]}),
        ("images", {"images": IMAGES.astype(np.float32)}),
        ("images", {"images": IMAGES[..., :2]}),
        ("images", {"images": IMAGES[:, :0]}),
        ("size", {"size": 8}),
        ("size", {"size": (8, 0)}),
        ("size", {"size": (8, 16_385)}),
        ("size", {"size": (8.0, 8)}),
        ("layout", {"layout": "CHW"}),
        ("channels", {"channels": 4}),
        ("channels", {"layout": "NHWC", "channels": 5}),
        ("dtype", {"dtype": np.float64}),
        ("dtype", {"dtype": "half a number"}),
        ("scale", {"scale": (1.0, 2.0)}),
        ("scale", {"scale": "unit"}),
        ("scale", {"scale": 1e39}),
        ("bias", {"bias": np.nan}),
        ("out", {"out": np.zeros((2, 3, 8, 8), np.float16)}),
        ("out", {"out": np.zeros((2, 8, 8, 3), np.float32)}),
        ("out", {"out": np.zeros((4, 3, 8, 8), np.float32)[::2]}),
        ("out", {"out": [1, 2]}),
    ],
)
def test_preprocess_refuses(option, arguments):
    arguments = {"images": IMAGES, "size": (8, 8), **arguments}
    with pytest.raises(OptionError, match=f"^{option}: got .*expected") as caught:
        processing.preprocess(arguments.pop("images"), arguments.pop("size"), **arguments)
    assert caught.value.option == option


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("prediction", {"prediction": PREDICTION[0]}),
        ("prediction", {"prediction": PREDICTION.astype(np.float64)}),
        ("prediction", {"prediction": PREDICTION[..., None]}),
        ("size", {"size": (0, 8)}),
        ("meaning", {"meaning": "nearness"}),
        ("scale", {"scale": 0.0}),
        ("scale", {"scale": -1}),
        ("scale", {"scale": np.inf}),
        ("scale", {"scale": 1e-50}),
        ("scale", {"scale": 1e39}),
        ("scale", {"scale": np.float64(1e300)}),
        ("scale", {"scale": "10"}),
        ("out.range", {"out": Maps(np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.float32), np.zeros(2, np.int32))}),
        ("out.faults", {"out": Maps(None, None, np.zeros(2, np.int64))}),
    ],
)
def test_postprocess_refuses(option, arguments):
    arguments = {"prediction": PREDICTION, "size": (8, 8), "meaning": "metres", **arguments}
    with pytest.raises(OptionError, match=f"^{re.escape(option)}: got .*expected") as caught:
        processing.postprocess(arguments.pop("prediction"), arguments.pop("size"), **arguments)
    assert caught.value.option == option


def test_metres_and_out_agree():
    maps = processing.postprocess(PREDICTION, (4, 4), meaning="metres")
    with pytest.raises(OptionError, match="out: got Maps without metres"):
        processing.postprocess(PREDICTION, (4, 4), meaning="metres", metres=True, out=maps)


# -------------------------------------------------------------------------------------------------------------------
# The kernel file


def test_the_emulated_fp16_is_numpys(library):
    bits = np.arange(65536, dtype=np.uint16)
    rng = np.random.default_rng(8)
    floats = rng.integers(0, 2**32, 65536, dtype=np.uint32).view(np.float32)
    near = np.abs(bits.view(np.float16)[:0x7C00]).astype(np.float32)  # numbers of fp16, and halfway between
    floats[: near.size] = near
    floats[near.size : 2 * near.size - 1] = (near[1:] + near[:-1]) / 2
    floats[near.size : near.size + 9000] *= np.float32(1 + 2**-20)
    values, rounded = np.empty(65536, np.float32), np.empty(65536, np.uint16)
    library.convert(ctypes.c_int64(65536), address(bits), address(values), address(floats), address(rounded))
    with np.errstate(all="ignore"):
        expected = floats.astype(np.float16)
        numbers = ~np.isnan(bits.view(np.float16))
        assert_same_bits(values[numbers], bits.view(np.float16).astype(np.float32)[numbers], "read")
        assert np.isnan(values[~numbers]).all() and np.isnan(rounded.view(np.float16)[np.isnan(floats)]).all()
        assert_same_bits(rounded[~np.isnan(floats)], expected.view(np.uint16)[~np.isnan(floats)], "rounded")


def test_kernels_keep_to_their_registers(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    command = [nvcc, "-std=c++17", "-O3", "-Werror", "all-warnings", "-gencode=arch=compute_90,code=sm_90"]
    command += ["-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "depth.cubin"), str(KERNEL)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    used = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", told, re.S
    )
    assert len(used) == 6, told
    for name, spilled, registers in used:
        assert int(spilled) == 0, told
        # of 65,536 an SM: a block of 1,024, or two of 256
        assert int(registers) <= (64 if "postprocess" in name else 128), told
