"""DenseDepth's graph: its form, and its numbers against Keras' own DenseNet-169 and decoder."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import keras_densedepth as keras
import numpy as np
import pytest

from gpufgbg import DepthModel, DepthOptions, OptionError
from gpufgbg.depth import network
from gpufgbg.depth.weights import DenseDepthWeights, read_weights

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> DenseDepthWeights:
    """The encoder as it is, a narrow decoder."""
    path = keras.write_h5(tmp_path_factory.mktemp("weights") / "narrow.h5", 16, leaky_after_conv_a=True)
    return read_weights(path)


def predicted(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"image": images})
    return output


def images(count: int, width: int, height: int) -> np.ndarray:
    return keras.pictures(count, width, height).astype(np.float32).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_graph_leaves_nothing_open(weights, precision):
    model = network.build(weights, (96, 64), 3, precision)
    onnx.checker.check_model(model, full_check=True)
    kind = onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.FLOAT
    shapes = []
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == kind
        shapes.append([dimension.dim_value for dimension in value.type.tensor_type.shape.dim])
    assert shapes == [[3, 3, 64, 96], [3, 1, 32, 48]]
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name != "x2"}
    assert types == {kind}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and {"conv1/conv", "conv5_block32_concat", "up4_convB", "conv3"} <= {*names}


def test_a_picture_does_not_depend_on_its_batch(weights):
    batch = images(3, 64, 32)
    together = predicted(network.build(weights, (64, 32), 3), batch)
    alone = predicted(network.build(weights, (64, 32), 1), batch[1:2])
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5)


@pytest.mark.parametrize("upsampling", ["half-pixel", "align-corners"])
def test_the_form_for_half_precision_computes_the_same(weights, upsampling):
    """Its graph in fp32 arithmetic; what fp16 adds is measured on a card by bench/bench_depth.py."""
    form = network._Graph(weights, "fp16", upsampling)
    form.dtype = np.dtype(np.float32)
    batch = images(1, 96, 64)
    plain = predicted(network.build(weights, (96, 64), 1, "fp32", upsampling), batch)
    np.testing.assert_allclose(predicted(form.model(1, 96, 64), batch), plain, rtol=1e-5)


@pytest.mark.parametrize("size", [(100, 96), (96, 100), (0, 32), (16, 32)])
def test_sizes_that_do_not_go(weights, size):
    with pytest.raises(OptionError, match="multiples of 32"):
        network.build(weights, size)


@pytest.mark.skipif(keras.PYTHON is None, reason="no tf_keras here, nor in GPUFGBG_TF_PYTHON")
@pytest.mark.timeout(600)
def test_keras_predicts_the_same(tmp_path):
    """For both widths and both meanings of bilinear x2, two at a time: Keras takes its time to start."""
    cases = [(tmp_path, width, upsampling) for width in (1664, 832) for upsampling in ("half-pixel", "align-corners")]
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(compare_with_keras, *zip(*cases, strict=True)))) == 4


def compare_with_keras(folder, width, upsampling):
    """Within 1e-3 everywhere, relative; the file is loaded by Keras itself."""
    path, oracle = folder / f"{width}-{upsampling}.h5", folder / f"{width}-{upsampling}.npz"
    leaky = ["--leaky-after-conv-a"] if width == 832 else []  # as model.py builds it, and as it is published
    command = [
        str(keras.PYTHON),
        keras.__file__,
        str(oracle),
        f"--width={width}",
        f"--upsampling={upsampling}",
        "--size=128x96",
    ]
    subprocess.run([*command, f"--weights={path}", *leaky], check=True, stderr=subprocess.DEVNULL)
    stored = np.load(oracle)
    found = predicted(
        network.build(read_weights(path), (128, 96), len(stored["images"]), "fp32", upsampling),
        np.ascontiguousarray(stored["images"].astype(np.float32).transpose(0, 3, 1, 2)),
    )
    np.testing.assert_allclose(found[:, 0], stored["predictions"][..., 0], rtol=1e-3)
    # and from a picture's bytes to metres
    pictures = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    options = DepthOptions(str(path), upsampling=upsampling)
    maps = DepthModel(options, (64, 48), "cpu").predict(pictures)
    assert maps.metres.shape == (2, 48, 64) and 0.1 <= maps.range.min() < maps.range.max() <= 10
