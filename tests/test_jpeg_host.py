"""The JPEG arithmetic of kernels/jpeg.cuh, built for the host.

Whole files equal Pillow's, and the pixels it reconstructs equal those that Pillow decodes from them.
"""

from __future__ import annotations

import ctypes
import io
from unittest.mock import patch

import host_build
import numpy as np
import pytest
from PIL import Image, ImageFile

GREY = "grey"
# Pillow's subsampling numbers for 4:4:4, 4:2:2, 4:2:0; grey pictures have one channel
MODES = [0, 1, 2, GREY]
MODE_NAMES = ["444", "422", "420", "grey"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    loaded = host_build.load("jpeg_host", tmp_path_factory.mktemp("host"))
    loaded.encode.restype = ctypes.c_int64
    return loaded


def address(array):
    return ctypes.c_void_p(array.ctypes.data)


def encode(library, pixels, mode, quality, optimize):
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else 3
    out = np.empty(8 * pixels.size + 4096, np.uint8)
    subsampling = 0 if mode == GREY else mode
    size = library.encode(
        address(pixels),
        width,
        height,
        channels,
        subsampling,
        quality,
        int(optimize),
        address(out),
        ctypes.c_int64(out.size),
    )
    assert 0 < size <= out.size
    return out[:size].tobytes()


def pillow(pixels, mode, quality, optimize):
    file = io.BytesIO()
    options = {} if mode == GREY else {"subsampling": mode}
    # Pillow gives up ("broken data stream") where an optimised file outgrows its buffer.
    with patch.object(ImageFile, "MAXBLOCK", 8 * pixels.size + 4096):
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, optimize=optimize, **options)
    return file.getvalue()


