"""Networks that can be run: DenseDepth from its weights, the built-in one, or any monocular model in ONNX."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpufgbg.depth import network
from gpufgbg.depth.options import DEMO, MEANINGS, RANGES, DepthOptions
from gpufgbg.exceptions import DeviceError, InputError, OptionError, printable

if TYPE_CHECKING:
    import onnx

    from gpufgbg.depth.weights import DenseDepthWeights

__all__ = ["DenseDepth", "NetworkSource", "OnnxModel", "files_of", "open_source"]

_DENSEDEPTH_SCALE = 10.0  # metres of depth 1 in nyu.h5
#: operators that leave axes where they are: what may stand before the first convolution
_SAME_FORM = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Pad", "Resize", "Sub"}
_MODEL_BYTES = 2**31  # what a model in memory has to be smaller than: protobuf's limit


class NetworkSource(Protocol):
    """What an engine is built from.

    Attributes
    ----------
    name : str
        For people: the file's name, or ``demo``.
    sha256 : str
        Of the file; where an ONNX model keeps its weights in other files, of all of them, one after the other.
    size : (int, int)
        Width and height of the input.
    asked : (int, int)
        What they would be without a bound: see `open_source`.
    channels_last : bool
        The input is (N, H, W, 3) instead of (N, 3, H, W).
    range, meaning : str
        See `DepthOptions`.
    scale : float
        Metres of one unit of depth.
    batch : int or None
        Pictures of one inference where the file fixes them.
    precision : {"fp16", "fp32"} or None
        Of the file; None where `graph` can be of either.
    """

    name: str
    sha256: str
    size: tuple[int, int]
    asked: tuple[int, int]
    channels_last: bool
    range: str
    meaning: str
    scale: float
    batch: int | None
    precision: str | None

    def graph(self, batch: int, precision: str) -> onnx.ModelProto:
        """The network for a batch, input and output shapes fixed where the file allows it."""

    def identity(self) -> dict[str, Any]:
        """What decides the graph, as JSON values: a part of an engine's key."""

    def typed(self, precision: str) -> bool:
        """Whether all tensors of ``graph`` have the precision's own type, so that an engine has no choice."""


def open_source(options: DepthOptions, frame: tuple[int, int], longest: int | None = None) -> NetworkSource:
    """The network that the options name, for frames of this (width, height).

    Where neither options nor file say how large the input is, it follows from the frame; ``longest`` is then the most
    that its longer side may have, a multiple of 32.

    Raises
    ------
    InputError
        The file can't be used; the message says why.
    OptionError
        An option does not go with the file.
    DeviceError
        A package that reads such files is missing.
    """
    if options.weights == DEMO:
        path = Path(str(resources.files("gpufgbg") / "depth" / "demo.onnx"))
        return OnnxModel(path, options, frame, DEMO, longest)
    path = Path(options.weights)
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--depth {printable(path)}: can't be read: {printable(reason)}: expected a file of weights or {DEMO!r}"
        ) from None
    if _is_onnx(path, head):
        return OnnxModel(path, options, frame, path.name, longest)
    return DenseDepth(path, options, frame, longest)


class DenseDepth:
    """DenseDepth with the weights of a Keras file."""

    channels_last = False
    batch: int | None = None
    precision: str | None = None

    def __init__(self, path: Path, options: DepthOptions, frame: tuple[int, int], longest: int | None = None) -> None:
        from gpufgbg.depth.weights import read_weights

        for name, fixed in (("range", "unit"), ("meaning", "inverse")):
            if getattr(options, name) not in (None, fixed):
                raise OptionError(
                    f"depth_{name}",
                    f"got {getattr(options, name)!r}: DenseDepth's is {fixed}; the option is for models in ONNX",
                )
        self.asked = options.size or (2 * frame[0], 2 * frame[1])
        width, height = options.size or _bounded(self.asked, longest)
        if width % network.MULTIPLE or height % network.MULTIPLE:
            default = "" if options.size else f" (twice the frame of {frame[0]}x{frame[1]})"
            raise OptionError(
                "depth_size",
                f"got {width}x{height}{default}, expected multiples of {network.MULTIPLE}, for example "
                f"{_round_up(width)}x{_round_up(height)}: the map is scaled to the frame",
            )
        self.weights: DenseDepthWeights = read_weights(path)
        self.name = path.name
        self.sha256 = self.weights.sha256
        self.size = (width, height)
        self.upsampling = options.upsampling
        self.range, self.meaning = "unit", "inverse"
        self.scale = options.scale or _DENSEDEPTH_SCALE

    def graph(self, batch: int, precision: str) -> onnx.ModelProto:
        """See `NetworkSource`."""
        _import_onnx()
        return network.build(self.weights, self.size, batch, precision, self.upsampling)

    def identity(self) -> dict[str, Any]:
        """See `NetworkSource`."""
        return {
            "network": f"DenseDepth, graph {network.GRAPH_VERSION}",
            "weights": self.sha256,
            "size": list(self.size),
            "upsampling": self.upsampling,
        }

    def typed(self, precision: str) -> bool:
        """See `NetworkSource`."""
        return True


