"""What a user says about depth: one frozen object, checked when it is made."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpufgbg.checks import choice, is_whole
from gpufgbg.exceptions import OptionError

__all__ = ["BACKENDS", "DEMO", "DEPTH_JPEG", "INPUTS", "MEANINGS", "PRECISIONS", "RANGES", "DepthOptions"]

DEMO = "demo"  # in place of a file: the built-in network
BACKENDS = ("auto", "tensorrt", "onnxruntime")
INPUTS = ("saved", "rendered")
MEANINGS = ("inverse", "metres", "relative", "disparity")
PRECISIONS = ("fp16", "fp32")
RANGES = ("unit", "imagenet", "255")
#: quality, subsampling and optimize of depth maps' files: Pillow's defaults, as the original has them
DEPTH_JPEG = (75, "420", False)
UPSAMPLINGS = ("half-pixel", "align-corners")  # meanings of bilinear x2: TensorFlow 2's and TensorFlow 1's
_MAX_SIDE = 16_384
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class DepthOptions:
    """How depth is predicted.

    Parameters
    ----------
    weights : path or "demo"
        DenseDepth's Keras HDF5 file (nyu.h5, kitti.h5 and files of their format), any monocular model in ONNX with
        one picture as input and one map as output, or ``"demo"``, a tiny built-in network for trying out.
    input : {"saved", "rendered"}
        Predict from the composite as its JPEG file decodes, like the original, or as it was rendered.
    backend : {"auto", "tensorrt", "onnxruntime"}
        ``auto`` takes TensorRT on a card, ONNX Runtime on the CPU.
    precision : {"fp16", "fp32"}, optional
        Default: fp16 with TensorRT, fp32 with ONNX Runtime.
    size : int or (int, int), optional
        Width and height of the network's input in pixels. Default: twice the frame for DenseDepth, whose output is
        half its input; what the file says for ONNX, or the frame where it leaves it open.
    batch : int, optional
        Pictures of one inference, 1 to 1,024. Default: 64 with TensorRT, less where memory is short; 1 with ONNX
        Runtime on the CPU.
    upsampling : {"half-pixel", "align-corners"}
        DenseDepth alone: the decoder's bilinear x2 as TensorFlow 2 or as TensorFlow 1 computed it.
    range : {"unit", "imagenet", "255"}, optional
        Values that the network takes: 0..1, 0..1 less ImageNet's mean over its std, or 0..255. Default: unit.
    meaning : {"inverse", "metres", "relative", "disparity"}, optional
        What it gives: inverse depth as DenseDepth's (depth = clip(1000 / p, 10, 1000) / 1000), depth in metres,
        depth without a unit (larger is farther), or inverse depth without a unit (larger is nearer: MiDaS, DPT, Depth
        Anything; depth = -p). Default: inverse for DenseDepth, what the file's metadata say or metres for ONNX.
    scale : float, optional
        Metres of one unit of depth: 10 for DenseDepth's nyu.h5 (the default for DenseDepth), 80 for kitti.h5; else 1.

    Raises
    ------
    OptionError
        A value is out of range; the option is named ``depth_...``.
    """

    weights: str = DEMO
    input: str = "saved"
    backend: str = "auto"
    precision: str | None = None
    size: tuple[int, int] | None = None
    batch: int | None = None
    upsampling: str = "half-pixel"
    range: str | None = None
    meaning: str | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        weights: Any = self.weights
        if not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights):
            raise OptionError("depth", f"got {weights!r}, expected a file of weights or {DEMO!r}")
        object.__setattr__(self, "weights", os.fspath(weights))
        choice("depth_input", self.input, INPUTS)
        choice("depth_backend", self.backend, BACKENDS)
        choice("depth_upsampling", self.upsampling, UPSAMPLINGS)
        for name, choices in (("precision", PRECISIONS), ("range", RANGES), ("meaning", MEANINGS)):
            if getattr(self, name) is not None:
                choice(f"depth_{name}", getattr(self, name), choices)
        size: Any = self.size
        if size is not None:
            sides = (size, size) if is_whole(size) else tuple(size) if isinstance(size, (tuple, list)) else ()
            if len(sides) != 2 or not all(is_whole(side) and 1 <= side <= _MAX_SIDE for side in sides):
                raise OptionError("depth_size", f"got {size!r}, expected 1 to {_MAX_SIDE:,} pixels a side")
            object.__setattr__(self, "size", (int(sides[0]), int(sides[1])))
        if self.batch is not None:
            if not is_whole(self.batch) or not 1 <= self.batch <= 1024:
                raise OptionError("depth_batch", f"got {self.batch!r}, expected 1 to 1,024")
            object.__setattr__(self, "batch", int(self.batch))
        scale: Any = self.scale
        if scale is not None:
            number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
            if not number or not _LEAST <= float(scale) <= _MOST:
                raise OptionError("depth_scale", f"got {scale!r}, expected a positive number of metres")
            object.__setattr__(self, "scale", float(scale))

    @classmethod
    def of(cls, depth: str | os.PathLike[str] | DepthOptions) -> DepthOptions:
        """The options, where a file of weights alone may stand for them."""
        return depth if isinstance(depth, cls) else cls(depth)  # type: ignore[arg-type]
