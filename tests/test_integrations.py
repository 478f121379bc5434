"""PyTorch, JAX and DALI receive the stream's own bytes, without a copy where that can be told."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import blends
import numpy as np
import pytest
from conftest import cutout, smooth

from gpufgbg import (
    Assets,
    Compositor,
    DepthModel,
    DepthOptions,
    DeviceError,
    InputError,
    OptionError,
    Recipe,
    generate,
    stream,
)
from gpufgbg.backends import cuda
from gpufgbg.normalise import normalise

RECIPE = Recipe(size=(64, 48), foreground_height=20, per_pair=3, seed=4)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def assets() -> Assets:
    rng = np.random.default_rng(3)
    cutouts = [cutout(rng, *size) for size in [(30, 20), (7, 48), (64, 12)]]
    return Assets.from_arrays(np.stack([smooth(rng, 64, 48, 3) for _ in range(5)]), cutouts)


@pytest.fixture(scope="module")
def compositor(assets: Assets) -> Compositor:
    """90 samples."""
    return Compositor(assets, RECIPE, "cpu", workers=2)


@pytest.fixture(scope="module")
def on_disk(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("integrations") / "out"
    generate(out, *folders.values(), RECIPE, device="cpu")
    return out


def flat(batches) -> list[int]:
    return list(itertools.chain.from_iterable(indices(batches)))


def indices(batches) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("module", "extra", "make"),
    [
        ("torch", "torch", "StreamDataset('nowhere')"),
        ("jax", "jax", "JaxStream('nowhere')"),
        ("nvidia.dali", "dali", "external_source(None)"),
    ],
)
def test_a_framework_that_is_missing_is_named_in_one_line(module, extra, make):
    code = f"""
import sys
sys.modules[{module!r}] = None
from gpufgbg import GpufgbgError
from gpufgbg.integrations.{extra} import *
try:
    {make}
except GpufgbgError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and f"pip install 'gpufgbg[{extra}]'" in done.stdout


# -- PyTorch --------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def dataset(torch, assets):
    """Makes data sets on the CPU."""
    from gpufgbg.integrations.torch import StreamDataset

    def make(source=assets, **options):
        if source is assets:
            options = {"recipe": RECIPE, "device": "cpu", **options}
        return StreamDataset(source, **options)

    return make


def loader(torch, data, workers, **options):
    return torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, **options)


def test_torch_gets_the_same_bytes(torch, dataset, compositor):
    for found, expected in zip(dataset(batch_size=13), stream(compositor, batch_size=13, epochs=1), strict=True):
        assert found["image"].shape == (len(expected), 48, 64, 3)
        assert found["image"].dtype == found["mask"].dtype == torch.uint8
        assert sorted(found) == ["image", "index", "mask"]
        np.testing.assert_array_equal(found["image"].numpy(), expected.image)
        np.testing.assert_array_equal(found["mask"].numpy(), expected.mask)
        np.testing.assert_array_equal(found["index"].numpy(), expected.index)


def test_torch_shares_the_streams_memory(torch, dataset, compositor):
    batch = next(stream(compositor))
    for array in (batch.image, batch.mask, batch.index):
        assert torch.from_dlpack(array).data_ptr() == array.ctypes.data
    part = iter(dataset(batch_size=8, reuse=1, prefetch=1))
    pointers = {next(part)["image"].data_ptr() for _ in range(6)}
    assert len(pointers) == 2  # the ring's, whatever torch sees
    part.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["float NCHW", "float NHWC"])
def test_torch_gets_normalised_batches(torch, dataset, compositor, dtype, layout):
    part = dataset(batch_size=40, layout=layout, dtype=dtype, **IMAGENET)
    for found, expected in zip(part, stream(compositor, batch_size=40, epochs=1), strict=True):
        image = found["image"]
        assert image.dtype == getattr(torch, dtype) and image.is_contiguous()
        own = normalise(expected.image, **IMAGENET, dtype=dtype, layout=layout.split()[1])
        bits = torch.int32 if dtype == "float32" else torch.int16
        np.testing.assert_array_equal(image.view(bits).numpy(), own.view(np.dtype(f"i{own.itemsize}")))
        mean, std = (torch.tensor(IMAGENET[name]) for name in ("mean", "std"))
        reference = (torch.from_numpy(expected.image) / 255 - mean) / std
        shown = image.permute(0, 2, 3, 1) if layout == "float NCHW" else image
        within = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
        torch.testing.assert_close(shown.float(), reference, rtol=0, atol=within)


