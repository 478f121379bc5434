"""The stream: every sample once an epoch, shared by ranks, resumed anywhere, equal to what is on disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import cutout, smooth
from test_placed import cuda_compositor, cupy, library  # noqa: F401

import gpufgbg
from gpufgbg import (
    Assets,
    Compositor,
    DatasetError,
    DepthModel,
    DepthOptions,
    InputError,
    OptionError,
    Recipe,
    SampleStream,
    generate,
    stream,
    streaming,
)
from gpufgbg.backends import cuda
from gpufgbg.backends.cpu import encode_jpeg, reconstruct_jpeg
from gpufgbg.integrations.convert import Conversion
from gpufgbg.layout import Layout
from gpufgbg.normalise import normalise
from gpufgbg.shuffle import Permutation

RECIPE = Recipe(size=(61, 47), foreground_height=20, per_pair=3, seed=4)
SIZES = [1, 2, 3, 5, 7, 8, 13, 97, 127, 128, 129, 1000, 4095, 4096, 4097, 65537, 392_040]


@pytest.fixture(scope="module")
def assets() -> Assets:
    rng = np.random.default_rng(3)
    cutouts = [cutout(rng, *size) for size in [(30, 20), (7, 47), (61, 12)]]
    return Assets.from_arrays(np.stack([smooth(rng, 61, 47, 3) for _ in range(5)]), cutouts)


@pytest.fixture(scope="module")
def compositor(assets: Assets) -> Compositor:
    """90 samples."""
    return Compositor(assets, RECIPE, "cpu", workers=2)


@pytest.fixture(params=["cpu", "emulated", "card"])
def anywhere(request, compositor) -> Compositor:
    """90 samples on the CPU, by the CUDA backend with its kernels emulated, and on a card."""
    fixture = {"emulated": "cuda_compositor", "card": "on_card"}.get(request.param)
    return request.getfixturevalue(fixture) if fixture else compositor


def host(array) -> np.ndarray:
    return array.get() if hasattr(array, "get") else array


def indices(batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def flat(batches) -> list[int]:
    return list(itertools.chain.from_iterable(indices(batches)))


def own_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("gpufgbg-stream")]


def no_threads_remain(seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while own_threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not own_threads()


# -- the shuffled order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_an_order_is_a_permutation(size):
    for seed, epoch in ((0, 0), (2**64 - 1, 1), (7, 2**40)):
        order = Permutation(size, seed, epoch)(np.arange(size))
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [2**32, 2**32 + 1, 2**40 - 1, 5 * 2**50 + 3, 2**62])
def test_an_order_of_any_size_is_looked_at_anywhere(size):
    order = Permutation(size, 3, 1)
    positions = np.unique(np.random.default_rng(0).integers(0, size, 20_000))
    found = order(positions)
    assert found.min() >= 0 and found.max() < size
    assert len(np.unique(found)) == len(positions)
    np.testing.assert_array_equal(order(positions[::-7]), found[::-7])
    assert abs(found.mean() / size - 0.5) < 0.02


def test_an_order_is_the_same_on_every_machine():
    assert Permutation(10, 0, 0)(range(10)).tolist() == [1, 0, 3, 8, 5, 4, 2, 6, 7, 9]
    assert Permutation(10**12, 2**63, 5)([0, 1, 10**12 - 1]).tolist() == [635078581038, 192901372745, 164076550276]


def test_all_orders_occur():
    orders = np.array([Permutation(4, 1, epoch)(range(4)) for epoch in range(4800)])
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert 130 < counts.min() <= counts.max() < 270  # 200 each, within 5 standard deviations


def test_orders_of_epochs_and_seeds_have_nothing_in_common():
    orders = np.array([Permutation(1000, seed, epoch)(range(1000)) for seed in range(10) for epoch in range(20)])
    correlation = np.corrcoef(orders) - np.eye(len(orders))
    assert np.abs(correlation).max() < 0.16  # 5 / sqrt(1000)


# -- epochs and ranks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 45, 90, 91])
def test_an_epoch_is_every_sample_once(compositor, batch_size, shuffle):
    batches = list(stream(compositor, batch_size=batch_size, epochs=2, shuffle=shuffle))
    whole = -(-90 // batch_size)
    assert [batch.epoch for batch in batches] == [0] * whole + [1] * whole
    assert {len(batch) for batch in batches[: whole - 1]} <= {batch_size}
    first, second = flat(batches[:whole]), flat(batches[whole:])
    assert sorted(first) == sorted(second) == list(range(90))
    assert (first == second == list(range(90))) is not shuffle
    assert len(stream(compositor, batch_size=batch_size)) == whole


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64, 90])
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_ranks_partition_an_epoch(compositor, world, batch_size):
    parts = [
        list(stream(compositor, batch_size=batch_size, epochs=1, rank=rank, world=world)) for rank in range(world)
    ]
    shares = [flat(part) for part in parts]
    assert sorted(itertools.chain(*shares)) == list(range(90))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    lengths = [len(stream(compositor, batch_size=batch_size, rank=rank, world=world)) for rank in range(world)]
    assert lengths == [len(part) for part in parts]
    # Together they go along the order that one rank has.
    order = flat(stream(compositor, epochs=1))
    together = zip(*(itertools.islice(part, 1) for part in parts), strict=True)
    step = min(batch_size * world, 90)
    assert sorted(flat(itertools.chain(*together))) == sorted(order[:step])


@pytest.mark.parametrize(("world", "batch_size"), [(1, 7), (2, 7), (4, 22), (7, 5)])
def test_drop_last_gives_every_rank_as_many_whole_batches(compositor, world, batch_size):
    seen: list[int] = []
    for rank in range(world):
        part = stream(compositor, batch_size=batch_size, epochs=1, rank=rank, world=world, drop_last=True)
        batches = list(part)
        assert len(part) == len(batches) == 90 // (world * batch_size)
        assert {len(batch) for batch in batches} == {batch_size}
        seen += flat(batches)
    assert sorted(seen) == sorted(flat(stream(compositor, epochs=1))[: len(seen)])


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [7, 40])
def test_processes_that_take_turns_give_the_batches_in_order(compositor, parts, batch_size):
    whole = indices(stream(compositor, batch_size=batch_size, epochs=3, rank=1, world=2))
    turns = [
        indices(stream(compositor, batch_size=batch_size, epochs=3, rank=1, world=2, part=(k, parts)))
        for k in range(parts)
    ]
    for k, turn in enumerate(turns):
        assert turn == whole[k::parts]
        once = stream(compositor, batch_size=batch_size, epochs=1, rank=1, world=2, part=(k, parts))
        assert len(once) == len(list(once))
    assert len(stream(compositor, batch_size=16, part=(0, 3))) == 2


def test_it_never_ends_by_itself(compositor):
    batches = list(itertools.islice(stream(compositor, batch_size=30), 10))
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_an_epoch_and_a_position_to_start_at(compositor):
    whole = flat(stream(compositor, batch_size=9, epochs=3))
    assert flat(stream(compositor, batch_size=9, epochs=3, epoch=1, start=20)) == whole[90 + 20 :]
    assert flat(stream(compositor, batch_size=9, epochs=2, start=90)) == whole[90:180]
    assert list(stream(compositor, epochs=3, epoch=3)) == []


def test_set_epoch(compositor):
    whole = indices(stream(compositor, batch_size=20, epochs=5))
    part = stream(compositor, batch_size=20, epochs=4)
    next(part), next(part)
    part.set_epoch(3)
    assert part.epoch == 3
    assert indices(part) == whole[15:20]
    part.set_epoch(0)  # also after its end
    assert indices(part) == whole[:20]
    turn = stream(compositor, batch_size=20, epochs=4, part=(1, 2))
    turn.set_epoch(2)
    assert indices(turn) == whole[11:20:2]


# -- state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"rank": 1, "world": 3}, {"drop_last": True}, {"part": (1, 2)}, {"shuffle": False}]
)
def test_resumes_at_any_step(compositor, options):
    made = {"batch_size": 8, "epochs": 3, "seed": 5, **options}
    whole = indices(stream(compositor, **made))
    first, states = stream(compositor, **made), []
    for k in range(len(whole) + 1):
        states.append(json.loads(json.dumps(first.state_dict())))
        if k < len(whole):
            assert next(first).index.tolist() == whole[k]
    for k, state in enumerate(states):
        later = stream(compositor, **made)
        if k % 2:
            next(later)  # a stream that is under way
        later.load_state_dict(state)
        assert later.state_dict() == state
        assert indices(later) == whole[k:], k
    first.load_state_dict(states[2])  # also after its end
    assert indices(first) == whole[2:]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resumes_with_another_batch_size_and_another_number_of_ranks(compositor, stop):
    order = flat(stream(compositor, epochs=2, batch_size=90))
    ranks = [stream(compositor, batch_size=3, epochs=2, rank=rank, world=4) for rank in range(4)]
    seen = list(itertools.chain(*(flat(itertools.islice(rank, stop)) for rank in ranks)))
    states = [rank.state_dict() for rank in ranks]
    assert states == states[:1] * 4
    assert sorted(seen) == sorted(order[: 12 * stop])
    for world, batch_size in ((1, 11), (3, 2), (5, 90)):
        left: dict[int, list[int]] = {0: [], 1: []}
        for rank in range(world):
            other = stream(compositor, batch_size=batch_size, epochs=2, rank=rank, world=world)
            other.load_state_dict(states[0])
            for batch in other:
                left[batch.epoch] += batch.index.tolist()
        assert sorted(seen + left[0]) == sorted(left[1]) == list(range(90))


def test_a_state_of_something_else_is_refused(compositor, assets):
    state = stream(compositor, seed=1).state_dict()
    more = Compositor(assets, Recipe(size=(61, 47), foreground_height=20, per_pair=4), "cpu")
    for other, message in (
        (stream(compositor, seed=2), "seed is 1 there and 2 here"),
        (stream(compositor, seed=1, shuffle=False), "shuffle is True there and False here"),
        (stream(more, seed=1), "samples is 90 there and 120 here"),
    ):
        with pytest.raises(OptionError, match=f"state: {message}"):
            other.load_state_dict(state)
    part = stream(compositor, seed=1)
    next(part)
    at = part.state_dict()
    for wrong in (
        {},
        None,
        {**state, "recipe": None},
        {**state, "recipe": {}},
        {**state, "epoch": -1},
        {**state, "position": 91},
        {**state, "position": 1.5},
    ):
        with pytest.raises(OptionError, match="state"):
            part.load_state_dict(wrong)
    assert part.state_dict() == at  # nothing changed


def test_a_state_of_other_samples_is_refused(assets, compositor):
    state = json.loads(json.dumps(stream(compositor).state_dict()))
    other_pictures = Assets.from_arrays(
        assets.backgrounds[::-1], [assets.foreground(f) for f in range(3)], [assets.mask(f) for f in range(3)]
    )
    same_pictures = Assets.from_arrays(
        assets.backgrounds, [assets.foreground(f) for f in range(3)], [assets.mask(f) for f in range(3)]
    )
    placed = replace(RECIPE, seed=77)
    for other, recipe, message in (
        (other_pictures, RECIPE, r"it is of other pictures: their fingerprint is '\w{16}' there and '\w{16}' here$"),
        (assets, placed, "the recipe's seed is 4 there and 77 here$"),
        (assets, replace(RECIPE, per_pair=6, flip="never"), "the recipe's per_pair is 3 there and 6 here$"),
    ):
        part = stream(Compositor(other, recipe, "cpu"))
        with pytest.raises(OptionError, match=f"^state: {message}"):
            part.load_state_dict(state)
        older = {name: value for name, value in state.items() if name not in ("recipe", "pictures")}
        part.load_state_dict(older)
    for quality in (RECIPE.quality, 10):  # of files alone
        stream(same_pictures, recipe=replace(RECIPE, quality=quality), device="cpu").load_state_dict(state)


def test_pictures_are_fingerprinted_once(compositor, monkeypatch):
    state = stream(compositor).state_dict()
    monkeypatch.setattr(Assets, "fingerprint", lambda self: 1 / 0)
    part = stream(compositor)
    part.load_state_dict(state)
    assert part.state_dict() == state


# -- Ctrl-C ---------------------------------------------------------------------------------------------


def interrupted(line: int, call) -> bool:
    """Call it, with a Ctrl-C before the ``line``-th line of streaming.py that runs; whether it came."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename != streaming.__file__:
            return None
        seen += event == "line"
        if event == "line" and seen == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("options", [{}, {"reuse": 2}, {"part": (1, 2)}, {"shuffle": False, "drop_last": True}])
