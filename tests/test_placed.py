"""The caller's own placements: what Pillow pastes, what `render` gives for the plan's, and refusals by sample."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import sys
from unittest.mock import MagicMock

import host_build
import numpy as np
import oracle
import pytest
from conftest import cutout, smooth
from PIL import Image

from gpufgbg import Assets, Batch, Compositor, DeviceError, InputError, Moments, OptionError, Placements, Recipe
from gpufgbg.backends import cuda
from gpufgbg.depth.processing import _batch

SIZES = [(1, 1), (61, 47), (30, 20), (7, 47), (61, 3), (33, 21)]
FIELDS = ("background", "foreground", "flip", "x", "y")


@pytest.fixture(scope="module")
def assets() -> Assets:
    rng = np.random.default_rng(3)
    cutouts = [cutout(rng, *size) for size in SIZES]
    cutouts.append(rng.integers(0, 256, (20, 25, 4), dtype=np.uint8))
    masks = [c[..., 3] if i % 2 else rng.integers(0, 256, c.shape[:2], dtype=np.uint8) for i, c in enumerate(cutouts)]
    return Assets.from_arrays(np.stack([smooth(rng, 61, 47, 3) for _ in range(4)]), cutouts, masks)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def compositor(request, assets) -> Compositor:
    return Compositor(assets, Recipe(size=(61, 47), foreground_height=20, per_pair=3), "cpu", workers=request.param)


def anywhere(assets: Assets, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Placements in no order, the frame's edges among them."""
    rng = np.random.default_rng(seed)
    height, width = assets.backgrounds.shape[1:3]
    foreground = rng.integers(0, assets.n_foregrounds, count)
    spans = {"x": width - assets.widths[foreground], "y": height - assets.heights[foreground]}
    corners = {name: np.minimum(rng.integers(-5, span + 6).clip(0), span) for name, span in spans.items()}
    background, flip = rng.integers(0, assets.n_backgrounds, count), rng.integers(0, 2, count).astype(bool)
    return {"background": background, "foreground": foreground, "flip": flip, **corners}


def check(assets: Assets, batch: Batch, given: dict[str, np.ndarray]) -> None:
    for n in range(len(batch.image)):
        b, f = given["background"][n], given["foreground"][n]
        composite, mask = oracle.paste(
            Image.fromarray(assets.backgrounds[b]),
            Image.fromarray(assets.foreground(f)),
            Image.fromarray(assets.mask(f)),
            bool(given["flip"][n]),
            (int(given["x"][n]), int(given["y"][n])),
        )
        np.testing.assert_array_equal(batch.image[n], composite, err_msg=str(n))
        np.testing.assert_array_equal(batch.mask[n], mask, err_msg=str(n))
    assert batch.moments == {"composite": Moments.of(batch.image), "composite_mask": Moments.of(batch.mask)}
    np.testing.assert_array_equal(batch.labels.index, np.arange(len(batch.image)))
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(batch.labels, name), given[name])


def test_every_placement_equals_pillow(compositor, assets):
    given = anywhere(assets, 300)
    assert (given["x"] == 0).any() and (given["x"] == 61 - assets.widths[given["foreground"]]).any()
    check(assets, compositor.render_placed(**given), given)


def test_the_plans_own_placements_give_what_render_gives(compositor):
    order = np.random.default_rng(1).permutation(len(compositor))
    planned = compositor.render(order)
    placed = compositor.render_placed(**{name: getattr(planned.labels, name) for name in FIELDS})
    np.testing.assert_array_equal(placed.image, planned.image)
    np.testing.assert_array_equal(placed.mask, planned.mask)
    assert placed.moments == planned.moments
    types = {f.name: getattr(planned.labels, f.name).dtype for f in dataclasses.fields(Placements)}
    assert types == {f.name: getattr(placed.labels, f.name).dtype for f in dataclasses.fields(Placements)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64, ">i2"])
def test_any_whole_numbers(compositor, assets, dtype):
    given = anywhere(assets, 20, 1)
    as_asked = {name: values.astype(dtype) for name, values in given.items()}
    strided = {name: np.repeat(values, 3)[1::3] for name, values in as_asked.items()}
    for form in (as_asked, strided, {name: values.tolist() for name, values in as_asked.items()}):
        check(assets, compositor.render_placed(**form), given)


