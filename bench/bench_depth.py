"""Depth on one card: the engine alone, what stands around it, its numbers, and the main job with depth, in one run.

    python bench/bench_depth.py --reference FILE.npz --only reference   # in a Python with ONNX Runtime
    python bench/bench_depth.py --reference FILE.npz [--input DIR] [--only engine,parts,numbers,bytes,job] [--out DIR]

Weights are random, of the real architecture (tests/keras_densedepth.py), at 448x448 -> 224x224. Rates are device
events around many launches after warm-up. The job is timed from process start to the last fsync, the engine being in
the cache. The first command makes the fp32 predictions that ``numbers`` compares with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_cuda import Table, seconds_a_call
from keras_densedepth import write_h5

from gpufgbg import Compositor, DepthModel, DepthOptions, JpegEncoder, Recipe, prepare
from gpufgbg.sample_assets import write_sample_assets

FRAMES = 32  # pictures of the comparison
KINDS = (  # the first pattern that a layer's name has
    ("reformats", "eformat"),
    ("decoder's convolutions", r"up\d_conv|^conv2( |$)|^conv3"),
    ("1x1 convolutions of dense blocks", "_1_conv"),
    ("3x3 convolutions of dense blocks", "_2_conv"),
    ("scale + ReLU before convolutions", r"_0_bn|pool\d_bn|^bn"),
    ("resize and concat", "upsampling2d|concat|copy"),
)


def weights_file() -> Path:
    path = Path(tempfile.gettempdir()) / "gpufgbg-bench-densedepth.h5"
    if not path.is_file():
        write_h5(path, 1664, 0, leaky_after_conv_a=True)
    return path


def folders(given: str | None) -> tuple[Path, Path, Path | None]:
    if given is None:
        backgrounds, foregrounds = write_sample_assets(Path(tempfile.gettempdir()) / "gpufgbg-bench-assets")
        return backgrounds, foregrounds, None
    root = Path(given)
    return root / "bg", root / "fg", root / "fg_mask"


def kind_of(layer: str) -> str:
    """What a layer of the engine is, by the names of what was fused into it."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, layer)), "other")


def bench_engine(table: Table, model: DepthModel, seconds: float) -> float:
    """Images a second of the engine alone."""
    import cupy

    engine = model.engine
    state = f"built in {seconds:.0f} s" if engine.built else f"out of the cache in {seconds:.1f} s"
    table.add("engine", f"batch {engine.batch}", f"TensorRT {engine.description['version']}, {state}")
    engine.images[...] = cupy.random.default_rng(0).random(engine.input_shape, dtype=np.float32).astype(engine.dtype)
    took = seconds_a_call(lambda: engine.infer(engine.images), 10, together=5)
    rate = engine.batch / took
    table.add(
        "engine alone, fp16, 448 -> 224, CUDA graph", f"{rate:,.0f} images/s", f"{engine.memory_bytes >> 20:,} MB"
    )
    kinds: dict[str, float] = {}
    for layer, milliseconds in engine.layers().items():
        kinds[kind_of(layer)] = kinds.get(kind_of(layer), 0.0) + milliseconds
    total = sum(kinds.values())
    for kind, milliseconds in sorted(kinds.items(), key=lambda item: -item[1]):
        table.add(f"engine's layers: {kind}", f"{milliseconds:.2f} ms a batch", f"{100 * milliseconds / total:.0f} %")
    return rate


def bench_parts(table: Table, model: DepthModel, compositor: Compositor) -> None:
    """What stands around the engine, each at a batch of 640."""
    import cupy

    from gpufgbg.depth.processing import NORMALISATIONS, postprocess, preprocess

    batches = [compositor.render(np.arange(start, start + 640)).image for start in range(0, 6400, 640)]
    turn = iter(range(10**9))
    inputs = cupy.empty((640, *model.engine.input_shape[1:]), model.engine.dtype)
    scale, bias = NORMALISATIONS["unit"]
    prediction = cupy.random.default_rng(0).uniform(15, 50, (640, 224, 224)).astype(model.engine.dtype)
    encoder = JpegEncoder(65, "420", True, model.device)
    for what, function in (
        ("reconstruct: pixels as the saved file decodes", lambda: encoder.reconstruct(batches[next(turn) % 10])),
        (
            "pre-processing: x2, scale, fp16",
            lambda: preprocess(
                batches[next(turn) % 10], (448, 448), dtype=inputs.dtype, scale=scale, bias=bias, out=inputs
            ),
        ),
        (
            "post-processing: inverse, clip, range, grey",
            lambda: postprocess(prediction, (224, 224), meaning="inverse", scale=10.0),
        ),
    ):
        took = seconds_a_call(function, 20)
        table.add(what, f"{640 / took / 1e3:,.0f} k images/s", f"{1e6 * took / 640:.2f} us an image")


def bench_numbers(table: Table, model: DepthModel, reference: Path) -> None:
    """Grey levels against ONNX Runtime's fp32, and the same picture at different places of a batch."""
    import cupy

    stored = np.load(reference)
    maps = model.predict(stored["images"])
    difference = np.abs(maps.grey.get().astype(int) - stored["grey"])
    table.add(
        f"fp16 against ONNX Runtime fp32, grey levels of {len(difference)} composites",
        f"mean {difference.mean():.3f}",
        f"over 4: {100 * (difference > 4).mean():.4f} %, greatest {difference.max()}",
    )
    relative = np.abs(maps.metres.get() / stored["metres"] - 1)
    table.add(
        "fp16 against ONNX Runtime fp32, metres, relative", f"mean {relative.mean():.5f}", f"{relative.max():.4f}"
    )
    images = cupy.asarray(stored["images"])
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = model.predict(images[order])
    single = model.predict(images[3:4])
    assert (shuffled.metres == maps.metres[order]).all() and (single.metres == maps.metres[3:4]).all()
    table.add("a picture's prediction at other places of other batches", "the same bits")