@pytest.mark.parametrize("given", [0, 1])
def test_ctrl_c_at_any_line_loses_no_batch(anywhere, options, given, monkeypatch):
    monkeypatch.setattr(streaming, "_LOOK_AHEAD", 12)  # so that the order is computed anew here and there
    made = {"batch_size": 8, "epochs": 3, "start": 70, "seed": 3, "prefetch": 1, **options}
    plain = stream(anywhere, **{**made, "reuse": 0})
    states, whole = [plain.state_dict()], []
    for batch in itertools.islice(plain, given + 4):
        whole.append((batch.index.tolist(), host(batch.image)))
        states.append(plain.state_dict())
    plain.close()
    lost = 0
    for line in itertools.count(1):
        part = stream(anywhere, **made)
        for _ in range(given):
            next(part)
        came = interrupted(line, lambda stream=part: next(stream))
        at = states.index(part.state_dict())
        assert at in ((given, given + 1) if came else (given + 1,)), line
        lost += came and at == given + 1
        for (index, image), batch in zip(whole[at : at + 2], part, strict=False):
            assert batch.index.tolist() == index, line
            np.testing.assert_array_equal(host(batch.image), image, err_msg=f"line {line}")
        part.close()
        if not came:
            break
    assert line > 20 and lost <= 2  # on its way out alone, when the state says so
    assert no_threads_remain()


