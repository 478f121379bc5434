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
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
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


def seconds_a_call(function, repeats: int, together: int = 5) -> float:
    """Median seconds of a call, from device events around ``together`` calls in a row, after warm-up."""
    import cupy

    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        for _ in range(together):
            function()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3 / together)
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

    count = 4000
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


class Memory:
    """Peak of the proportional set size of a process and its children, sampled twice a second."""

    def __init__(self, root: int) -> None:
        self.root, self.peak_kb, self.stop = root, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stop.wait(0.5):
            total = 0
            for pid in self._family():
                with suppress(OSError):
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                    total += int(text.partition("Pss:")[2].split()[0])
            self.peak_kb = max(self.peak_kb, total)

    def _family(self) -> list[int]:
        found = [self.root]
        for pid in found:
            with suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found.extend(int(child) for child in (task / "children").read_text().split())
        return found


def generated(folders: dict, out: Path, *more: str, device: str = "cuda") -> dict:
    """A whole ``gpufgbg generate`` process: its report, wall seconds from start to end, memory of all of it."""
    os.sync()
    given = [f"--{name}={path}" for name, path in folders.items() if path]
    command = [
        sys.executable,
        "-m",
        "gpufgbg",
        "generate",
        *given,
        f"--out={out}",
        f"--device={device}",
        "--json",
        *more,
    ]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        memory = Memory(process.pid)
        printed, error = process.communicate()
    took = time.perf_counter() - start
    memory.stop.set()
    if process.returncode:
        raise SystemExit(error[-3000:])
    return {**json.loads(printed), "wall": took, "host_mb": memory.peak_kb / 1024}


def memory_of(report: dict) -> str:
    return f"host {report['host_mb']:,.0f} MB in all, card {report['memory']['device'] / 2**20:,.0f} MB"


def bench_job(table: Table, folders: dict, work: Path, repeats: int) -> None:
    # Every run has a folder of its own and nothing is deleted between: ext4 makes new files slowly for a while after
    # many were deleted.
    for sink in ("tree", "tar"):
        for number in range(1, repeats + 1):
            report = generated(folders, work / f"to_{sink}{number}", f"--sink={sink}")
            total = sum(report["bytes"].values())
            table.add(
                f"main job: {report['samples']:,} pairs to {sink}, process start to last fsync, run {number}",
                f"{report['wall']:.2f} s",
                f"{report['samples'] / report['wall']:,.0f} pairs/s, {total / 1e9:.2f} GB; {memory_of(report)}",
            )
            phases = {"Python's start, imports, exit": report["wall"] - report["seconds"], **report["timeline"]}
            for phase, seconds in phases.items():
                table.add(f"to {sink}, run {number}: {phase}", f"{seconds:.2f} s")
    for path in work.glob("to_*"):
        shutil.rmtree(path)


def bench_scale(table: Table, folders: dict, work: Path, counts: list[int]) -> None:
    points = []
    for count in counts:
        # At 4,000,000 samples the disk would be too small for quality 65.
        options = ["--quality=10"] if count > 1_500_000 else []
        per_pair = max(20, -(-count // (2 * 99 * 99)))
        out = work / f"scale{count}"
        report = generated(folders, out, "--sink=tar", f"--per-pair={per_pair}", f"--samples=0:{count}", *options)
        table.add(
            f"cost: {count:,} samples to tar{' at quality 10' if options else ''}",
            f"{report['wall']:.2f} s",
            f"{count / report['wall']:,.0f} pairs/s; {memory_of(report)}",
        )
        if not options:
            points.append((count, report["wall"], report["timeline"]["samples"]))
        shutil.rmtree(out)
    with suppress(ImportError):
        draw(points, work / "scale.png")


def draw(points: list[tuple[int, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    counts = [p[0] for p in points]
    axes.plot(counts, [p[1] for p in points], "o-", label="whole process")
    axes.plot(counts, [p[2] for p in points], "s--", label="samples alone")
    axes.set(xlabel="samples", ylabel="seconds", title="generate --sink tar on one card", xlim=0, ylim=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _compare(part: tuple[Path, Path, list[str]]) -> list[str]:
    """Files of a data set that differ from another's or from what Pillow makes of its assets and labels."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import oracle

    one, two, lines = part
    wrong = []
    for line in lines:
        name, x, y = line.split("\t")
        for path, data in oracle.expected_files(one, name, int(x), int(y)).items():
            if (one / path).read_bytes() != data or (two / path).read_bytes() != data:
                wrong.append(path)
    return wrong


def bench_equality(table: Table, folders: dict, work: Path) -> None:
    cores, first = len(os.sched_getaffinity(0)), 123_457
    ours, cpus = work / "slice_cuda", work / "slice_cpu"
    for out, device in ((ours, "cuda"), (cpus, "cpu")):
        generated(folders, out, f"--samples={first}:{first + 20_000}", device=device)
    lines = [line for path in sorted((ours / "labels").iterdir()) for line in path.read_text().splitlines()]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        parts = pool.map(_compare, [(ours, cpus, lines[k::cores]) for k in range(cores)])
    wrong = [path for part in parts for path in part]
    table.add("slice of 20,000 samples: files equal to Pillow's and to the CPU's", f"{2 * len(lines) - len(wrong):,}",
              f"of {2 * len(lines):,}")  # fmt: skip
    texts = [(out / "dataset.json").read_text() for out in (ours, cpus)]
    table.add("slice of 20,000 samples: dataset.json equal to the CPU's", "yes" if texts[0] == texts[1] else "NO")
    assert not wrong and texts[0] == texts[1] and len(lines) == 20_000


_FIRST = """
import time, sys
from gpufgbg import Compositor, Recipe, prepare
folders = [v or None for v in sys.argv[1:]]
compositor = Compositor(prepare(*folders), device="cuda")
batch = compositor.render(range(256))
assert int(batch.mask.max()) > 0
"""


def bench_first(table: Table, folders: dict) -> None:
    for number in (1, 2):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", _FIRST, *(str(v or "") for v in folders.values())], check=True)
        table.add(
            f"process start to first batch in the card's memory, run {number}", f"{time.perf_counter() - start:.2f} s"
        )


def device_name() -> str:
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="folder with bg/, fg/, fg_mask/ (default: built-in sample assets)")
    parser.add_argument("--only", default="render,encode,pillow,first,equality,job,scale")
    parser.add_argument("--counts", default="10000,100000,392040,1000000,4000000")
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
        table.add("device", device_name(), f"Python {platform.python_version()}, CuPy {cupy.__version__}")
        if "render" in only:
            bench_render(table, compositor, pillow)
        if "encode" in only:
            bench_encode(table, compositor, pillow)
        del compositor
        cupy.get_default_memory_pool().free_all_blocks()
    if "pillow" in only:
        bench_pillow(table, folders)
    if "first" in only:
        bench_first(table, folders)
    if "equality" in only:
        bench_equality(table, folders, options.work)
    if "job" in only:
        bench_job(table, folders, options.work, options.repeats)
    if "scale" in only:
        bench_scale(table, folders, options.work, [int(v) for v in options.counts.split(",")])
    if options.out:
        machine = f"{device_name()}, {len(os.sched_getaffinity(0))} cores, Linux {platform.release()}"
        command = f"{machine}, {date.today()}: `python bench/bench_cuda.py {' '.join(sys.argv[1:])}`"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table.markdown(command))


if __name__ == "__main__":
    main()
