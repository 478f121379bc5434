"""Depth on a card: the pipeline against the CPU's bytes, and TensorRT. Skipped where there is no CUDA device.

What has a tiny network is quick; the real architecture is measured and compared by bench/bench_depth.py.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_models
import oracle
import pytest
from conftest import smooth, start
from PIL import Image

from gpufgbg import DepthModel, DepthOptions, DeviceError, GpufgbgWarning, InputError, Recipe, add_depth, generate
from gpufgbg.backends import cuda
from gpufgbg.depth import engine_tensorrt
from gpufgbg.manifest import Manifest

pytestmark = pytest.mark.skipif(cuda.count_devices() == 0, reason=f"no CUDA device: {cuda.why_not()}")
tensorrt = pytest.mark.skipif(engine_tensorrt.why_not() is not None, reason=str(engine_tensorrt.why_not()))
SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=6)


def has_onnxruntime() -> bool:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


onnxruntime = pytest.mark.skipif(not has_onnxruntime(), reason="no ONNX Runtime in this Python")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all tests: each engine is built once."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("GPUFGBG_CACHE")
    os.environ["GPUFGBG_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["GPUFGBG_CACHE"]
    else:
        os.environ["GPUFGBG_CACHE"] = before


@pytest.fixture(scope="module")
def blur(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_models.blur(tmp_path_factory.mktemp("model") / "blur.onnx")


def pictures(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    rng = np.random.default_rng(count)
    return np.stack([smooth(rng, width, height, 3) for _ in range(count)])


def depth_files(folder: Path) -> dict[str, bytes]:
    files = {
        name: data for name, data in oracle.tree_of(folder).items() if name.startswith(("fg_bg", "labels", "sh"))
    }
    assert files
    return files


# -- the pipeline on the card, with the CPU's own engine -----------------------------------------------------


@onnxruntime
@pytest.mark.parametrize("given", ["saved", "rendered"])
@pytest.mark.parametrize("sink", ["tree", "zip", "tar"])
def test_every_byte_equals_the_cpus(folders, tmp_path, blur, sink, given):
    options = DepthOptions(str(blur), input=given, backend="onnxruntime")
    for device in ("cpu", "cuda"):
        report = generate(tmp_path / device, *folders.values(), SMALL, depth=options, sink=sink, device=device)
        assert report.complete
    assert oracle.tree_of(tmp_path / "cuda") == oracle.tree_of(tmp_path / "cpu")


@onnxruntime
@pytest.mark.parametrize("batch_size", [1, 7, 50, 1000])
def test_batches_and_writers_do_not_matter(folders, tmp_path, blur, batch_size):
    options = DepthOptions(str(blur), backend="onnxruntime", batch=4)
    generate(tmp_path / "cpu", *folders.values(), SMALL, depth=options, device="cpu")
    report = generate(
        tmp_path / "cuda", *folders.values(), SMALL, depth=options, device="cuda", batch_size=batch_size, workers=1
    )
    assert depth_files(tmp_path / "cuda") == depth_files(tmp_path / "cpu")
    jpeg = sum(report.size_bytes[kind] for kind in ("composite", "composite_mask", "depth"))
    assert report.transferred["files"] == jpeg
    assert report.transferred["other"] <= 100 * report.samples + 1000 * (1 + report.samples // batch_size)


@onnxruntime
def test_depth_added_on_the_card(folders, tmp_path, blur):
    options = DepthOptions(str(blur), backend="onnxruntime")
    generate(tmp_path / "cpu", *folders.values(), SMALL, depth=options, device="cpu")
    generate(tmp_path / "cuda", *folders.values(), SMALL, device="cuda")
    add_depth(tmp_path / "cuda", options, device="cuda")
    assert oracle.tree_of(tmp_path / "cuda") == oracle.tree_of(tmp_path / "cpu")


@onnxruntime
def test_out_of_memory_makes_smaller_batches(folders, tmp_path, blur):
    import cupy

    options = DepthOptions(str(blur), backend="onnxruntime")
    generate(tmp_path / "free", *folders.values(), SMALL, depth=options, device="cuda")
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    for spare in (3 << 20, 12 << 20):
        pool.set_limit(size=pool.total_bytes() + spare)
        try:
            generate(tmp_path / f"{spare}", *folders.values(), SMALL, depth=options, device="cuda", batch_size=144)
        finally:
            pool.set_limit(size=0)
        assert oracle.tree_of(tmp_path / f"{spare}") == oracle.tree_of(tmp_path / "free")


# -- TensorRT ------------------------------------------------------------------------------------------------


@tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_predicts_what_the_network_says(blur, precision):
    import cupy

    images = pictures(70)  # more than a batch
    model = DepthModel(DepthOptions(str(blur), precision=precision), (64, 48), "cuda")
    maps = model.predict(cupy.asarray(images))
    expected = onnx_models.blurred(images.transpose(0, 3, 1, 2) / 255)
    assert isinstance(maps.metres, cupy.ndarray) and maps.grey.shape == (70, 48, 64)
    tolerance = 1e-5 if precision == "fp32" else 4e-3
    np.testing.assert_allclose(maps.metres.get(), expected, rtol=tolerance)
    np.testing.assert_allclose(maps.range.get()[:, 0], expected.min(axis=(1, 2)), rtol=tolerance)
    for source in (images, _Torchlike(cupy.asarray(images))):
        again = model.predict(source)
        assert (again.metres == maps.metres).all() and (again.grey == maps.grey).all()


class _Torchlike:
    """Only what torch's tensors have."""

    def __init__(self, array) -> None:
        self.__cuda_array_interface__ = array.__cuda_array_interface__
        self._array = array