def _bounded(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    """About the same shape, its longer side ``longest`` and both multiples of 32; as it is where it is not larger."""
    if longest is None or max(size) <= longest:
        return size
    width, height = (max(1, round(side * longest / max(size) / network.MULTIPLE)) * network.MULTIPLE for side in size)
    return width, height


def _round_up(side: int) -> int:
    return -(-side // network.MULTIPLE) * network.MULTIPLE


@dataclass(frozen=True)
class _Tensor:
    """An input or output of a graph; None for a dimension that the file leaves open."""

    name: str
    kind: int
    shape: tuple[int | None, ...]


class OnnxModel:
    """A monocular model in ONNX: one picture in, one map out."""

    def __init__(
        self, path: Path, options: DepthOptions, frame: tuple[int, int], name: str, longest: int | None = None
    ) -> None:
        self.path = path
        self.name = name
        if options.upsampling != "half-pixel":
            raise OptionError(
                "depth_upsampling", f"{printable(path.name)} is ONNX: the option is for DenseDepth's HDF5"
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"--depth {printable(path)}: can't be read: {error.strerror}") from None
        self._model = self._parsed(data)
        digest = hashlib.sha256(data)
        self._load_data(digest)
        self.sha256 = digest.hexdigest()
        source, output = self._one("input"), self._one("output")
        batch, self.channels_last, width, height = self._input_form(source)
        self._check_output(output)
        self._check()
        self.batch = batch
        self.precision: str | None = "fp16" if input_type(self._model) == np.float16 else "fp32"
        self.asked = self._size(options, frame, width, height)
        self.size = self._size(options, _bounded(frame, longest), width, height)
        metadata = {entry.key: entry.value for entry in self._model.metadata_props}
        self.range = options.range or self._known(metadata, "range", RANGES, "unit")
        self.meaning = options.meaning or self._known(metadata, "meaning", MEANINGS, "metres")
        self.scale = options.scale or 1.0

    def _parsed(self, data: bytes) -> onnx.ModelProto:
        load = _import_onnx().load_model_from_string
        try:
            model: onnx.ModelProto = load(data)
            if not model.graph.node:
                raise ValueError("no graph in it")
        except Exception as error:  # protobuf's, onnx' and what they let through have no common base
            raise self._unusable(error) from None
        return model

    def _load_data(self, digest: Any) -> None:
        """Take weights that lie in other files into the model, and those files' bytes into ``digest``.

        Not onnx' own loader, which refuses links: those of Hugging Face's cache are links.
        """
        external = list(_external(self._model))
        for name in sorted({name for _, name in external}):
            beside = f"--depth {printable(self.path)}: its weights lie in {printable(name)}"
            if not _is_below(name):
                raise InputError(f"{beside}, expected a file in the model's own folder: export the model again")
            try:
                data = (self.path.parent / name).read_bytes()
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                reason = getattr(error, "strerror", None) or error
                raise InputError(
                    f"{beside}, which can't be read: {printable(reason)}: put that file beside the model"
                ) from None
            digest.update(data)
            for tensor, location in external:
                if location != name:
                    continue
                told = {entry.key: entry.value for entry in tensor.external_data}
                try:
                    start = int(told.get("offset", 0))
                    stop = start + int(told["length"]) if "length" in told else len(data)
                    if not 0 <= start <= stop:
                        raise ValueError
                except ValueError:
                    raise InputError(f"{beside} at no possible place: export the model again") from None
                if stop > len(data):
                    raise InputError(f"{beside}, which is cut off: {len(data)} bytes, expected {stop}: get it again")
                tensor.raw_data = data[start:stop]
                tensor.data_location = 0  # TensorProto.DEFAULT
                del tensor.external_data[:]
        size = sum(len(tensor.raw_data) for tensor, _ in external)
        if size >= _MODEL_BYTES:
            raise InputError(
                f"--depth {printable(self.path)}: {size:,} bytes of weights, expected less than {_MODEL_BYTES:,}: "
                "export the model in fp16"
            )

    def _check(self) -> None:
        try:
            _import_onnx().checker.check_model(self._model)
        except Exception as error:  # as above
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> InputError:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return InputError(f"--depth {printable(self.path)}: no usable ONNX model: {printable(reason)}")

    def _one(self, side: str) -> _Tensor:
        graph = self._model.graph
        constants = {tensor.name for tensor in graph.initializer}
        values = [value for value in getattr(graph, side) if value.name not in constants]
        if len(values) != 1:
            names = ", ".join(printable(value.name) for value in values) or "none"
            what = "picture as input" if side == "input" else "map as output"
            raise InputError(f"--depth {printable(self.path)}: {len(values)} {side}s ({names}), expected one {what}")
        value = values[0]
        tensor = value.type.tensor_type
        if not tensor.HasField("shape"):
            raise InputError(
                f"--depth {printable(self.path)}: {side} {printable(value.name)} has a dynamic rank, expected a "
                "shape with 4 dimensions: export the model with fixed dimensions"
            )
        shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
        return _Tensor(value.name, tensor.elem_type, shape)

    def _input_form(self, tensor: _Tensor) -> tuple[int | None, bool, int | None, int | None]:
        """(batch, channels last, width, height) of the input."""
        self._check_type("input", tensor)
        shape = tensor.shape
        axis, channels = self._channel_axis(tensor) if len(shape) == 4 else (0, None)
        if axis == 1:
            return shape[0], False, shape[3], shape[2]
        if axis == 3:
            return shape[0], True, shape[2], shape[1]
        text = "x".join("?" if side is None else str(side) for side in shape)
        taken = "" if channels in (None, 3) else f", of {channels} channels"
        raise InputError(
            f"--depth {printable(self.path)}: input {printable(tensor.name)} is {text}{taken}, expected Nx3xHxW or "
            "NxHxWx3"
        )

    def _channel_axis(self, tensor: _Tensor) -> tuple[int, int | None]:
        """The input's axis of red, green and blue, 0 where it has none; and how many channels, where that is told.

        The axis of 3. Where the file leaves it open, as Hugging Face's exports do: what the first convolution takes
        for channels, else what is usual, the axis behind the batch.
        """
        shape = tensor.shape
        if 3 in (shape[1], shape[3]):
            return (1 if shape[1] == 3 else 3), 3
        told = self._convolved(tensor.name)
        if told is None:
            return (1 if shape[1] is None and shape[3] not in (1, 4) else 0), None
        axis, channels = told
        return (axis if shape[axis] is None and channels in (None, 3) else 0), channels

    def _convolved(self, name: str) -> tuple[int, int | None] | None:
        """Which axis of the input a convolution takes for its channels, and how many; None where none tells."""
        graph = self._model.graph
        sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        places = [(name, (0, 1, 2, 3))]  # tensors of the input's form, and its axes in their order
        for found, axes in places:  # grows
            for node in graph.node:
                if found not in node.input[:1]:
                    continue
                settings = {attribute.name: attribute for attribute in node.attribute}
                if node.op_type == "Conv":
                    size = sizes.get(node.input[1], ())
                    group = settings["group"].i if "group" in settings else 1
                    return axes[1], size[1] * group if len(size) == 4 else None
                if node.op_type == "Transpose" and "perm" in settings and len(settings["perm"].ints) == 4:
                    a, b, c, d = (axes[axis] for axis in settings["perm"].ints)
                    places.append((node.output[0], (a, b, c, d)))
                elif node.op_type in _SAME_FORM:
                    places.append((node.output[0], axes))
        return None

    def _check_type(self, side: str, tensor: _Tensor) -> None:
        onnx = _import_onnx()
        if tensor.kind not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            kind = onnx.TensorProto.DataType.Name(tensor.kind)
            raise InputError(
                f"--depth {printable(self.path)}: {side} {printable(tensor.name)} holds {kind}, expected FLOAT or "
                f"FLOAT16: export the model for floating-point {side}"
            )

    def _check_output(self, tensor: _Tensor) -> None:
        self._check_type("output", tensor)
        shape = tensor.shape
        maps = (len(shape) == 4 and 1 in (shape[1], shape[3])) or len(shape) == 3
        if not maps and not (len(shape) == 4 and None in (shape[1], shape[3])):
            text = "x".join("?" if side is None else str(side) for side in shape)
            raise InputError(
                f"--depth {printable(self.path)}: output {printable(tensor.name)} is {text}, expected one map a "
                "picture: NxHxW, Nx1xHxW or NxHxWx1"
            )

    def _size(
        self, options: DepthOptions, frame: tuple[int, int], width: int | None, height: int | None
    ) -> tuple[int, int]:
        asked = options.size or frame
        size = (width or asked[0], height or asked[1])
        if options.size is not None and size != options.size:
            raise OptionError(
                "depth_size",
                f"got {options.size[0]}x{options.size[1]}, {printable(self.path.name)} takes "
                f"{width or 'any'}x{height or 'any'}",
            )
        return size

    def _known(self, metadata: dict[str, str], key: str, choices: tuple[str, ...], default: str) -> str:
        value = metadata.get(key, default)
        return value if value in choices else default

    def graph(self, batch: int, precision: str) -> onnx.ModelProto:
        """See `NetworkSource`."""
        model = type(self._model)()
        model.CopyFrom(self._model)
        name = self._one("input").name
        value = next(value for value in model.graph.input if value.name == name)
        width, height = self.size
        shape = (batch, height, width, 3) if self.channels_last else (batch, 3, height, width)
        for dimension, side in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            dimension.dim_value = side
        # What the file says of shapes further on may name the dimensions that are fixed now: let the engine infer it.
        del model.graph.value_info[:]
        for dimension in model.graph.output[0].type.tensor_type.shape.dim:
            dimension.ClearField("value")
        return model

    def identity(self) -> dict[str, Any]:
        """See `NetworkSource`."""
        return {"network": "ONNX", "weights": self.sha256, "size": list(self.size)}

    def typed(self, precision: str) -> bool:
        """See `NetworkSource`."""
        wanted = 10 if precision == "fp16" else 1  # TensorProto.FLOAT16, FLOAT
        floating = {t.data_type for t in self._model.graph.initializer if t.data_type in (1, 10, 11, 16)}
        return floating <= {wanted} and self._one("input").kind == wanted


def files_of(weights: str) -> dict[str, Path]:
    """The files of a network that `open_source` takes, by their names in the first one's folder; that one first."""
    path = Path(weights)
    names: set[str] = set()
    with path.open("rb") as file:
        head = file.read(8)
        if _is_onnx(path, head):
            names.update(name for _, name in _external(_import_onnx().load_model_from_string(head + file.read())))
    return {path.name: path, **{name: path.parent / name for name in sorted(names)}}


def _is_onnx(path: Path, head: bytes) -> bool:
    return path.suffix.lower() == ".onnx" and head != b"\x89HDF\r\n\x1a\n"


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants of a model, those of graphs inside its nodes included."""
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop(0)
        yield from getattr(graph, "initializer", ())  # a function has none
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _external(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, str]]:
    """The constants that lie in other files, and the name of each one's, relative to the model's folder."""
    for tensor in _tensors(model):
        if tensor.data_location == 1:  # TensorProto.EXTERNAL
            yield tensor, next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _is_below(name: str) -> bool:
    """Whether a relative name can't lead out of its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError:
        raise DeviceError("--depth: the package onnx is not installed: pip install 'gpufgbg[depth]'") from None
    return onnx


def input_type(model: onnx.ModelProto) -> np.dtype[Any]:
    """Type of the values that a model's input holds."""
    constants = {tensor.name for tensor in model.graph.initializer}
    value = next(value for value in model.graph.input if value.name not in constants)
    return np.dtype(np.float16 if value.type.tensor_type.elem_type == 10 else np.float32)


def check_output(source: NetworkSource, shape: tuple[Any, ...], batch: int) -> None:
    """Raise `InputError` where an output of this shape is not one map a picture."""
    maps = len(shape) == 3 or (len(shape) == 4 and 1 in (shape[1], shape[3]))
    if not maps or shape[0] != batch:
        found = "x".join(map(str, shape)) or "one number"
        raise InputError(
            f"--depth {printable(source.name)}: the output is {found}, expected one map a picture: "
            f"{batch}xHxW, {batch}x1xHxW or {batch}xHxWx1"
        )


def key_of(description: dict[str, Any]) -> str:
    """A short digest of JSON values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:24]
