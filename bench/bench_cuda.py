"""The CUDA engine on one card: rates in its memory, the main job end to end, and rivals, in one run.

    python bench/bench_cuda.py --input DIR [--only render,encode,job,scale,rivals] [--out FOLDER]

Rates are device events around many launches over rotating inputs larger than the L2 cache, after warm-up; the
bandwidth that they are compared with is measured here too. Bytes are compared with Pillow's in the same run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from pillow_recipe import PillowRecipe

from gpufgbg import Compositor, JpegEncoder, Recipe, prepare
from gpufgbg.sample_assets import write_sample_assets


class Table:
    """Rows of (what, figure, remark), printed as they come."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, what: str, figure: str, remark: str = "") -> None:
        self.rows.append((what, figure, remark))
        print(f"{what:<70} {figure:>22}  {remark}", flush=True)

    def markdown(self, head: str) -> str:
        lines = [head, "", "| what | figure | remark |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {a} | {b} | {c} |" for a, b, c in self.rows)]) + "\n"


def seconds_a_call(function, repeats: int) -> float:
    """Median seconds of a call, from device events around each, after three warm-up calls."""
    import cupy

    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return float(np.median(times))


def bench_render(table: Table, compositor: Compositor, pillow: PillowRecipe) -> None:
    import cupy

    count = 8000
    composites, masks = compositor.backend.frames(count)
    both = cupy.empty(composites.nbytes + masks.nbytes, np.uint8)
    fill = both.nbytes / seconds_a_call(lambda: cupy.cuda.runtime.memset(both.data.ptr, 7, both.nbytes), 20)
    half = both.nbytes // 2
    copy = (
        2
        * half
        / seconds_a_call(lambda: cupy.cuda.runtime.memcpyAsync(both.data.ptr, both.data.ptr + half, half, 3, 0), 20)
    )
    table.add("device memory: fill, bytes written", f"{fill / 1e12:.2f} TB/s")
    table.add("device memory: copy, bytes read + written", f"{copy / 1e12:.2f} TB/s")
    starts = [k * 37_000 % (len(compositor) - count) for k in range(5)]
    plans = [compositor.plan.placements(np.arange(start, start + count)) for start in starts]
    turn = iter(range(10**9))
    took = seconds_a_call(lambda: compositor.backend.render(plans[next(turn) % 5], composites, masks), 30)
    written = composites.nbytes + masks.nbytes
    table.add(
        "render: composite + mask pairs, 224x224, batch 8,000",
        f"{count / took / 1e6:.2f} M pairs/s",
        f"{written / took / 1e12:.2f} TB/s written, {100 * written / took / fill:.0f} % of the fill rate",
    )
    batch = compositor.render(plans[0].index[::40])
    for n, (composite, mask) in enumerate(pillow.render(batch.labels)):
        assert (np.asarray(composite) == batch.image[n].get()).all() and (
            np.asarray(mask) == batch.mask[n].get()
        ).all()
    table.add("render: samples of this run equal to Pillow's", f"{len(batch.labels)} of {len(batch.labels)}")


def bench_encode(table: Table, compositor: Compositor, pillow: PillowRecipe) -> None:
    import cupy

    count = 2000
    batches = []
    for k in range(4):
        start = k * 97_000 % (len(compositor) - count)
        batches.append(compositor.render(np.arange(start, start + count)))
    encoder = JpegEncoder(65, "420", True, "cuda")
    for what, pictures in (
        ("RGB 4:2:0", [b.image for b in batches]),
        ("grey masks", [b.mask for b in batches]),
    ):
        turn = iter(range(10**9))
        took = seconds_a_call(lambda p=pictures, t=turn: encoder.encode(p[next(t) % 4]), 20)
        size = float(np.mean([int(encoder.encode(p).offsets[-1]) / count for p in pictures]))
        table.add(
            f"encode: {what}, 224x224, quality 65, optimal tables, batch {count:,}",
            f"{count / took / 1e6:.3f} M images/s",
            f"{size:,.0f} bytes a file",
        )
    batch = compositor.render(batches[0].labels.index[::20])
    composites, masks = list(encoder.encode(batch.image)), list(encoder.encode(batch.mask))
    assert list(zip(composites, masks, strict=True)) == list(pillow.encode(batch.labels))
    table.add("encode: files of this run equal to Pillow's", f"{2 * len(batch.labels)} of {2 * len(batch.labels)}")
    nvimgcodec(table, batches[0].image, batches[0].mask)
    cupy.get_default_memory_pool().free_all_blocks()


def nvimgcodec(table: Table, composites, masks) -> None:
    """NVIDIA's own encoder on the same pictures, where its package is installed."""
    import cupy

    try:
        from nvidia import nvimgcodec as codec
    except ImportError:
        table.add("rival: nvImageCodec", "absent", "nvidia-nvimgcodec is not installed")
        return
    encoder = codec.Encoder()
    colour = {"chroma_subsampling": codec.ChromaSubsampling.CSS_420}
    grey = {"chroma_subsampling": codec.ChromaSubsampling.CSS_GRAY, "color_spec": codec.ColorSpec.GRAY}
    for what, pictures, options in (("RGB 4:2:0", composites, colour), ("grey masks", masks[..., None], grey)):
        parameters = codec.EncodeParams(
            quality_type=codec.QualityType.QUALITY,
            quality_value=65,
            jpeg_encode_params=codec.JpegEncodeParams(optimized_huffman=True),
            **options,
        )
        images = codec.as_images(list(cupy.ascontiguousarray(pictures[:2000])))
        encoder.encode(images[:50], "jpeg", params=parameters)
        start = time.perf_counter()
        files = encoder.encode(images, "jpeg", params=parameters)
        took = time.perf_counter() - start
        made = sum(file is not None for file in files)
        table.add(
            f"rival: nvImageCodec encode, {what}", f"{made / took:,.0f} images/s", f"{made} of {len(images)} made"
        )