def test_torch_normalises_by_the_data_sets_own_statistics(torch, dataset, folders, tmp_path):
    report = generate(tmp_path / "out", *folders.values(), RECIPE, device="cpu")
    part = dataset(tmp_path / "out", device="cpu", layout="float NCHW", batch_size=64)
    assert part.conversion.mean == report.statistics["composite"].mean
    everything = torch.cat([batch["image"] for batch in part])
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(everything.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_torch_gets_labels_depth_and_tuples(torch, dataset, compositor):
    batch = next(iter(dataset(labels=True, depth="demo", batch_size=4)))
    own = next(stream(compositor, depth="demo", batch_size=4))
    for name in ("background", "foreground", "repetition", "flip", "x", "y"):
        np.testing.assert_array_equal(batch[name].numpy(), getattr(own.labels, name))
        assert batch[name].dtype == (torch.bool if name == "flip" else torch.int32)
    np.testing.assert_array_equal(batch["boxes"].numpy(), own.boxes)
    assert batch["boxes"].dtype == torch.int32 and batch["boxes"].shape == (4, 4)
    (spread,) = loader(torch, dataset(labels=True, batch_size=90), 1)
    whole = next(stream(compositor, batch_size=90))
    np.testing.assert_array_equal(spread["boxes"].numpy(), whole.boxes)
    np.testing.assert_array_equal(spread["flip"].numpy(), whole.labels.flip)
    for name, array in (("depth", own.depth.grey), ("depth_range", own.depth.range), ("metres", own.depth.metres)):
        np.testing.assert_array_equal(batch[name].numpy(), array)
    image, mask, depth = next(iter(dataset(as_tuple=True, depth="demo", metres=False, batch_size=4)))
    np.testing.assert_array_equal(image.numpy(), own.image)
    assert mask.shape == depth.shape == (4, 48, 64)
    assert len(next(iter(dataset(as_tuple=True)))) == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more processes than cores
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_any_number_of_worker_processes_gives_the_same_batches_in_order(torch, dataset, compositor, workers):
    data = dataset(batch_size=7, epochs=2, seed=3, reuse=1 if workers else 0)
    data.set_epoch(4)
    found = list(loader(torch, data, workers))
    expected = list(stream(compositor, batch_size=7, epochs=6, epoch=4, seed=3))
    assert len(loader(torch, data, workers)) == len(data) == len(found) == len(expected) == 26
    for one, other in zip(found, expected, strict=True):
        assert one["index"].tolist() == other.index.tolist()
        np.testing.assert_array_equal(one["image"].numpy(), other.image)


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_processes_that_are_not_forked(torch, dataset, context):
    data = dataset(batch_size=40)
    found = indices(loader(torch, data, 1, multiprocessing_context=context))
    assert found == indices(data)
    assert indices(pickle.loads(pickle.dumps(data))) == found


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver", "pickle", "deepcopy"])
def test_a_blend_goes_along(torch, dataset, assets, how):
    plain = Compositor(assets, RECIPE, "cpu")
    for function in (blends.inverted, blends.darker) if how == "pickle" else (blends.inverted,):
        mine = Compositor(assets, RECIPE, "cpu", 3, function)
        data = dataset(mine, batch_size=90, shuffle=False)
        assert data.compositor is mine and mine.blend.function.__name__ == getattr(function, "__name__", "")
        if how in ("fork", "spawn", "forkserver"):
            batches = loader(torch, data, 1, multiprocessing_context=how)
        else:
            batches = pickle.loads(pickle.dumps(data)) if how == "pickle" else copy.deepcopy(data)
            assert batches.compositor is not mine and batches.compositor.workers == 3
        (batch,) = batches
        expected = mine.render(range(90)).image
        np.testing.assert_array_equal(batch["image"].numpy(), expected)
        assert (expected != plain.render(range(90)).image).any()
    assert plain.blend is None and dataset(plain).compositor is plain


def test_a_blend_without_a_name_stays_where_processes_are_forked(torch, dataset, assets):
    data = dataset(Compositor(assets, RECIPE, "cpu", blend=lambda fg, bg, alpha, x, y: 255 - bg), batch_size=90)
    (expected,) = data
    for batches in (loader(torch, data, 1, multiprocessing_context="fork"), copy.deepcopy(data)):
        assert torch.equal(next(iter(batches))["image"], expected["image"])
    said = r"^blend: <lambda> can't go to a process that is not forked: [^\n]+$"
    with pytest.raises(OptionError, match=said):
        pickle.dumps(data)
    with pytest.raises(OptionError, match=said):
        iter(loader(torch, data, 1, multiprocessing_context="spawn"))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_kept_processes_see_the_epoch_of_a_copy(torch, dataset, how):
    data = dataset(batch_size=90)
    data = pickle.loads(pickle.dumps(data)) if how == "pickle" else copy.deepcopy(data)
    kept = loader(torch, data, 1, persistent_workers=True)
    first = indices(kept)
    data.set_epoch(1)
    assert indices(kept) == indices(data) != first


def test_processes_that_are_kept_see_the_epoch(torch, dataset):
    data = dataset(batch_size=20)
    kept = loader(torch, data, 2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        orders.append(flat(kept))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(90))


def test_depth_in_worker_processes(torch, dataset):
    found = next(iter(loader(torch, dataset(depth=DepthOptions(), batch_size=4), 1)))
    expected = next(iter(dataset(depth="demo", batch_size=4)))
    assert torch.equal(found["depth"], expected["depth"])
    model = DepthModel("demo", RECIPE.size, "cpu", 1)
    assert torch.equal(next(iter(dataset(depth=model, batch_size=4)))["depth"], expected["depth"])
    with pytest.raises(Exception, match="expected DepthOptions"):
        next(iter(loader(torch, dataset(depth=model), 1)))
    for alone in (
        pickle.dumps,
        copy.deepcopy,
        lambda data: iter(loader(torch, data, 1, multiprocessing_context="spawn")),
    ):
        with pytest.raises(OptionError, match=r"^depth: got a DepthModel, which stays in its process: [^\n]+$"):
            alone(dataset(depth=model))
    spawned = loader(torch, dataset(depth="demo", batch_size=4), 1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(spawned))["depth"], expected["depth"])