def test_ctrl_c_while_an_order_is_computed(anywhere, monkeypatch):
    whole = [(batch.epoch, batch.index.tolist()) for batch in stream(anywhere, batch_size=30, seed=1, epochs=4)]
    part, shuffled, calls = stream(anywhere, batch_size=30, seed=1, epochs=4, prefetch=1), Permutation.__call__, []

    def twice_in_vain(order, positions):
        calls.append(order)
        if len(calls) in (2, 3):
            raise KeyboardInterrupt
        return shuffled(order, positions)

    monkeypatch.setattr(Permutation, "__call__", twice_in_vain)
    found = []
    while not part.ended:
        with contextlib.suppress(KeyboardInterrupt):
            batch = next(part)
            found.append((batch.epoch, batch.index.tolist()))
    assert found == whole and len(calls) == 6


# -- what is in the batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 13, 64])
def test_batches_equal_those_of_the_compositor(compositor, batch_size, reuse):
    for batch in stream(compositor, batch_size=batch_size, epochs=2, reuse=reuse):
        expected = compositor.render(batch.index)
        np.testing.assert_array_equal(batch.image, expected.image)
        np.testing.assert_array_equal(batch.mask, expected.mask)
        for name in ("index", "background", "foreground", "repetition", "flip", "x", "y"):
            np.testing.assert_array_equal(getattr(batch.labels, name), getattr(expected.labels, name))
        assert batch.image.shape == (len(batch), 47, 61, 3) and batch.image.dtype == batch.mask.dtype == np.uint8
        assert batch.image.flags.c_contiguous and batch.mask.flags.c_contiguous
        assert batch.depth is None


