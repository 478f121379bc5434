"""Sample assets: shapes, exact repeatability, true depth, clean cut-outs, files, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gpufgbg.sample_assets import draw_figure, draw_street, write_sample_assets

Street = tuple[NDArray[np.uint8], NDArray[np.float32]]


@pytest.fixture(scope="module")
def streets() -> list[Street]:
    return [draw_street(index) for index in range(10)]


@pytest.fixture(scope="module")
def figures() -> list[NDArray[np.uint8]]:
    return [draw_figure(index) for index in range(10)]


def test_street_shapes_and_depth_range(streets: list[Street]) -> None:
    for picture, depth in streets:
        assert picture.shape == (448, 448, 3) and picture.dtype == np.uint8
        assert depth.shape == (448, 448) and depth.dtype == np.float32
        assert depth.min() >= 1.0 and depth.max() == 80.0
        assert 1.0 < depth[-1].min() < 3.0  # the near ground
        assert picture.std() > 20.0  # not a blank picture


def test_street_ground_recedes_to_the_horizon(streets: list[Street]) -> None:
    for _, depth in streets:
        # Nothing stands in the middle of the road in the lowest rows.
        ground = depth[320:, 224].astype(np.float64)
        assert (np.diff(ground) < 0).all()
        # On a plane seen in perspective 1 / depth grows by the same amount in every row.
        steps = np.diff(1.0 / ground)
        assert np.allclose(steps, steps[0], rtol=1e-3)


def test_street_facades_are_parallel_to_the_street(streets: list[Street]) -> None:
    for _, depth in streets:
        # Up the outermost columns the same facade runs, so its depth grows towards the middle.
        row = depth[100]
        assert row[0] < row[12] and row[-1] < row[-13]
        assert row.max() > 5.0 * row[0]


def test_street_depth_edges_are_edges_of_the_picture(streets: list[Street]) -> None:
    for picture, depth in streets:
        grey = picture.astype(np.float64).mean(axis=2)
        contrast = np.abs(grey[:, 2:] - grey[:, :-2])
        jump = np.abs(np.diff(np.log(depth.astype(np.float64)), axis=1))
        edges = np.maximum(jump[:, 1:], jump[:, :-1]) > 0.5
        assert contrast[edges].mean() > 3.0 * contrast[~edges].mean()


def test_streets_repeat_and_differ(streets: list[Street]) -> None:
    again = draw_street(3)
    assert np.array_equal(again[0], streets[3][0]) and np.array_equal(again[1], streets[3][1])
    more = [*streets, draw_street(10), draw_street(23)]
    assert len({picture.tobytes() for picture, _ in more}) == len(more)
    assert len({depth.tobytes() for _, depth in more}) == len(more)


@pytest.mark.parametrize("size", [(16, 16), (320, 180), (90, 200), (700, 16), (16, 700)])
def test_street_any_size(size: tuple[int, int]) -> None:
    picture, depth = draw_street(4, size)
    assert picture.shape == (size[1], size[0], 3) and depth.shape == (size[1], size[0])
    assert depth.min() >= 1.0 and depth.max() <= 80.0


def test_figures_are_clean_cutouts(figures: list[NDArray[np.uint8]]) -> None:
    for figure in figures:
        alpha = figure[..., 3]
        assert figure.dtype == np.uint8 and figure.shape[0] == 210 and figure.shape[2] == 4
        assert (alpha == 0).any() and (alpha == 255).any()
        assert ((alpha > 0) & (alpha < 255)).any()
        assert not figure[alpha == 0].any()
        assert alpha[0].any() and alpha[-1].any() and alpha[:, 0].any() and alpha[:, -1].any()


def test_figures_repeat_and_differ(figures: list[NDArray[np.uint8]]) -> None:
    for index, figure in enumerate(figures):
        assert np.array_equal(figure, draw_figure(index))
    more = [*figures, draw_figure(10), draw_figure(20), draw_figure(37)]
    assert len({figure.tobytes() for figure in more}) == len(more)


@pytest.mark.parametrize("height", [16, 105, 333])
def test_figure_height(height: int) -> None:
    for index in range(10):
        figure = draw_figure(index, height)
        assert figure.shape[0] == height
        assert 0.2 * height < figure.shape[1] < 224 / 105 * height  # fits the demo's pictures


def test_write_sample_assets(tmp_path: Path, figures: list[NDArray[np.uint8]]) -> None:
    folders = write_sample_assets(tmp_path / "new" / "assets", n_backgrounds=2, n_foregrounds=11)
    backgrounds, foregrounds = folders
    assert backgrounds == tmp_path / "new" / "assets" / "backgrounds"
    assert foregrounds == tmp_path / "new" / "assets" / "foregrounds"
    assert sorted(p.name for p in backgrounds.iterdir()) == ["street_00.jpg", "street_01.jpg"]
    assert len(list(foregrounds.iterdir())) == 11
    with Image.open(backgrounds / "street_01.jpg") as image:
        assert image.format == "JPEG" and image.size == (448, 448) and image.mode == "RGB"
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # 4:4:4
        error = np.asarray(image).astype(np.float64) - draw_street(1)[0]
        assert np.abs(error).mean() < 3.0
    for index in range(10):
        with Image.open(foregrounds / f"figure_{index:02d}.png") as image:
            assert image.mode == "RGBA" and np.array_equal(np.asarray(image), figures[index])
    assert write_sample_assets(tmp_path / "new" / "assets", 1, 1) == folders  # again: no error


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="index"):
        draw_street(-1)
    with pytest.raises(IndexError, match="index"):
        draw_figure(-1)
    with pytest.raises(ValueError, match="width"):
        draw_street(0, (15, 100))
    with pytest.raises(ValueError, match="height"):
        draw_street(0, (100, 4097))
    for height in (15, 4097):
        with pytest.raises(ValueError, match="height"):
            draw_figure(0, height)
    with pytest.raises(ValueError, match="counts"):
        write_sample_assets(tmp_path, n_foregrounds=-1)