@tensorrt
def test_layouts_sizes_and_ranges(tmp_path):
    images = pictures(3)
    plain = DepthModel(str(onnx_models.blur(tmp_path / "a.onnx")), (64, 48), "cuda").predict(images)
    last = DepthModel(str(onnx_models.blur(tmp_path / "b.onnx", channels_last=True)), (64, 48), "cuda").predict(
        images
    )
    np.testing.assert_allclose(last.metres.get(), plain.metres.get(), rtol=4e-3)
    fixed = onnx_models.blur(tmp_path / "c.onnx", batch=2, size=(96, 64))
    assert DepthModel(str(fixed), (64, 48), "cuda").predict(images).grey.shape == (3, 48, 64)


@tensorrt
def test_the_callers_stream_is_honoured(blur):
    import cupy

    model = DepthModel(str(blur), (64, 48), "cuda")
    images = pictures(5)
    expected = model.predict(images).grey.get()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        late = cupy.zeros(images.shape, np.uint8)
        for _ in range(50):  # what fills the input is still under way when predict is called
            late += 1
        late[...] = cupy.asarray(images)
        np.testing.assert_array_equal(model.predict(late).grey.get(), expected)


@tensorrt
def test_position_and_company_do_not_matter(blur):
    model = DepthModel(str(blur), (64, 48), "cuda")
    images = pictures(130)
    order = np.random.default_rng(0).permutation(130)
    maps, shuffled, alone = model.predict(images), model.predict(images[order]), model.predict(images[77:78])
    assert (shuffled.metres == maps.metres[order]).all() and (alone.metres == maps.metres[77:78]).all()


@tensorrt
@pytest.mark.parametrize("sink", ["tree", "zip", "tar"])
def test_one_set_of_bytes(folders, tmp_path, blur, sink):
    common = {"depth": str(blur), "sink": sink, "device": "cuda"}
    generate(tmp_path / "whole", *folders.values(), SMALL, **common)
    for samples in ((100, None), (0, 30), (30, 100)):
        generate(tmp_path / "parts", *folders.values(), SMALL, **common, samples=samples, batch_size=11)
    assert oracle.tree_of(tmp_path / "parts") == oracle.tree_of(tmp_path / "whole")
    engines = Manifest(tmp_path / "whole").read()["depth"]["engines"]
    assert [engine["backend"] for engine in engines] == ["tensorrt"] and engines[0]["precision"] == "fp16"