def test_labels_and_boxes_are_where_the_images_are(anywhere, assets):
    types = {"index": np.int64, "flip": np.bool_}
    for batch in stream(anywhere, batch_size=32, epochs=1):
        labels, there = batch.labels, batch.device_labels
        for field in fields(labels):
            one, other = getattr(labels, field.name), getattr(there, field.name)
            assert type(one) is np.ndarray and type(other) is type(batch.image)
            assert one.dtype == other.dtype == types.get(field.name, np.int32) and one.shape == other.shape
            np.testing.assert_array_equal(host(other), one)
        assert type(batch.boxes) is type(batch.image) and batch.boxes.dtype == np.int32
        boxes, image = host(batch.boxes), host(batch.image)
        assert boxes.shape == (len(batch), 4)
        for n, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            foreground = assets.foreground(labels.foreground[n])
            assert (x0, y0) == (labels.x[n], labels.y[n]) and (y1 - y0, x1 - x0) == foreground.shape[:2]
            background = assets.backgrounds[labels.background[n]].copy()
            assert (image[n] != background).any()
            background[y0:y1, x0:x1] = image[n, y0:y1, x0:x1]
            np.testing.assert_array_equal(image[n], background)


def test_labels_and_boxes_go_to_a_card_in_one_copy(cuda_compositor, monkeypatch):  # noqa: F811
    import cupy  # noqa: F811

    batches, copied, asarray = list(stream(cuda_compositor, batch_size=32, epochs=1)), [], cupy.asarray
    monkeypatch.setattr(cupy, "asarray", lambda array: copied.append(array) or asarray(array))
    for count, batch in enumerate(batches, 1):
        assert not {"labels", "_there"} & vars(batch).keys()  # made when asked for
        assert batch.boxes is batch.boxes and batch.device_labels is batch.device_labels
        assert len(copied) == count


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_threads_and_prefetching_do_not_matter(assets, compositor, workers, prefetch):
    expected = list(stream(compositor, batch_size=40, epochs=1))
    found = list(
        stream(assets, recipe=RECIPE, batch_size=40, epochs=1, device="cpu", workers=workers, prefetch=prefetch)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.index, other.index)
        np.testing.assert_array_equal(one.image, other.image)


