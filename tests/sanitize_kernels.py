"""Every kernel once over small inputs, for compute-sanitizer; checks the results too. Not a test module itself.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize_kernels.py
    (and likewise racecheck, initcheck, synccheck)

CuPy's pool is switched off, so that every array has its own allocation and nothing looks initialised that is not.
"""

from __future__ import annotations

import itertools
import sys

import cupy
import numpy as np
from conftest import smooth
from test_cuda import made

from gpufgbg import Compositor, JpegEncoder, Moments, Recipe
from gpufgbg.backends import cuda
from gpufgbg.depth.processing import postprocess, preprocess
from gpufgbg.normalise import DTYPES, LAYOUTS, normalise


def check_depth(rng: np.random.Generator) -> None:
    """Pre- and post-processing, with values that are no numbers, of several sizes."""
    for height, width in ((224, 224), (33, 61), (1, 1)):
        images = rng.integers(0, 256, (3, height, width, 3), dtype=np.uint8)
        for size, (layout, channels), dtype in itertools.product(
            ((2 * height, 2 * width), (47, 35)), (("NCHW", 3), ("NHWC", 3), ("NHWC", 8)), ("float32", "float16")
        ):
            given = {"layout": layout, "channels": channels, "dtype": dtype, "scale": 0.5, "bias": (0.1, 0.2, -3.0)}
            expected, found = (preprocess(a, size, **given) for a in (images, cupy.asarray(images)))
            assert (found.get() == expected).all(), (height, width, size, layout, channels, dtype)
        for dtype, size, metres in itertools.product(
            ("float32", "float16"), ((height, width), (2 * height, 2 * width), (47, 35)), (False, True)
        ):
            prediction = (1 + 200 * rng.random((3, height, width))).astype(dtype)
            prediction[1], prediction[2, 0, 0] = 7, np.nan
            given = {"meaning": "inverse", "scale": 10.0, "metres": metres}
            expected, found = (postprocess(a, size, **given) for a in (prediction, cupy.asarray(prediction)))
            for name in ("grey", "range", "faults", *(["metres"] if metres else [])):
                pair = getattr(found, name).get(), getattr(expected, name)
                assert np.array_equal(*pair, equal_nan=name in ("range", "metres")), (name, dtype, size)


def main() -> int:
    cupy.cuda.set_allocator(None)
    for width, height in ((224, 224), (64, 48), (61, 47), (1, 1)):
        assets, recipe = made(width, height), Recipe(size=(width, height), foreground_height=1, per_pair=2, seed=5)
        cpu, gpu = (Compositor(assets, recipe, device) for device in ("cpu", "cuda"))
        for indices in (np.arange(min(20, len(cpu))), np.array([7, 3, 3])):
            expected, found = cpu.render(indices), gpu.render(indices)
            assert (found.image.get() == expected.image).all() and (found.mask.get() == expected.mask).all()
            assert found.moments == expected.moments
    rng = np.random.default_rng(0)
    for width, height in ((224, 224), (67, 45), (300, 33), (1, 1)):
        # Rows end at 4 bytes: the encoder reads whole words that hold at least one of their own bytes.
        batch = np.stack([smooth(rng, width, height + 6, 3)[:height] for _ in range(4)])
        batch[1] = rng.integers(0, 256, batch[1].shape)
        for subsampling in ("444", "422", "420", "grey"):
            for quality, optimize in ((65, True), (95, False)):
                given = np.ascontiguousarray(batch[..., 0]) if subsampling == "grey" else batch
                form = "HW" if subsampling == "grey" else "HWC"
                mode = "420" if subsampling == "grey" else subsampling
                cpu, gpu = (JpegEncoder(quality, mode, optimize, device) for device in ("cpu", "cuda"))
                case = width, height, subsampling, quality
                assert list(gpu.encode(given, form)) == list(cpu.encode(given, form)), case
                assert (gpu.reconstruct(given, form).get() == cpu.reconstruct(given, form)).all(), case
        for dtype, layout in itertools.product(DTYPES, LAYOUTS):
            expected, found = (
                normalise(a, 0.4, 0.3, dtype=dtype, layout=layout) for a in (batch, cupy.asarray(batch))
            )
            assert (found.get() == expected).all(), (width, height, dtype, layout)
        assert cuda.moments(batch) == Moments.of(batch)
        assert cuda.moments(np.ascontiguousarray(batch[..., 0])) == Moments.of(batch[..., 0])
    check_depth(rng)
    print("all kernels ran, results equal the CPU's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
