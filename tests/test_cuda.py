"""The CUDA engine against the CPU backend and Pillow. Skipped where there is no CUDA device."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import oracle
import pytest
from conftest import cutout, smooth, start
from PIL import Image, ImageFile

from gpufgbg import (
    Assets,
    Compositor,
    DeviceError,
    InputError,
    JpegEncoder,
    Moments,
    OptionError,
    Recipe,
    generate,
    mean_std,
)
from gpufgbg.backends import cuda
from gpufgbg.normalise import normalise

pytestmark = pytest.mark.skipif(cuda.count_devices() == 0, reason=f"no CUDA device: {cuda.why_not()}")
SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
SIZES = [(224, 224), (64, 48), (61, 47), (16, 16), (1, 1), (33, 20), (320, 100)]


def made(width: int, height: int, seed: int = 0) -> Assets:
    rng = np.random.default_rng(seed)
    sizes = {(1, 1), (width, height), (max(1, width // 3), max(1, height // 2)), (width, 1), (1, height)}
    cutouts = [cutout(rng, *size) if min(size) > 4 else noise(rng, size) for size in sorted(sizes)]
    cutouts.append(noise(rng, (max(1, width // 2), max(1, height // 2))))
    masks = [rng.integers(0, 256, c.shape[:2], dtype=np.uint8) for c in cutouts]
    return Assets.from_arrays(rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8), cutouts, masks)


def noise(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)


@pytest.mark.parametrize("flip", ["both", "never", "always"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_renders_what_the_cpu_renders(width, height, flip):
    assets = made(width, height)
    recipe = Recipe(size=(width, height), foreground_height=1, per_pair=7, flip=flip, seed=2**63 + 11)
    cpu, gpu = (Compositor(assets, recipe, device) for device in ("cpu", "cuda"))
    shuffled = np.random.default_rng(1).permutation(len(cpu))
    for indices in (np.arange(len(cpu)), shuffled, [3], [5, 5, 0], []):
        expected, found = cpu.render(indices), gpu.render(indices)
        np.testing.assert_array_equal(found.image.get(), expected.image)
        np.testing.assert_array_equal(found.mask.get(), expected.mask)
        assert found.moments == expected.moments


@pytest.mark.parametrize("where", ["host", "card", "both"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_renders_the_callers_placements_as_the_cpu_does(width, height, where):
    import cupy

    assets, recipe = made(width, height), Recipe(size=(width, height), foreground_height=1, per_pair=7)
    cpu, gpu = (Compositor(assets, recipe, device) for device in ("cpu", "cuda"))
    rng = np.random.default_rng(2)
    for count in (0, 1, 2, 300):
        f = rng.integers(0, assets.n_foregrounds, count)
        given = {
            "background": rng.integers(0, assets.n_backgrounds, count),
            "foreground": f,
            "flip": rng.integers(0, 2, count).astype(bool),
            "x": rng.integers(0, width - assets.widths[f] + 1),
            "y": rng.integers(0, height - assets.heights[f] + 1),
        }
        there = {"host": (), "card": tuple(given), "both": ("y", "flip")}[where]
        expected = cpu.render_placed(**given)
        found = gpu.render_placed(**{n: cupy.asarray(v) if n in there else v for n, v in given.items()})
        np.testing.assert_array_equal(found.image.get(), expected.image)
        np.testing.assert_array_equal(found.mask.get(), expected.mask)
        assert found.moments == expected.moments
        assert isinstance(found.labels.x, cupy.ndarray if there else np.ndarray)
    planned = gpu.render(range(len(gpu)))
    given = {name: getattr(planned.labels, name) for name in ("background", "foreground", "flip", "x", "y")}
    placed = gpu.render_placed(**given)
    assert (placed.image == planned.image).all() and (placed.mask == planned.mask).all()
    assert placed.moments == planned.moments


def test_placements_on_the_card_are_checked_there():
    import cupy

    gpu = Compositor(made(64, 48), SMALL, "cuda")
    good = dict.fromkeys(("background", "foreground", "flip", "x", "y"), cupy.zeros(5, cupy.int32))
    with cupy.cuda.Stream(non_blocking=True):
        for name, value in {"background": 3, "foreground": -1, "x": 64, "y": 2**40}.items():
            wrong = cupy.zeros(5, cupy.int64)
            wrong[2] = wrong[4] = value
            with pytest.raises(OptionError, match=f"{name}: sample 2: got {value}, expected 0 to"):
                gpu.render_placed(**good | {name: wrong})
        assert gpu.render_placed(**good).image.shape == (5, 48, 64, 3)


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (5, 33, 17), (3, 224, 224, 3)])
def test_mean_and_std_of_arrays_on_the_card(shape):
    import cupy

    class ByDlpack:
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for form in (cupy.asarray(batch), ByDlpack(cupy.asarray(batch)), cupy.asarray(np.repeat(batch, 2, axis=0))[::2]):
        assert mean_std(form) == mean_std(batch)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_batches_do_not_matter(size):
    assets, recipe = made(64, 48), Recipe(size=(64, 48), foreground_height=20, per_pair=40)
    cpu, gpu = (Compositor(assets, recipe, device) for device in ("cpu", "cuda"))
    expected = cpu.render(range(len(cpu)))
    for first in range(0, min(len(cpu), 40 * size), size):
        stop = min(first + size, len(cpu))
        batch = gpu.render(range(first, stop))
        np.testing.assert_array_equal(batch.image.get(), expected.image[first:stop])
        np.testing.assert_array_equal(batch.mask.get(), expected.mask[first:stop])


def test_two_streams_at_once():
    import cupy

    assets, recipe = made(224, 224), Recipe(foreground_height=1, per_pair=20)
    cpu, gpu = (Compositor(assets, recipe, device) for device in ("cpu", "cuda"))
    expected = cpu.render(range(len(cpu)))
    encoder, on_cpu = (JpegEncoder(65, "420", True, device) for device in ("cuda", "cpu"))
    reference, pixels = list(on_cpu.encode(expected.image)), on_cpu.reconstruct(expected.image)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    for _ in range(3):
        results = []
        for part, stream in enumerate(streams):
            with stream:
                batch = gpu.render(range(part, len(cpu), 2))
                results.append((batch, encoder.reconstruct(batch.image), encoder.encode(batch.image)))
        for part, (batch, seen, files) in enumerate(results):
            streams[part].synchronize()
            np.testing.assert_array_equal(batch.image.get(), expected.image[part::2])
            assert list(files) == reference[part::2]
            np.testing.assert_array_equal(seen.get(), pixels[part::2])


def spin() -> None:
    """Keep CuPy's current stream busy for some tenths of a second."""
    import cupy

    code = """extern "C" __global__ void spin(long long cycles) {
        const long long start = clock64();
        while (clock64() - start < cycles) {}
    }"""
    cupy.RawKernel(code, "spin")((1,), (1,), (np.int64(500_000_000),))