def decoded(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def reconstruct(library, pixels, mode, quality):
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    out = np.empty_like(pixels)
    channels, subsampling = 1 if pixels.ndim == 2 else 3, 0 if mode == GREY else mode
    library.reconstruct(address(pixels), width, height, channels, subsampling, quality, address(out))
    return out


def check(library, pixels, mode, quality, optimize):
    expected = pillow(pixels, mode, quality, optimize)
    got = encode(library, pixels, mode, quality, optimize)
    case = f"shape {pixels.shape}, mode {mode}, quality {quality}, optimize {optimize}"
    assert got == expected, f"{case}: {len(got)} bytes, Pillow {len(expected)}"
    np.testing.assert_array_equal(reconstruct(library, pixels, mode, quality), decoded(expected), err_msg=case)
    return got


def as_mode(pixels, mode):
    """The first channel of a picture (H, W, 3) where the mode is grey, else the picture."""
    return np.ascontiguousarray(pixels[..., 0]) if mode == GREY else pixels


def natural(rng, height, width):
    """Sums of cosines under a 1/f spectrum with edges and a little noise, uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    base = np.zeros((height, width), np.float32)
    for _ in range(12):
        fy, fx = rng.uniform(0.5, 24, 2) / 64
        base += np.cos(fy * y + fx * x + rng.uniform(0, 6.3)) / (fy + fx)
    base += 6 * (y > height * rng.uniform(0.2, 0.8)) - 5 * (x + y / 2 > width * rng.uniform(0.3, 1))
    tint = rng.uniform(0.4, 1.2, 3)
    colour = 128 + base[..., None] * 9 * tint + rng.normal(0, 2, (height, width, 3))
    return np.clip(colour, 0, 255).astype(np.uint8)


def smooth(rng, height, width):
    y, x = np.mgrid[:height, :width]
    slopes = rng.uniform(-3, 3, (2, 3))
    ramp = rng.uniform(0, 255, 3) + y[..., None] * slopes[0] + x[..., None] * slopes[1]
    return np.clip(ramp, 0, 255).astype(np.uint8)


def noise(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def extremes(rng, height, width):
    return rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)


def flat(rng, height, width):
    return np.tile(rng.integers(0, 256, 3, dtype=np.uint8), (height, width, 1))


def checkerboard(rng, height, width):
    y, x = np.mgrid[:height, :width]
    step = int(rng.integers(1, 9))
    board = ((y // step + x // step) % 2).astype(np.uint8)
    return np.stack([board * np.uint8(255), (1 - board) * np.uint8(255), board * np.uint8(200)], 2)


def sparse(rng, height, width):
    """Mostly black with a few specks: long runs of zeros."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[rng.random((height, width)) < 0.01] = 255
    return picture


def saturated(rng, height, width):
    """Patches of colours from the corners of the cube: what is decoded leaves it on all sides."""
    step = int(rng.integers(2, 25))
    corners = extremes(rng, -(-height // step), -(-width // step))
    return np.ascontiguousarray(corners.repeat(step, axis=0).repeat(step, axis=1)[:height, :width])


KINDS = [natural, smooth, noise, extremes, flat, checkerboard, sparse, saturated]


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("optimize", [False, True], ids=["standard", "optimal"])
def test_every_quality(library, mode, optimize):
    rng = np.random.default_rng(1)
    for quality in range(1, 101):
        for kind in KINDS:
            pixels = as_mode(kind(rng, 45, 53), mode)
            check(library, pixels, mode, quality, optimize)


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_every_remainder_of_the_size(library, mode):
    rng = np.random.default_rng(2)
    for height in range(1, 34):
        for width in range(1, 34):
            kind = KINDS[int(rng.integers(len(KINDS)))]
            pixels = as_mode(kind(rng, height, width), mode)
            check(library, pixels, mode, int(rng.integers(1, 101)), bool((height + width) % 2))


def test_random_pictures(library):
    rng = np.random.default_rng(3)
    for _ in range(1500):
        height, width = (int(side) for side in rng.integers(1, 71, 2))
        mode = MODES[int(rng.integers(4))]
        kind = KINDS[int(rng.integers(len(KINDS)))]
        pixels = as_mode(kind(rng, height, width), mode)
        check(library, pixels, mode, int(rng.integers(1, 101)), bool(rng.integers(2)))


@pytest.mark.parametrize(
    ("height", "width", "mode", "quality", "optimize"),
    [
        (224, 224, 2, 65, True),
        (224, 224, GREY, 65, True),
        (1500, 2000, 2, 65, True),
        (1500, 2000, 0, 90, False),
        (1080, 1921, 1, 75, True),
        (1111, 777, GREY, 100, True),
        (3, 4000, 2, 50, True),
        (4000, 3, 2, 50, True),
    ],
)
def test_large_pictures(library, height, width, mode, quality, optimize):
    pixels = as_mode(natural(np.random.default_rng(4), height, width), mode)
    check(library, pixels, mode, quality, optimize)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_grey_with_declared_subsampling(library, subsampling):
    pixels = as_mode(natural(np.random.default_rng(5), 41, 23), GREY)
    check(library, pixels, subsampling, 65, True)


@pytest.mark.parametrize("optimize", [False, True], ids=["standard", "optimal"])
@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_stuffed_bytes(library, mode, optimize):
    rng = np.random.default_rng(6)
    file = check(library, as_mode(extremes(rng, 300, 300), mode), mode, 100, optimize)
    assert file.count(b"\xff\x00") > 100


def block_of_one_coefficient(k_natural, coefficient):
    """The 8x8 samples, rounded, whose DCT is one AC coefficient on grey."""
    row, column = divmod(k_natural, 8)
    angle = (2 * np.arange(8) + 1) * np.pi / 16
    scale = [np.sqrt(0.5) if u == 0 else 1 for u in (row, column)]
    wave = np.outer(np.cos(row * angle) * scale[0], np.cos(column * angle) * scale[1])
    return np.clip(np.rint(128 + coefficient / 4 * wave), 0, 255).astype(np.uint8)


def test_sample_far_beyond_the_range(library):
    # Found by search: at quality 1 the first sample comes out of the inverse DCT as 577 + 128. libjpeg-turbo's SIMD
    # code saturates; its C code (JSIMD_FORCENONE=1, or a build without SIMD) takes 577 modulo 1024 and makes it 0.
    block = np.array(
        [
            [255, 0, 60, 0, 0, 81, 230, 116],
            [0, 255, 0, 255, 137, 0, 255, 255],
            [255, 0, 85, 161, 96, 255, 182, 0],
            [0, 52, 255, 255, 255, 255, 255, 0],
            [187, 147, 255, 0, 68, 255, 255, 0],
            [156, 255, 255, 156, 255, 0, 224, 0],
            [97, 255, 57, 126, 255, 255, 0, 255],
            [169, 0, 15, 255, 255, 255, 255, 0],
        ],
        np.uint8,
    )
    for picture, limit in ((block, 255), (255 - block, 0)):
        seen = reconstruct(library, picture, GREY, 1)
        expected = decoded(pillow(picture, GREY, 1, True)).copy()
        assert seen[0, 0] == limit
        assert expected[0, 0] in (0, 255)
        expected[0, 0] = limit
        np.testing.assert_array_equal(seen, expected)


def code_lengths_of(file):
    """The BITS lists of a file's Huffman tables."""
    lists, at = [], file.find(b"\xff\xc4")
    while at >= 0:
        lists.append(list(file[at + 5 : at + 21]))
        at = file.find(b"\xff\xc4", at + 2)
    return lists


def test_picture_that_needs_the_length_limit(library):
    # Fibonacci numbers of blocks that hold one AC symbol each: with the reserved symbol's 1 before
    # them, the unlimited code is deeper than 16 bits.
    fibonacci = [1, 2]
    while len(fibonacci) < 20:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    header = io.BytesIO(pillow(np.zeros((8, 8), np.uint8), GREY, 50, False))
    steps = Image.open(header).quantization[0]  # natural order
    after_dc = [1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12]  # runs of 0 to 15 zeros
    blocks = []
    for i, count in enumerate(fibonacci):
        place = after_dc[i % 16]
        coefficient = steps[place] * (1 if i < 16 else 2)
        blocks += [block_of_one_coefficient(place, coefficient)] * count
    across = 136
    blocks += [np.full((8, 8), 128, np.uint8)] * (-len(blocks) % across)
    rows = [np.hstack(blocks[i : i + across]) for i in range(0, len(blocks), across)]
    file = check(library, np.vstack(rows), GREY, 50, True)
    dc, ac = code_lengths_of(file)
    assert sum(dc) >= 1
    assert sum(ac) == 21
    assert ac[15] >= 2, "codes of the full 16 bits"


def reference_lengths(histogram):
    """T.81 figures K.1 to K.4, step by step: BITS[1..16] and HUFFVAL."""
    frequency = [int(count) for count in histogram] + [0] * (256 - len(histogram)) + [1]
    size, others = [0] * 257, [-1] * 257
    while True:
        present = [v for v in range(257) if frequency[v]]
        if len(present) < 2:
            break
        v1 = min(present, key=lambda v: (frequency[v], -v))
        v2 = min((v for v in present if v != v1), key=lambda v: (frequency[v], -v))
        frequency[v1] += frequency[v2]
        frequency[v2] = 0
        size[v1] += 1
        while others[v1] >= 0:
            v1 = others[v1]
            size[v1] += 1
        others[v1] = v2
        size[v2] += 1
        while others[v2] >= 0:
            v2 = others[v2]
            size[v2] += 1
    bits = [0] * 258
    for length in size:
        bits[length] += 1
    bits[0] = 0
    i = 257
    while True:
        if bits[i] > 0:
            if i <= 16:
                break
            j = i - 2
            while bits[j] == 0:
                j -= 1
            bits[i] -= 2
            bits[i - 1] += 1
            bits[j + 1] += 2
            bits[j] -= 1
        else:
            i -= 1
            if i == 16:
                break
    i = 16
    while bits[i] == 0:
        i -= 1
    bits[i] -= 1
    order = sorted((v for v in range(256) if size[v]), key=lambda v: (size[v], v))
    return bits[1:17], order, max(size)


def reference_codes(bits):
    """T.81 figures C.1 and C.2: (code, length) of each rank."""
    codes, code = [], 0
    for length, count in enumerate(bits, 1):
        for _ in range(count):
            codes.append((code, length))
            code += 1
        code <<= 1
    return codes


def huffman_cases():
    rng = np.random.default_rng(7)
    fibonacci = [1, 1]
    while len(fibonacci) < 43:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    for symbols in (2, 15, 16, 17, 20, 30, 43):
        yield fibonacci[:symbols]
        yield fibonacci[:symbols][::-1]
        yield list(rng.permutation(fibonacci[:symbols]))
    yield [5]
    yield [0, 0, 0, 1]
    yield [1] * 162
    yield [7] * 128
    yield [1 << min(i, 25) for i in range(40)]
    yield [3**i for i in range(19)]
    for _ in range(150):
        used = int(rng.integers(1, 163))
        spread = float(rng.uniform(0, 14))
        counts = np.exp(rng.uniform(0, spread, used)).astype(np.int64)
        histogram = np.zeros(256, np.int64)
        histogram[rng.permutation(256)[:used]] = counts
        yield histogram.tolist()


def test_optimal_tables_against_t81(library):
    deepest = 0
    for case in huffman_cases():
        histogram = np.array(case, np.uint32)
        lengths = np.zeros(17, np.uint8)
        symbols = np.zeros(192, np.uint8)
        book = np.zeros(256, np.uint32)
        library.huffman(address(histogram), histogram.size, address(lengths), address(symbols), address(book))
        bits, order, depth = reference_lengths(case)
        deepest = max(deepest, depth)
        assert lengths[1:].tolist() == bits
        assert lengths[0] == len(order)
        assert symbols[: len(order)].tolist() == order
        for symbol, (code, length) in zip(order, reference_codes(bits), strict=True):
            size = symbol & 15
            assert code != (1 << length) - 1, "the code of all ones is reserved"
            if size <= 11:
                assert book[symbol] == (code << (size + 5)) | (length + size)
    assert deepest > 32


def test_quantiser_is_division(library):
    values = [*range(-8300, 8301, 7), 8300, 0, -1, 1]
    for step in range(1, 256):
        # halves of the divisor are where a wrong reciprocal would show
        edges = [sign * (8 * step * n + 4 * step + d) for n in range(9) for d in (-1, 0, 1) for sign in (-1, 1)]
        for value in edges + values[step % 5 :: 5]:
            expected = (abs(value) + 4 * step) // (8 * step) * (1 if value >= 0 else -1)
            assert library.quantised(value, step) == expected


def test_bytes_of_ones(library):
    library.all_ones_bytes.restype = ctypes.c_uint32
    interesting = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
    for a in interesting:
        for b in interesting:
            for c in interesting:
                for d in interesting:
                    word = int.from_bytes(bytes([a, b, c, d]), "little")
                    marks = bytes(0x80 if byte == 0xFF else 0 for byte in (a, b, c, d))
                    got = library.all_ones_bytes(ctypes.c_uint32(word))
                    assert got == int.from_bytes(marks, "little")


def test_colour_conversion_is_the_fixed_point_matrix(library):
    rng = np.random.default_rng(8)
    pixels = rng.integers(0, 256, (3000, 3)).tolist()
    pixels += [[r, g, b] for r in (0, 1, 254, 255) for g in (0, 1, 254, 255) for b in (0, 1, 254, 255)]
    for red, green, blue in pixels:
        expected = [
            (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16,
            (-11058 * red - 21710 * green + 32768 * blue + (128 << 16) + 32767) >> 16,
            (32768 * red - 27439 * green - 5329 * blue + (128 << 16) + 32767) >> 16,
        ]
        packed = red | green << 8 | blue << 16 | 0xAB000000  # the top byte must not matter
        got = [library.component_of(c, ctypes.c_uint32(packed)) for c in range(3)]
        assert got == expected
