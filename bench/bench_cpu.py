"""The CPU path against the original's Pillow loop, as ratios measured in one run.

    python bench/bench_cpu.py [--input DIR] [--rounds N] [--out FILE]

Each round measures every row once, in turn; a row's figure is the median over the rounds of the ratio within a
round, so that it holds on a machine whose speed drifts. Outputs are compared with Pillow's in the same run. Peak
memory is the operating system's own figure for a whole ``gpufgbg generate`` process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
from pillow_recipe import PillowRecipe

from gpufgbg import Compositor, Recipe, prepare
from gpufgbg.cpu_pipeline import BATCH
from gpufgbg.sample_assets import write_sample_assets

ENCODED, RENDERED = 600, 4000  # samples a round


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def consume(iterator) -> None:
    deque(iterator, maxlen=0)


def render(compositor: Compositor, placements, workers: int) -> None:
    def part(start: int) -> None:
        compositor.backend.render_reusing(placements[start : start + BATCH], BATCH)

    each(part, range(0, len(placements), BATCH), workers)


def encode(compositor: Compositor, placements, workers: int) -> None:
    backend = compositor.backend

    def part(start: int) -> None:
        images, masks, _ = backend.render_reusing(placements[start : start + BATCH], BATCH)
        backend.encode(images)
        backend.encode(masks)

    each(part, range(0, len(placements), BATCH), workers)


def each(function, items, workers: int) -> None:
    if workers == 1:
        for item in items:
            function(item)
    else:
        consume(pools[workers].map(function, items))


pools = {2: ThreadPoolExecutor(2)}


def check(compositor: Compositor, pillow: PillowRecipe, placements) -> None:
    """Our pictures and bytes are Pillow's, on samples of this very run."""
    some = placements[:: max(1, len(placements) // 50)]
    batch = compositor.render(some.index)
    for n, (composite, mask) in enumerate(pillow.render(some)):
        assert (np.asarray(composite) == batch.image[n]).all() and (np.asarray(mask) == batch.mask[n]).all()
    ours = zip(
        compositor.backend.encode(batch.image),
        compositor.backend.encode(batch.mask),
        strict=True,
    )
    assert list(ours) == list(pillow.encode(some))


def generated(folders: dict[str, Path | None], out: Path, samples: str, *more: str) -> tuple[float, float]:
    """(samples a second of a whole process, its peak memory in MB)."""
    given = [f"--{name}={path}" for name, path in folders.items() if path]
    command = [sys.executable, "-m", "gpufgbg", "generate", *given, f"--out={out}", f"--samples={samples}", "--json"]
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)"
    code += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code, *command, *more], capture_output=True, text=True, check=True)
    took = time.perf_counter() - start
    first, last = (int(end) for end in samples.split(":"))
    return (last - first) / took, int(found.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input", type=Path, help="folder with bg/, fg/, fg_mask/ (default: the built-in sample assets)"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=20_000, help="samples of the runs of a whole process")
    parser.add_argument("--memory", default="1000,392040", help="numbers of samples whose peak memory is measured")
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if options.input:
            folders = {"backgrounds": options.input / "bg", "foregrounds": options.input / "fg"}
            folders["masks"] = options.input / "fg_mask"
        else:
            folders = dict(zip(("backgrounds", "foregrounds"), write_sample_assets(work), strict=True))
            folders["masks"] = None
        recipe = Recipe()
        assets = prepare(*folders.values(), recipe)
        compositor, pillow = Compositor(assets, recipe, "cpu", workers=2), PillowRecipe(assets)
        check(compositor, pillow, compositor.plan.placements(np.arange(0, len(compositor), 97)[:2000]))
        rows: dict[str, list[float]] = {}
        for number in range(options.rounds + 1):
            first = number * 4200 % (len(compositor) - RENDERED)
            rendered = compositor.plan.placements(np.arange(first, first + RENDERED))
            encoded = rendered[:ENCODED]
            took = {
                "pillow": seconds(consume, pillow.encode(encoded)),
                "ours 1": seconds(encode, compositor, encoded, 1),
                "ours 2": seconds(encode, compositor, encoded, 2),
                "pillow render": seconds(consume, pillow.render(rendered)),
                "pillow render, flipped ahead": seconds(consume, pillow.render(rendered, True)),
                "render 1": seconds(render, compositor, rendered, 1),
                "render 2": seconds(render, compositor, rendered, 2),
            }
            if number == 0:
                continue  # warm-up
            ratios = {
                "composite + mask to JPEG in memory, 1 thread": took["pillow"] / took["ours 1"],
                "composite + mask to JPEG in memory, 2 workers": took["pillow"] / took["ours 2"],
                "render alone, 1 thread": took["pillow render"] / took["render 1"],
                "render alone, 2 threads": took["pillow render"] / took["render 2"],
                "render alone, 1 thread, Pillow flips ahead": took["pillow render, flipped ahead"] / took["render 1"],
            }
            for name, ratio in ratios.items():
                rows.setdefault(name, []).append(ratio)
        # A whole process, from its start to the last fsync, beside the loop that keeps its bytes in memory
        count = min(len(compositor), options.samples)
        for number in range(3):
            for sink in ("tar", "tree"):
                rate, _ = generated(folders, work / f"{sink}{number}", f"0:{count}", "--workers=2", f"--sink={sink}")
                placements = compositor.plan.placements(np.arange(2000))
                loop = 2000 / seconds(consume, pillow.encode(placements))
                name = f"`generate --sink {sink}`, {count:,} samples, 2 workers, whole process with start and fsync"
                rows.setdefault(name, []).append(rate / loop)
        lines = [
            f"`python bench/bench_cpu.py {' '.join(sys.argv[1:])}`, {date.today()}, "
            f"{len(os.sched_getaffinity(0))} cores, median of {options.rounds} rounds (min to max)",
            "",
            "| gpufgbg against the original's Pillow loop (one process) | times as fast |",
            "|---|---|",
        ]
        for name, ratios in rows.items():
            lines.append(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
        lines += ["", "| samples | peak memory of `gpufgbg generate --sink tar --workers 2` |", "|---|---|"]
        for count in map(int, options.memory.split(",")):
            per_pair = max(20, -(-count // (2 * assets.n_backgrounds * assets.n_foregrounds)))
            more = ("--workers=2", "--sink=tar", f"--per-pair={per_pair}")
            _, peak = generated(folders, work / f"memory{count}", f"0:{count}", *more)
            lines.append(f"| {count:,} | {peak:.0f} MB |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        options.out.write_text(table)


if __name__ == "__main__":
    main()
