"""DenseDepth with random weights: the file that gpufgbg reads, the network in PyTorch, its amount of arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpufgbg.depth.weights import BLOCKS, DenseDepthWeights, tensor_shapes
from gpufgbg.files import atomic_path

__all__ = ["flop", "torch_module", "write_weights"]

WIDTHS = (1664, 832, 416, 208, 104)  # of conv2 and of the decoder's blocks, as published
SKIPS = (("up1", "pool3"), ("up2", "pool2"), ("up3", "pool1"), ("up4", "stem"))
_STORED = {"mean": "moving_mean", "variance": "moving_variance"}
_EPSILON = 1.001e-5


def write_weights(path: Path, seed: int = 0) -> Path:
    """A file of random weights in Keras' format, that keep activations near 1 and predictions within 1 to 100.

    It lists no layers without weights, so it is read as model.py's network: a leaky ReLU behind each convolution.
    """
    import h5py

    rng = np.random.default_rng(seed)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, shape in tensor_shapes(WIDTHS).items():
        layer, _, kind = name.rpartition("/")
        layers.setdefault(layer, {})[_STORED.get(kind, kind)] = _random(rng, layer, kind, shape)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, tensors in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{kind}:0".encode() for kind in tensors]
            for kind, values in tensors.items():
                group.create_dataset(f"{layer}/{kind}:0", data=values)
    return path


def _random(rng: np.random.Generator, layer: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    if kind == "kernel":
        gain = 12.0 if layer == "conv3" else 1.2
        return values * np.float32(gain / np.sqrt(np.prod(shape[:3])))
    if kind == "bias":
        return 35 + values if layer == "conv3" else values / 10
    if kind == "gamma":
        return 1 + values / 5
    return np.exp(values / 3) if kind == "variance" else values * np.float32(0.3)


def flop(size: tuple[int, int]) -> float:
    """Floating-point operations of a picture's convolutions, a product and a sum counting as two."""
    width, height = size
    # How often the input was halved where a layer stands: by its name, or by how the name begins.
    halvings = {"conv1/conv": 1, "conv2": 5, "conv3": 1, "up1": 4, "up2": 3, "up3": 2, "up4": 1}
    halvings |= {f"conv{stage}_block": stage for stage in (2, 3, 4, 5)} | {
        f"pool{stage}": stage for stage in (2, 3, 4)
    }
    total = 0.0
    for name, shape in tensor_shapes(WIDTHS).items():
        layer, _, kind = name.rpartition("/")
        if kind == "kernel":
            begins = max((known for known in halvings if layer.startswith(known)), key=len)
            total += 2.0 * np.prod(shape) * (width >> halvings[begins]) * (height >> halvings[begins])
    return total


def torch_module(weights: DenseDepthWeights) -> Any:
    """The network as a `torch.nn.Module`: (N, 3, H, W), 0..1, to (N, 1, H / 2, W / 2), inverse depth."""
    import torch
    from torch import nn
    from torch.nn import functional

    def conv(tensors: Mapping[str, np.ndarray], layer: str, **options: int) -> nn.Conv2d:
        kernel = torch.from_numpy(np.array(tensors[f"{layer}/kernel"].transpose(3, 2, 0, 1), copy=True))
        bias = tensors.get(f"{layer}/bias")
        after, before, size, _ = kernel.shape
        made = nn.Conv2d(before, after, size, padding=size // 2, bias=bias is not None, **options)
        made.weight.data = kernel
        if bias is not None:
            made.bias.data = torch.from_numpy(np.array(bias))
        return made

    def norm(tensors: Mapping[str, np.ndarray], layer: str) -> nn.BatchNorm2d:
        values = {kind: torch.from_numpy(np.array(tensors[f"{layer}/{kind}"])) for kind in ("gamma", "beta")}
        made = nn.BatchNorm2d(len(values["gamma"]), eps=_EPSILON)
        made.weight.data, made.bias.data = values["gamma"], values["beta"]
        made.running_mean = torch.from_numpy(np.array(tensors[f"{layer}/mean"]))
        made.running_var = torch.from_numpy(np.array(tensors[f"{layer}/variance"]))
        return made

    class Layer(nn.Module):
        """A layer of a dense block: its channels behind those that were there."""

        def __init__(self, name: str) -> None:
            super().__init__()
            tensors = weights.tensors
            self.before = nn.Sequential(norm(tensors, f"{name}_0_bn"), nn.ReLU(), conv(tensors, f"{name}_1_conv"))
            self.after = nn.Sequential(norm(tensors, f"{name}_1_bn"), nn.ReLU(), conv(tensors, f"{name}_2_conv"))

        def forward(self, x: Any) -> Any:
            return torch.cat([x, self.after(self.before(x))], 1)

    class Up(nn.Module):
        """A block of the decoder: double, put beside the encoder's, two convolutions."""

        def __init__(self, name: str) -> None:
            super().__init__()
            slope = weights.leaky_slope
            first = nn.LeakyReLU(slope) if weights.leaky_after_conv_a else nn.Identity()
            convolutions = (conv(weights.tensors, f"{name}_conv{which}") for which in "AB")
            self.layers = nn.Sequential(next(convolutions), first, next(convolutions), nn.LeakyReLU(slope))

        def forward(self, x: Any, skip: Any) -> Any:
            doubled = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            return self.layers(torch.cat([doubled, skip], 1))

    class DenseDepth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tensors = weights.tensors
            self.stem = nn.Sequential(conv(tensors, "conv1/conv", stride=2), norm(tensors, "conv1/bn"), nn.ReLU())
            self.blocks = nn.ModuleList(
                nn.Sequential(*(Layer(f"conv{stage}_block{i}") for i in range(1, layers + 1)))
                for stage, layers in enumerate(BLOCKS, start=2)
            )
            self.transitions = nn.ModuleList(
                nn.Sequential(
                    norm(tensors, f"pool{i}_bn"), nn.ReLU(), conv(tensors, f"pool{i}_conv"), nn.AvgPool2d(2)
                )
                for i in (2, 3, 4)
            )
            self.middle = nn.Sequential(norm(tensors, "bn"), nn.ReLU(), conv(tensors, "conv2"))
            self.ups = nn.ModuleList(Up(name) for name, _ in SKIPS)
            self.last = conv(tensors, "conv3")

        def forward(self, x: Any) -> Any:
            stem = self.stem(x)
            x = functional.max_pool2d(stem, 3, 2, 1)
            kept = {"stem": stem, "pool1": x}
            for stage, block in enumerate(self.blocks, start=2):
                x = block(x)
                if stage < 5:
                    x = kept[f"pool{stage}"] = self.transitions[stage - 2](x)
            x = self.middle(x)
            for up, (_, skip) in zip(self.ups, SKIPS, strict=True):
                x = up(x, kept[skip])
            return self.last(x)

    return DenseDepth().eval()
