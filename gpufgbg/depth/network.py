"""DenseDepth as an ONNX graph, from the weights alone.

Alhashim and Wonka, High Quality Monocular Depth Estimation via Transfer Learning, arXiv 1812.11941 (2018): a
DenseNet-169 without its classifier (Huang et al., arXiv 1608.06993) and a decoder of four blocks that double the
resolution. The graph is written so that an importer has nothing left to guess:

- batch norm behind a convolution is folded into it; batch norm before one (a dense block's first, a transition's) is
  reduced to scale and shift, with its ReLU behind it: in fp32 a BatchNormalization node; in fp16, which TensorRT
  runs, a 1x1 convolution of each channel by itself, for which its kernels move nearly twice the bytes a second;
- in fp16, the last convolution, 3x3 to one channel, is a 1x1 one to its nine taps and a 3x3 one that adds them up:
  TensorRT computes at least some tens of channels at a time, so that nearly all of the plain one's work is wasted;
- each layer of a dense block concatenates its 32 channels to what was there;
- every tensor has a fixed shape, and the name that Keras' model gives the layer.

Input ``image`` (N, 3, H, W), RGB, 0..1. Output ``prediction`` (N, 1, H / 2, W / 2), inverse depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpufgbg.depth.options import UPSAMPLINGS
from gpufgbg.depth.weights import BLOCKS, EPSILON, DenseDepthWeights
from gpufgbg.exceptions import OptionError

if TYPE_CHECKING:
    import onnx

__all__ = ["GRAPH_VERSION", "MULTIPLE", "build"]

GRAPH_VERSION = 1  # part of an engine's key: raise it with every change of the graph
MULTIPLE = 32  # the encoder halves the input five times
OPSET = 13
_TRANSFORMATIONS = dict(zip(UPSAMPLINGS, ("half_pixel", "align_corners"), strict=True))
_DECODER = (("up1", "pool3_pool"), ("up2", "pool2_pool"), ("up3", "pool1"), ("up4", "conv1/relu"))  # block, skip


def build(
    weights: DenseDepthWeights,
    size: tuple[int, int],
    batch: int = 1,
    precision: str = "fp32",
    upsampling: str = "half-pixel",
) -> onnx.ModelProto:
    """The network as an ONNX model.

    Parameters
    ----------
    weights : DenseDepthWeights
    size : (int, int)
        Width and height of the input in pixels, multiples of 32.
    batch : int
        Pictures of one inference; fixed in the graph.
    precision : {"fp32", "fp16"}
        Type of all tensors.
    upsampling : {"half-pixel", "align-corners"}
        Meaning of the decoder's bilinear x2.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    OptionError
        An option is out of range.
    """
    width, height = size
    if width < MULTIPLE or height < MULTIPLE or width % MULTIPLE or height % MULTIPLE:
        raise OptionError("depth_size", f"got {width}x{height}, expected multiples of {MULTIPLE}")
    if upsampling not in UPSAMPLINGS:
        raise OptionError("depth_upsampling", f"got {upsampling!r}, expected one of {', '.join(UPSAMPLINGS)}")
    return _Graph(weights, precision, upsampling).model(batch, width, height)


class _Graph:
    """Collects nodes; each method adds a layer behind a tensor and returns the new tensor's name."""

    def __init__(self, weights: DenseDepthWeights, precision: str, upsampling: str) -> None:
        self.weights = weights
        self.tensors = weights.tensors
        self.half = precision == "fp16"
        self.dtype = np.dtype(np.float16 if self.half else np.float32)
        self.upsampling = upsampling
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def model(self, batch: int, width: int, height: int) -> onnx.ModelProto:
        from onnx import helper

        prediction = self.decoder(*self.encoder("image"))
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        graph = helper.make_graph(
            self.nodes,
            "DenseDepth",
            [helper.make_tensor_value_info("image", kind, (batch, 3, height, width))],
            [helper.make_tensor_value_info(prediction, kind, (batch, 1, height // 2, width // 2))],
            list(self.constants.values()),
        )
        model: onnx.ModelProto = helper.make_model(
            graph, producer_name="gpufgbg", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8
        )
        return model

    # -- the network ------------------------------------------------------------------------------------

    def encoder(self, image: str) -> tuple[str, dict[str, str]]:
        """DenseNet-169; returns its output and the tensors that the decoder takes as skips."""
        stem = self.relu("conv1/relu", self.conv("conv1/conv", image, bn="conv1/bn", stride=2, pad=3))
        # The ReLU's output is not negative: padding with zeros, as Keras does, or with -inf is the same.
        x = self.add("MaxPool", "pool1", [stem], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        skips = {"conv1/relu": stem, "pool1": x}
        for stage, layers in enumerate(BLOCKS, start=2):
            for layer in range(1, layers + 1):
                x = self.dense_layer(f"conv{stage}_block{layer}", x)
            if stage < 5:
                y = self.relu(f"pool{stage}_relu", self.batch_norm(f"pool{stage}_bn", x))
                y = self.conv(f"pool{stage}_conv", y)
                x = self.add("AveragePool", f"pool{stage}_pool", [y], kernel_shape=[2, 2], strides=[2, 2])
                skips[x] = x
        return self.relu("relu", self.batch_norm("bn", x)), skips

    def dense_layer(self, name: str, x: str) -> str:
        y = self.relu(f"{name}_0_relu", self.batch_norm(f"{name}_0_bn", x))
        y = self.relu(f"{name}_1_relu", self.conv(f"{name}_1_conv", y, bn=f"{name}_1_bn"))
        y = self.conv(f"{name}_2_conv", y, pad=1)
        return self.add("Concat", f"{name}_concat", [x, y], axis=1)

    def decoder(self, x: str, skips: dict[str, str]) -> str:
        x = self.conv("conv2", x)
        for block, skip in _DECODER:
            x = self.double(f"{block}_upsampling2d", x)
            x = self.add("Concat", f"{block}_concat", [x, skips[skip]], axis=1)
            x = self.conv(f"{block}_convA", x, pad=1)
            if self.weights.leaky_after_conv_a:
                x = self.leaky_relu(f"{block}_convA_leaky_relu", x)
            x = self.leaky_relu(f"{block}_convB_leaky_relu", self.conv(f"{block}_convB", x, pad=1))
        return self.last_conv(x)

    def last_conv(self, x: str) -> str:
        kernel = self.tensors["conv3/kernel"]  # (3, 3, in, 1)
        if not self.half:
            return self.conv("conv3", x, pad=1, output="prediction")
        taps = kernel.reshape(9, -1)[:, :, None, None]
        y = self.add("Conv", "conv3_taps", [x, self.constant("conv3_taps/kernel", taps)], kernel_shape=[1, 1])
        pick = np.eye(9, dtype=np.float32).reshape(1, 9, 3, 3)  # tap i of channel i
        inputs = [y, self.constant("conv3/pick", pick), self.constant("conv3/bias", self.tensors["conv3/bias"])]
        return self.add("Conv", "conv3", inputs, output="prediction", kernel_shape=[3, 3], pads=[1] * 4)

    # -- layers -----------------------------------------------------------------------------------------

    def conv(
        self, name: str, x: str, *, bn: str | None = None, stride: int = 1, pad: int = 0, output: str | None = None
    ) -> str:
        """A convolution, with the batch norm ``bn`` that follows it folded in."""
        kernel = self.tensors[f"{name}/kernel"]
        bias = self.tensors.get(f"{name}/bias")
        if bn is not None:
            scale, shift = self.scale_and_shift(bn)
            kernel = kernel * scale
            bias = shift if bias is None else bias * scale + shift
        inputs = [x, self.constant(f"{name}/kernel", kernel.transpose(3, 2, 0, 1))]  # HWIO -> OIHW
        if bias is not None:
            inputs.append(self.constant(f"{name}/bias", bias))
        kernel_shape = list(kernel.shape[:2])
        return self.add(
            "Conv", name, inputs, output=output, kernel_shape=kernel_shape, strides=[stride] * 2, pads=[pad] * 4
        )

    def batch_norm(self, name: str, x: str) -> str:
        scale, shift = self.scale_and_shift(name)
        if self.half:
            inputs = [
                x,
                self.constant(f"{name}/scale", scale[:, None, None, None]),
                self.constant(f"{name}/shift", shift),
            ]
            return self.add("Conv", name, inputs, kernel_shape=[1, 1], group=len(scale))
        nothing, one = np.zeros_like(scale), np.ones_like(scale)
        rest = [self.constant(f"{name}/{k}", v) for k, v in
                (("scale", scale), ("shift", shift), ("mean", nothing), ("variance", one))]  # fmt: skip
        return self.add("BatchNormalization", name, [x, *rest], epsilon=0.0)

    def scale_and_shift(self, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A batch norm as y = x * scale + shift."""
        gamma, beta, mean, variance = (
            self.tensors[f"{name}/{kind}"].astype(np.float64) for kind in ("gamma", "beta", "mean", "variance")
        )
        scale = gamma / np.sqrt(variance + EPSILON)
        return scale.astype(np.float32), (beta - mean * scale).astype(np.float32)

    def relu(self, name: str, x: str) -> str:
        return self.add("Relu", name, [x])

    def leaky_relu(self, name: str, x: str) -> str:
        return self.add("LeakyRelu", name, [x], alpha=self.weights.leaky_slope)

    def double(self, name: str, x: str) -> str:
        """Bilinear x2."""
        scales = self.constant("x2", np.array([1, 1, 2, 2], np.float32), np.dtype(np.float32))
        mode = _TRANSFORMATIONS[self.upsampling]
        return self.add("Resize", name, [x, "", scales], mode="linear", coordinate_transformation_mode=mode)

    def add(self, operator: str, name: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        output = output or name
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name: str, values: npt.NDArray[Any], dtype: np.dtype[Any] | None = None) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            tensor = np.ascontiguousarray(values, dtype or self.dtype)
            self.constants[name] = numpy_helper.from_array(tensor, name)
        return name