def test_weights_that_are_not_there_are_told_at_once(torch, dataset, tmp_path):
    for name in ("nope.h5", "nope.onnx"):
        with pytest.raises(InputError, match=rf"^--depth .*{name}: can't be read: No such file"):
            dataset(depth=tmp_path / name)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_partition_what_torch_gets(torch, dataset, world):
    parts = [flat(dataset(batch_size=4, rank=rank, world=world, drop_last=False)) for rank in range(world)]
    assert sorted(itertools.chain(*parts)) == list(range(90))
    whole = [dataset(batch_size=4, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in whole} == {90 // (4 * world)}
    assert {len(batch) for part in whole for batch in indices(part)} == {4}


def test_ranks_come_from_torch_distributed(torch, assets):
    if not torch.distributed.is_available():
        pytest.skip("this build of PyTorch has no torch.distributed")
    from gpufgbg.integrations.torch import StreamDataset

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        part = StreamDataset(assets, recipe=RECIPE, device="cpu", batch_size=40)
        assert sorted(flat(part)) == list(range(90))  # a world of one keeps the last, shorter batch
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's import of PyTorch
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 5, 12, 13])
def test_torchdatas_loader_continues_exactly(torch, dataset, workers, stop):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def made():
        return stateful.StatefulDataLoader(dataset(batch_size=7), batch_size=None, num_workers=workers)

    whole, first = indices(made()), made()
    steps = iter(first)
    seen = indices(itertools.islice(steps, stop))
    state = copy.deepcopy(first.state_dict())
    assert seen == whole[:stop] and len(whole) == 13
    later = made()
    later.load_state_dict(state)
    assert indices(later) == whole[stop:]
    assert indices(later) == whole  # and the next epoch is a whole one


