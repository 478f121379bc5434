"""DenseDepth in Keras: files of its format from random weights, and the network itself as oracle.

`write_h5` needs h5py alone; `build_keras` needs TensorFlow and tf_keras. Run as a script in an environment that has
them, it writes such a file, has Keras load it both from its own list of layers and into the network built by Keras'
own DenseNet-169, and saves pictures with Keras' predictions:

    python tests/keras_densedepth.py OUT.npz --width=832 --upsampling=half-pixel --size=96x64

The published files (nyu.h5, kitti.h5) have one leaky ReLU a block, behind convB; ``leaky_after_conv_a`` adds the one
behind convA that ``model.py`` of the DenseDepth repository makes (its issue #130).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np

BLOCKS = (6, 12, 32, 32)
BATCH_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
#: a Python with tf_keras
PYTHON = sys.executable if find_spec("tf_keras") else os.environ.get("GPUFGBG_TF_PYTHON")
HEADER_LIMIT = 64512  # Keras' HDF5_OBJECT_HEADER_LIMIT


@dataclass
class Layer:
    """A layer as Keras' config lists it; shapes are those of its weights, in Keras' order."""

    name: str
    kind: str
    inputs: list[str]
    config: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


# -- the layers, in Keras' order -----------------------------------------------------------------------------


def _conv(name: str, below: str, kernel: int, before: int, after: int, **options: Any) -> Layer:
    config = {
        "filters": after,
        "kernel_size": [kernel, kernel],
        "strides": [1, 1],
        "padding": "valid",
        "data_format": "channels_last",
        "dilation_rate": [1, 1],
        "activation": "linear",
        "use_bias": True,
        "kernel_initializer": {
            "class_name": "VarianceScaling",
            "config": {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None},
        },
        "bias_initializer": {"class_name": "Zeros", "config": {}},
        **dict.fromkeys(
            ("kernel_regularizer", "bias_regularizer", "activity_regularizer", "kernel_constraint", "bias_constraint")
        ),
        **options,
    }
    shapes = {"kernel": (kernel, kernel, before, after)}
    if config["use_bias"]:
        shapes["bias"] = (after,)
    return Layer(name, "Conv2D", [below], config, shapes)


def _batch_norm(name: str, below: str, channels: int) -> Layer:
    config = {
        "axis": 3,
        "momentum": 0.99,
        "epsilon": 1.001e-05,
        "center": True,
        "scale": True,
        "beta_initializer": {"class_name": "Zeros", "config": {}},
        "gamma_initializer": {"class_name": "Ones", "config": {}},
        "moving_mean_initializer": {"class_name": "Zeros", "config": {}},
        "moving_variance_initializer": {"class_name": "Ones", "config": {}},
        **dict.fromkeys(("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint")),
    }
    return Layer(name, "BatchNormalization", [below], config, dict.fromkeys(BATCH_NORM, (channels,)))


def _relu(name: str, below: str) -> Layer:
    return Layer(name, "Activation", [below], {"activation": "relu"})


def _pool(name: str, kind: str, below: str, size: int) -> Layer:
    config = {"pool_size": [size] * 2, "padding": "valid", "strides": [2, 2], "data_format": "channels_last"}
    return Layer(name, kind, [below], config)


def encoder_layers(blocks: tuple[int, ...] = BLOCKS) -> Iterator[Layer]:
    """keras.applications' DenseNet without top."""
    shape = [None, None, None, 3]
    yield Layer("input_1", "InputLayer", [], {"batch_input_shape": shape, "dtype": "float32", "sparse": False})
    padding = {"padding": [[3, 3], [3, 3]], "data_format": "channels_last"}
    yield Layer("zero_padding2d_1", "ZeroPadding2D", ["input_1"], padding)
    yield _conv("conv1/conv", "zero_padding2d_1", 7, 3, 64, strides=[2, 2], use_bias=False)
    yield _batch_norm("conv1/bn", "conv1/conv", 64)
    yield _relu("conv1/relu", "conv1/bn")
    padding = {"padding": [[1, 1], [1, 1]], "data_format": "channels_last"}
    yield Layer("zero_padding2d_2", "ZeroPadding2D", ["conv1/relu"], padding)
    yield _pool("pool1", "MaxPooling2D", "zero_padding2d_2", 3)
    x, channels = "pool1", 64
    for stage, layers in enumerate(blocks, start=2):
        for n in range(1, layers + 1):
            name = f"conv{stage}_block{n}"
            yield _batch_norm(f"{name}_0_bn", x, channels)
            yield _relu(f"{name}_0_relu", f"{name}_0_bn")
            yield _conv(f"{name}_1_conv", f"{name}_0_relu", 1, channels, 128, use_bias=False)
            yield _batch_norm(f"{name}_1_bn", f"{name}_1_conv", 128)
            yield _relu(f"{name}_1_relu", f"{name}_1_bn")
            yield _conv(f"{name}_2_conv", f"{name}_1_relu", 3, 128, 32, padding="same", use_bias=False)
            yield Layer(f"{name}_concat", "Concatenate", [x, f"{name}_2_conv"], {"axis": 3})
            x, channels = f"{name}_concat", channels + 32
        if stage < 5:
            yield _batch_norm(f"pool{stage}_bn", x, channels)
            yield _relu(f"pool{stage}_relu", f"pool{stage}_bn")
            yield _conv(f"pool{stage}_conv", f"pool{stage}_relu", 1, channels, channels // 2, use_bias=False)
            yield _pool(f"pool{stage}_pool", "AveragePooling2D", f"pool{stage}_conv", 2)
            x, channels = f"pool{stage}_pool", channels // 2
    yield _batch_norm("bn", x, channels)
    yield _relu("relu", "bn")


def decoder_layers(width: int, channels: int = 1664, leaky_after_conv_a: bool = False) -> Iterator[Layer]:
    """DenseDepth's decoder behind an encoder that ends in ``channels`` channels."""
    yield _conv("conv2", "relu", 1, channels, width, padding="same")
    x, leaks = "conv2", 0
    for n, (skip, more) in enumerate(
        (("pool3_pool", 256), ("pool2_pool", 128), ("pool1", 64), ("conv1/relu", 64)), 1
    ):
        yield Layer(
            f"up{n}_upsampling2d", "BilinearUpSampling2D", [x], {"size": [2, 2], "data_format": "channels_last"}
        )
        yield Layer(f"up{n}_concat", "Concatenate", [f"up{n}_upsampling2d", skip], {"axis": -1})
        x, before, after = f"up{n}_concat", (width >> (n - 1)) + more, width >> n
        for part, leaky in (("convA", leaky_after_conv_a), ("convB", True)):
            yield _conv(f"up{n}_{part}", x, 3, before, after, padding="same")
            x, before = f"up{n}_{part}", after
            if leaky:
                leaks += 1
                yield Layer(f"leaky_re_lu_{leaks}", "LeakyReLU", [x], {"alpha": 0.20000000298023224})
                x = f"leaky_re_lu_{leaks}"
    yield _conv("conv3", x, 3, width >> 4, 1, padding="same")


# -- the file ------------------------------------------------------------------------------------------------


def write_h5(
    path: Path,
    width: int = 1664,
    seed: int = 0,
    keras_version: str = "2.2.4",
    *,
    layers: list[Layer] | None = None,
    leaky_after_conv_a: bool = False,
    weights_only: bool = False,
    dtype: str = "float32",
    header_limit: int = HEADER_LIMIT,
) -> Path:
    """A file as Keras writes it, of random weights that keep activations near 1 and predictions within 1..100.

    Parameters
    ----------
    path : Path
    width : int
        Channels of conv2, a multiple of 16: 1664 in the published files.
    seed : int
    keras_version : str
        As the file's attribute says.
    layers : list of Layer, optional
        Another network than DenseDepth.
    leaky_after_conv_a : bool
        A leaky ReLU behind each convA too.
    weights_only : bool
        What ``save_weights`` writes, no config; otherwise ``save``.
    dtype : str
        Type of the datasets.
    header_limit : int
        Bytes from which a list of names is split over several attributes.

    Returns
    -------
    Path
        ``path``.
    """
    if layers is None:
        layers = [*encoder_layers(), *decoder_layers(width, leaky_after_conv_a=leaky_after_conv_a)]
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        if not weights_only:
            file.attrs["keras_version"] = keras_version.encode()
            file.attrs["backend"] = b"tensorflow"
            file.attrs["model_config"] = json.dumps(config(layers)).encode()
        root = file if weights_only else file.create_group("model_weights")
        _write_names(root, "layer_names", [layer.name for layer in layers], header_limit)
        root.attrs["backend"] = b"tensorflow"
        root.attrs["keras_version"] = keras_version.encode()
        for layer in layers:
            group = root.create_group(layer.name)
            _write_names(group, "weight_names", [f"{layer.name}/{kind}:0" for kind in layer.shapes], header_limit)
            for kind, shape in layer.shapes.items():
                group.create_dataset(
                    f"{layer.name}/{kind}:0", data=_random(rng, layer.name, kind, shape), dtype=dtype
                )
    return path


def _write_names(group: h5py.Group, attribute: str, names: list[str], limit: int) -> None:
    array = np.asarray([name.encode() for name in names])
    chunks = [array]
    while any(chunk.nbytes > limit for chunk in chunks):
        chunks = np.array_split(array, len(chunks) + 1)
    if len(chunks) == 1:
        group.attrs[attribute] = array
    for n, chunk in enumerate(chunks if len(chunks) > 1 else []):
        group.attrs[f"{attribute}{n}"] = chunk


def config(layers: list[Layer]) -> dict[str, Any]:
    """The attribute ``model_config``, as Keras 2.2.4 has it."""
    listed = []
    for layer in layers:
        common = {"name": layer.name} if layer.kind == "InputLayer" else {"name": layer.name, "trainable": True}
        inbound = [[[name, 0, 0, {}] for name in layer.inputs]] if layer.inputs else []
        listed.append(
            {
                "name": layer.name,
                "class_name": layer.kind,
                "config": {**common, **layer.config},
                "inbound_nodes": inbound,
            }
        )
    ends = {"input_layers": [[layers[0].name, 0, 0]], "output_layers": [[layers[-1].name, 0, 0]]}
    return {"class_name": "Model", "config": {"name": "model_1", "layers": listed, **ends}}


def _random(rng: np.random.Generator, layer: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind == "kernel":
        gain = {"conv1/conv": 2.0, "conv3": 12.0}.get(layer, 1.3 if layer.startswith("conv") else 1.1)
        return rng.standard_normal(shape, np.float32) * np.float32(gain / np.sqrt(np.prod(shape[:3])))
    values = rng.standard_normal(shape, np.float32)
    if kind == "bias":
        return 35 + values if layer == "conv3" else values / 10
    if kind == "gamma":
        return (1 + values / 5) * np.where(rng.random(shape) < 0.1, np.float32(-1), np.float32(1))
    if kind == "moving_variance":
        return np.exp(values / 3)
    return values * np.float32(0.3)  # beta, moving_mean


# -- Keras itself --------------------------------------------------------------------------------------------


def bilinear_layer(align_corners: bool) -> type:
    """DenseDepth's layer that doubles width and height."""
    import tensorflow as tf
    import tf_keras

    class BilinearUpSampling2D(tf_keras.layers.Layer):
        def __init__(self, size: tuple[int, int] = (2, 2), data_format: str | None = None, **options: Any) -> None:
            super().__init__(**options)
            self.size, self.data_format = tuple(size), data_format

        def call(self, x: Any) -> Any:
            size = [self.size[n] * tf.shape(x)[n + 1] for n in range(2)]
            if align_corners:
                return tf.compat.v1.image.resize_bilinear(x, size, align_corners=True)
            return tf.image.resize(x, size, method="bilinear")

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "size": self.size, "data_format": self.data_format}

    return BilinearUpSampling2D


def build_keras(width: int = 1664, align_corners: bool = False, leaky_after_conv_a: bool = False) -> Any:
    """DenseDepth on Keras' own DenseNet-169, a ``tf_keras.Model`` with random weights; ``load_weights`` fills it."""
    import tf_keras
    from tf_keras.layers import Concatenate, Conv2D, LeakyReLU

    double = bilinear_layer(align_corners)
    base = tf_keras.applications.DenseNet169(input_shape=(None, None, 3), include_top=False, weights=None)
    x = Conv2D(width, 1, padding="same", name="conv2")(base.output)
    for n, skip in enumerate(("pool3_pool", "pool2_pool", "pool1", "conv1/relu"), 1):
        x = double((2, 2), name=f"up{n}_upsampling2d")(x)
        x = Concatenate(name=f"up{n}_concat")([x, base.get_layer(skip).output])
        x = Conv2D(width >> n, 3, padding="same", name=f"up{n}_convA")(x)
        if leaky_after_conv_a:
            x = LeakyReLU(alpha=0.2)(x)
        x = Conv2D(width >> n, 3, padding="same", name=f"up{n}_convB")(x)
        x = LeakyReLU(alpha=0.2)(x)
    return tf_keras.Model(base.input, Conv2D(1, 3, padding="same", name="conv3")(x))


def pictures(count: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Pictures with soft and hard parts, (count, height, width, 3) float32 in 0..1."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, height // 16 + 1, width // 16 + 1, 3), np.float32)
    images = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    images += rng.normal(0, 0.1, images.shape).astype(np.float32)
    return (images.clip(0, 1) * 255).round().astype(np.float32) / 255


def main() -> None:
    """Write a file unless one is given, load it in Keras in both ways, predict, save."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="npz file to write: images (N, H, W, 3), predictions (N, H/2, W/2, 1)")
    parser.add_argument("--width", type=int, default=1664, help="channels of conv2")
    parser.add_argument("--upsampling", choices=("half-pixel", "align-corners"), default="half-pixel")
    parser.add_argument("--size", default="96x64", help="WIDTHxHEIGHT of the pictures")
    parser.add_argument("--count", type=int, default=2, help="number of pictures")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures")
    parser.add_argument("--weights", type=Path, help="h5 file to use; written here if there is none")
    parser.add_argument("--leaky-after-conv-a", action="store_true", help="a leaky ReLU behind each convA too")
    parser.add_argument("--resave", type=Path, help="h5 file where Keras saves the model that it has loaded")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tf_keras

    align = arguments.upsampling == "align-corners"
    width, height = map(int, arguments.size.split("x"))
    images = pictures(arguments.count, width, height, arguments.seed)
    leaky = {"leaky_after_conv_a": arguments.leaky_after_conv_a}
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.weights or Path(folder) / "weights.h5"
        if not file.exists():
            write_h5(file, arguments.width, arguments.seed, **leaky)
        model = build_keras(arguments.width, align, **leaky)
        model.load_weights(file)
        loaded = tf_keras.models.load_model(
            file, custom_objects={"BilinearUpSampling2D": bilinear_layer(align)}, compile=False
        )
    predictions = model.predict(images, batch_size=1, verbose=0)
    np.testing.assert_array_equal(predictions, loaded.predict(images, batch_size=1, verbose=0))
    if arguments.resave:
        loaded.save(arguments.resave, include_optimizer=False, save_format="h5")
    np.savez(arguments.out, images=images, predictions=predictions)
    print(f"{arguments.out}: {predictions.shape}, {predictions.min():.3f} to {predictions.max():.3f}")


if __name__ == "__main__":
    main()
