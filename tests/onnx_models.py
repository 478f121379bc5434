"""Small models in ONNX for tests, each with one thing about it; all but the broken ones are a fixed 3x3 convolution.

The convolution weighs colours differently, so that swapped channels show, and pads with zeros. Judge: `blurred`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.multiply.outer([0.5, 1.5, 3.0], np.outer([1, 2, 1], [2, 3, 1]) / 24).astype(np.float32)[None]
BIAS = np.array([0.25], np.float32)
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


def blurred(images: np.ndarray, stride: int = 1) -> np.ndarray:
    """What `blur` gives for images (N, 3, H, W), plainly: (N, H / stride, W / stride) float64."""
    n, _, height, width = images.shape
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    total = np.full((n, height, width), float(BIAS[0]))
    for c in range(3):
        for row in range(3):
            for column in range(3):
                total += WEIGHTS[0, c, row, column] * padded[:, c, row : row + height, column : column + width]
    return total[:, ::stride, ::stride]


def blur(
    path: Path,
    *,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    channels_last: bool = False,
    dtype: str = "float32",
    stride: int = 1,
    channels: int = 1,
    tail: Sequence[tuple[str, float | None]] = (),
    rank: int = 4,
    said: Sequence[int | str | None] | None = None,
    said_type: str | None = None,
    said_input: Sequence[int | str | None] | None = None,
    head: Sequence[tuple[str, float]] = (),
    metadata: dict[str, str] | None = None,
    domain: str = "",
    seed: int = 0,
) -> Path:
    """A blur of the picture, meant as depth in metres: 0.25 to 5.25 where the input is 0 to 1.

    Parameters
    ----------
    path : Path
    batch, size : int, (int, int)
        Pictures, and width and height; None leaves them open.
    channels_last : bool
        (N, H, W, 3) to (N, H, W, 1) instead of (N, 3, H, W) to (N, 1, H, W).
    dtype : {"float32", "float16"}
    stride : int
        2 for a map of half the size.
    channels : int
        Maps a picture.
    tail : (operator, constant or None)
        What is done to the blur afterwards, for example ``("Mul", 0.0)``.
    rank : int
        3 for maps (N, H, W).
    said : sequence, optional
        The output's shape as the file tells it; () for a file that does not tell even its rank.
    said_type : str, optional
        The output's type, when a Cast makes it another.
    said_input : sequence, optional
        The input's shape as the file tells it.
    head : (operator, constant)
        What is done to the picture before all else.
    metadata : dict, optional
    domain : str
        Whose operators the tail's are.
    seed : int
        Other weights than `WEIGHTS` where it is not 0.
    """
    kind = _TYPES[dtype]
    width, height = size or ("W", "H")
    n = batch or "N"
    shape = (n, height, width, 3) if channels_last else (n, 3, height, width)
    weights = WEIGHTS if not seed else np.random.default_rng(seed).random(WEIGHTS.shape, np.float32)
    constants = {"weights": np.repeat(weights, channels, 0), "bias": np.repeat(BIAS, channels)}
    nodes, x = [], "image"
    for i, (operator, value) in enumerate(head):
        constants[f"head{i}"] = np.array(value, np.float32)
        nodes.append(helper.make_node(operator, [x, f"head{i}"], [f"first{i}"]))
        x = f"first{i}"
    if channels_last:
        nodes.append(helper.make_node("Transpose", [x], ["planes"], perm=[0, 3, 1, 2]))
        x = "planes"
    pads, strides = [1, 1, 1, 1], [stride, stride]
    nodes.append(helper.make_node("Conv", [x, "weights", "bias"], ["blur"], pads=pads, strides=strides))
    x = "blur"
    for i, (operator, value) in enumerate(tail):
        inputs = [x]
        if value is not None:
            constants[f"value{i}"] = np.array(value, np.float32)
            inputs.append(f"value{i}")
        nodes.append(helper.make_node(operator, inputs, [f"tail{i}"], domain=domain))
        x = f"tail{i}"
    open_sides = (n, "h", "w")
    output = (open_sides[0], channels, *open_sides[1:])
    if channels_last:
        nodes.append(helper.make_node("Transpose", [x], ["last"], perm=[0, 2, 3, 1]))
        x, output = "last", (*open_sides, channels)
    if rank == 3:
        nodes.append(helper.make_node("Squeeze", [x, "axis"], ["flat"]))
        x, output = "flat", open_sides
    if said_type:
        nodes.append(helper.make_node("Cast", [x], ["cast"], to=_TYPES[said_type]))
        x = "cast"
    nodes.append(helper.make_node("Identity", [x], ["depth"]))
    initializers = [numpy_helper.from_array(np.asarray(value, dtype), name) for name, value in constants.items()]
    if rank == 3:
        initializers.append(numpy_helper.from_array(np.array([3 if channels_last else 1], np.int64), "axis"))
    told = None if said == () else (output if said is None else said)
    return write(
        path,
        nodes,
        [helper.make_tensor_value_info("image", kind, said_input or shape)],
        [helper.make_tensor_value_info("depth", _TYPES[said_type or dtype], told)],
        initializers,
        metadata,
        [domain] if domain else [],
    )


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    metadata: dict[str, str] | None = None,
    domains: Sequence[str] = (),
) -> Path:
    """Any graph as a file; not checked."""
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(initializers))
    opsets = [helper.make_opsetid("", 13), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    helper.set_model_props(model, metadata or {})
    path.write_bytes(model.SerializeToString())
    return path


def _floats(name: str, shape: Sequence[int | str] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def inverse(path: Path) -> Path:
    """Inverse depth as DenseDepth's, 7.5 to 157.5: clipped below 10 in its reciprocal, varied above."""
    return blur(path, tail=[("Mul", 30.0)], metadata={"meaning": "inverse"})