def test_an_iteration_continues_exactly(torch, dataset):
    data = dataset(batch_size=7)
    data.set_epoch(2)
    whole, first = indices(data), iter(data)
    for k in range(len(whole)):
        later = iter(dataset(batch_size=7))
        later.load_state_dict(first.state_dict())
        assert indices(later) == whole[k:]
        next(first)
    with pytest.raises(OptionError, match="state"):
        first.load_state_dict({})


@pytest.mark.parametrize("wrong", [{"end": "x"}, {"end": -1}, {"end": True}, {"position": 91}, {"seed": 9}])
def test_a_state_that_is_refused_leaves_an_iteration_as_it_is(torch, dataset, wrong):
    whole, part = indices(dataset(batch_size=7)), iter(dataset(batch_size=7))
    next(part)
    state = part.state_dict()
    with pytest.raises(OptionError, match=f"^state: {next(iter(wrong))} is "):
        part.load_state_dict({**state, **wrong})
    assert part.state_dict() == state
    assert indices(part) == whole[1:]


def test_an_endless_data_set(torch, dataset):
    data = dataset(epochs=None, batch_size=45)
    with pytest.raises(TypeError, match="no length"):
        len(data)
    found = flat(itertools.islice(data, 6))
    assert [sorted(found[at : at + 90]) for at in (0, 90, 180)] == [list(range(90))] * 3


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "layout": ("NCHW", None),
        "dtype": ("float64", "int8"),
        "labels": (1,),
        "as_tuple": (1,),
        "epochs": (0, 1.5),
        "batch_size": (0,),
        "drop_last": (1,),
        "rank": (1,),
        "start": (0,),
        "part": ((0, 1),),
        "cuda_stream": (0,),
        "depth": (3,),
        "device": ("gpu",),
        "std": (0,),
    }.items(),
)
def test_options_of_torch_out_of_range_are_refused(torch, dataset, option, values):
    for value in values:
        with pytest.raises(OptionError) as refused:
            dataset(**{option: value})
        assert refused.value.option == option


def test_mean_and_std_that_nobody_knows_are_asked_for(torch, dataset):
    with pytest.raises(OptionError, match=r"mean: needed with std for layout 'float NCHW'"):
        dataset(layout="float NCHW")


def test_an_error_in_the_consumer_leaves_no_thread_or_process(torch, dataset):
    import multiprocessing

    def consume(workers: int) -> None:
        for _ in loader(torch, dataset(batch_size=4), workers):
            raise RuntimeError("mine")

    for workers in (0, 2):
        with pytest.raises(RuntimeError, match="mine"):
            consume(workers)
    for thread in threading.enumerate():
        if thread.name.startswith("gpufgbg"):
            thread.join(10)
    assert not [t for t in threading.enumerate() if t.name.startswith("gpufgbg")]
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children()


def test_torch_on_a_card(torch, assets, compositor):
    if cuda.count_devices() == 0 or not torch.cuda.is_available():
        pytest.skip(f"no CUDA device for both: {cuda.why_not() or 'PyTorch without CUDA'}")
    from gpufgbg.integrations.torch import StreamDataset

    side = torch.cuda.Stream()
    for given in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(given):
            plain = list(StreamDataset(assets, recipe=RECIPE, batch_size=40, device="cuda"))
            labelled = list(StreamDataset(assets, recipe=RECIPE, batch_size=40, device="cuda", labels=True))
            options = {"layout": "float NCHW", "dtype": "bfloat16", "device": "cuda", **IMAGENET}
            floats = list(StreamDataset(assets, recipe=RECIPE, batch_size=40, **options))
            sums = [batch["image"].to(torch.int64).sum() for batch in plain]  # on the same stream
        given.synchronize()
        for k, own in enumerate(stream(compositor, batch_size=40, epochs=1)):
            assert plain[k]["image"].is_cuda and not plain[k]["index"].is_cuda
            for name, own_values in {"boxes": own.boxes, "flip": own.labels.flip, "x": own.labels.x}.items():
                assert labelled[k][name].device == plain[k]["image"].device
                np.testing.assert_array_equal(labelled[k][name].cpu().numpy(), own_values)
            np.testing.assert_array_equal(plain[k]["image"].cpu().numpy(), own.image)
            np.testing.assert_array_equal(plain[k]["mask"].cpu().numpy(), own.mask)
            assert int(sums[k]) == int(own.image.sum(dtype=np.int64))
            expected = normalise(own.image, **IMAGENET, dtype="bfloat16")
            np.testing.assert_array_equal(floats[k]["image"].view(torch.int16).cpu().numpy(), expected.view(np.int16))
    with pytest.raises(Exception, match="num_workers=0"):
        next(iter(loader(torch, StreamDataset(assets, recipe=RECIPE, device="cuda"), 1)))