def command(input_folders: tuple[Path, Path, Path | None], out: Path, *more: str) -> list[str]:
    backgrounds, foregrounds, masks = input_folders
    arguments = ["--backgrounds", backgrounds, "--foregrounds", foregrounds, "--out", out, "--json", *more]
    if masks is not None:
        arguments += ["--masks", masks]
    arguments += ["--device", "cuda", "--depth", weights_file()]
    return [sys.executable, "-m", "gpufgbg", "generate", *map(str, arguments)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


def bench_bytes(table: Table, input_folders: tuple[Path, Path, Path | None], work: Path) -> None:
    """One set of bytes: whole, in slices out of order, killed and continued."""
    few = ("--per-pair", "1", "--samples", "0:6000")
    subprocess.run(command(input_folders, work / "whole", *few), check=True, stdout=subprocess.DEVNULL)
    whole = files_below(work / "whole")
    parts = ("2500:6000", "0:700", "700:2500")
    for part in parts:
        arguments = command(input_folders, work / "parts", "--per-pair", "1", "--samples", part)
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    assert files_below(work / "parts") == whole
    table.add("6,000 triples in slices out of order", "the same bytes", f"{len(whole):,} files")
    kills = 0
    for wait in (3.5, 4.5, 5.5):
        with subprocess.Popen(command(input_folders, work / "killed", *few), stdout=subprocess.DEVNULL) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
    subprocess.run(command(input_folders, work / "killed", *few), check=True, stdout=subprocess.DEVNULL)
    assert files_below(work / "killed") == whole
    table.add(f"6,000 triples, killed {kills} times and continued", "the same bytes")


def bench_job(
    table: Table, input_folders: tuple[Path, Path, Path | None], work: Path, sink: str, rate: float, samples: str
) -> None:
    start = time.perf_counter()
    more = ("--sink", sink, *(("--samples", samples) if samples else ()))
    found = subprocess.run(command(input_folders, work / sink, *more), check=True, stdout=subprocess.PIPE, text=True)
    took = time.perf_counter() - start
    report = json.loads(found.stdout)
    count = report["samples"]
    share = f"; {100 * count / took / rate:.1f} % of the engine's own rate" if rate else ""
    table.add(
        f"main job: {count:,} composites, masks and depth maps to {sink}, process start to last fsync",
        f"{took:.1f} s",
        f"{count / took:,.0f} triples/s{share}",
    )
    moved = report["transferred"]
    jpeg = sum(report["bytes"][kind] for kind in ("composite", "composite_mask", "depth"))
    table.add(
        "main job: bytes from the card to the host, counted at each copy",
        f"{(moved['files'] + moved['other']) / 1e9:.3f} GB",
        f"{jpeg / 1e9:.3f} GB of JPEG files; {100 * (moved['files'] + moved['other'] - jpeg) / jpeg:.3f} % more",
    )
    memory = report["memory"]
    table.add(
        "main job: memory", f"card {memory['device'] >> 20:,} MB", f"pinned on the host {memory['pinned'] >> 20} MB"
    )
    depth = report["statistics"]["depth"]
    table.add("main job: depth maps' mean and std", f"{depth['mean'][0]:.4f} / {depth['std'][0]:.4f}")
    print(json.dumps(report["timeline"], indent=1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", help="folder with bg/, fg/, fg_mask/ (default: built-in sample assets)")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--only", default="engine,parts,numbers,bytes,job")
    parser.add_argument("--samples", default="", help="of the job, A:B (default: all)")
    parser.add_argument("--sink", default="tree")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gpufgbg-bench")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    input_folders = folders(options.input)
    recipe = Recipe()
    if options.only == "reference":
        compositor = Compositor(prepare(*input_folders, recipe=recipe), recipe, "cpu")
        images = compositor.render(np.linspace(0, len(compositor) - 1, FRAMES).astype(int)).image
        maps = DepthModel(DepthOptions(str(weights_file())), recipe.size, "cpu").predict(images)
        np.savez(options.reference, images=images, grey=maps.grey, metres=maps.metres)
        return
    import cupy

    table, wanted, rate = Table(), options.only.split(","), 0.0
    if {"engine", "parts", "numbers"} & set(wanted):
        start = time.perf_counter()
        model = DepthModel(
            DepthOptions(str(weights_file())), recipe.size, "cuda", tell=lambda t: print(t, flush=True)
        )
        seconds = time.perf_counter() - start
        if "engine" in wanted:
            rate = bench_engine(table, model, seconds)
        if "numbers" in wanted and options.reference and options.reference.exists():
            bench_numbers(table, model, options.reference)
        if "parts" in wanted:
            bench_parts(table, model, Compositor(prepare(*input_folders, recipe=recipe), recipe, "cuda"))
        del model
        cupy.get_default_memory_pool().free_all_blocks()
    options.work.mkdir(parents=True, exist_ok=True)
    if "bytes" in wanted:
        bench_bytes(table, input_folders, options.work)
    if "job" in wanted:
        bench_job(table, input_folders, options.work, options.sink, rate, options.samples)
    if options.out:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        head = f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}"
        head += f"\n\n    python bench/bench_depth.py {' '.join(sys.argv[1:])}"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "depth.md").write_text(table.markdown(head))


if __name__ == "__main__":
    main()
