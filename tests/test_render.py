"""Rendered batches equal Pillow's, whatever the batch, the order, the threads and the sizes."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from conftest import cutout, smooth
from PIL import Image

from gpufgbg import (
    Assets,
    Compositor,
    DeviceError,
    InputError,
    JpegEncoder,
    Moments,
    OptionError,
    Recipe,
    add_depth,
    generate,
)
from gpufgbg.backends import cpu
from gpufgbg.report import preview
from gpufgbg.verify import verify

RECIPE = Recipe(size=(61, 47), foreground_height=20, per_pair=3)


@pytest.fixture(scope="module")
def assets() -> Assets:
    rng = np.random.default_rng(3)
    sizes = [(1, 1), (61, 47), (30, 20), (7, 47), (61, 3), (33, 21)]
    cutouts = [cutout(rng, *size) for size in sizes]
    cutouts.append(rng.integers(0, 256, (20, 25, 4), dtype=np.uint8))  # noise in colour and alpha
    hollow = rng.integers(0, 256, (9, 40, 4), dtype=np.uint8)
    hollow[:, :13, 3] = hollow[4, :, 3] = 0  # columns and a row of nothing
    cutouts.append(hollow)
    masks = [c[..., 3] if i % 2 else rng.integers(0, 256, c.shape[:2], dtype=np.uint8) for i, c in enumerate(cutouts)]
    return Assets.from_arrays(np.stack([smooth(rng, 61, 47, 3) for _ in range(4)]), cutouts, masks)


def expected(assets: Assets, batch) -> tuple[np.ndarray, np.ndarray]:
    p, images, masks = batch.labels, [], []
    for n in range(len(p)):
        composite, mask = oracle.paste(
            Image.fromarray(assets.backgrounds[p.background[n]]),
            Image.fromarray(assets.foreground(p.foreground[n])),
            Image.fromarray(assets.mask(p.foreground[n])),
            bool(p.flip[n]),
            (int(p.x[n]), int(p.y[n])),
        )
        images.append(np.asarray(composite))
        masks.append(np.asarray(mask))
    return np.stack(images), np.stack(masks)


@pytest.fixture(params=["tables kept", "tables for each chunk"])
def compositor(request, assets, monkeypatch) -> Compositor:
    if request.param != "tables kept":
        monkeypatch.setattr(cpu, "_TABLE_BYTES", 0)
    return Compositor(assets, RECIPE, "cpu", workers=2)


@pytest.mark.parametrize("flip", ["both", "never", "always"])
def test_every_sample_equals_pillow(compositor, assets, flip):
    recipe = Recipe(size=(61, 47), foreground_height=20, per_pair=3, flip=flip, seed=9)
    batch = Compositor(assets, recipe, "cpu").render(range(len(Compositor(assets, recipe))))
    images, masks = expected(assets, batch)
    np.testing.assert_array_equal(batch.image, images)
    np.testing.assert_array_equal(batch.mask, masks)
    assert batch.image.dtype == batch.mask.dtype == np.uint8


def test_every_table_mode_equals_pillow(compositor, assets):
    batch = compositor.render(range(len(compositor)))
    images, masks = expected(assets, batch)
    np.testing.assert_array_equal(batch.image, images)
    np.testing.assert_array_equal(batch.mask, masks)


@pytest.mark.parametrize("size", [1, 7, 256])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_threads_and_order_do_not_matter(assets, compositor, size, workers):
    whole = compositor.render(range(len(compositor)))
    other = Compositor(assets, RECIPE, "cpu", workers=workers)
    order = np.random.default_rng(size).permutation(len(compositor))
    for indices in (np.arange(len(compositor)), order):
        for start in range(0, len(indices), size):
            part = other.render(indices[start : start + size])
            np.testing.assert_array_equal(part.image, whole.image[indices[start : start + size]])
            np.testing.assert_array_equal(part.mask, whole.mask[indices[start : start + size]])


def test_reused_frames_hold_the_same_pictures(compositor):
    whole = compositor.render(range(len(compositor)))
    order = np.concatenate([np.arange(len(compositor)), np.random.default_rng(1).permutation(len(compositor))])
    for start in range(0, len(order), 5):
        part = order[start : start + 5]
        images, masks, moments = compositor.backend.render_reusing(compositor.plan.placements(part), 5)
        np.testing.assert_array_equal(images, whole.image[part])
        np.testing.assert_array_equal(masks, whole.mask[part])
        assert moments["composite"] == Moments.of(whole.image[part])


def test_moments_of_a_batch_are_those_of_its_pixels(compositor):
    batch = compositor.render(np.random.default_rng(4).integers(0, len(compositor), 150))
    assert batch.moments == {"composite": Moments.of(batch.image), "composite_mask": Moments.of(batch.mask)}


def test_tall_foregrounds_are_counted_exactly():
    rng = np.random.default_rng(8)
    figure = np.full((700, 9, 4), 255, np.uint8)
    assets = Assets.from_arrays(np.zeros((1, 700, 12, 3), np.uint8), [figure, cutout(rng, 12, 600)])
    batch = Compositor(assets, Recipe(size=(12, 700), foreground_height=9), "cpu").render(range(80))
    assert batch.moments["composite"] == Moments.of(batch.image)


def test_no_sample_and_one_sample(compositor):
    assert compositor.render([]).image.shape == (0, 47, 61, 3)
    assert compositor.render([5]).mask.shape == (1, 47, 61)


def test_indices_outside_are_refused(compositor):
    with pytest.raises(OptionError, match="indices"):
        compositor.render([len(compositor)])


def test_backgrounds_of_another_size_are_refused(assets):
    with pytest.raises(InputError, match=r"backgrounds are 61x47.*frame is 224x224"):
        Compositor(assets, Recipe())


def test_numpys_integers_are_numbers_of_workers(assets, folders, tmp_path):
    recipe = Recipe(size=(61, 47), foreground_height=20)
    assert type(Compositor(assets, recipe, "cpu", np.int64(2)).workers) is int
    for wrong in (0, 1025, 2.0, True, "2", np.float64(2)):
        with pytest.raises(OptionError, match=r"workers: got .*, expected .*1 to 1024"):
            Compositor(assets, recipe, "cpu", wrong)
    counts = {"workers": np.int32(2), "batch_size": np.uint8(5)}
    small = Recipe(size=(64, 48), foreground_height=20, per_pair=1)
    assert generate(tmp_path / "out", **folders, recipe=small, device="cpu", **counts).complete
    assert verify(tmp_path / "out", rerender=np.int64(3), workers=np.int8(1)).rerendered == 3
    assert preview(tmp_path / "out", columns=np.int16(2)).is_file()
    with pytest.raises(OptionError, match="batch_size: got 0, expected 1 to 65536"):
        add_depth(tmp_path / "out", "demo", batch_size=0, device="cpu")


def test_a_device_that_is_not_there_is_told_in_words_for_python_and_the_command_line_alike(assets):
    for call in (lambda: Compositor(assets, RECIPE, "cuda:99"), lambda: JpegEncoder(device="cuda:99")):
        with pytest.raises(DeviceError, match=r"^device cuda:99: .*; or use device cpu$"):
            call()
