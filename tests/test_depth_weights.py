"""Reading DenseDepth's weights: good files of every kind, and one line for each bad one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")

import keras_densedepth as keras  # noqa: E402
from keras_densedepth import Layer, decoder_layers, encoder_layers, write_h5  # noqa: E402

from gpufgbg.depth.weights import read_weights  # noqa: E402
from gpufgbg.exceptions import DeviceError, InputError  # noqa: E402

SIZES = {16: (8, 4, 2, 1), 832: (416, 208, 104, 52), 1664: (832, 416, 208, 104)}
TENSORS = 864


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The whole encoder with the narrowest decoder."""
    path = write_h5(tmp_path_factory.mktemp("weights") / "small.h5", 16)
    yield path
    path.unlink()


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that doesn't outlive the test: these files are 50 MB and more."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors under the names that `read_weights` gives them, read without it."""
    found = {}
    with h5py.File(path) as file:
        root = file.get("model_weights", file)
        for layer in [*encoder_layers(), *decoder_layers(16)]:
            for kind in layer.shapes:
                name = f"{layer.name}/{kind.removeprefix('moving_')}"
                found[name] = root[layer.name][f"{layer.name}/{kind}:0"][()]
    return found


def refused(path: Path) -> str:
    """The one line that a bad file gets, without its name."""
    with pytest.raises(InputError) as caught:
        read_weights(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert len(line) < len(str(path)) + 260
    return line.removeprefix(f"{path}: ")


# -- good files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [832, 1664])
def test_published_widths(tmp_path: Path, width: int) -> None:
    path = write_h5(tmp_path / "nyu.h5", width, seed=width)
    weights = read_weights(str(path))
    assert weights.path == path
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (weights.encoder_width, weights.decoder_widths) == (width, SIZES[width])
    assert (weights.leaky_after_conv_a, weights.leaky_slope) == (False, 0.2)
    expected = stored(path)
    assert weights.tensors.keys() == expected.keys()
    assert len(expected) == TENSORS
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights.tensors[name], tensor)
    if width == 1664:
        assert sum(tensor.size for tensor in weights.tensors.values()) == 42_816_089


