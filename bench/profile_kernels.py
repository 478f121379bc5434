"""Every kernel of ours once, at the batch of the main job on a card: what ``gpufgbg bench --profile`` runs under ncu.

python bench/profile_kernels.py [BACKGROUNDS FOREGROUNDS [MASKS]] [--device cuda:N] [--batch N]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

import cupy
import cupyx.profiler
import numpy as np

from gpufgbg import Compositor, JpegEncoder, Recipe, prepare
from gpufgbg.backends import cuda
from gpufgbg.benchmarks.profile import BATCH
from gpufgbg.depth.processing import postprocess, preprocess
from gpufgbg.normalise import DTYPES, LAYOUTS, normalise
from gpufgbg.sample_assets import write_sample_assets


def launch_all(compositor: Compositor, batch: int) -> None:
    """One launch of each kernel, in the order of the files in ``kernels/``."""
    backend = compositor.backend
    placements = compositor.plan.placements(np.arange(batch) * 37 % len(compositor))
    composites, masks = backend.frames(batch)
    backend.render(placements, composites, masks).get()
    backend.render_placed(placements, composites, masks).get()
    cuda.moments(composites)
    cuda.moments(masks)
    for subsampling in ("420", "422", "444"):
        encoder = JpegEncoder(65, subsampling, True, backend.name)
        encoder.encode(composites)
        encoder.reconstruct(composites)
    encoder.encode(masks)
    encoder.reconstruct(masks)
    for layout, dtype in itertools.product(("NCHW", "NHWC"), (np.float16, np.float32)):
        preprocess(composites, (448, 448), layout=layout, dtype=dtype)
    for dtype in (np.float16, np.float32):
        prediction = cupy.random.default_rng(0).uniform(15, 50, (batch, 224, 224)).astype(dtype)
        postprocess(prediction, (224, 224), meaning="inverse", scale=10.0)
    for layout, name in itertools.product(LAYOUTS, DTYPES):
        normalise(composites, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dtype=name, layout=layout)
    cupy.cuda.runtime.deviceSynchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Launch every kernel once.")
    parser.add_argument("folders", nargs="*", help="backgrounds, foregrounds, masks (default: built-in pictures)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=BATCH)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        assets = prepare(*(given.folders or write_sample_assets(temporary)), recipe=Recipe())
    with cupy.cuda.Device(int(given.device.partition(":")[2] or 0)):
        compositor = Compositor(assets, Recipe(), given.device)
        with cupyx.profiler.profile():  # ncu starts here: loading the pictures counts each of them
            launch_all(compositor, given.batch)


if __name__ == "__main__":
    main()