# -- JAX ------------------------------------------------------------------------------------------------


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def test_jax_gets_the_same_bytes_without_a_copy(jax, compositor):
    from gpufgbg.integrations.jax import JaxStream

    with JaxStream(compositor, batch_size=13, epochs=1, labels=True) as part:
        assert len(part) == 7
        for found, expected in zip(part, stream(compositor, batch_size=13, epochs=1), strict=True):
            assert isinstance(found["image"], jax.Array) and found["image"].dtype == found["mask"].dtype == np.uint8
            np.testing.assert_array_equal(found["image"], expected.image)
            np.testing.assert_array_equal(found["mask"], expected.mask)
            assert found["index"].tolist() == expected.index.tolist()
            for name in ("background", "foreground", "repetition", "flip", "x", "y"):
                own = getattr(expected.labels, name)
                assert isinstance(found[name], jax.Array) and found[name].dtype == own.dtype
                np.testing.assert_array_equal(found[name], own)
            assert found["boxes"].dtype == np.int32
            np.testing.assert_array_equal(found["boxes"], expected.boxes)
    batch = next(stream(compositor, batch_size=3))
    for array in (batch.image, batch.mask):
        assert jax.dlpack.from_dlpack(array).unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jax_gets_normalised_batches(jax, compositor, dtype):
    from gpufgbg.integrations.jax import JaxStream

    part = JaxStream(compositor, batch_size=90, epochs=1, layout="float NHWC", dtype=dtype, **IMAGENET)
    found, own = next(part)["image"], next(stream(compositor, batch_size=90)).image
    assert found.dtype == getattr(jax.numpy, dtype) and found.shape == own.shape
    mean, std = (np.float32(IMAGENET[name]) for name in ("mean", "std"))
    within = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(found.astype(np.float32), (own / np.float32(255) - mean) / std, rtol=0, atol=within)
    part.close()


