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
from gpufgbg.normalise import DTYPES, LAYOUTS, normalise


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
                mode = "420" if subsampling == "grey" else subsampling
                cpu, gpu = (JpegEncoder(quality, mode, optimize, device) for device in ("cpu", "cuda"))
                assert list(gpu.encode(given)) == list(cpu.encode(given)), (width, height, subsampling, quality)
                assert (gpu.reconstruct(given).get() == cpu.reconstruct(given)).all(), (width, height, subsampling)
        for dtype, layout in itertools.product(DTYPES, LAYOUTS):
            expected, found = (
                normalise(a, 0.4, 0.3, dtype=dtype, layout=layout) for a in (batch, cupy.asarray(batch))
            )
            assert (found.get() == expected).all(), (width, height, dtype, layout)
        assert cuda.moments(batch) == Moments.of(batch)
        assert cuda.moments(np.ascontiguousarray(batch[..., 0])) == Moments.of(batch[..., 0])
    print("all kernels ran, results equal the CPU's")
    return 0


if __name__ == "__main__":
    sys.exit(main())