def flat(path: Path) -> Path:
    """2 everywhere."""
    return blur(path, tail=[("Mul", 0.0), ("Add", 2.0)])


def not_numbers(path: Path) -> Path:
    """NaN where the picture is dark."""
    return blur(path, tail=[("Sub", 2.0), ("Sqrt", None)])


def grey(path: Path, said_input: Sequence[int | str | None]) -> Path:
    """Takes the first channel alone."""
    weights = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one")
    nodes = [helper.make_node("Conv", ["image", "one"], ["depth"])]
    return write(path, nodes, [_floats("image", said_input)], [_floats("depth", ("N", 1, "H", "W"))], [weights])


def mean(path: Path, said_input: Sequence[int | str | None]) -> Path:
    """The mean of the channels, of axis 1: no convolution."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["depth"], axes=[1])]
    return write(path, nodes, [_floats("image", said_input)], [_floats("depth", ("N", 1, "H", "W"))])


def external(path: Path, data: str = "weights.data") -> Path:
    """`blur` with its weights in a file beside it."""
    import onnx

    model = onnx.load(blur(path))
    path.unlink()
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def two_inputs(path: Path) -> Path:
    """A picture and a second one."""
    shape = (1, 3, 32, 32)
    nodes = [
        helper.make_node("Add", ["left", "right"], ["sum"]),
        helper.make_node("ReduceMean", ["sum"], ["depth"], axes=[1]),
    ]
    return write(path, nodes, [_floats("left", shape), _floats("right", shape)], [_floats("depth", (1, 1, 32, 32))])


def two_outputs(path: Path) -> Path:
    """Depth and how sure it is."""
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["depth"], axes=[1]),
        helper.make_node("ReduceMax", ["image"], ["sureness"], axes=[1]),
    ]
    map_ = (1, 1, 32, 32)
    return write(path, nodes, [_floats("image", (1, 3, 32, 32))], [_floats("depth", map_), _floats("sureness", map_)])


def dynamic_rank(path: Path) -> Path:
    """The input has no shape, not even a number of dimensions."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["depth"], axes=[1])]
    return write(path, nodes, [_floats("image", None)], [_floats("depth", None)])


def whole_numbers(path: Path) -> Path:
    """Takes uint8."""
    nodes = [
        helper.make_node("Cast", ["image"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values"], ["depth"], axes=[1]),
    ]
    inputs = [_floats("image", ("N", 3, "H", "W"), TensorProto.UINT8)]
    return write(path, nodes, inputs, [_floats("depth", ("N", 1, "H", "W"))])


def four_channels(path: Path) -> Path:
    """Takes RGBA."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["depth"], axes=[1])]
    return write(path, nodes, [_floats("image", ("N", 4, "H", "W"))], [_floats("depth", ("N", 1, "H", "W"))])


def unknown_operator(path: Path, domain: str = "") -> Path:
    """An operator that nobody knows, of ONNX itself or of a domain."""
    return blur(path, tail=[("Mystery", None)], domain=domain)


def only_32(path: Path) -> Path:
    """The file leaves its size open, and works at 32x32 alone, as it adds a table of this size."""
    table = numpy_helper.from_array(np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(1, 1, 32, 32), "table")
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["grey"], axes=[1]),
        helper.make_node("Add", ["grey", "table"], ["depth"]),
    ]
    inputs = [_floats("image", ("N", 3, "H", "W"))]
    return write(path, nodes, inputs, [_floats("depth", ("N", 1, "H", "W"))], [table])


def only_16s(path: Path) -> Path:
    """As `only_32`, but nobody knows before it runs: pictures are cut into tiles of 16x16, and those counted."""
    tile = numpy_helper.from_array(np.array([-1, 1, 16, 16]), "tile")
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["grey"], axes=[1]),
        helper.make_node("NonZero", ["grey"], ["places"]),
        helper.make_node("Shape", ["places"], ["count"]),
        helper.make_node("Reshape", ["grey", "tile"], ["tiles"]),
        helper.make_node("Cast", ["count"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["number"], ["most"], keepdims=0),
        helper.make_node("Add", ["tiles", "most"], ["depth"]),
    ]
    inputs = [_floats("image", ("N", 3, "H", "W"))]
    return write(path, nodes, inputs, [_floats("depth", ("a", 1, "b", "c"))], [tile])


def without_batch(path: Path) -> Path:
    """Three maps, whatever the number of pictures."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["depth"], axes=[0], keepdims=0)]
    return write(path, nodes, [_floats("image", ("N", 3, "H", "W"))], [_floats("depth", ("a", "b", "c"))])