def test_jax_normalises_by_the_data_sets_own_statistics(jax, compositor, on_disk):
    from gpufgbg.integrations.jax import JaxStream

    with JaxStream(on_disk, device="cpu", layout="float NCHW", batch_size=24, epochs=1, shuffle=False) as part:
        known = part.stream.statistics["composite"]
        assert (part.conversion.mean, part.conversion.std) == (known.mean, known.std)
        everything = np.concatenate([np.asarray(batch["image"]) for batch in part])
    np.testing.assert_allclose(everything.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(everything.std((0, 2, 3)), 1, atol=1e-5)
    mine = JaxStream(on_disk, device="cpu", layout="float NCHW", mean=0.25)
    assert (mine.conversion.mean, mine.conversion.std) == (0.25, known.std)
    for given in ({}, {"mean": 0.5}, {"std": 0.5}):
        with pytest.raises(OptionError, match="mean: needed with std for layout 'float NHWC'"):
            JaxStream(compositor, layout="float NHWC", **given)
    assert JaxStream(compositor).conversion.layout == "uint8 NHWC"


def test_jax_on_a_card(jax, assets, compositor):
    if cuda.count_devices() == 0 or jax.default_backend() != "gpu":
        pytest.skip(f"no CUDA device for both: {cuda.why_not() or 'JAX without CUDA'}")
    from gpufgbg.integrations.jax import JaxStream

    part = JaxStream(assets, recipe=RECIPE, device="cuda", batch_size=40, epochs=1, labels=True)
    for k, found in enumerate(part):
        own = next(itertools.islice(stream(compositor, batch_size=40), k, None))
        assert {device.platform for device in found["image"].devices()} == {"gpu"}
        np.testing.assert_array_equal(found["image"], own.image)
        np.testing.assert_array_equal(found["mask"], own.mask)
        for name, own_values in {"boxes": own.boxes, "flip": own.labels.flip, "x": own.labels.x}.items():
            assert {device.platform for device in found[name].devices()} == {"gpu"}
            np.testing.assert_array_equal(found[name], own_values)


def test_jax_continues_exactly(jax, compositor):
    from gpufgbg.integrations.jax import JaxStream

    first = JaxStream(compositor, batch_size=13, epochs=2, depth="demo")
    batch = next(first)
    assert batch["depth"].shape == (13, 48, 64) and batch["depth_range"].shape == (13, 2)
    later = JaxStream(compositor, batch_size=9, epochs=2)
    later.load_state_dict(first.state_dict())
    assert flat(first) == flat(later)
    first.set_epoch(1)
    assert sorted(flat(first)) == list(range(90))
    with pytest.raises(OptionError, match="reuse"):
        JaxStream(compositor, reuse=1)


# -- DALI -----------------------------------------------------------------------------------------------


@pytest.fixture
def dali():
    return pytest.importorskip("nvidia.dali")


@pytest.mark.parametrize("depth", [None, "demo"])
def test_dali_gets_the_same_bytes(dali, compositor, depth):
    from gpufgbg.integrations.dali import external_source

    @dali.pipeline_def(batch_size=16, num_threads=2, device_id=None, prefetch_queue_depth=3)
    def pipe(samples):
        return tuple(external_source(samples))

    with stream(compositor, batch_size=16, epochs=2, depth=depth) as samples:
        pipeline, seen = pipe(samples), 0
        pipeline.build()
        for own in stream(compositor, batch_size=16, epochs=2, depth=depth):
            image, mask, *rest = pipeline.run()
            assert len(image) == len(own) and image.layout() == "HWC"
            for n in range(len(own)):
                np.testing.assert_array_equal(np.array(image[n]), own.image[n])
                np.testing.assert_array_equal(np.array(mask[n]), own.mask[n])
                for part in rest:
                    np.testing.assert_array_equal(np.array(part[n]), own.depth.grey[n])
            assert len(rest) == (depth is not None)
            seen += len(image)
        assert seen == 180
        with pytest.raises(StopIteration):
            pipeline.run()


def run_epoch(pipeline) -> list[list[np.ndarray]]:
    """What the pipeline gives until it ends: batches, outputs."""
    found = []
    with contextlib.suppress(StopIteration):
        while True:
            outputs = (out.as_cpu() if hasattr(out, "as_cpu") else out for out in pipeline.run())
            found.append([np.stack([*map(np.array, out)]) for out in outputs])
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("depth", [None, "demo"])
def test_dali_gets_labels(dali, assets, compositor, device, depth):
    if device == "cuda" and cuda.count_devices() == 0:
        pytest.skip(f"no CUDA device: {cuda.why_not()}")
    from gpufgbg.integrations.dali import external_source

    @dali.pipeline_def(batch_size=16, num_threads=2, device_id=None if device == "cpu" else 0)
    def pipe(samples):
        return tuple(external_source(samples, labels=True))

    options = DepthOptions(backend="onnxruntime") if depth else None
    try:
        samples = stream(assets, recipe=RECIPE, device=device, batch_size=16, epochs=1, depth=options)
    except DeviceError as error:
        pytest.skip(str(error))
    with samples:
        pipeline = pipe(samples)
        pipeline.build()
        found = run_epoch(pipeline)
    for outputs, own in zip(found, stream(compositor, batch_size=16, epochs=1), strict=True):
        assert len(outputs) == 7 + (depth is not None)
        index, background, foreground, flip, boxes = outputs[-5:]
        np.testing.assert_array_equal(outputs[0], own.image)
        assert (index.dtype, flip.dtype, boxes.dtype) == (np.int64, np.bool_, np.int32)
        np.testing.assert_array_equal(boxes, own.boxes)
        for name, array in {"index": index, "background": background, "foreground": foreground, "flip": flip}.items():
            np.testing.assert_array_equal(array, getattr(own.labels, name))


def test_dali_begins_again_when_it_is_reset(dali, compositor):
    from gpufgbg.integrations.dali import external_source

    @dali.pipeline_def(batch_size=16, num_threads=2, device_id=None)
    def pipe(samples):
        return tuple(external_source(samples, labels=True))

    whole = indices({"index": batch.index} for batch in stream(compositor, batch_size=16, epochs=3))
    with stream(compositor, batch_size=16, epochs=2) as samples:
        state = samples.state_dict()
        next(samples)
        samples.load_state_dict(samples.state_dict())  # a stream that goes on somewhere
        pipeline = pipe(samples)
        pipeline.build()
        assert [outputs[2].tolist() for outputs in run_epoch(pipeline)] == whole[1:12]
        for _ in range(2):
            with pytest.raises(StopIteration):
                pipeline.run()
            pipeline.reset()
            assert [outputs[2].tolist() for outputs in run_epoch(pipeline)] == whole[:12]
        samples.set_epoch(1)  # goes before
        pipeline.reset()
        assert [outputs[2].tolist() for outputs in run_epoch(pipeline)] == whole[6:12]
        samples.load_state_dict(state)
        pipeline.reset()
        assert len(run_epoch(pipeline)) == 12
        pipeline.reset()
        samples.close()
        with pytest.raises(OptionError, match=r"^stream: closed, not at its end"):
            pipeline.run()


def test_dali_on_a_card(dali, assets, compositor):
    if cuda.count_devices() == 0:
        pytest.skip(f"no CUDA device: {cuda.why_not()}")
    from gpufgbg.integrations.dali import external_source

    @dali.pipeline_def(batch_size=16, num_threads=2, device_id=0)
    def pipe(samples):
        image, mask = external_source(samples)
        return image, mask, dali.fn.flip(image, horizontal=1)

    with stream(assets, recipe=RECIPE, device="cuda", batch_size=16, epochs=40) as samples:
        pipeline = pipe(samples)
        pipeline.build()
        for own in stream(compositor, batch_size=16, epochs=40):
            image, mask, flipped = (np.stack([*map(np.array, out.as_cpu())]) for out in pipeline.run())
            np.testing.assert_array_equal(image, own.image)
            np.testing.assert_array_equal(mask, own.mask)
            np.testing.assert_array_equal(flipped, own.image[:, :, ::-1])


def test_streams_that_dali_can_not_read_are_refused(compositor):
    from gpufgbg.integrations.dali import StreamSource

    with pytest.raises(OptionError, match="stream: it uses its arrays again"):
        StreamSource(stream(compositor, reuse=2))
    with pytest.raises(OptionError, match="stream: got 3"):
        StreamSource(3)
    with pytest.raises(OptionError, match="keep: got 0"):
        StreamSource(stream(compositor), keep=0)
    with pytest.raises(OptionError, match="labels: got 1, expected True or False"):
        StreamSource(stream(compositor), labels=1)


# -- examples and benchmark ------------------------------------------------------------------------------


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_run(example, tmp_path):
    needed = {"train_torch.py": "torch", "jax_batches.py": "jax", "dali_pipeline.py": "nvidia.dali"}
    pytest.importorskip(needed[example])
    command = [sys.executable, str(EXAMPLES / example), "--steps=2", "--batch=4", "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_benchmark_runs():
    parts = ["feed", "leaks"]
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401

        parts.append("training")
    options = [
        "--device=cpu",
        "--samples=8",
        "--batch=4",
        "--training-batch=2",
        "--steps=1",
        "--size=64",
        "--leaks=100",
    ]
    bench = EXAMPLES.parent / "bench" / "bench_stream.py"
    command = [sys.executable, str(bench), *options, "--leaks=100", f"--only={','.join(parts)}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples/s") == 7 + 2 * ("training" in parts)
    assert done.stdout.count("memory after") == 4
