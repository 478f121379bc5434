"""mean_std of arrays, folders and data sets: NumPy's and Pillow's own pixels are the judge. Cards: test_cuda.py."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from conftest import smooth
from PIL import Image

from gpufgbg import DatasetError, DeviceError, InputError, Moments, OptionError, Recipe, generate, mean_std


@pytest.mark.parametrize("shape", [(3, 17, 5), (2, 8, 9, 3), (1, 1, 1)])
def test_arrays(shape):
    batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    found = mean_std(batch)
    assert found == mean_std(batch[:, ::-1]) == Moments.of(batch)
    np.testing.assert_allclose(found.mean, (batch / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.std, (batch / 255).std(axis=(0, 1, 2)), rtol=1e-9, atol=1e-12)
    assert mean_std(batch[:1]) + mean_std(batch[1:]) == found


def test_an_array_that_speaks_dlpack_alone():
    class ByDlpack:
        def __init__(self, array):
            self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__

    batch = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    assert mean_std(ByDlpack(batch)) == Moments.of(batch)


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (0, 4, 5), (2, 0, 5, 3)])
def test_no_pixels(shape):
    assert mean_std(np.empty(shape, np.uint8)) == Moments() and mean_std(np.empty(shape, np.uint8)).mean == ()


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 5, 4, 4), np.uint8), np.zeros((2, 3, 4, 3)), np.zeros((3, 4), np.uint8), 7, None]
)
def test_other_arrays_are_refused(wrong):
    with pytest.raises(InputError, match=r"pictures: got .*expected uint8 \(N, H, W, 3\) or \(N, H, W\) or"):
        mean_std(wrong)
    with pytest.raises(
        InputError, match=r"pictures: got .* as picture 1, expected uint8 \(H, W, 3\) or \(3, H, W\) or"
    ):
        mean_std([np.zeros((5, 6), np.uint8), ["a"]])


def test_pictures_of_several_sizes_and_layouts():
    rng = np.random.default_rng(2)
    colour = [rng.integers(0, 256, (height, 9, 3), dtype=np.uint8) for height in (5, 6, 5)]
    grey = [rng.integers(0, 256, (4, width), dtype=np.uint8) for width in (7, 5)]
    expected = Moments.total(Moments.of(picture[None]) for picture in colour)
    for given in (colour, tuple(colour), [picture.transpose(2, 0, 1) for picture in colour]):
        assert mean_std(given) == expected
    assert mean_std(grey) == mean_std([picture[None] for picture in grey])
    as_rgb = [np.stack([picture] * 3, axis=-1) for picture in grey]
    assert mean_std([grey[0], *colour, grey[1]]) == mean_std(colour + as_rgb)
    batch = np.stack([colour[0], colour[2]])
    assert mean_std(batch.transpose(0, 3, 1, 2)) == mean_std(batch) == mean_std([colour[0], colour[2]])
    assert mean_std(colour[0], layout="HWC") == Moments.of(colour[0][None])
    assert mean_std(colour[0], layout="HW") == Moments.of(colour[0])
    assert mean_std([]) == mean_std([np.empty((0, 5), np.uint8)]) == Moments()


def test_a_layout_has_to_be_said_where_the_shape_has_two():
    with pytest.raises(
        InputError, match=r"got uint8 \(16, 24, 3\), which fits both \(N, H, W\) and \(H, W, C\): say which"
    ):
        mean_std(np.zeros((16, 24, 3), np.uint8))
    with pytest.raises(OptionError, match="layout: got 'NHWC', expected auto, HWC, CHW, HW"):
        mean_std(np.zeros((16, 24, 3), np.uint8), layout="NHWC")
    with pytest.raises(OptionError, match="layout: got 'HWC' with a path, expected it with arrays"):
        mean_std("photos", layout="HWC")


@pytest.fixture
def folder(tmp_path):
    """Colour pictures of three kinds and a grey one in folders, and files that are none of them."""
    rng = np.random.default_rng(1)
    made = {
        "a.jpg": smooth(rng, 40, 30, 3),
        "b/c.png": smooth(rng, 7, 9, 4),
        "b/d/e.TIFF": smooth(rng, 12, 5, 3),
        "f.png": smooth(rng, 20, 10, 1)[..., 0],
    }
    for name, pixels in made.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("dear")
    (tmp_path / "photos" / ".hidden.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [1, 3])
def test_a_folder(folder, workers):
    images = [Image.open(path) for path in folder.rglob("[a-f].*")]
    expected = Moments.total(Moments.of(np.asarray(image.convert("RGB"))[None]) for image in images)
    assert mean_std(folder, workers=workers) == mean_std(str(folder)) == expected and expected.images == 4


def test_a_folder_of_grey_pictures(folder):
    shutil.rmtree(folder / "b")
    (folder / "a.jpg").unlink()
    assert mean_std(folder) == Moments.of(np.asarray(Image.open(folder / "f.png"))[None])


def test_folders_that_can_not_be_measured(folder, tmp_path):
    (folder / "b" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "worse.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 problems.*worse\.jpg.*bad\.png"):
        mean_std(folder)
    (tmp_path / "empty").mkdir()
    for path, message in {"empty": "no pictures in it", "none": "no such folder", "": "no such folder"}.items():
        with pytest.raises(InputError, match=message):
            mean_std(tmp_path / path / "x" if not path else tmp_path / path)


@pytest.mark.parametrize("sink", ["tree", "zip", "tar"])
def test_data_sets(folders, tmp_path, sink):
    out = tmp_path / "out"
    generate(out, **folders, recipe=Recipe(size=(64, 48), foreground_height=20, per_pair=1), sink=sink, device="cpu")
    generate(
        tmp_path / "tree", **folders, recipe=Recipe(size=(64, 48), foreground_height=20, per_pair=1), device="cpu"
    )
    for kind, name in (("composite", "fg_bg"), ("composite_mask", "fg_bg_masks"), ("background", "bg")):
        assert mean_std(out, kind, device="cpu") == mean_std(tmp_path / "tree" / name)
    assert mean_std(out, "composite", workers=1).images == 24
    with pytest.raises(DatasetError, match="no pictures of kind depth in it"):
        mean_std(out, "depth")
    with pytest.raises(OptionError, match="is a data set: expected one of background, composite,"):
        mean_std(out)


def test_devices(tmp_path):
    for given in (tmp_path, np.zeros((1, 2, 2), np.uint8)):
        with pytest.raises(OptionError, match="device: got 'cuda:1' without kind"):
            mean_std(given, device="cuda:1")
        with pytest.raises(OptionError, match="device: got 'tpu', expected auto"):
            mean_std(given, device="tpu")
    with pytest.raises(DeviceError, match="device cuda:99: "):
        mean_std(tmp_path, "composite", device="cuda:99")


def test_kinds_that_are_refused(tmp_path):
    with pytest.raises(OptionError, match="kind: got 'foreground', expected one of background"):
        mean_std(tmp_path, "foreground")
    with pytest.raises(OptionError, match="kind: got 'composite' with an array"):
        mean_std(np.zeros((1, 2, 2), np.uint8), "composite")
    with pytest.raises(DatasetError, match="no such file or folder"):
        mean_std(tmp_path / "none", "composite")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
def test_what_is_no_file_is_named(folder):
    os.mkfifo(folder / "x.jpg")
    with pytest.raises(InputError, match=r"x\.jpg: neither a file nor a folder"):
        mean_std(folder)