def test_numbers_stand_for_arrays(compositor, assets):
    x = np.arange(31)
    given = {"background": 2, "foreground": 2, "flip": True, "y": 5}
    check(assets, compositor.render_placed(**given, x=x), {n: np.full(31, v) for n, v in given.items()} | {"x": x})
    assert compositor.render_placed(**given, x=3).image.shape == (1, 47, 61, 3)
    assert compositor.render_placed(**given, x=[]).mask.shape == (0, 47, 61)
    assert compositor.render_placed(**given, x=[]).moments["composite"].images == 0


def test_the_callers_arrays_are_copied(compositor, assets):
    given = {
        name: values.astype(bool if name == "flip" else np.int32) for name, values in anywhere(assets, 9).items()
    }
    before = {name: values.copy() for name, values in given.items()}
    batch = compositor.render_placed(**given)
    for values in given.values():
        values[...] = 0
    check(assets, batch, before)


GOOD = {"background": [0, 1, 2], "foreground": [1, 2, 3], "flip": [0, 1, 0], "x": [0, 31, 54], "y": [0, 27, 0]}


def test_the_last_places_are_in_range(compositor):
    assert len(compositor.render_placed(**GOOD).image) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"background": [0, 1, 4]}, "background: sample 2: got 4, expected 0 to 3"),
        ({"background": [-1, 1, 4]}, "background: sample 0: got -1, expected 0 to 3"),
        ({"foreground": [1, 7, 3]}, "foreground: sample 1: got 7, expected 0 to 6"),
        ({"foreground": [1, 2**40, -9]}, f"foreground: sample 1: got {2**40}, expected 0 to 6"),
        ({"x": [0, 32, 55]}, "x: sample 1: got 32, expected 0 to 31: foreground 2 is 30x20, the frame 61x47, and"),
        ({"x": [0, 31, -1]}, "x: sample 2: got -1, expected 0 to 54"),
        ({"x": np.array([1, 0, 0], np.uint8)}, "x: sample 0: got 1, expected 0 to 0"),
        ({"y": [0, 28, 0], "x": [0, 0, -7]}, "y: sample 1: got 28, expected 0 to 27"),
        ({"y": np.array([0, 2**64 - 1, 0], np.uint64)}, f"y: sample 1: got {2**64 - 1}, expected 0 to 27"),
        ({"background": 9, "y": -1}, "background: sample 0: got 9"),
        ({"x": [0.0, 1.0, 2.0]}, "x: got float64 (3,), expected integers (3,)"),
        ({"flip": ["a", "b", "c"]}, "flip: got <U1 (3,), expected bool (3,)"),
        ({"y": [0, 1]}, "y: got int64 (2,), expected integers (3,)"),
        ({"y": []}, "y: got float64 (0,), expected integers (3,)"),
        ({"y": [[0, 1, 2]]}, "y: got int64 (1, 3), expected integers (3,)"),
        ({"x": None}, "x: got object (), expected integers (3,)"),
    ],
)
def test_a_placement_out_of_range_is_refused(compositor, wrong, message):
    with pytest.raises(OptionError) as refused:
        compositor.render_placed(**{**GOOD, **wrong})
    assert str(refused.value).startswith(message)


def test_rows_of_several_lengths_are_refused_in_one_line(compositor):
    for call in (compositor.render, lambda rows: compositor.render_placed(**GOOD | {"x": rows})):
        with pytest.raises(OptionError, match=r"^(indices|x): got list that makes no array of integers: [^\n]+$"):
            call([[1], [2, 3]])


class Card(np.ndarray):
    """A NumPy array that says that it lies in a card's memory, as CuPy's do."""

    __cuda_array_interface__ = None
    device = contextlib.nullcontext()

    def get(self) -> np.ndarray:
        return self.view(np.ndarray).copy()


def on_card(values) -> Card:
    return np.array(values).view(Card)


class ByDlpack:
    """An array that speaks DLPack alone, on a device of some kind."""

    def __init__(self, values, kind: int) -> None:
        self.values, self.kind = np.asarray(values), kind

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        assert self.kind == 1, "an array on a card can't be read so"
        return self.values