def test_moments_are_read_after_the_stream_that_made_the_batch():
    import cupy

    cpu, gpu = (Compositor(made(64, 48), SMALL, device) for device in ("cpu", "cuda"))
    expected = cpu.render(range(40))
    given = {n: getattr(expected.labels, n) for n in ("background", "foreground", "flip", "x", "y")}
    busy, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    on_card = {name: cupy.asarray(values) for name, values in given.items()}
    for render in (lambda: gpu.render(range(40)), lambda: gpu.render_placed(**on_card)):
        render()  # what is made once
        with busy:
            spin()
            batch = render()
        with other:
            assert batch.moments == expected.moments


@pytest.mark.parametrize("use", ["mean_std", "encode", "normalise", "render_placed"])
def test_tensors_are_read_after_pytorchs_stream_that_makes_them(use):
    torch = pytest.importorskip("torch")
    batch = pictures(np.random.default_rng(6), 40, 30)
    on_cpu, encoder = (JpegEncoder(80, "444", True, device) for device in ("cpu", "cuda"))
    cpu, gpu = (Compositor(made(64, 48), SMALL, device) for device in ("cpu", "cuda"))
    zeros = dict.fromkeys(("background", "foreground", "flip", "y"), 0)
    uses = {
        "mean_std": (batch, mean_std, mean_std),
        "encode": (batch, lambda given: list(on_cpu.encode(given)), lambda given: list(encoder.encode(given))),
        "normalise": (batch, normalise, lambda given: normalise(given).get()),
        "render_placed": (
            np.arange(1, 30),
            lambda given: cpu.render_placed(**zeros, x=given).image,
            lambda given: gpu.render_placed(**zeros, x=given).image.get(),
        ),
    }
    values, here, there = uses[use]
    source = torch.from_numpy(values).cuda()
    tensor = torch.zeros_like(source)
    there(tensor)  # what is made once
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        tensor.copy_(source)
        np.testing.assert_equal(there(tensor), here(values))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 17), (3, 224, 224), (1000, 16, 16)])