def test_tensors_can_not_be_changed(small: Path) -> None:
    tensors = read_weights(small).tensors
    with pytest.raises(ValueError, match="read-only"):
        tensors["bn/gamma"][0] = 0
    with pytest.raises(TypeError):
        tensors["bn/gamma"] = np.zeros(1664, np.float32)  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "leaky"),
    [
        ({"weights_only": True}, False),
        ({"weights_only": True, "leaky_after_conv_a": True}, True),
        ({"leaky_after_conv_a": True}, True),
        ({"header_limit": 5000}, False),  # the list of layers split over several attributes
        ({"keras_version": "2.11.0"}, False),
    ],
)
def test_variants(tmp_path: Path, small: Path, options: dict, leaky: bool) -> None:
    path = write_h5(tmp_path / "it.h5", 16, **options)
    weights, expected = read_weights(path), stored(small)
    assert weights.leaky_after_conv_a is leaky
    assert all(np.array_equal(weights.tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float64", 0.0), (">f4", 0.0)])
def test_other_float_types(tmp_path: Path, small: Path, dtype: str, tolerance: float) -> None:
    weights = read_weights(write_h5(tmp_path / "it.h5", 16, dtype=dtype))
    for name, tensor in stored(small).items():
        assert weights.tensors[name].dtype == np.float32
        np.testing.assert_allclose(weights.tensors[name], tensor, rtol=tolerance, atol=tolerance / 100)


def test_groups_beside_the_network_are_ignored(tmp_path: Path, small: Path) -> None:
    path = copied(small, tmp_path)
    with h5py.File(path, "r+") as file:
        file.create_group("optimizer_weights")["Adam/iterations:0"] = 7
        root = file["model_weights"]
        names = [*root.attrs["layer_names"].tolist(), b"time_distributed_1"]
        root.attrs["layer_names"] = names
        group = root.create_group("time_distributed_1")
        group.attrs["weight_names"] = [b"time_distributed_1/kernel:0"]
        group["time_distributed_1/kernel:0"] = np.zeros(3)
    assert len(read_weights(path).tensors) == TENSORS


def test_names_as_variable_length_strings(tmp_path: Path, small: Path) -> None:
    path = copied(small, tmp_path)
    with h5py.File(path, "r+") as file:
        for group in (file["model_weights"], file["model_weights/conv2"]):
            for name in {"layer_names", "weight_names"} & group.attrs.keys():
                group.attrs[name] = [value.decode() for value in group.attrs[name]]
    assert len(read_weights(path).tensors) == TENSORS


def test_names_of_keras_3(tmp_path: Path, small: Path) -> None:
    """No slash in a layer's name, no ':0' behind a weight's, and another name for the slope."""
    layers = [*encoder_layers(), *decoder_layers(16)]
    for layer in layers:
        layer.name = layer.name.replace("/", "_")
        if layer.kind == "LeakyReLU":
            layer.config = {"negative_slope": 0.3}
    path = write_h5(tmp_path / "it.h5", layers=layers)
    with h5py.File(path, "r+") as file:
        group = file["model_weights/conv2"]
        for kind in ("kernel", "bias"):
            group.move(f"conv2/{kind}:0", f"conv2/{kind}")
        group.attrs["weight_names"] = [b"conv2/kernel", b"conv2/bias"]
    weights = read_weights(path)
    assert weights.leaky_slope == 0.3
    assert np.array_equal(weights.tensors["bn/mean"], stored(small)["bn/mean"])
    assert weights.tensors.keys() == stored(small).keys()


def test_other_ways_to_write_options(tmp_path: Path) -> None:
    """One number for both sides, float32's epsilon, and a NumPy number as Keras 2 also writes it."""
    layers = [*encoder_layers(), *decoder_layers(16)]
    for layer in layers:
        if layer.kind == "LeakyReLU":
            layer.config = {"alpha": {"type": "ndarray", "value": 0.25}}
        elif layer.kind == "BatchNormalization":
            layer.config["epsilon"] = float(np.float32(1.001e-5))
        elif isinstance(layer.config.get("strides"), list):
            layer.config["strides"] = layer.config["strides"][0]
    assert read_weights(write_h5(tmp_path / "it.h5", layers=layers)).leaky_slope == 0.25


def test_network_inside_a_model(tmp_path: Path, small: Path) -> None:
    """What multi_gpu_model leaves: one layer that is the network and holds all tensors."""
    inner = [*encoder_layers(), *decoder_layers(16)]
    path = write_h5(tmp_path / "it.h5", layers=[Layer("input_2", "InputLayer", []), Layer("model_1", "Model", [])])
    with h5py.File(small) as source, h5py.File(path, "r+") as file:
        group = file["model_weights/model_1"]
        weight_names = [f"{layer.name}/{kind}:0" for layer in inner for kind in layer.shapes]
        group.attrs["weight_names"] = [name.encode() for name in weight_names]
        for layer in inner:
            for kind in layer.shapes:
                name = f"{layer.name}/{kind}:0"
                group[name] = source["model_weights"][layer.name][name][()]
        outer = keras.config([Layer("input_2", "InputLayer", []), Layer("model_1", "Model", ["input_2"])])
        outer["config"]["layers"][1] = {"name": "model_1", **keras.config(inner), "inbound_nodes": []}
        file.attrs["model_config"] = json.dumps(outer)
    weights = read_weights(path)
    assert weights.tensors.keys() == stored(small).keys()
    assert not weights.leaky_after_conv_a


@pytest.mark.skipif(keras.PYTHON is None, reason="no tf_keras here, nor in GPUFGBG_TF_PYTHON")
def test_keras_reads_our_file_and_we_read_its(tmp_path: Path) -> None:
    ours, theirs = write_h5(tmp_path / "ours.h5", 16), tmp_path / "theirs.h5"
    script = [str(keras.PYTHON), keras.__file__, str(tmp_path / "out.npz"), "--width=16", "--count=1"]
    subprocess.run([*script, f"--weights={ours}", f"--resave={theirs}"], check=True, stderr=subprocess.DEVNULL)
    first, second = read_weights(ours), read_weights(theirs)
    assert all(np.array_equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert dataclasses.replace(first, path=second.path, sha256=second.sha256, tensors={}) == dataclasses.replace(
        second, tensors={}
    )
    predictions = np.load(tmp_path / "out.npz")["predictions"]
    assert 1 < predictions.min() < predictions.max() < 100


# -- files that are no HDF5 ----------------------------------------------------------------------------------


def archive(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return data.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("nyu.h5", b"", "the file is empty; expected DenseDepth's weights as a Keras HDF5 file (.h5)"),
        ("nyu.h5", b"hello, world\n" * 99, "no HDF5 file; expected DenseDepth's weights as a Keras HDF5 file (.h5)"),
        ("nyu.h5", b"\x89HDF", "no HDF5 file"),
        ("nyu.h5", b"\n<!DOCTYPE html><html>", "a web page or XML"),
        ("nyu.h5", b"<?xml version='1.0'?><Error>", "a web page or XML"),
        ("nyu.h5", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("nyu.h5", b"\x08\x08\x12\x07pytorch\x1a", "an ONNX model, not Keras weights: rename the file to nyu.onnx"),
        ("nyu.onnx", b"\x0a\x01xyz", "an ONNX model, not Keras weights: pass it as such"),
        ("nyu.pth", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a Python pickle, as PyTorch saves"),
        ("nyu.pt", archive("archive/data.pkl", "archive/data/0"), "a PyTorch file"),
        ("nyu.keras", archive("metadata.json", "config.json", "model.weights.h5"), "a model in Keras' newer format"),
        ("nyu.npz", archive("a.npy", "b.npy"), "a NumPy archive (.npz)"),
        ("nyu.zip", archive("nyu.h5"), "a zip archive: unpack it first"),
        ("nyu.zip", b"PK\x03\x04" + bytes(50), "a damaged zip archive"),
        ("nyu.tflite", b"\x1c\0\0\0TFL3" + bytes(20), "a TensorFlow Lite model"),
        ("nyu.safetensors", (40).to_bytes(8, "little") + b'{"a":{}}' + bytes(40), "a safetensors file"),
    ],
)
def test_no_hdf5(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert refused(path).startswith(expected)


def test_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "nyu.h5") == "no such file"
    assert refused(tmp_path).startswith("a folder, expected")
    (tmp_path / "saved_model.pb").touch()
    assert refused(tmp_path).startswith("a TensorFlow SavedModel folder, expected")


def test_name_with_a_line_break(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\\nb\.h5: no such file$"):
        read_weights(tmp_path / "a\nb.h5")


def test_without_h5py(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DeviceError, match=r"needs h5py: pip install 'gpufgbg\[depth\]'$"):
        read_weights(small)


# -- HDF5 files of something else ----------------------------------------------------------------------------


def shrunk(layers: list[Layer]) -> list[Layer]:
    """The same layers with weights of one number, for what is refused before shapes are looked at."""
    return [dataclasses.replace(layer, shapes=dict.fromkeys(layer.shapes, (1,))) for layer in layers]


def densedepth(**options: bool) -> list[Layer]:
    return shrunk([*encoder_layers(), *decoder_layers(16, **options)])


def without(layers: list[Layer], *names: str) -> list[Layer]:
    return [layer for layer in layers if layer.name not in names]


def with_layer(layers: list[Layer], after: str, *more: Layer) -> list[Layer]:
    place = [layer.name for layer in layers].index(after) + 1
    return [*layers[:place], *more, *layers[place:]]


def resnet() -> list[Layer]:
    names = [
        f"conv{stage}_block{block}_{part}_bn"
        for stage, blocks in enumerate((3, 4, 6, 3), start=2)
        for block in range(1, blocks + 1)
        for part in ((0, 1, 2, 3) if block == 1 else (1, 2, 3))
    ]
    return [dense(name) for name in names]


def dense(name: str) -> Layer:
    return Layer(name, "Dense", [], shapes={"kernel": (1, 1)})


def leaky(name: str, slope: float = 0.2) -> Layer:
    return Layer(name, "LeakyReLU", [], {"alpha": slope})


def configured(name: str, **options: Any) -> list[Layer]:
    """DenseDepth with other options of a layer, or of all of a kind."""
    return [
        dataclasses.replace(layer, config={**layer.config, **options}) if name in (layer.name, layer.kind) else layer
        for layer in densedepth()
    ]


NETWORKS: list[tuple[str, Callable[[], list[Layer]], str]] = [
    (
        "DenseNet-121",
        lambda: shrunk(list(encoder_layers((6, 12, 24, 16)))),
        "Keras weights of DenseNet-121 without DenseDepth's decoder (no layer 'up1_convA')",
    ),
    (
        "DenseNet-169",
        lambda: shrunk(list(encoder_layers())),
        "Keras weights of DenseNet-169 without DenseDepth's decoder (no layer 'up1_convA')",
    ),
    (
        "DenseDepth on DenseNet-201",
        lambda: shrunk([*encoder_layers((6, 12, 48, 32)), *decoder_layers(16, 1920)]),
        "looks like DenseDepth on DenseNet-201; only DenseDepth on DenseNet-169 can be read",
    ),
    (
        "a DenseNet of one's own",
        lambda: shrunk([*encoder_layers((2, 2, 2, 3)), *decoder_layers(16, 1920)]),
        "looks like DenseDepth on a DenseNet with blocks of 2, 2, 2, 3; only",
    ),
    ("ResNet-50", resnet, "Keras weights of ResNet-50 without DenseDepth's decoder"),
    (
        "ResNet-50 of old",
        lambda: [dense("res2a_branch2a"), dense("fc1000")],
        "Keras weights of ResNet-50 without DenseDepth's decoder",
    ),
    ("VGG", lambda: [dense("block1_conv1")], "Keras weights of VGG without DenseDepth's decoder"),
    ("MobileNet", lambda: [dense("conv_pw_1")], "Keras weights of MobileNet without DenseDepth's decoder"),
    (
        "any model",
        lambda: [dense(f"dense_{n}") for n in range(1, 6)],
        "Keras weights of a model without DenseDepth's decoder (no layer 'up1_convA'); "
        "it has 'dense_1', 'dense_2', 'dense_3' and 2 more",
    ),
    ("no weights", lambda: [leaky("a")], "no layer in it has weights; expected DenseDepth"),
    (
        "two layers less",
        lambda: without(densedepth(), "up2_convB", "conv5_block32_1_bn"),
        "not DenseDepth on DenseNet-169: it lacks 'conv5_block32_1_bn/beta', 'conv5_block32_1_bn/gamma', "
        "'conv5_block32_1_bn/mean' and 3 more",
    ),
    (
        "a block's first layer less",
        lambda: without(densedepth(), "conv4_block7_0_bn"),
        "not DenseDepth on DenseNet-169: it lacks 'conv4_block7_0_bn/beta', 'conv4_block7_0_bn/gamma', "
        "'conv4_block7_0_bn/mean' and 1 more",
    ),
    (
        "a decoder layer less",
        lambda: without(densedepth(), "up2_convB"),
        "not DenseDepth on DenseNet-169: it lacks 'up2_convB/bias', 'up2_convB/kernel'",
    ),
    (
        "a layer more",
        lambda: [*densedepth(), dense("up5_convA")],
        "not DenseDepth on DenseNet-169: it also has 'up5_convA/kernel'",
    ),
    (
        "another name",
        lambda: [*without(densedepth(), "conv3"), dense("depth")],
        "not DenseDepth on DenseNet-169: it lacks 'conv3/bias', 'conv3/kernel' and also has 'depth/kernel'",
    ),
    ("no last ReLU", lambda: without(densedepth(), "relu"), "its encoder ends without a ReLU"),
    (
        "another activation",
        lambda: with_layer(densedepth(), "up1_convA", Layer("re_lu_1", "ReLU", [])),
        "layer 're_lu_1' between 'up1_convA' and 'up1_convB' is not DenseDepth's",
    ),
    (
        "no leaky ReLU",
        lambda: without(densedepth(), *(f"leaky_re_lu_{n}" for n in range(1, 5))),
        "it lists no leaky ReLU, so the decoder's activations are unknown",
    ),
    (
        "one leaky ReLU less",
        lambda: without(densedepth(), "leaky_re_lu_4"),
        "0 leaky ReLUs between 'up4_convB' and 'conv3', expected 1",
    ),
    (
        "one leaky ReLU more",
        lambda: with_layer(densedepth(), "up2_convB", leaky("leaky_9")),
        "2 leaky ReLUs between 'up2_convB' and 'up3_convA', expected 1",
    ),
    (
        "blocks that differ",
        lambda: with_layer(densedepth(), "up2_convA", leaky("leaky_9")),
        "its decoder's blocks have different activations",
    ),
    (
        "slopes that differ",
        lambda: with_layer(without(densedepth(), "leaky_re_lu_4"), "up4_convB", leaky("leaky_9", 0.1)),
        "its decoder's blocks have different activations",
    ),
    (
        "a convolution with an activation",
        lambda: [
            dataclasses.replace(layer, config={"activation": "relu"}) if layer.name == "conv2" else layer
            for layer in densedepth()
        ],
        "layer 'conv2' has activation 'relu', expected none",
    ),
    *(
        (
            f"slope {slope!r}",
            lambda slope=slope: configured("LeakyReLU", alpha=slope),
            f"layer 'leaky_re_lu_1' has slope {slope}, expected a number from 0 to 1, 0.2 in DenseDepth",
        )
        for slope in (None, [0.2], {"value": [0.2]}, {"name": "x"}, "a", float("nan"), float("inf"), -0.1, True)
    ),
    (
        "another epsilon",
        lambda: configured("BatchNormalization", epsilon=0.001),
        "layer 'conv1/bn' has epsilon 0.001, expected 1.001e-05 as in DenseDepth",
    ),
    (
        "an epsilon that is none",
        lambda: configured("conv3_block2_0_bn", epsilon=None),
        "layer 'conv3_block2_0_bn' has epsilon None, expected 1.001e-05 as in DenseDepth",
    ),
    (
        "another stride",
        lambda: configured("conv1/conv", strides=[1, 1]),
        "layer 'conv1/conv' has strides [1, 1], expected [2, 2] as in DenseDepth",
    ),
    (
        "a decoder's stride",
        lambda: configured("up1_convA", strides=2),
        "layer 'up1_convA' has strides 2, expected [1, 1] as in DenseDepth",
    ),
    (
        "a dilated convolution",
        lambda: configured("conv5_block3_2_conv", dilation_rate=[2, 2]),
        "layer 'conv5_block3_2_conv' has dilation_rate [2, 2], expected [1, 1] as in DenseDepth",
    ),
    (
        "another padding",
        lambda: configured("conv3", padding="valid"),
        "layer 'conv3' has padding valid, expected same as in DenseDepth",
    ),
    (
        "another pool",
        lambda: configured("pool3_pool", pool_size=[4, 4]),
        "layer 'pool3_pool' has pool_size [4, 4], expected [2, 2] as in DenseDepth",
    ),
]


@pytest.mark.parametrize(("make", "expected"), [row[1:] for row in NETWORKS], ids=[row[0] for row in NETWORKS])
def test_another_network(tmp_path: Path, make: Callable[[], list[Layer]], expected: str) -> None:
    assert refused(write_h5(tmp_path / "nyu.h5", layers=make())).startswith(expected)


def test_layers_without_weights_not_listed(tmp_path: Path) -> None:
    """Then nothing tells where the activations are: it is taken for what DenseDepth's model.py builds."""
    path = write_h5(tmp_path / "nyu.h5", 16, weights_only=True)
    with h5py.File(path, "r+") as file:
        names = [name for name in file.attrs["layer_names"] if len(file[name].attrs["weight_names"])]
        file.attrs["layer_names"] = names
    weights = read_weights(path)
    assert (weights.leaky_after_conv_a, weights.leaky_slope) == (True, 0.2)


def test_hdf5_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "nyu.h5"
    with h5py.File(path, "w") as file:
        file["depth"] = np.zeros((3, 3))
    assert refused(path) == "an HDF5 file, but not one of Keras (no attribute 'layer_names')"
    with h5py.File(path, "r+") as file:
        file.create_group("layers/conv2d")
    assert refused(path).startswith("weights in Keras' newer format (.weights.h5)")


# -- damaged files and bad tensors ---------------------------------------------------------------------------


def copied(source: Path, folder: Path) -> Path:
    """A copy to spoil."""
    path = folder / "nyu.h5"
    path.write_bytes(source.read_bytes())
    return path


def replaced(name: str, values: object) -> Callable[[h5py.Group], None]:
    def spoil(root: h5py.Group) -> None:
        layer, _, kind = name.rpartition("/")
        old = root[layer][f"{layer}/{kind}:0"]
        new = values(old[()]) if callable(values) else values
        del root[layer][f"{layer}/{kind}:0"]
        root[layer].create_dataset(f"{layer}/{kind}:0", data=new)

    return spoil


def with_value(value: float, dtype: str = "float32") -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(dtype)
        values.flat[3:5] = value
        return values

    return change


SPOILT = [
    (
        replaced("conv1/conv/kernel", np.zeros((64, 3, 7, 7), np.float32)),
        "tensor 'conv1/conv/kernel' is 64x3x7x7, expected 7x7x3x64",
    ),
    (
        replaced("up2_convA/kernel", np.zeros((3, 3, 99, 4), np.float32)),
        "tensor 'up2_convA/kernel' is 3x3x99x4, expected 3x3x136x4",
    ),
    (
        replaced("up1_convA/bias", np.zeros(7, np.float32)),
        "tensor 'up1_convA/kernel' is 3x3x272x8, expected 3x3x272x7 (3 more tensors don't fit either)",
    ),
    (replaced("conv3/bias", np.float32(3)), "tensor 'conv3/bias' is a scalar, expected 1"),
    (replaced("bn/beta", lambda v: v.astype(np.int32)), "tensor 'bn/beta' has type int32, expected a float type"),
    (replaced("bn/beta", with_value(np.nan)), "tensor 'bn/beta' has 2 of 1664 values that are not finite float32"),
    (replaced("conv2/kernel", with_value(-np.inf, "float16")), "tensor 'conv2/kernel' has 2 of 26624 values that"),
    (replaced("bn/gamma", with_value(1e39, "float64")), "tensor 'bn/gamma' has 2 of 1664 values that are not finite"),
    (replaced("bn/moving_variance", with_value(-0.5)), "tensor 'bn/variance' has a variance below zero (-0.5)"),
    (
        lambda root: root["conv2"].__delitem__("conv2/bias:0"),
        "tensor 'conv2/bias:0' is missing; the file is incomplete, get it again",
    ),
    (
        replaced("conv2/bias", h5py.Empty("f4")),
        "tensor 'conv2/bias:0' is empty; the file is incomplete, get it again",
    ),
    (
        lambda root: root.__delitem__("pool3_conv"),
        "the group of layer 'pool3_conv' is missing; the file is incomplete, get it again",
    ),
]


@pytest.mark.parametrize(("spoil", "expected"), SPOILT, ids=[expected[:50] for _, expected in SPOILT])
def test_spoilt(small: Path, tmp_path: Path, spoil: Callable[[h5py.Group], None], expected: str) -> None:
    path = copied(small, tmp_path)
    with h5py.File(path, "r+") as file:
        spoil(file["model_weights"])
    assert refused(path).startswith(expected)


@pytest.mark.parametrize("kept", [100, 5000, 0.5, 0.999])
def test_truncated(small: Path, tmp_path: Path, kept: float) -> None:
    data = small.read_bytes()
    length = int(len(data) * kept) if kept < 1 else int(kept)
    path = tmp_path / "nyu.h5"
    path.write_bytes(data[:length])
    assert refused(path) == f"truncated: {length} of {len(data)} bytes are there; get the file again"


def test_damaged(small: Path, tmp_path: Path) -> None:
    path = copied(small, tmp_path)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 24)
    assert refused(path).startswith("damaged HDF5 file (")


def test_listed_name_is_printed_as_one_line(tmp_path: Path) -> None:
    line = refused(write_h5(tmp_path / "nyu.h5", layers=[dense("two\nlines"), dense("x" * 300)]))
    assert r"'two\nlines/kernel'" in line or r"'two\nlines'" in line