@pytest.fixture
def cupy(monkeypatch) -> MagicMock:
    """CuPy on NumPy's arrays."""

    def made(name: str):
        return lambda *arguments, **options: getattr(np, name)(*arguments, **options).view(Card)

    module = MagicMock(name="cupy")
    for name in ("arange", "asarray", "ascontiguousarray", "broadcast_to", "concatenate", "empty", "where", "zeros"):
        setattr(module, name, made(name))
    module.from_dlpack = lambda array: on_card(array.values)
    module.ndarray = Card
    module.cuda.Device.return_value.id = 0
    module.cuda.Device.return_value.attributes = {"MultiProcessorCount": 7}
    module.cuda.memory.OutOfMemoryError = MemoryError
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_arrays_on_a_card_are_copied_for_the_cpu(compositor, assets, cupy):
    given = anywhere(assets, 7)
    kinds = {"background": 2, "foreground": 13, "flip": 1}
    batch = compositor.render_placed(
        **{n: ByDlpack(v, kinds[n]) if n in kinds else on_card(v) for n, v in given.items()}
    )
    check(assets, batch, given)
    assert not isinstance(batch.labels.x, Card)


class LikeTorch(ByDlpack):
    """A tensor on a card. Its ``__cuda_array_interface__`` names no stream: whoever reads by it waits for none."""

    __cuda_array_interface__ = {"version": 2}  # noqa: RUF012


@pytest.mark.parametrize("use", [cuda.as_array, lambda tensor: _batch("images", tensor, ("uint8",), "", (3,))])
def test_tensors_on_a_card_are_taken_by_dlpack_so_that_their_streams_are_waited_for(cupy, use):
    values = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    found = use(LikeTorch(values, 2))
    assert isinstance(found, Card)
    np.testing.assert_array_equal(found, values)
    assert np.shares_memory(use(found), found)  # CuPy's own
    refused = BufferError("Can't export tensors that require gradient, use tensor.detach()")
    cupy.from_dlpack = MagicMock(side_effect=refused)
    with pytest.raises(InputError, match=r"^array: got LikeTorch that DLPack can't hand over: .*tensor\.detach\(\)$"):
        use(LikeTorch(values, 2))


def test_arrays_without_dlpack_are_taken_by_the_cuda_array_interface(cupy):
    interface = type("Numbas", (), {"__cuda_array_interface__": {}})()
    cupy.asarray = MagicMock(return_value=on_card([1]))
    assert cuda.as_array(interface) is cupy.asarray.return_value
    cupy.asarray.assert_called_once_with(interface)


def test_indices_on_a_card_are_copied_to_the_host(compositor, cupy):
    for given in (on_card([3, 5]), ByDlpack([3, 5], 2)):
        np.testing.assert_array_equal(compositor.render(given).image, compositor.render([3, 5]).image)
    with pytest.raises(OptionError, match=r"indices: got float64 \(1,\), expected integers \(N,\)"):
        compositor.render(on_card([0.5]))


def test_an_array_on_a_card_without_cupy(compositor, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="an array is in a card's memory: CuPy is not installed"):
        compositor.render_placed(**GOOD | {"x": on_card([0, 0, 0])})


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return host_build.load("kernels_emulated", tmp_path_factory.mktemp("host"))


@pytest.fixture
def cuda_compositor(cupy, assets, library, monkeypatch) -> Compositor:
    """The CUDA backend on NumPy's arrays, with the kernels run by tests/host/cuda_emulator.h."""

    def plain(argument):
        if isinstance(argument, np.ndarray):
            assert isinstance(argument, Card) and argument.flags.c_contiguous
            return ctypes.c_void_p(argument.ctypes.data)
        kinds = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "uint64": ctypes.c_uint64}
        return kinds[argument.dtype.name](int(argument))

    def kernel(stem: str, name: str):
        run = getattr(library, f"run_{name}")
        return lambda grid, block, arguments: run(*grid, *map(plain, arguments))

    monkeypatch.setattr(cuda, "kernel", kernel)
    monkeypatch.setattr(cuda, "why_not", lambda index=0: None)
    return Compositor(assets, Recipe(size=(61, 47), foreground_height=20, per_pair=3), "cuda")


