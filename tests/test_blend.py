"""The 8-bit blend: the kernels' header and the CPU backend against Pillow, over all 256 x 256 x 256 inputs."""

from __future__ import annotations

import ctypes

import host_build
import numpy as np
import pytest
from PIL import Image

from gpufgbg import Assets, Compositor, Recipe

ROWS, COLUMNS = np.mgrid[:256, :256].astype(np.uint8)  # rows by background, columns by foreground


def by_pillow(alpha: int) -> np.ndarray:
    frame = Image.fromarray(ROWS)
    frame.paste(Image.fromarray(COLUMNS), (0, 0), Image.new("L", (256, 256), alpha))
    return np.asarray(frame)


def masks_by_pillow() -> np.ndarray:
    mask = Image.fromarray(COLUMNS[:1])
    frame = Image.new("L", (256, 1))
    frame.paste(mask, (0, 0), mask)
    return np.asarray(frame)[0]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_build.load("arithmetic", tmp_path_factory.mktemp("host"))


def test_header_equals_pillow_on_all_inputs(host):
    out = np.zeros((256, 256), np.uint8)
    for alpha in range(256):
        host.blend_all(alpha, out.ctypes.data_as(ctypes.c_void_p))
        np.testing.assert_array_equal(out, by_pillow(alpha), err_msg=f"alpha {alpha}")


def test_header_equals_pillow_on_all_masks(host):
    out = np.zeros(256, np.uint8)
    host.blend_mask_all(out.ctypes.data_as(ctypes.c_void_p))
    np.testing.assert_array_equal(out, masks_by_pillow())


def test_cpu_backend_equals_pillow_on_all_inputs():
    recipe = Recipe(size=256, foreground_height=256, flip="never", per_pair=1)
    frame = np.dstack([ROWS, ROWS, ROWS])[None]
    for block in range(0, 256, 32):
        alphas = range(block, block + 32)
        cutouts = [np.dstack([COLUMNS, COLUMNS, COLUMNS, np.full_like(ROWS, alpha)]) for alpha in alphas]
        masks = [COLUMNS] * len(cutouts)
        batch = Compositor(Assets.from_arrays(frame, cutouts, masks), recipe, "cpu").render(range(len(cutouts)))
        for alpha, image, mask in zip(alphas, batch.image, batch.mask, strict=True):
            expected = by_pillow(alpha)
            for channel in range(3):
                np.testing.assert_array_equal(image[..., channel], expected, err_msg=f"alpha {alpha}")
            np.testing.assert_array_equal(mask, np.tile(masks_by_pillow(), (256, 1)))
