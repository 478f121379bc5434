"""Numba's machine code is kept where a folder for it can be written to, and made in memory elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpufgbg
from gpufgbg.compiling import compiled

# As Numba meets it where the package, and the user's home, are read-only.
READ_ONLY = """
import numba.core.caching

class ReadOnly:
    @staticmethod
    def TemporaryFile(**_):
        raise OSError(30, "Read-only file system")

numba.core.caching.tempfile = ReadOnly
"""

USE = """
import numpy as np
import gpufgbg
from gpufgbg.depth.processing import postprocess, preprocess
from gpufgbg.normalise import normalise

batch = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
print(gpufgbg.mean_std(batch).images, len(gpufgbg.JpegEncoder(device="cpu").encode(batch)))
print(normalise(batch).shape, preprocess(batch, (4, 4)).shape)
print(postprocess(np.ones((1, 4, 4), np.float32), (8, 8), meaning="metres").grey.shape)
assets = gpufgbg.Assets.from_arrays(batch, [np.full((4, 4, 4), 255, np.uint8)])
for blend in (None, lambda fg, bg, alpha, x, y: fg):
    compositor = gpufgbg.Compositor(assets, gpufgbg.Recipe(size=8, foreground_height=4), "cpu", blend=blend)
    print(compositor.render([0, 3]).image.shape)
"""

PRINTED = """\
2 2
(2, 3, 8, 8) (2, 3, 4, 4)
(1, 8, 8)
(2, 8, 8, 3)
(2, 8, 8, 3)
"""


def test_a_function_that_has_no_file_is_compiled_in_memory():
    names: dict = {}
    exec("def twice(a):\n    return a + a", names)
    assert compiled(names["twice"])(21) == 42


def test_everything_runs_where_nothing_can_be_written():
    done = subprocess.run([sys.executable, "-c", READ_ONLY + USE], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", PRINTED)


def test_one_place_asks_for_a_cache():
    package = Path(gpufgbg.__file__).parent
    asking = [path.name for path in package.rglob("*.py") if "cache=True" in path.read_text()]
    assert asking == ["compiling.py"]
