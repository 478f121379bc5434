"""The kernel files themselves, run on the CPU by tests/host/cuda_emulator.h, against the CPU backend and Pillow."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import host_build
import numpy as np
import pytest
from conftest import cutout, smooth
from test_blend import by_pillow
from test_jpeg_host import GREY, KINDS, MODE_NAMES, MODES, as_mode, decoded, natural, pillow

from gpufgbg import Assets, Compositor, Moments, Recipe

FLIP_MODES = {"never": 0, "always": 1, "both": 2}
i32, i64, u64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_build.load("kernels_emulated", tmp_path_factory.mktemp("host"))


def address(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


class Guarded:
    """An array ``off`` bytes from an address aligned to 64, full of noise, between bytes that must not change."""

    def __init__(self, shape: tuple[int, ...], dtype: type, off: int = 0) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._memory = np.random.default_rng(size).integers(0, 256, size + 256, np.uint8)
        start = 64 + -(self._memory.ctypes.data + 64) % 64 + off
        self._around = [self._memory[:start], self._memory[start + size :]]
        self._before = [part.copy() for part in self._around]
        self.array = self._memory[start : start + size].view(dtype).reshape(shape)

    def done(self) -> np.ndarray:
        for part, before in zip(self._around, self._before, strict=True):
            np.testing.assert_array_equal(part, before, err_msg="written out of bounds")
        return self.array


def placed_at(array: np.ndarray, off: int) -> np.ndarray:
    copy = Guarded(array.shape, array.dtype.type, off).array
    copy[...] = array
    return copy


@dataclass(frozen=True)
class Launch:
    """How the compositing kernels are called. off: bytes by which backgrounds, composites, masks are misaligned."""

    given: bool = False  # composite_placed, else composite
    bands: int = 1
    extra_blocks: int = 0
    off: tuple[int, int, int] = (0, 0, 0)
    count: bool = True


def run(library: ctypes.CDLL, compositor: Compositor, indices: np.ndarray | None, first: int, n: int, how: Launch):
    """Composites, masks, placements and changes of n samples: indices, or first and those that follow."""
    assets, recipe = compositor.assets, compositor.recipe
    width, height = recipe.size
    backgrounds = placed_at(assets.backgrounds, how.off[0])
    composites = Guarded((n, height, width, 3), np.uint8, how.off[1])
    mattes = Guarded((n, height, width), np.uint8, how.off[2])
    placements, changes = Guarded((n, 5), np.int32), Guarded((6,), np.uint64)
    changes.array[...] = start = 2**64 - 5  # what is there is added to
    common = [
        n + how.extra_blocks,
        how.bands,
        address(backgrounds),
        address(assets.foregrounds),
        address(assets.masks),
    ]
    common += [address(assets.offsets), address(assets.widths), address(assets.heights), width, height]
    counted = address(changes.array if how.count else None)
    if how.given:
        plan = compositor.plan.placements(np.arange(first, first + n) if indices is None else indices)
        columns = [plan.background, plan.foreground, plan.flip, plan.x, plan.y]
        placements.array[...] = np.stack(columns, 1)
        library.run_composite_placed(
            *common, address(placements.array), n, address(composites.array), address(mattes.array), counted
        )
    else:
        library.run_composite(
            *common, assets.n_foregrounds, recipe.per_pair, FLIP_MODES[recipe.flip], u64(recipe.seed),
            address(indices), i64(first), n, address(composites.array), address(mattes.array),
            address(placements.array if how.count else None), counted,
        )  # fmt: skip
    added = (changes.done() - np.uint64(start)).view(np.int64)  # modulo 2**64
    return composites.done(), mattes.done(), placements.done(), added


def check(library: ctypes.CDLL, compositor: Compositor, indices: np.ndarray | None, first: int, n: int, how: Launch):
    images, masks, placements, added = run(library, compositor, indices, first, n, how)
    batch = compositor.render(np.arange(first, first + n) if indices is None else indices)
    np.testing.assert_array_equal(images, batch.image, err_msg=str(how))
    np.testing.assert_array_equal(masks, batch.mask, err_msg=str(how))
    if how.count:
        p = batch.labels
        np.testing.assert_array_equal(placements, np.stack([p.background, p.foreground, p.flip, p.x, p.y], 1))
        after = Moments.of(images)
        before = Moments.of(compositor.assets.backgrounds[p.background])
        assert added[:3].tolist() == [a - b for a, b in zip(after.sum, before.sum, strict=True)]
        squares = zip(after.sum_of_squares, before.sum_of_squares, strict=True)
        assert added[3:].tolist() == [a - b for a, b in squares]
    else:
        assert not added.any()


def compositor_of(size: tuple[int, int], flip: str = "both", seed: int = 0, per_pair: int = 2) -> Compositor:
    """Noise and figures: one pixel, the whole frame, its whole width or height, odd widths, hollow ones."""
    width, height = size
    rng = np.random.default_rng(width * height)
    shapes = {(1, 1), (width, height), (width, 1), (1, height), (width // 2 | 1, height // 2 | 1)}
    shapes |= {(min(width, w), min(height, h)) for w, h in [(7, 3), (15, 9), (16, 16), (17, 20), (33, 5), (80, 105)]}
    cutouts = []
    for i, (w, h) in enumerate(sorted(shapes)):
        cutouts.append(cutout(rng, w, h) if i % 3 == 0 else rng.integers(0, 256, (h, w, 4), dtype=np.uint8))
        if i % 3 == 2:
            cutouts[-1][..., 3] = rng.choice(np.array([0, 255], np.uint8), (h, w))
    masks = [rng.integers(0, 256, c.shape[:2], dtype=np.uint8) for c in cutouts]
    backgrounds = [smooth(rng, width, height, 3), rng.integers(0, 256, (height, width, 3), dtype=np.uint8)]
    recipe = Recipe(size=size, foreground_height=1, per_pair=per_pair, flip=flip, seed=seed)
    return Compositor(Assets.from_arrays(np.stack(backgrounds), cutouts, masks), recipe, "cpu", workers=1)


SIZES = [(64, 48), (61, 47), (16, 16), (1, 1), (33, 20), (48, 3), (80, 21), (12, 7)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("flip", FLIP_MODES)
def test_every_sample_equals_the_cpu_backend(library, size, flip):
    compositor = compositor_of(size, flip, seed=2**64 - 3)
    check(library, compositor, None, 0, len(compositor), Launch())


@pytest.mark.parametrize("size", [(64, 48), (61, 47), (16, 16)], ids=str)
def test_every_way_to_call_gives_the_same(library, size):
    compositor = compositor_of(size)
    indices = np.random.default_rng(1).integers(0, len(compositor), 40)
    how = Launch()
    for given in (False, True):
        for bands in (1, 2, 5, size[1], size[1] + 3):
            check(library, compositor, indices[:9].copy(), 0, 9, replace(how, given=given, bands=bands))
        check(library, compositor, indices, 0, 40, replace(how, given=given))
        check(library, compositor, None, 11, 20, replace(how, given=given, extra_blocks=7))
        check(library, compositor, None, 5, 3, replace(how, given=given, count=given))
        check(library, compositor, indices[:5].copy(), 0, 5, replace(how, given=given, count=False))


@pytest.mark.parametrize("off", [(1, 0, 0), (0, 4, 0), (0, 0, 8), (3, 5, 7)], ids=str)
def test_addresses_that_are_not_aligned(library, off):
    check(library, compositor_of((64, 48)), None, 3, 30, Launch(off=off))


@pytest.mark.parametrize("given", [False, True], ids=["planned", "placed"])
def test_the_usual_frame(library, given):
    compositor = compositor_of((224, 224), per_pair=1)
    indices = np.random.default_rng(2).permutation(len(compositor))[:16]
    check(library, compositor, indices, 0, 16, Launch(given=given))


def test_indices_above_32_bits(library):
    compositor = compositor_of((16, 16), per_pair=1_000_000, seed=7)
    assets = compositor.assets
    many = replace(assets, backgrounds=np.resize(assets.backgrounds, (400, 16, 16, 3)))
    compositor = Compositor(many, compositor.recipe, "cpu", workers=1)
    assert len(compositor) > 2**32
    indices = np.random.default_rng(3).integers(2**32, len(compositor), 20)
    check(library, compositor, indices, 0, 20, Launch())
    check(library, compositor, None, len(compositor) - 4, 4, Launch())


@pytest.mark.parametrize("width", [1024, 1023])
def test_changes_of_a_large_foreground_are_exact(library, width):
    # More than a thread may add up in 32 bits: a white figure over black, the whole frame.
    figure = np.full((1200, width, 4), 255, np.uint8)
    assets = Assets.from_arrays(np.zeros((1, 1200, width, 3), np.uint8), [figure])
    recipe = Recipe(size=(width, 1200), foreground_height=1200, per_pair=1, flip="never")
    check(library, Compositor(assets, recipe, "cpu", workers=1), None, 0, 1, Launch())


def test_four_bytes_are_blended_as_pillow_does_on_all_inputs(library):
    out = np.zeros((256, 256), np.uint8)
    for alpha in range(256):
        library.blend_all_by_four(alpha, address(out))
        np.testing.assert_array_equal(out, by_pillow(alpha), err_msg=f"alpha {alpha}")


@pytest.mark.parametrize("channels", [1, 3])
def test_moments_of_any_length_and_alignment(library, channels):
    rng = np.random.default_rng(4)
    lengths = [*range(70), 1000, 20_000, 300_001]
    for length in lengths:
        pixels = rng.integers(0, 256, (1, 1, length, channels), dtype=np.uint8)
        if length % 3 == 0:
            pixels[...] = 255
        pictures = placed_at(pixels, int(rng.integers(0, 16)))
        sums = Guarded((2 * channels,), np.uint64)
        sums.array[...] = 1000
        blocks = int(rng.choice([1, 2, 3, 7]))
        library.run_moments(blocks, address(pictures), i64(pixels.size), channels, address(sums.array))
        expected = Moments.of(pixels) if length else Moments(0, 0, (0,) * channels, (0,) * channels)
        assert (sums.done() - 1000).tolist() == [*expected.sum, *expected.sum_of_squares], (length, blocks)


@pytest.mark.parametrize("channels", [1, 3])
def test_moments_of_more_than_32_bits(library, channels):
    pixels = np.full((1, 3000, 5000, channels), 255, np.uint8)
    sums = np.zeros(2 * channels, np.uint64)
    library.run_moments(1, address(pixels), i64(pixels.size), channels, address(sums))
    assert sums.tolist() == [15_000_000 * 255] * channels + [15_000_000 * 255**2] * channels


def encode(library: ctypes.CDLL, pictures: np.ndarray, mode, quality: int, optimize: bool, **options) -> list[bytes]:
    pictures = np.ascontiguousarray(pictures)
    n, height, width = pictures.shape[:3]
    capacity = options.get("capacity", 8 * pictures.size + 4096 * n)
    files, offsets = np.zeros(capacity, np.uint8), np.zeros(n + 1, np.int64)
    subsampling = 0 if mode == GREY else mode
    library.run_jpeg(
        address(pictures), n, width, height, 1 if pictures.ndim == 3 else 3, subsampling, quality, int(optimize),
        options.get("misalign", 0), i64(capacity), address(files), address(offsets),
    )  # fmt: skip
    return [files[offsets[i] : offsets[i + 1]].tobytes() for i in range(n)]


def reconstruct(library: ctypes.CDLL, pictures: np.ndarray, mode, quality: int, misalign: int, out: int):
    pictures = np.ascontiguousarray(pictures)
    n, height, width = pictures.shape[:3]
    found = np.zeros_like(pictures)
    library.run_jpeg_reconstruct(
        address(pictures), n, width, height, 1 if pictures.ndim == 3 else 3, 0 if mode == GREY else mode, quality,
        misalign, out, address(found),
    )  # fmt: skip
    return found


def check_files(library: ctypes.CDLL, pictures: np.ndarray, mode, quality: int, optimize: bool, **options) -> None:
    files = encode(library, pictures, mode, quality, optimize, **options)
    misalign = options.get("misalign", 0)
    pixels = reconstruct(library, pictures, mode, quality, misalign, 5 * misalign % 16)
    for i, (file, picture, seen) in enumerate(zip(files, pictures, pixels, strict=True)):
        expected = pillow(picture, mode, quality, optimize)
        case = f"picture {i} of {pictures.shape}, {mode}, {quality}, {optimize}, {options}"
        assert file == expected, case
        np.testing.assert_array_equal(seen, decoded(expected), err_msg=case)


@pytest.mark.parametrize("optimize", [False, True], ids=["standard", "optimal"])
@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_files_equal_pillow(library, mode, optimize):
    rng = np.random.default_rng(5)
    for case in range(4):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        if case == 1:
            width = 48  # rows aligned to 16 bytes
        pictures = [as_mode(KINDS[int(rng.integers(len(KINDS)))](rng, height, width), mode) for _ in range(3)]
        quality = (65, 95, 100, int(rng.integers(1, 60)))[case]
        check_files(library, np.stack(pictures), mode, quality, optimize, misalign=case)


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_what_a_decoder_gets_at_every_remainder_of_the_size(library, mode):
    rng = np.random.default_rng(9)
    sizes = [(w, h) for w in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33) for h in (1, 2, 3, 16, 17, 18)]
    for width, height in sizes:
        pictures = np.stack([as_mode(kind(rng, height, width), mode) for kind in KINDS])
        quality, off = int(rng.integers(1, 101)), (int(rng.choice([0, 4, 8, 3])), int(rng.choice([0, 4, 8, 3])))
        found = reconstruct(library, pictures, mode, quality, *off)
        for picture, seen in zip(pictures, found, strict=True):
            expected = decoded(pillow(picture, mode, quality, False))
            np.testing.assert_array_equal(seen, expected, err_msg=f"{width}x{height}, {quality}, {off}")


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
def test_a_picture_of_several_chunks(library, mode):
    rng = np.random.default_rng(6)
    pictures = np.stack([as_mode(natural(rng, 200, 300), mode) for _ in range(2)])
    check_files(library, pictures, mode, 65, True)


def test_files_that_do_not_fit_are_left_out(library):
    rng = np.random.default_rng(7)
    pictures = np.stack([natural(rng, 40, 40) for _ in range(5)])
    whole = encode(library, pictures, 2, 65, True)
    capacity = sum(map(len, whole[:3])) + 5
    assert encode(library, pictures, 2, 65, True, capacity=capacity)[:3] == whole[:3]


def test_the_order_of_threads_does_not_matter(library):
    rng = np.random.default_rng(8)
    pictures = np.stack([natural(rng, 50, 70) for _ in range(2)])
    compositor = compositor_of((64, 48))
    for seed in range(5):
        library.reorder(seed)
        check_files(library, pictures, 2, 80, True)
        check(library, compositor, None, seed, 10, Launch(bands=2))