@pytest.mark.parametrize("where", ["host", "card", "both"])
def test_the_cuda_backend_on_emulated_kernels(cuda_compositor, assets, where):
    given = anywhere(assets, 40, 2)
    there = {"host": (), "card": FIELDS, "both": ("x", "flip")}[where]
    batch = cuda_compositor.render_placed(**{n: on_card(v) if n in there else v for n, v in given.items()})
    assert all(isinstance(getattr(batch.labels, name), Card) == bool(there) for name in FIELDS)
    check(assets, batch, given)
    assert len(cuda_compositor.render_placed(**{n: on_card(v[:0]) for n, v in given.items()}).image) == 0


def test_the_cuda_backend_refuses_what_is_out_of_range(cuda_compositor):
    on = {name: on_card(values) for name, values in GOOD.items()}
    with pytest.raises(OptionError, match="x: sample 1: got 32, expected 0 to 31"):
        cuda_compositor.render_placed(**on | {"x": on_card([0, 32, 99])})
    with pytest.raises(OptionError, match=r"x: got object \(\), expected integers"):
        cuda_compositor.render_placed(**on | {"x": None})


class Streams:
    """What a card is given, in order: each launch, mark, wait and copy with the stream that is current then."""

    def __init__(self, cupy: MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[object, ...]] = []
        self.current = "first"
        get, kernel = Card.get, cuda.kernel

        def event(**options) -> MagicMock:
            assert options == {"disable_timing": True}
            made = MagicMock()
            made.record = lambda: self.log.append(("mark", self.current, made))
            return made

        def launcher(stem: str, name: str):
            launch = kernel(stem, name)
            return lambda *arguments: self.log.append(("launch", self.current)) or launch(*arguments)

        monkeypatch.setattr(cuda, "kernel", launcher)
        monkeypatch.setattr(Card, "get", lambda array: self.log.append(("copy", self.current)) or get(array))
        cupy.cuda.Event = event
        cupy.cuda.get_current_stream.return_value.wait_event = lambda event: self.log.append(
            ("wait", self.current, event)
        )

    def check(self, copies: int) -> None:
        """Copies by another stream than the one that made the arrays, each after waiting for what made them."""
        made = [entry for entry in self.log if entry[1] == "first"]
        (event,) = {entry[2] for entry in made if entry[0] == "mark"}
        assert made[-2:] == [("launch", "first"), ("mark", "first", event)]
        after = self.log[self.log.index(made[-1]) + 1 :]
        assert after == [("wait", "another", event), ("copy", "another")] * copies


@pytest.fixture
def streams(cuda_compositor, cupy, monkeypatch) -> Streams:
    return Streams(cupy, monkeypatch)


@pytest.mark.parametrize("where", ["plan", "host", "card"])
def test_moments_are_read_after_the_stream_that_made_the_batch(cuda_compositor, streams, assets, where):
    given = {n: on_card(v) if where == "card" else v for n, v in anywhere(assets, 5).items()}
    batch = cuda_compositor.render([3, 1, 2]) if where == "plan" else cuda_compositor.render_placed(**given)
    streams.current = "another"
    assert batch.moments["composite"] == Moments.of(batch.image)
    streams.check(3 if where == "card" else 1)  # backgrounds and foregrounds; what changed


def test_sums_are_read_after_the_stream_that_counts_them(streams):
    pictures = on_card(np.arange(64, dtype=np.uint8).reshape(1, 8, 8))
    pending = cuda.start_moments(pictures)
    streams.current = "another"
    assert pending.get() == Moments.of(pictures)
    streams.check(1)


def test_the_plans_own_placements_on_emulated_kernels(cuda_compositor):
    planned = cuda_compositor.render(range(0, len(cuda_compositor), 5))
    placed = cuda_compositor.render_placed(**{name: getattr(planned.labels, name) for name in FIELDS})
    np.testing.assert_array_equal(placed.image, planned.image)
    np.testing.assert_array_equal(placed.mask, planned.mask)
    assert placed.moments == planned.moments
