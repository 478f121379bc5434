"""The CPU backend's JPEG files equal Pillow's, byte for byte."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from conftest import smooth
from PIL import Image

from gpufgbg.backends.cpu import encode_jpeg


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (33, 47, 3), dtype=np.uint8)
    board = np.where(np.indices((40, 40)).sum(axis=0)[..., None] % 2, 255, 0).astype(np.uint8).repeat(3, axis=2)
    flat = np.full((17, 16, 3), 200, np.uint8)
    return [smooth(rng, 64, 48, 3), noise, board, flat]


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_all_qualities(pictures, subsampling, optimize):
    for quality in range(1, 101):
        for picture in pictures:
            for pixels in (picture, np.ascontiguousarray(picture[..., 0])):
                (found,) = encode_jpeg(pixels[None], quality, subsampling, optimize)
                assert found == oracle.jpeg(Image.fromarray(pixels), quality, subsampling, optimize), quality


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_all_remainders_of_the_block_size(subsampling):
    rng = np.random.default_rng(1)
    sizes = [(w, 1 + w * 7 % 19) for w in range(1, 35)] + [(1, 1), (16, 16), (15, 17)]
    for width, height in sizes:
        pixels = smooth(rng, width, height + 6, 3)[:height]
        (found,) = encode_jpeg(np.ascontiguousarray(pixels)[None], 65, subsampling, True)
        assert found == oracle.jpeg(Image.fromarray(pixels), 65, subsampling), (width, height)