def test_moments(shape, channels):
    pictures = np.random.default_rng(0).integers(0, 256, (*shape, 3) if channels == 3 else shape, dtype=np.uint8)
    assert cuda.moments(pictures) == Moments.of(pictures)


def test_moments_of_extremes():
    assert cuda.moments(np.full((50, 300, 300, 3), 255, np.uint8)) == Moments.of(
        np.full((50, 300, 300, 3), 255, np.uint8)
    )


def pictures(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    board = np.where(np.indices((height, width)).sum(axis=0) % 2, 255, 0).astype(np.uint8)
    flat = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    loud = (rng.integers(0, 2, (height, width, 3)) * 255).astype(np.uint8)
    soft = smooth(rng, width, height + 6, 3)[:height]
    hard = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([soft, hard, np.dstack([board] * 3), flat, loud])


def check(batch: np.ndarray, quality: int, subsampling: str, optimize: bool) -> None:
    encoder, layout = JpegEncoder(quality, subsampling, optimize, "cuda"), "HW" if batch.ndim == 3 else "HWC"
    found, pixels = list(encoder.encode(batch, layout)), encoder.reconstruct(batch, layout).get()
    for n, file in enumerate(found):
        expected = oracle.jpeg(Image.fromarray(batch[n]), quality, subsampling, optimize)
        case = (n, batch.shape, quality, subsampling, optimize)
        assert file == expected, case
        np.testing.assert_array_equal(pixels[n], Image.open(io.BytesIO(expected)), err_msg=str(case))
    assert len(found) == len(batch) == len(pixels)


@pytest.fixture
def big_buffer(monkeypatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 1 << 26)  # or Pillow fails on noise at quality 100


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "grey"])
def test_encodes_as_pillow_at_all_qualities(subsampling, optimize, big_buffer):
    batch = pictures(np.random.default_rng(0), 67, 45)
    for quality in range(1, 101):
        if subsampling == "grey":
            check(np.ascontiguousarray(batch[..., 0]), quality, "420", optimize)
        else:
            check(batch, quality, subsampling, optimize)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "grey"])
def test_encodes_all_remainders_of_the_block_size(subsampling, big_buffer):
    rng = np.random.default_rng(1)
    for width in range(1, 34):
        for height in (1, 2, 7, 8, 9, 15, 16, 17, 1 + width % 33, 33 - width % 33):
            batch = pictures(rng, width, height)[[0, 1, 4]]
            grey = subsampling == "grey"
            check(np.ascontiguousarray(batch[..., 0]) if grey else batch, 65, "420" if grey else subsampling, True)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "grey"])
@pytest.mark.parametrize(("width", "height"), [(2000, 1500), (1999, 3), (5, 2049), (640, 480)])
def test_encodes_large_pictures(width, height, subsampling, big_buffer):
    batch = pictures(np.random.default_rng(2), width, height)
    grey = subsampling == "grey"
    for quality, optimize in ((65, True), (100, False), (5, True)):
        check(
            np.ascontiguousarray(batch[..., 0]) if grey else batch, quality, "420" if grey else subsampling, optimize
        )


