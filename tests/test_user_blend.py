"""Blends of the user's own: the same bytes from plain Python, the CPU backend, the kernels emulated, and a card."""

from __future__ import annotations

import copy
import ctypes
import math
import pickle
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType, SimpleNamespace

import blends
import host_build
import numba
import numpy as np
import pytest
from test_kernels_emulated import Launch, compositor_of, run
from test_placed import FIELDS, Card, cupy  # noqa: F401

from gpufgbg import Assets, Blend, Compositor, DeviceError, Moments, OptionError, Recipe
from gpufgbg import blend as blend_module
from gpufgbg.backends import cpu, cuda

SIZES = [(64, 48), (61, 47), (16, 16), (1, 1), (33, 20), (80, 21)]
LEVELS = np.arange(256)[::-1].copy()
DARKER = 2


def pillow(fg, bg, alpha, x, y):
    v = bg * (255 - alpha) + fg * alpha + 128
    return (v + (v >> 8)) >> 8


def multiply(fg, bg, alpha, x, y):
    return (255 * bg * (255 - alpha) + bg * fg * alpha) // 65025


def feather(fg, bg, alpha, x, y):
    if alpha < 64:
        return bg
    by = min((alpha - 64) * 2, 255)
    return (bg * (255 - by) + fg * by + 127) // 255


def lamp(fg, bg, alpha, x, y):
    distance = (x - 20) ** 2 + (y - 10) ** 2
    by = alpha * max(256 - distance, 0) // 256
    v = bg * (255 - by) + fg * by + 128
    return (v + (v >> 8)) >> 8


def overflowing(fg, bg, alpha, x, y):
    return 3 * (fg + bg) - 2 * alpha - x


def dividing(fg, bg, alpha, x, y):
    part = alpha / 255
    return fg * part + bg * (1 - part) + 0.5


EMULATED = [pillow, multiply, feather, lamp, overflowing, dividing]  # in the order of tests/host/blend_emulated.cpp


def rounding(fg, bg, alpha, x, y):
    # Where a multiplication and an addition in one, or another precision, would show in the byte.
    part = math.sqrt(alpha) * 0.1 + fg / 3
    return (part * part - part * part * 0.999 + (x * 0.1 + y * 0.7) * 0.3) * 1000 % 256


def single(fg, bg, alpha, x, y):
    part = np.float32(alpha) / np.float32(255)
    return (np.float32(fg) * part + np.float32(bg) * (np.float32(1) - part)) * np.float32(1.5)


def not_a_number(fg, bg, alpha, x, y):
    far = 1e308 * 10.0
    if alpha == 0:
        return far - far
    return far if fg > bg else -far


