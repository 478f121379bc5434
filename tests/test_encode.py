"""The CPU backend's JPEG files equal Pillow's, byte for byte, and so do the pixels it gets back from them."""

from __future__ import annotations

import io

import numpy as np
import oracle
import pytest
from conftest import smooth
from PIL import Image

from gpufgbg import InputError, JpegEncoder
from gpufgbg.backends.cpu import encode_jpeg, reconstruct_jpeg


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
                (seen,) = reconstruct_jpeg(pixels[None], quality, subsampling)
                np.testing.assert_array_equal(seen, Image.open(io.BytesIO(found)), err_msg=str(quality))


@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_all_remainders_of_the_block_size(subsampling):
    rng = np.random.default_rng(1)
    sizes = [(w, 1 + w * 7 % 19) for w in range(1, 35)] + [(1, 1), (16, 16), (15, 17)]
    for width, height in sizes:
        pixels = smooth(rng, width, height + 6, 3)[:height]
        (found,) = encode_jpeg(np.ascontiguousarray(pixels)[None], 65, subsampling, True)
        assert found == oracle.jpeg(Image.fromarray(pixels), 65, subsampling), (width, height)
        (seen,) = reconstruct_jpeg(np.ascontiguousarray(pixels)[None], 65, subsampling)
        np.testing.assert_array_equal(seen, Image.open(io.BytesIO(found)), err_msg=f"{width}x{height}")


def test_the_encoder_reconstructs_a_batch_and_leaves_it_alone(pictures):
    encoder = JpegEncoder(30, "422", True, "cpu")
    batch = np.stack([pictures[0], pictures[0][::-1]])
    before = batch.copy()
    for given in (batch, batch[..., 1], batch[:, ::2, ::3], batch[:0], batch[:0, ..., 0]):
        found = encoder.reconstruct(given)
        assert found.shape == given.shape and found.dtype == np.uint8
        files = encoder.encode(given)
        for seen, file in zip(found, files, strict=True):
            np.testing.assert_array_equal(seen, Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(batch, before)


@pytest.mark.parametrize("given", [np.zeros((2, 8, 8, 4), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((1, 8, 8))])
def test_the_encoder_refuses_what_is_no_batch_of_pictures(given):
    encoder = JpegEncoder(device="cpu")
    for call in (encoder.encode, encoder.reconstruct):
        with pytest.raises(InputError, match=r"images: got .*, expected uint8 \(N, H, W, 3\) or \(N, H, W\)"):
            call(given)