@pytest.mark.parametrize("reuse", [1, 2, 5])
def test_reused_arrays_are_valid_as_long_as_told(compositor, reuse):
    part, held, buffers = stream(compositor, batch_size=7, reuse=reuse, prefetch=3), [], set()
    for step in range(60):
        if step == 31:
            part.set_epoch(9)
        batch = next(part)
        time.sleep(0.002)  # time for the threads to do harm
        buffers.add(batch.image.ctypes.data)
        held = [*held, batch][-reuse:]
        for kept in held:
            expected = compositor.render(kept.index)
            np.testing.assert_array_equal(kept.image, expected.image)
            np.testing.assert_array_equal(kept.mask, expected.mask)
    assert len(buffers) == reuse + 3


@pytest.mark.parametrize("reuse", [0, 1, 2, 5])
@pytest.mark.parametrize(("layout", "dtype"), [("float NCHW", "float32"), ("float NHWC", "bfloat16")])
def test_normalised_arrays_are_valid_as_long_as_told(compositor, monkeypatch, reuse, layout, dtype):
    monkeypatch.setattr("gpufgbg.normalise._SHARE", 10_000)
    values = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    conversions = [Conversion(layout, dtype=dtype, **values), Conversion(layout, dtype=dtype, std=0.5)]
    part, held, buffers = stream(compositor, batch_size=7, reuse=reuse, prefetch=3), [], set()
    for step in range(60):
        if step == 31:
            part.set_epoch(9)
        if step == 43:
            part.load_state_dict({**part.state_dict(), "position": 80})
        batch = next(part)
        images = [conversion.arrays(batch)["image"] for conversion in conversions]
        buffers.update(image.ctypes.data for image in images)
        held = [*held, (batch.index, images)][-(reuse or 3) :]
        for index, kept in held:
            for conversion, image in zip(conversions, kept, strict=True):
                own = compositor.render(index).image
                own = normalise(own, conversion.mean, conversion.std, dtype=dtype, layout=layout.split()[1])
                np.testing.assert_array_equal(image, own)
                assert image.dtype == own.dtype and image.flags.c_contiguous and image.ctypes.data % 64 == 0
    assert not reuse or len(buffers) == 2 * reuse
    part.close()
    again = conversions[0].arrays(batch)["image"]
    np.testing.assert_array_equal(again, images[0])
    assert np.shares_memory(again, images[0]) == bool(reuse)


def test_a_ring_that_begins_with_a_short_batch(compositor):
    part = stream(compositor, batch_size=40, reuse=1, start=80, shuffle=False)
    conversion, sizes = Conversion("float NCHW"), []
    for _ in range(4):
        batch = next(part)
        found = conversion.arrays(batch)["image"]
        np.testing.assert_array_equal(found, normalise(compositor.render(batch.index).image))
        sizes.append(len(found))
    assert sizes == [10, 40, 40, 10]


def test_fresh_arrays_belong_to_the_caller(compositor):
    batches = list(stream(compositor, batch_size=7, epochs=1))
    for batch in batches:
        batch.image[:] = 1
    batches = list(stream(compositor, batch_size=7, epochs=1))
    for batch in batches:
        np.testing.assert_array_equal(batch.image, compositor.render(batch.index).image)


def test_arrays_speak_dlpack(compositor):
    batch = next(stream(compositor, batch_size=3))
    for array in (batch.image, batch.mask):
        assert np.from_dlpack(array).ctypes.data == array.ctypes.data