def by_table(fg, bg, alpha, x, y):
    return LEVELS[(fg + bg) // DARKER]


def of_truth(fg, bg, alpha, x, y):
    return fg > bg


ALL = [*EMULATED, rounding, single, not_a_number, by_table, of_truth, lambda fg, bg, alpha, x, y: -fg // 3 + bg % 7]
NAMES = [function.__name__ for function in ALL]


def expected(assets: Assets, labels, function) -> np.ndarray:
    """The composites, one call of the Python function after the other."""
    images = assets.backgrounds[labels.background].copy()
    for n, image in enumerate(images):
        foreground = assets.foreground(labels.foreground[n])
        foreground = foreground[:, ::-1] if labels.flip[n] else foreground
        height, width = foreground.shape[:2]
        x0, y0 = int(labels.x[n]), int(labels.y[n])
        over = foreground.tolist()
        part = image[y0 : y0 + height, x0 : x0 + width]
        under = part.tolist()
        made = [
            [[function(over[y][x][c], under[y][x][c], over[y][x][3], x0 + x, y0 + y) for c in range(3)]
             for x in range(width)]
            for y in range(height)
        ]  # fmt: skip
        part[...] = np.trunc(np.nan_to_num(np.array(made, np.float64), nan=0.0).clip(0, 255))
    return images


def with_blend(compositor: Compositor, blend, device: str = "cpu", workers: int = 1) -> Compositor:
    return Compositor(compositor.assets, compositor.recipe, device, workers, blend=blend)


def some(compositor: Compositor, count: int = 40) -> np.ndarray:
    return np.random.default_rng(len(compositor)).permutation(len(compositor))[:count]


@pytest.mark.parametrize("function", ALL, ids=NAMES)
def test_the_cpu_gives_what_python_gives(function):
    blend = Blend(function)
    for size, flip in [((64, 48), "both"), ((61, 47), "always"), ((16, 16), "never"), ((1, 1), "both")]:
        plain = compositor_of(size, flip)
        batch = with_blend(plain, blend, workers=2).render(some(plain))
        np.testing.assert_array_equal(batch.image, expected(plain.assets, batch.labels, function), err_msg=str(size))
        np.testing.assert_array_equal(batch.mask, plain.render(some(plain)).mask)
        assert batch.moments == {"composite": Moments.of(batch.image), "composite_mask": Moments.of(batch.mask)}


@pytest.mark.parametrize("size", [*SIZES, (224, 224)], ids=str)
def test_pillows_alpha_as_a_users_blend_is_the_builtin(size):
    plain = compositor_of(size)
    mine = with_blend(plain, pillow)
    a, b = plain.render(range(min(len(plain), 200))), mine.render(range(min(len(plain), 200)))
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.mask, b.mask)
    assert a.moments == b.moments


def test_frames_used_again_and_tables_of_a_chunk(monkeypatch):
    monkeypatch.setattr(cpu, "_TABLE_BYTES", 0)
    plain = compositor_of((61, 47))
    mine = with_blend(plain, lamp)
    for start in range(0, 60, 5):
        placements = plain.plan.placements(some(plain, 60)[start : start + 5])
        images, _, moments = mine.backend.render_reusing(placements, 5)
        np.testing.assert_array_equal(images, expected(plain.assets, placements, lamp))
        assert moments["composite"] == Moments.of(images)


def test_tall_foregrounds_are_counted_exactly():
    figure = np.full((700, 9, 4), 255, np.uint8)
    assets = Assets.from_arrays(np.zeros((1, 700, 12, 3), np.uint8), [figure])
    recipe = Recipe(size=(12, 700), foreground_height=9)
    batch = Compositor(assets, recipe, "cpu", blend=overflowing).render(range(8))
    assert batch.moments["composite"] == Moments.of(batch.image)


def test_the_callers_own_placements():
    plain = compositor_of((61, 47))
    labels = plain.plan.placements(some(plain))
    batch = with_blend(plain, lamp).render_placed(**{name: getattr(labels, name) for name in FIELDS})
    np.testing.assert_array_equal(batch.image, expected(plain.assets, labels, lamp))


def test_a_blend_is_compiled_once_for_many():
    blend = Blend(pillow)
    plain = compositor_of((16, 16))
    backends = [with_blend(plain, blend).backend for _ in range(2)]
    assert backends[0]._render is backends[1]._render
    assert blend.name == "pillow" and repr(blend) == "Blend(pillow)"
    assert Blend(blend.cpu.py_func.__closure__[0].cell_contents).function is pillow  # out of Numba's wrapper


@pytest.mark.parametrize("function", [blends.inverted, blends.darker], ids=["def", "njit"])
def test_a_blend_is_pickled_by_its_function(function):
    blend = Blend(function)
    again = pickle.loads(pickle.dumps(blend))
    assert again is not blend and again.name == blend.name
    points = [(fg, bg, 255, 3, 4) for fg in (0, 7, 255) for bg in (0, 9, 200)]
    assert [again.cpu(*point) for point in points] == [blend.cpu(*point) for point in points]
    assert copy.copy(blend) is copy.deepcopy(blend) is blend


def test_a_function_without_a_name_is_not_pickled():
    def inner(fg, bg, alpha, x, y):
        return bg

    for function in (inner, lambda fg, bg, alpha, x, y: bg):
        blend = Blend(function)
        with pytest.raises(OptionError, match=r"^blend: \S+ can't go to a process that is not forked: [^\n]+$"):
            pickle.dumps(blend)
        assert copy.deepcopy([blend]) == [blend]


def test_many_blends_that_are_kept_are_compiled_once_each():
    plain = compositor_of((16, 16))
    kept = [Blend(pillow) for _ in range(17)]
    first = [with_blend(plain, blend).backend._render for blend in kept]
    again = [with_blend(plain, blend).backend._render for blend in kept]
    assert all(a is b for a, b in zip(first, again, strict=True)) and len(set(map(id, first))) == 17


# The kernels, emulated


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_build.load("blend_emulated", tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize("function", EMULATED, ids=NAMES[: len(EMULATED)])
def test_the_kernels_give_what_python_gives(library, function):
    library.choose_blend(EMULATED.index(function))
    sizes = {size: flip for flip, size in zip(["both", "always", "never"] * 2, SIZES, strict=True)}
    for size, flip in sizes.items():
        plain = compositor_of(size, flip)
        indices = some(plain, 24)
        for how in (Launch(), Launch(given=True, bands=3), Launch(off=(0, 4, 0))):
            images, masks, _, added = run(library, plain, indices, 0, len(indices), how)
            labels = plain.plan.placements(indices)
            np.testing.assert_array_equal(images, expected(plain.assets, labels, function), err_msg=f"{size} {how}")
            np.testing.assert_array_equal(masks, plain.render(indices).mask)
            after, before = Moments.of(images), Moments.of(plain.assets.backgrounds[labels.background])
            old = [*before.sum, *before.sum_of_squares]
            new = [*after.sum, *after.sum_of_squares]
            assert added.tolist() == [a - b for a, b in zip(new, old, strict=True)]


def test_the_cuda_backend_on_emulated_kernels(cupy, library, monkeypatch):  # noqa: F811
    def plain(argument):
        if isinstance(argument, np.ndarray):
            assert isinstance(argument, Card) and argument.flags.c_contiguous
            return ctypes.c_void_p(argument.ctypes.data)
        kinds = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "uint64": ctypes.c_uint64}
        return kinds[argument.dtype.name](int(argument))

    def launcher(name: str):
        return lambda grid, block, arguments: getattr(library, f"run_{name}")(*grid, *map(plain, arguments))

    builtin = []
    monkeypatch.setattr(cuda, "kernel", lambda stem, name: builtin.append(stem) or launcher(name))
    monkeypatch.setattr(cuda, "CardBlend", lambda blend, device: SimpleNamespace(kernel=launcher))
    monkeypatch.setattr(cuda, "why_not", lambda index=0: None)
    library.choose_blend(EMULATED.index(lamp))
    compositor = compositor_of((64, 48))
    indices = some(compositor)
    here, there = (with_blend(compositor, lamp, device) for device in ("cpu", "cuda"))
    a, b = here.render(indices), there.render(indices)
    placed = there.render_placed(**{name: getattr(a.labels, name) for name in FIELDS})
    for batch in (b, placed):
        np.testing.assert_array_equal(batch.image, a.image)
        np.testing.assert_array_equal(batch.mask, a.mask)
        assert batch.moments == a.moments
    assert set(builtin) == {"moments"}


# Linked for a card, without one


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """LTO-IR of kernels/composite.cu: this build's, else made by nvcc as CMakeLists.txt does, or a skip."""
    pytest.importorskip("numba_cuda")
    pytest.importorskip("cuda.bindings.nvjitlink")
    built = resources.files("gpufgbg") / "_kernels" / "composite_blend.ltoir"
    if built.is_file():
        return built.read_bytes()
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        pytest.skip("no kernels in this build, and no nvcc")
    source = Path(__file__).parents[1] / "kernels" / "composite.cu"
    out = tmp_path_factory.mktemp("lto") / "composite_blend.ltoir"
    codes = [f"-gencode=arch=compute_{cc},code=lto_{cc}" for cc in (75, 80)]
    flags = ["-std=c++17", "-O3", "-rdc=true", "-DGPUFGBG_USER_BLEND", "-Werror", "all-warnings", *codes, "-fatbin"]
    subprocess.run([nvcc, *flags, "-o", str(out), str(source)], check=True)
    return out.read_bytes()


@pytest.mark.parametrize("cc", [75, 80, 86, 89, 90, 100, 120])
def test_blends_link_for_every_card(kernels, monkeypatch, cc):
    monkeypatch.setattr(blend_module, "_kernels", lambda: kernels)
    for function in ALL if cc == 90 else [pillow, dividing]:
        blend = Blend(function)
        cubin = blend.link(cc)
        assert cubin[:4] == b"\x7fELF"
        assert {b".text.composite", b".text.composite_placed"} <= set(cubin.split(b"\0"))
        assert b"gpufgbg_blend" not in cubin, f"{function.__name__} is not inlined"
        assert blend.link(cc) is cubin


def test_a_card_that_nvjitlink_does_not_know(kernels, monkeypatch):
    monkeypatch.setattr(blend_module, "_kernels", lambda: kernels)
    with pytest.raises(DeviceError) as refused:
        Blend(pillow).link(19)
    assert str(refused.value).startswith("blend: nvJitLink can't make code for compute capability 19: ")
    assert "\n" not in str(refused.value)


def test_a_build_without_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(blend_module, "_compile_ltoir", lambda function, name: b"")
    monkeypatch.setattr(blend_module.resources, "files", lambda package: tmp_path)
    blend_module._kernels.cache_clear()
    with pytest.raises(DeviceError, match="no kernels in this build"):
        Blend(pillow).link(90)


def test_numba_cuda_that_does_not_go_with_numpy(monkeypatch):
    pytest.importorskip("numba_cuda")
    from numba import cuda as numba_cuda

    def compile_(*_: object, **__: object) -> None:
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")

    monkeypatch.setattr(numba_cuda, "compile", compile_)
    with pytest.raises(DeviceError, match=r"Numba-CUDA [\d.]+ does not go with NumPy .*row_stack.*gpufgbg\[blend\]"):
        Blend(multiply).link(90)


def test_without_numba_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    with pytest.raises(DeviceError, match=r"needs Numba-CUDA \(pip install 'gpufgbg\[blend\]'\)"):
        Blend(pillow).link(90)


def test_functions_that_a_blend_calls(kernels, monkeypatch):
    monkeypatch.setattr(blend_module, "_kernels", lambda: kernels)

    @numba.njit(inline="always")
    def doubled(value):
        return 2 * value if value > 3 else value

    blend = Blend(lambda fg, bg, alpha, x, y: doubled(fg))
    assert [blend.cpu(fg, 0, 0, 0, 0) for fg in (3, 4, 200)] == [3, 8, 255]
    assert b"doubled" not in blend.link(90)


@numba.njit(inline="always")
def tripled(value):
    return 3 * value


def test_helpers_that_raise_nothing_are_taken():
    def itself(fg, bg, alpha, x, y):
        return tripled(fg) + math.floor(bg / 2) + later

    later = 1
    assert Blend(itself).cpu(5, 7, 0, 0, 0) == 19


def test_powers_of_integers_are_integers_as_the_page_says():
    blend = Blend(lambda fg, bg, alpha, x, y: (fg + 1) ** -1 * 255)
    assert [blend.cpu(fg, 0, 0, 0, 0) for fg in (0, 1, 9, 255)] == [255, 0, 0, 0]
    blend = Blend(lambda fg, bg, alpha, x, y: 255 / (fg + 1))
    assert [blend.cpu(fg, 0, 0, 0, 0) for fg in (0, 1, 9, 255)] == [255, 127, 25, 0]


def test_what_only_the_cpu_can_compile_is_refused_in_one_line(kernels):
    blend = Blend(lambda fg, bg, alpha, x, y: len({fg, bg}))
    assert blend.cpu(1, 2, 0, 0, 0) == 2
    with pytest.raises(OptionError, match=r"^blend: <lambda> can't be compiled for a card.*: [^\n]+$"):
        blend.link(90)


def test_the_wheel_carries_the_kernels_to_link():
    try:
        files = {Path(f).name for f in metadata.files("gpufgbg") or []}
    except metadata.PackageNotFoundError:
        pytest.skip("gpufgbg is not installed")
    assert ("composite_blend.ltoir" in files) == ("composite.fatbin" in files)


# Functions that are no blends


def nothing(fg, bg, alpha, x, y):
    pass


def now_and_then(fg, bg, alpha, x, y):
    return bg if fg > 3 else None


def two(fg, bg, alpha, x, y):
    return fg, bg


def complex_number(fg, bg, alpha, x, y):
    return 1j * fg


def text(fg, bg, alpha, x, y):
    return "a"


def unknown(fg, bg, alpha, x, y):
    return nowhere(fg)  # noqa: F821


def added_to_text(fg, bg, alpha, x, y):
    return fg + "a"


def opens_a_file(fg, bg, alpha, x, y):
    with Path("x").open() as file:
        return file


def refuses(fg, bg, alpha, x, y):
    assert fg > bg
    return fg


def generates(fg, bg, alpha, x, y):
    yield fg


async def waits(fg, bg, alpha, x, y):
    return fg


def tries(fg, bg, alpha, x, y):
    try:
        return fg // bg
    except ZeroDivisionError:
        return 7


def tidies_up(fg, bg, alpha, x, y):
    try:
        return fg // 3
    finally:
        fg = 0


def raises_inside(fg, bg, alpha, x, y):
    def small(value):
        if value > 128:
            raise ValueError
        return value

    return small(fg)


@numba.njit(inline="always")
def checked(value):
    if value > 128:
        raise ValueError("too much")
    return value


@numba.njit
def half(value):
    return checked(value) // 2


def raises_in_a_helper(fg, bg, alpha, x, y):
    return checked(fg)


def raises_far_away(fg, bg, alpha, x, y):
    return half(half(fg))


def raises_in_a_module(fg, bg, alpha, x, y):
    return helpers.module.checked(fg)


helpers = ModuleType("helpers")
helpers.module = ModuleType("module")
helpers.module.checked = checked


def calls_an_enclosing_one():
    mine = checked
    return lambda fg, bg, alpha, x, y: mine(fg)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda fg, bg, alpha: fg, "<lambda> takes (fg, bg, alpha), expected a Python function of (fg, bg, alpha, x"),
        (lambda *all: 1, "<lambda> takes (*all), expected a Python function of (fg, bg, alpha, x, y)"),
        (len, "got builtin_function_or_method, expected a Python function of (fg, bg, alpha, x, y)"),
        ("multiply", "got str, expected a Python function of (fg, bg, alpha, x, y)"),
        (nothing, "nothing returns none, expected a number from every path"),
        (now_and_then, "now_and_then returns OptionalType(int32), expected a number from every path"),
        (two, "two returns UniTuple(int32 x 2), expected a number"),
        (complex_number, "complex_number returns complex128, expected a number"),
        (text, "text returns "),
        (generates, "generates returns "),
        (unknown, "unknown can't be compiled: NameError: name 'nowhere' is not defined"),
        (added_to_text, "added_to_text can't be compiled, line "),
        (opens_a_file, "opens_a_file can't be compiled"),
        (refuses, "refuses raises exceptions, which a card can't: return a value"),
        (waits, "got async waits, expected a Python function of (fg, bg, alpha, x, y)"),
        (tries, "tries has a try, which a card can't: test for what would raise"),
        (tidies_up, "tidies_up has a try, which a card can't: test for what would raise"),
        (raises_inside, "raises_inside raises exceptions, which a card can't: return a value"),
        (
            raises_in_a_helper,
            "raises_in_a_helper calls checked, which raises exceptions, which a card can't: return a",
        ),
        (
            raises_far_away,
            "raises_far_away calls checked, which raises exceptions, which a card can't: return a value",
        ),
        (
            raises_in_a_module,
            "raises_in_a_module calls checked, which raises exceptions, which a card can't: return a",
        ),
        (
            calls_an_enclosing_one(),
            "<lambda> calls checked, which raises exceptions, which a card can't: return a value",
        ),
    ],
)
def test_what_is_no_blend_is_refused_in_one_line(function, message):
    with pytest.raises(OptionError) as refused:
        with_blend(compositor_of((16, 16)), function)
    assert str(refused.value).startswith(f"blend: {message}")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