@tensorrt
def test_killed_and_continued(folders, tmp_path, blur):
    command = ["generate", *(f"--{name}={folder}" for name, folder in folders.items())]
    command += ["--size=64x48", "--foreground-height=20", "--per-pair=300", f"--depth={blur}", "--device=cuda"]
    with start(*command, f"--out={tmp_path / 'whole'}") as process:
        printed = process.communicate(timeout=200)
        assert process.returncode == 0, printed
    for wait in (2.5, 3.0, 3.5):
        with start(*command, f"--out={tmp_path / 'killed'}") as process:
            try:
                process.communicate(timeout=wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
    with start(*command, f"--out={tmp_path / 'killed'}") as process:
        printed = process.communicate(timeout=200)
        assert process.returncode == 0, printed
    assert oracle.tree_of(tmp_path / "killed") == oracle.tree_of(tmp_path / "whole")


@tensorrt
def test_a_folder_of_pictures(run, tmp_path, blur):
    (tmp_path / "in").mkdir()
    for i, size in enumerate([(64, 48), (64, 48), (100, 30), (31, 77)]):
        Image.fromarray(pictures(1, *size)[0]).save(tmp_path / "in" / f"{i}.png")
    code, _, error = run(
        "depth", tmp_path / "in", f"--weights={blur}", f"--out={tmp_path / 'out'}", "--device=cuda", "--json"
    )
    assert code == 0, error
    for i, size in enumerate([(64, 48), (64, 48), (100, 30), (31, 77)]):
        with Image.open(tmp_path / "out" / f"{i}.jpg") as depth_map:
            assert depth_map.size == size and depth_map.mode == "L"


# -- the cache -----------------------------------------------------------------------------------------------


@contextmanager
def own_cache(folder: Path) -> Iterator[Path]:
    before = os.environ["GPUFGBG_CACHE"]
    os.environ["GPUFGBG_CACHE"] = str(folder)
    try:
        yield folder
    finally:
        os.environ["GPUFGBG_CACHE"] = before


@tensorrt
def test_engines_are_kept_and_built_again_when_spoilt(tmp_path, blur):
    images = pictures(2)
    with own_cache(tmp_path / "cache"):
        first = DepthModel(str(blur), (64, 48), "cuda")
        assert first.engine.built
        expected = first.predict(images).metres.get()
        (kept,) = (tmp_path / "cache").glob("*.engine")
        data = kept.read_bytes()
        assert not DepthModel(str(blur), (64, 48), "cuda").engine.built
        head, _, plan = data.partition(b"\n")
        spoilt = bytearray(data)
        spoilt[len(data) // 2] ^= 1
        for content in (bytes(spoilt), data[:-100], b"", head.replace(b"fp16", b"fp32") + b"\n" + plan):
            kept.write_bytes(content)
            again = DepthModel(str(blur), (64, 48), "cuda")
            assert again.engine.built and kept.read_bytes().partition(b"\n")[0].startswith(b'{"')
            np.testing.assert_allclose(again.predict(images).metres.get(), expected, rtol=1e-2)
        other = DepthModel(DepthOptions(str(blur), batch=8), (64, 48), "cuda")
        assert other.engine.built and other.batch == 8 and len(list((tmp_path / "cache").glob("*.engine"))) == 2


@tensorrt
def test_a_cache_that_cannot_be_written(tmp_path, blur):
    (tmp_path / "file").write_text("no folder")
    with own_cache(tmp_path / "file" / "below"), pytest.warns(GpufgbgWarning, match="GPUFGBG_CACHE"):
        model = DepthModel(str(blur), (64, 48), "cuda")
    assert model.engine.built and model.predict(pictures(1)).grey.shape == (1, 48, 64)


@tensorrt
def test_two_builders_at_once(tmp_path, blur):
    environment = {**os.environ, "GPUFGBG_CACHE": str(tmp_path / "cache")}
    command = ("depth", "build", f"--weights={blur}", "--frame=64x48", "--json")
    both = [start(*command, env=environment) for _ in range(2)]
    printed = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sorted('"built": true' in out for out, _ in printed) == [False, True]


@tensorrt
def test_a_builder_that_died_holds_nothing_up(tmp_path, blur):
    environment = {**os.environ, "GPUFGBG_CACHE": str(tmp_path / "cache")}
    command = ("depth", "build", f"--weights={blur}", "--frame=64x48", "--json")
    with start(*command, env=environment) as process:
        while not list((tmp_path / "cache").glob("*.lock")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    with start(*command, env=environment) as process:
        out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert '"backend": "tensorrt"' in out


# -- what goes wrong -----------------------------------------------------------------------------------------


@tensorrt
def test_out_of_memory_takes_a_smaller_batch(blur):
    import cupy

    pool = cupy.get_default_memory_pool()
    images = pictures(3)
    expected = DepthModel(DepthOptions(str(blur), precision="fp32"), (64, 48), "cuda").predict(images).metres.get()
    pool.free_all_blocks()
    said: list[str] = []
    pool.set_limit(size=pool.total_bytes() + (2 << 20))
    try:
        model = DepthModel(DepthOptions(str(blur), precision="fp32"), (64, 48), "cuda", tell=said.append)
        np.testing.assert_allclose(model.predict(images).metres.get(), expected, rtol=1e-5)
        with pytest.raises(DeviceError, match="choose a smaller --depth-batch"):
            DepthModel(DepthOptions(str(blur), precision="fp32", batch=64), (64, 48), "cuda")
    finally:
        pool.set_limit(size=0)
    assert model.batch < 64 and any("trying 32" in line for line in said)


@tensorrt
def test_no_numbers_and_flat_predictions(tmp_path):
    images = pictures(2)
    images[1] = 0
    model = DepthModel(DepthOptions(str(onnx_models.not_numbers(tmp_path / "nan.onnx")), precision="fp32"), (64, 48))
    with pytest.raises(InputError, match="no numbers"):
        model.predict(images)
    flat = DepthModel(str(onnx_models.flat(tmp_path / "flat.onnx")), (64, 48), "cuda").predict(images)
    assert not flat.grey.any() and (flat.range == 2).all()


@tensorrt
def test_an_operator_that_tensorrt_does_not_know(tmp_path):
    model = onnx_models.unknown_operator(tmp_path / "odd.onnx", domain="nobody")
    with pytest.raises(InputError, match=r"TensorRT can't import it: .*Mystery"):
        DepthModel(str(model), (64, 48), "cuda")


@pytest.mark.skipif(engine_tensorrt.why_not() is None, reason="TensorRT is installed")
def test_without_tensorrt(refused, arguments, blur):
    given = [argument for argument in arguments if not argument.startswith("--device")]
    error = refused(*given, "--device=cuda", f"--depth={blur}")
    assert "pip install 'gpufgbg[tensorrt]'" in error and "--depth-backend onnxruntime" in error