def test_encodes_thousands_at_once():
    rng = np.random.default_rng(3)
    batch = np.stack([smooth(rng, 32, 24, 3) for _ in range(50)])
    many = np.tile(batch, (100, 1, 1, 1))
    cpu, gpu = (JpegEncoder(65, "420", True, device) for device in ("cpu", "cuda"))
    assert list(gpu.encode(many)) == list(cpu.encode(batch)) * 100
    np.testing.assert_array_equal(gpu.reconstruct(many).get(), np.tile(cpu.reconstruct(batch), (100, 1, 1, 1)))


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "grey"])
@pytest.mark.parametrize("off", [0, 1, 4, 8])
def test_reconstructs_into_memory_that_is_given(subsampling, off):
    import cupy

    grey = subsampling == "grey"
    mode = "420" if grey else subsampling
    for width in (64, 61):
        batch = pictures(np.random.default_rng(5), width, 33)
        batch = np.ascontiguousarray(batch[..., 0]) if grey else batch
        given = cupy.full(batch.size + 32, 7, np.uint8)
        out = given[off : off + batch.size].reshape(batch.shape)
        found = cuda.CudaJpeg(40, mode, True).reconstruct(cupy.asarray(batch), out)
        assert found is out
        np.testing.assert_array_equal(out.get(), JpegEncoder(40, mode, True, "cpu").reconstruct(batch))
        assert (given[:off] == 7).all() and (given[off + batch.size :] == 7).all()
        with pytest.raises(InputError, match="out: got"):
            cuda.CudaJpeg(40, mode, True).reconstruct(cupy.asarray(batch), out[:1])
    empty = cuda.CudaJpeg(40, mode, True).reconstruct(cupy.asarray(batch[:0]))
    assert empty.shape == batch[:0].shape


def test_takes_arrays_of_other_libraries():
    import cupy

    torch = pytest.importorskip("torch")
    batch = pictures(np.random.default_rng(4), 40, 30)
    on_cpu, encoder = (JpegEncoder(80, "444", True, device) for device in ("cpu", "cuda"))
    expected, pixels = list(on_cpu.encode(batch)), on_cpu.reconstruct(batch)
    tensor = torch.from_numpy(batch).cuda()
    for given in (batch, cupy.asarray(batch), tensor, torch.utils.dlpack.to_dlpack(tensor)):
        given = cupy.from_dlpack(given) if type(given).__name__ == "PyCapsule" else given
        files = encoder.encode(given)
        assert list(files) == expected and files[1] == expected[1] and files[-1] == expected[-1]
        np.testing.assert_array_equal(encoder.reconstruct(given).get(), pixels)


@pytest.mark.parametrize("sink", ["tree", "zip", "tar"])
def test_data_sets_equal_the_cpus(folders, tmp_path, sink):
    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=30)
    for device in ("cpu", "cuda"):
        report = generate(tmp_path / device, **folders, recipe=recipe, sink=sink, device=device, workers=3)
        assert report.complete and report.device == {"cpu": "cpu", "cuda": "cuda:0"}[device]
    expected = oracle.tree_of(tmp_path / "cpu")
    assert oracle.tree_of(tmp_path / "cuda") == expected
    for name, batch_size in (("one", 1), ("three", 3), ("big", 1000)):
        for samples in ((0, 11), (300, 720), (None, None)):
            generate(
                tmp_path / name, **folders, recipe=recipe, sink=sink, device="cuda", workers=2, batch_size=batch_size,
                samples=samples,
            )  # fmt: skip
        assert oracle.tree_of(tmp_path / name) == expected


def test_statistics_equal_the_cpus_on_the_real_frame(tmp_path):
    from gpufgbg.sample_assets import write_sample_assets

    backgrounds, foregrounds = write_sample_assets(tmp_path / "assets", 4, 6)
    for device in ("cpu", "cuda"):
        generate(tmp_path / device, backgrounds, foregrounds, recipe=Recipe(per_pair=9), device=device)
    contents = [json.loads((tmp_path / device / "dataset.json").read_text()) for device in ("cpu", "cuda")]
    assert contents[0] == contents[1]


