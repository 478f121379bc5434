"""The original recipe as a program of its own: pictures in, a folder tree out, by Pillow; the rival of `generate`.

    python bench/pillow_job.py BACKGROUNDS FOREGROUNDS MASKS OUT SAMPLES PROCESSES      (MASKS may be empty)

It prepares the pictures as gpufgbg does, so that the files are the same, and ends with the file system's sync. It
writes no labels, no statistics and no checksums.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import numpy as np
from pillow_recipe import PillowRecipe

from gpufgbg import Placements, Plan, Recipe, prepare
from gpufgbg.files import sync_file_system
from gpufgbg.layout import Layout

KINDS = ("composite", "composite_mask")


def write(pillow: PillowRecipe, layout: Layout, placements: Placements, out: Path) -> None:
    """Make and write some samples."""
    for stem, files in zip(layout.stems(placements), pillow.encode(placements), strict=True):
        for kind, data in zip(KINDS, files, strict=True):
            (out / Layout.sample_path(kind, stem)).write_bytes(data)


def main(backgrounds: str, foregrounds: str, masks: str, out: str, samples: str, processes: str) -> None:
    recipe, root, count, workers = Recipe(), Path(out), int(samples), int(processes)
    assets = prepare(backgrounds, foregrounds, masks or None, recipe, workers)
    plan = Plan(recipe, assets.n_backgrounds, assets.widths, assets.heights)
    pillow, layout = PillowRecipe(assets), Layout.of(plan)
    placements = plan.placements(np.arange(count))
    for kind in KINDS:
        for stem in {layout.background(int(b)) for b in np.unique(placements.background)}:
            (root / Layout.sample_path(kind, f"{stem}_fg_")).parent.mkdir(parents=True)
    step = -(-count // workers)
    parts = [(pillow, layout, placements[start : start + step], root) for start in range(0, count, step)]
    if workers == 1:
        write(*parts[0])
    else:
        started = [multiprocessing.get_context("fork").Process(target=write, args=part) for part in parts]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise SystemExit("a process failed")
    sync_file_system(root)


if __name__ == "__main__":
    main(*sys.argv[1:])