# On a card


@pytest.mark.skipif(cuda.count_devices() == 0, reason=f"no CUDA device: {cuda.why_not()}")
@pytest.mark.parametrize("function", ALL, ids=NAMES)
def test_a_card_gives_the_same(function):
    pytest.importorskip("numba_cuda")
    blend = Blend(function)
    for size, flip in [*((size, "both") for size in SIZES), ((224, 224), "both"), ((80, 21), "always")]:
        plain = compositor_of(size, flip)
        here, there = (with_blend(plain, blend, device) for device in ("cpu", "cuda"))
        for indices in (np.arange(min(100, len(plain))), some(plain, 100)):
            a, b = here.render(indices), there.render(indices)
            placed = there.render_placed(**{name: getattr(a.labels, name) for name in FIELDS})
            for batch in (b, placed):
                np.testing.assert_array_equal(batch.image.get(), a.image, err_msg=f"{size}")
                np.testing.assert_array_equal(batch.mask.get(), a.mask)
                assert batch.moments == a.moments


@pytest.mark.skipif(cuda.count_devices() == 0, reason=f"no CUDA device: {cuda.why_not()}")
def test_pillows_alpha_on_a_card_is_the_builtin():
    pytest.importorskip("numba_cuda")
    for size in SIZES:
        plain = compositor_of(size)
        builtin, mine = (with_blend(plain, blend, "cuda").render(range(len(plain))) for blend in (None, pillow))
        np.testing.assert_array_equal(mine.image.get(), builtin.image.get())
        assert mine.moments == builtin.moments