def test_out_of_memory_takes_smaller_batches_or_says_what_it_needs(folders, tmp_path):
    import cupy

    recipe = Recipe(size=(640, 480), foreground_height=100, per_pair=10)
    generate(tmp_path / "cpu", **folders, recipe=recipe, device="cpu")
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    try:
        pool.set_limit(size=100 << 20)
        generate(tmp_path / "cuda", **folders, recipe=recipe, device="cuda", workers=2, batch_size=200)
        assert oracle.tree_of(tmp_path / "cuda") == oracle.tree_of(tmp_path / "cpu")
        pool.free_all_blocks()
        pool.set_limit(size=6 << 20)
        with pytest.raises(DeviceError, match=r"out of memory: one sample takes \d+ MB.*or use device cpu"):
            generate(tmp_path / "none", **folders, recipe=recipe, device="cuda", workers=2)
    finally:
        pool.set_limit(size=0)


def test_a_writer_that_dies_is_one_error_and_the_run_continues(folders, tmp_path, monkeypatch):
    from gpufgbg import cuda_pipeline

    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=400)
    generate(tmp_path / "whole", **folders, recipe=recipe, device="cuda", workers=2)
    original, killed = cuda_pipeline._Writer.send, []

    def send(self, message):
        if message[0] == "samples" and message[2] > 5000 and not killed:
            killed.append(self.process.kill())
        original(self, message)

    with monkeypatch.context() as patch:
        patch.setattr(cuda_pipeline._Writer, "send", send)
        with pytest.raises(DeviceError, match="a writer process ended with code -9"):
            generate(tmp_path / "out", **folders, recipe=recipe, device="cuda", workers=2)
    report = generate(tmp_path / "out", **folders, recipe=recipe, device="cuda", workers=2)
    assert report.complete
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def big(folders) -> list[str]:
    return [
        "generate", *(f"--{name}={path}" for name, path in folders.items()), "--size=224", "--foreground-height=20",
        "--per-pair=900", "--device=cuda", "--workers=2",
    ]  # fmt: skip


@pytest.mark.parametrize("sink", ["tree", "zip", "tar"])
def test_killed_and_resumed(folders, tmp_path, sink):
    command = [*big(folders), f"--sink={sink}"]
    begun = time.monotonic()
    with start(*command, f"--out={tmp_path / 'whole'}") as process:
        printed = process.communicate(timeout=200)
        assert process.returncode == 0, printed
    took = time.monotonic() - begun
    kills = 0
    for part in (0.4, 0.6, 0.7, 0.8, 0.9):
        with start(*command, f"--out={tmp_path / 'out'}") as process:
            try:
                process.communicate(timeout=took * part)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
    with start(*command, f"--out={tmp_path / 'out'}") as process:
        printed = process.communicate(timeout=200)
        assert process.returncode == 0, printed
    assert kills
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_interrupted_and_continued(folders, tmp_path):
    command = [*big(folders), f"--out={tmp_path / 'out'}"]
    with start(*command) as process:
        runs = tmp_path / "out" / ".gpufgbg" / "runs"
        while not (runs.is_dir() and any(runs.iterdir())) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "samples are safe; the same command continues" in error.splitlines()[-1]
    assert not any(runs.iterdir())
    with start(*command) as process:
        printed = process.communicate(timeout=200)
        assert process.returncode == 0, printed


def test_full_disk(folders, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    small = [mount, "-t", "tmpfs", "-o", "size=60m", "none", disk]
    if not mount or subprocess.run(small, capture_output=True).returncode:
        pytest.skip("can't mount a small file system here")
    try:
        command = [*big(folders), f"--out={disk / 'out'}"]
        with start(*command) as process:
            printed, error = process.communicate(timeout=200)
        last = error.splitlines()[-1]
        assert process.returncode == 2 and printed == "" and last.startswith("gpufgbg: error: no space left")
        assert "samples are safe" in last
        subprocess.run([mount, "-o", "remount,size=2g", disk], check=True)
        with start(*command) as process:
            printed = process.communicate(timeout=200)
            assert process.returncode == 0, printed
        with start("verify", disk / "out", "--rerender", "200") as process:
            printed = process.communicate(timeout=200)
            assert process.returncode == 0, printed
    finally:
        subprocess.run(["umount", disk], check=True)