@pytest.mark.parametrize("depth_input", ["saved", "rendered"])
@pytest.mark.parametrize("metres", [True, False])
def test_depth_is_that_of_the_model(compositor, depth_input, metres):
    model = DepthModel(DepthOptions(input=depth_input), RECIPE.size, "cpu", 1)
    for batch in stream(compositor, batch_size=50, epochs=1, depth=model, metres=metres):
        image = batch.image
        if depth_input == "saved":
            image = reconstruct_jpeg(image, RECIPE.quality, RECIPE.subsampling)
        expected = model.predict(image)
        np.testing.assert_array_equal(batch.depth.grey, expected.grey)
        np.testing.assert_array_equal(batch.depth.range, expected.range)
        if metres:
            np.testing.assert_array_equal(batch.depth.metres, expected.metres)
        else:
            assert batch.depth.metres is None


def test_depth_that_is_no_number_is_told_and_ends_the_stream(compositor, monkeypatch):
    model = DepthModel("demo", RECIPE.size, "cpu", 1)
    part = stream(compositor, batch_size=5, shuffle=False, depth=model)
    next(part)
    infer = model.engine.infer
    monkeypatch.setattr(model.engine, "infer", lambda inputs: infer(inputs) * np.float32("nan"))
    with pytest.raises(InputError, match=r"the prediction for sample \d+ are no numbers"):
        for _ in range(5):
            next(part)
    assert no_threads_remain()
    with pytest.raises(OptionError, match=r"^stream: closed by InputError\('--depth demo: .*\), not at its end: "):
        next(part)


@pytest.fixture(scope="module")
def on_disk(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stream") / "out"
    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=2, seed=8)
    generate(out, *folders.values(), recipe, depth="demo", device="cpu", workers=2)
    return out


def test_a_data_set_on_disk_streams_its_own_bytes(on_disk):
    part = stream(on_disk, batch_size=10, epochs=1, device="cpu", depth="demo")
    layout, recipe = Layout.of(part.compositor.plan), part.compositor.recipe
    assert part.samples == 48
    assert part.statistics["composite"].images == 48
    seen = set()
    for batch in part:
        kinds = {
            "composite": encode_jpeg(batch.image, recipe.quality, recipe.subsampling, recipe.optimize),
            "composite_mask": encode_jpeg(batch.mask, recipe.quality, recipe.subsampling, recipe.optimize),
            "depth": encode_jpeg(batch.depth.grey, 75, "420", False),
        }
        for kind, files in kinds.items():
            for stem, file in zip(layout.stems(batch.labels), files, strict=True):
                assert (on_disk / layout.sample_path(kind, stem)).read_bytes() == file
        seen |= set(batch.index.tolist())
    assert len(seen) == 48


def test_folders_stream_what_they_would_make(folders, on_disk):
    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=2, seed=8)
    made = stream(*folders.values(), recipe, batch_size=48, epochs=1, device="cpu")
    assert made.statistics == {}
    np.testing.assert_array_equal(next(made).image, next(stream(on_disk, batch_size=48, device="cpu")).image)


# -- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "batch_size": (0, -1, 65_537, 1.0, "8", True, None),
        "epochs": (-1, 1.5, "1"),
        "shuffle": (1, None, "yes"),
        "seed": (-1, 2**64, 0.0),
        "rank": (-1, 1, 2.0),
        "world": (0, 91, "2"),
        "drop_last": (0, "no"),
        "epoch": (-1, 0.5),
        "start": (-1, 91, None),
        "part": ((1, 1), (-1, 2), (0, 0), 3, "01", (0, 1, 2), None),
        "metres": (1,),
        "reuse": (-1, 1025, None, 1.0),
        "prefetch": (0, 1025, None),
        "device": ("gpu", 0),
        "workers": (0, 1.5),
        "cuda_stream": (7, "x"),
        "depth": (3, ""),
        "source": (3, None, b"folder"),
        "foregrounds": ("elsewhere",),
        "masks": ("elsewhere",),
    }.items(),
)
def test_options_out_of_range_are_refused(assets, compositor, option, values):
    for value in values:
        if option in ("workers", "device"):
            arguments = {"source": assets, "recipe": RECIPE, option: value}
        else:
            arguments = {"source": compositor, option: value}
        with pytest.raises(OptionError) as refused:
            stream(**arguments)
        assert refused.value.option == option or option == "masks", (option, value)
        assert "\n" not in str(refused.value)