def _pillow_worker(part: tuple[dict, int, int]) -> float:
    folders, start, stop = part
    recipe = Recipe()
    assets = prepare(*folders.values(), recipe)
    pillow = PillowRecipe(assets)
    from gpufgbg import Plan

    plan = Plan(recipe, assets.n_backgrounds, assets.widths, assets.heights)
    begun = time.perf_counter()
    count = sum(1 for _ in pillow.encode(plan.placements(np.arange(start, stop))))
    return count / (time.perf_counter() - begun)


def bench_pillow(table: Table, folders: dict) -> None:
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        rates = pool.map(_pillow_worker, [(folders, k * 4000, k * 4000 + 2500) for k in range(cores)], chunksize=1)
    table.add(f"rival: the Pillow recipe, bytes to memory, {cores} processes", f"{sum(rates):,.0f} pairs/s")


def generated(folders: dict, out: Path, *more: str) -> dict:
    """A whole ``gpufgbg generate`` process: wall seconds from its start to its end, its own report, peak memory."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    given = [f"--{name}={path}" for name, path in folders.items() if path]
    command = [sys.executable, "-m", "gpufgbg", "generate", *given, f"--out={out}", "--device=cuda", "--json", *more]
    start = time.perf_counter()
    found = subprocess.run(command, capture_output=True, text=True)
    took = time.perf_counter() - start
    if found.returncode:
        raise SystemExit(found.stderr[-3000:])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {**json.loads(found.stdout), "wall": took, "peak_mb": peak}


def bench_job(table: Table, folders: dict, work: Path, repeats: int) -> None:
    for sink in ("tree", "tar"):
        for number in range(repeats):
            report = generated(folders, work / sink, f"--sink={sink}")
            total = sum(report["bytes"].values())
            table.add(
                f"main job: {report['samples']:,} pairs to {sink}, process start to last fsync, run {number + 1}",
                f"{report['wall']:.2f} s",
                f"{report['samples'] / report['wall']:,.0f} pairs/s, {total / 1e9:.2f} GB, inside generate() "
                f"{report['seconds']:.2f} s",
            )
        for phase, seconds in report["timeline"].items():
            table.add(f"main job to {sink}, last run: {phase}", f"{seconds:.2f} s")
        start = report["wall"] - report["seconds"]
        table.add(f"main job to {sink}, last run: Python's start, imports, exit", f"{start:.2f} s")


def bench_scale(table: Table, folders: dict, work: Path, counts: list[int]) -> None:
    for count in counts:
        per_pair = max(20, -(-count // (2 * 99 * 99)))
        report = generated(folders, work / "scale", "--sink=tar", f"--per-pair={per_pair}", f"--samples=0:{count}")
        table.add(
            f"cost: {count:,} samples to tar",
            f"{report['wall']:.2f} s",
            f"peak host memory {report['peak_mb']:.0f} MB",
        )
        shutil.rmtree(work / "scale", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="folder with bg/, fg/, fg_mask/ (default: built-in sample assets)")
    parser.add_argument("--only", default="render,encode,pillow,job,scale")
    parser.add_argument("--counts", default="10000,100000,392040,1000000")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench"))
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    options = parser.parse_args()
    only = options.only.split(",")
    options.work.mkdir(parents=True, exist_ok=True)
    if options.input:
        names = {"backgrounds": "bg", "foregrounds": "fg", "masks": "fg_mask"}
        folders = {name: options.input / folder for name, folder in names.items()}
    else:
        backgrounds, foregrounds = write_sample_assets(options.work / "assets")
        folders = {"backgrounds": backgrounds, "foregrounds": foregrounds, "masks": None}
    table = Table()
    if {"render", "encode"} & set(only):
        import cupy

        recipe = Recipe()
        assets = prepare(*folders.values(), recipe)
        compositor, pillow = Compositor(assets, recipe, "cuda"), PillowRecipe(assets)
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        table.add("device", name, f"Python {platform.python_version()}, CuPy {cupy.__version__}")
        if "render" in only:
            bench_render(table, compositor, pillow)
        if "encode" in only:
            bench_encode(table, compositor, pillow)
        del compositor
        cupy.get_default_memory_pool().free_all_blocks()
    if "pillow" in only:
        bench_pillow(table, folders)
    if "job" in only:
        bench_job(table, folders, options.work, options.repeats)
    if "scale" in only:
        bench_scale(table, folders, options.work, [int(v) for v in options.counts.split(",")])
    if options.out:
        command = f"`python bench/bench_cuda.py {' '.join(sys.argv[1:])}`, {date.today()}"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table.markdown(command))


if __name__ == "__main__":
    main()
