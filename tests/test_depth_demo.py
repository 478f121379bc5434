"""The demo's depth network: small, plain, and right about streets that it was not trained on."""

from __future__ import annotations

import io
from importlib import resources
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpufgbg.recipe import Recipe
from gpufgbg.sample_assets import FAR_M, draw_figure, draw_street

onnxruntime = pytest.importorskip("onnxruntime")

FILE = resources.files("gpufgbg") / "depth" / "demo.onnx"
FIGURE_M = 0.62 * 224 * 1.7 / 105  # metres: what the network is taught for a foreground of the default height


@pytest.fixture(scope="module")
def session() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(FILE.read_bytes(), options, providers=["CPUExecutionProvider"])


def composite(street: int, figure: int, x: int, y: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A saved composite as input (1, 3, 224, 224), its true depth and the figure's pixels, (224, 224) each."""
    picture, depth = draw_street(street, (224, 224))
    frame, cover = Image.fromarray(picture), Image.new("L", (224, 224))
    cutout = Image.fromarray(draw_figure(figure, Recipe.foreground_height))
    frame.paste(cutout.convert("RGB"), (x, y), cutout.getchannel("A"))
    cover.paste(cutout.getchannel("A"), (x, y))
    inside = np.asarray(cover) >= 128
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=Recipe.quality)
    pixels = np.asarray(Image.open(file), np.float32) / 255
    return pixels.transpose(2, 0, 1)[None].copy(), np.where(inside, np.float32(FIGURE_M), depth), inside


def predict(session: Any, pixels: np.ndarray) -> np.ndarray:
    """Depth in metres, (224, 224)."""
    (depth,) = session.run(None, {"image": pixels})
    return depth[0, 0].repeat(2, axis=0).repeat(2, axis=1)


def test_is_small() -> None:
    assert len(FILE.read_bytes()) < 1_000_000


def test_says_what_it_is(session: Any) -> None:
    metadata = session.get_modelmeta()
    assert metadata.custom_metadata_map["range"] == "unit"
    assert metadata.custom_metadata_map["meaning"] == "metres"
    assert "for trying the pipeline out only" in metadata.description


def test_shapes(session: Any) -> None:
    (image,), (depth,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, 224, 224])
    assert (depth.name, depth.type, depth.shape) == ("depth", "tensor(float)", ["batch", 1, 112, 112])
    (maps,) = session.run(None, {"image": np.zeros((3, 3, 224, 224), np.float32)})
    assert maps.shape == (3, 1, 112, 112)
    assert np.array_equal(maps[0], maps[2])


def test_holds_plain_operations_only() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_model_from_string(FILE.read_bytes())
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} <= {"Conv", "Relu", "Add", "Concat", "Resize", "Clip", "Exp"}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    # Folded batch norms can blow weights up: all must be ordinary numbers in half precision too.
    for tensor in model.graph.initializer:
        values = np.abs(onnx.numpy_helper.to_array(tensor))
        assert np.isfinite(values).all() and values.max() < 1000, tensor.name


@pytest.mark.parametrize("street", [0, 3])
def test_is_right_about_unseen_streets(session: Any, street: int) -> None:
    pixels, truth, inside = composite(street, figure=street, x=60, y=100)
    depth = predict(session, pixels)
    assert depth.min() >= 1.0 and depth.max() <= FAR_M + 1e-3
    close = np.maximum(depth / truth, truth / depth) < 1.25
    assert close.mean() > 0.75
    assert close[inside].mean() > 0.65


def test_puts_the_figure_before_the_sky(session: Any) -> None:
    pixels, truth, inside = composite(street=1, figure=0, x=90, y=5)
    depth = predict(session, pixels)
    assert np.median(depth[truth == FAR_M]) > 5 * np.median(depth[inside])


def test_ground_recedes(session: Any) -> None:
    pixels, _, _ = composite(street=7, figure=2, x=0, y=0)
    rows = predict(session, pixels)[140::20, 60:164].mean(axis=1)
    assert (np.diff(rows) < 0).all()