def test_options_that_contradict_each_other_are_refused(compositor, folders, on_disk, tmp_path):
    with pytest.raises(OptionError, match=r"batch_size: .*no whole batch"):
        stream(compositor, batch_size=50, world=2, drop_last=True)
    with pytest.raises(OptionError, match="recipe: a data set has its own"):
        stream(on_disk, recipe=RECIPE)
    with pytest.raises(OptionError, match="masks: a data set has its own"):
        stream(on_disk, masks=folders["masks"])
    with pytest.raises(OptionError, match="source: a Compositor has its own"):
        stream(compositor, recipe=RECIPE)
    with pytest.raises(OptionError, match="source: a Compositor has its own"):
        stream(compositor, device="cuda")
    with pytest.raises(DatasetError, match=r"no dataset\.json"):
        stream(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        stream(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match="frame"):
        stream(compositor.assets)


# -- the end --------------------------------------------------------------------------------------------


def test_threads_end_with_the_last_epoch_close_and_the_block(compositor):
    assert len(list(stream(compositor, epochs=1))) == 2
    assert not own_threads()
    part = stream(compositor)
    batch = next(part)
    assert own_threads()
    part.close()
    assert not own_threads()
    with pytest.raises(OptionError, match=r"^stream: closed, not at its end: [^\n]+$"):
        list(part)
    assert batch.image.any()
    with stream(compositor) as part, pytest.raises(RuntimeError, match="mine"):
        for _ in part:
            raise RuntimeError("mine")
    with stream(compositor) as part:
        next(part)
    assert not own_threads()


def test_threads_end_when_the_stream_is_forgotten(compositor):
    def consume() -> None:
        for _ in stream(compositor, batch_size=4):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        consume()
    assert no_threads_remain()


def test_a_closed_stream_does_not_look_like_one_at_its_end(anywhere):
    whole = indices(stream(anywhere, batch_size=40, epochs=1))
    part = stream(anywhere, batch_size=40, epochs=1)
    state = part.state_dict()
    next(part)
    part.close()
    for go_on in (lambda: None, lambda: part.load_state_dict(state), lambda: part.set_epoch(0)):
        go_on()
        with pytest.raises(OptionError, match=r"^stream: closed, not at its end"):
            next(part)
    part = stream(anywhere, batch_size=40, epochs=1)
    assert indices(itertools.islice(part, len(whole))) == whole
    assert part.ended
    part.close()
    assert list(part) == []
    part.set_epoch(0)
    assert not part.ended
    with pytest.raises(OptionError, match="closed"):
        list(part)


def test_an_error_while_rendering_ends_the_stream(assets, compositor, monkeypatch):
    broken = Compositor(assets, RECIPE, "cpu", workers=2)
    part = stream(broken, batch_size=8)
    next(part)
    monkeypatch.setattr(broken.backend, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for _ in range(9):
            next(part)
    assert not own_threads()
    with pytest.raises(OptionError, match=r"^stream: closed by ZeroDivisionError\('division by zero'\), not at its"):
        list(part)
    assert stream(compositor, batch_size=8).state_dict().keys() == part.state_dict().keys()


def test_a_forked_process_goes_on_with_threads_of_its_own(compositor):
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    expected = indices(stream(compositor, batch_size=8, epochs=1))
    code = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_stream import *
rng = np.random.default_rng(3)
cutouts = [cutout(rng, *size) for size in [(30, 20), (7, 47), (61, 12)]]
assets = Assets.from_arrays(np.stack([smooth(rng, 61, 47, 3) for _ in range(5)]), cutouts)
part = stream(assets, recipe=RECIPE, batch_size=8, epochs=1, device="cpu", reuse=1)
found = [next(part).index.tolist() for _ in range(3)]
child = os.fork()
found += indices(part)
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(found)
else:
    os._exit(found != {expected!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "1 / 0", "os.kill(os.getpid(), signal.SIGINT)"])
def test_a_process_with_an_open_stream_exits(on_disk, ending):
    code = f"""
import os, signal, gpufgbg
part = gpufgbg.stream({str(on_disk)!r}, batch_size=32, device="cpu", workers=3, prefetch=8)
print(next(part).index.tolist(), flush=True)
{ending}
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 45
    assert (done.returncode == 0) is (ending in ("", "raise SystemExit(0)"))
    assert "Fatal" not in done.stderr and "Exception ignored" not in done.stderr
    # and a fresh process has the same order
    assert json.loads(done.stdout) == next(stream(on_disk, batch_size=32, device="cpu")).index.tolist()


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) << 10
    raise AssertionError


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc on this system")
@pytest.mark.parametrize("reuse", [0, 1])
def test_memory_is_flat(compositor, reuse):
    part = stream(compositor, batch_size=16, reuse=reuse)
    for _ in itertools.islice(part, 300):
        pass
    before, threads = resident_bytes(), threading.active_count()
    for _ in itertools.islice(part, 2000):
        pass
    assert resident_bytes() - before < 8 << 20
    assert threading.active_count() == threads
    part.close()


# -- on a card ------------------------------------------------------------------------------------------


@pytest.fixture
def on_card(assets) -> Compositor:
    if cuda.count_devices() == 0:
        pytest.skip(f"no CUDA device: {cuda.why_not()}")
    return Compositor(assets, RECIPE, "cuda")


@pytest.mark.parametrize("reuse", [0, 1])
def test_a_card_gives_the_same(on_card, compositor, reuse):
    pairs = zip(
        stream(on_card, batch_size=13, epochs=2, reuse=reuse),
        stream(compositor, batch_size=13, epochs=2),
        strict=True,
    )
    for found, expected in pairs:
        np.testing.assert_array_equal(found.index, expected.index)
        np.testing.assert_array_equal(found.image.get(), expected.image)
        np.testing.assert_array_equal(found.mask.get(), expected.mask)
        np.testing.assert_array_equal(found.labels.x, expected.labels.x)


@pytest.mark.parametrize("depth_input", ["saved", "rendered"])
def test_a_card_gives_the_depth_of_its_model(on_card, depth_input):
    options = DepthOptions(input=depth_input, backend="onnxruntime")
    try:
        model = DepthModel(options, RECIPE.size, on_card.backend.name, 1)
    except gpufgbg.DeviceError as error:
        pytest.skip(str(error))
    for batch in stream(on_card, batch_size=50, epochs=1, depth=model):
        seen = on_card.backend.jpeg.reconstruct(batch.image) if depth_input == "saved" else batch.image
        np.testing.assert_array_equal(batch.depth.grey.get(), model.predict(seen).grey.get())


@pytest.mark.parametrize("given", ["object", "pointer", "current", "null"])
def test_a_card_works_on_the_streams_it_is_told(on_card, compositor, given):
    import cupy  # noqa: F811

    own = cupy.cuda.Stream(non_blocking=True)
    option = {"object": own, "pointer": own.ptr, "current": None, "null": 0}[given]
    part = stream(on_card, batch_size=40, epochs=1, cuda_stream=option)
    expected = stream(compositor, batch_size=40, epochs=1)
    with own if given == "current" else cupy.cuda.Stream.null:
        batches = list(part)
        boxes = [batch.boxes for batch in batches]
    (cupy.cuda.Stream.null if given == "null" else own).synchronize()
    for found, box, other in zip(batches, boxes, expected, strict=True):
        np.testing.assert_array_equal(found.image.get(), other.image)
        np.testing.assert_array_equal(box.get(), other.boxes)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "auto"])
@pytest.mark.parametrize("kind", ["cuda_compositor", "on_card"])
def test_the_first_card_has_two_names(request, kind, name):
    found = request.getfixturevalue(kind)
    assert stream(found, device=name).device == found.backend.name == "cuda:0"
    for other in ("cuda:1", "cpu"):
        with pytest.raises(OptionError, match="source: a Compositor has its own"):
            stream(found, device=other)


def test_device_memory_is_flat(on_card):
    import cupy  # noqa: F811

    part, pool = stream(on_card, batch_size=16), cupy.get_default_memory_pool()
    for _ in itertools.islice(part, 100):
        pass
    before = pool.total_bytes()
    for _ in itertools.islice(part, 2000):
        pass
    cupy.cuda.Device().synchronize()
    assert pool.total_bytes() == before


def test_a_model_on_another_device_is_refused(on_card):
    model = DepthModel("demo", RECIPE.size, "cpu", 1)
    with pytest.raises(OptionError, match="depth: the model is on cpu, the samples are on cuda"):
        SampleStream(on_card, depth=model)
