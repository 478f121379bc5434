"""DenseDepth's weights out of a Keras HDF5 file, with h5py alone.

The format is what Keras 2 writes, ``model.save`` (nyu.h5, kitti.h5) or ``model.save_weights``: the attribute
``layer_names`` lists all layers, each layer's group has an attribute ``weight_names``, and the tensors lie under
those names. The network is keras.applications' DenseNet-169 without top and the decoder of Alhashim and Wonka,
arXiv 1812.11941; every tensor's presence and shape is checked against it.

The activations, which the tensors don't show, are read from the list of layers: the published files have a leaky
ReLU behind each block's convB only, while ``model.py`` of the DenseDepth repository makes one behind convA too
(its issue #130). A file that lists no layers without weights is taken for model.py's. What else the list tells of
layers (strides, padding, epsilon) has to be DenseDepth's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpufgbg.exceptions import DeviceError, InputError, printable

if TYPE_CHECKING:
    import h5py

__all__ = ["BLOCKS", "EPSILON", "DenseDepthWeights", "read_weights", "tensor_shapes"]

BLOCKS = (6, 12, 32, 32)  # layers of DenseNet-169's dense blocks
GROWTH = 32  # channels that each layer of a dense block adds
EPSILON = 1.001e-5  # of every batch norm
POOLS = {"pool1": 3, "pool2_pool": 2, "pool3_pool": 2, "pool4_pool": 2}  # pixels a side; all of stride 2
SKIPS = {"up1": 256, "up2": 128, "up3": 64, "up4": 64}  # channels of pool3_pool, pool2_pool, pool1, conv1/relu
_KINDS = {"moving_mean": "mean", "moving_variance": "variance"}
_BATCH_NORM = ("gamma", "beta", "mean", "variance")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LEAK = 0.2  # slope of Keras' LeakyReLU in DenseDepth
#: blocks -> keras.applications' name
_DENSENETS: dict[tuple[int, ...], str] = {
    (6, 12, 24, 16): "DenseNet-121",
    BLOCKS: "DenseNet-169",
    (6, 12, 48, 32): "DenseNet-201",
}
_RESNETS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "ResNet-50",
    (3, 4, 23, 3): "ResNet-101",
    (3, 8, 36, 3): "ResNet-152",
}
#: a layer of the network -> its name
_FAMILIES = (
    (r"res2a_branch2a", "ResNet-50"),
    (r"block2_sepconv1", "Xception"),
    (r"block1_conv1", "VGG"),
    (r"conv_pw_1|expanded_conv_depthwise", "MobileNet"),
    (r"block1a_dwconv", "EfficientNet"),
)


@dataclass(frozen=True)
class DenseDepthWeights:
    """All tensors of a DenseDepth network, checked.

    Attributes
    ----------
    path : Path
    sha256 : str
        Of the file, in hexadecimal.
    tensors : mapping of str to (...) float32
        Named ``<layer>/<kind>``; kind is kernel, bias, gamma, beta, mean or variance. Kernels are (kh, kw, in, out).
        Read-only, all values finite.
    encoder_width : int
        Channels that conv2 makes of the encoder's 1664: 1664 in the published files, 832 in others.
    decoder_widths : (int, int, int, int)
        Channels of blocks up1 to up4.
    leaky_after_conv_a : bool
        Whether a leaky ReLU stands behind each block's convA; behind convB there always is one. False in the
        published files.
    leaky_slope : float
        Slope of the leaky ReLUs below zero.
    """

    path: Path
    sha256: str
    tensors: Mapping[str, NDArray[np.float32]]
    encoder_width: int
    decoder_widths: tuple[int, int, int, int]
    leaky_after_conv_a: bool
    leaky_slope: float = _LEAK


class _Unusable(Exception):
    """What is wrong with the file, without its name."""


def read_weights(path: str | Path) -> DenseDepthWeights:
    """Read and check a Keras HDF5 file of DenseDepth.

    Parameters
    ----------
    path : str or Path
        Written by Keras' ``model.save`` or ``model.save_weights`` in the HDF5 format, with tensors of any float type.

    Returns
    -------
    DenseDepthWeights

    Raises
    ------
    InputError
        The file can't be read or isn't DenseDepth's; one line that says why.
    DeviceError
        h5py is not installed.
    """
    path = Path(path)
    try:
        digest = _checked_file(path)
        return _read(path, digest)
    except _Unusable as error:
        raise InputError(f"{printable(path)}: {error}") from error.__cause__


def _read(path: Path, digest: str) -> DenseDepthWeights:
    try:
        import h5py
    except ImportError:
        raise DeviceError("reading DenseDepth's weights needs h5py: pip install 'gpufgbg[depth]'") from None
    try:
        with h5py.File(path, "r") as file:
            layer_names, found = _stored(file)
            _check_layers(found)
            layers = _layers(file, layer_names)
            _check_options(layers)
            after_a, slope = _activations(layers, {name.rpartition("/")[0] for name in found})
            shapes = _shapes(found)
            _check_shapes(found, shapes)
            tensors = {name: _tensor(name, found[name]) for name in shapes}
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # what h5py raises for a damaged file
        text = str(error)
        ends = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", text)
        if ends:
            raise _Unusable(f"truncated: {ends[1]} of {ends[2]} bytes are there; get the file again") from error
        reason = printable(text.strip("'\"").partition("\n")[0][:160])
        raise _Unusable(f"damaged HDF5 file ({reason}); get it again") from error
    widths = [tensors[f"{block}_convB/bias"].size for block in SKIPS]
    return DenseDepthWeights(
        path=path,
        sha256=digest,
        tensors=MappingProxyType(tensors),
        encoder_width=tensors["conv2/bias"].size,
        decoder_widths=(widths[0], widths[1], widths[2], widths[3]),
        leaky_after_conv_a=after_a,
        leaky_slope=slope,
    )


# -- the file ------------------------------------------------------------------------------------------------


def _checked_file(path: Path) -> str:
    """The file's sha256; raises where it is no HDF5 file, with what it is instead."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            problem = _foreign(path, head)
            if problem:
                raise _Unusable(problem)
            digest = hashlib.sha256(head)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        raise _Unusable("no such file") from None
    except IsADirectoryError:
        kind = "a TensorFlow SavedModel folder" if (path / "saved_model.pb").is_file() else "a folder"
        raise _Unusable(f"{kind}, expected DenseDepth's weights as one Keras HDF5 file (.h5)") from None
    except OSError as error:
        raise _Unusable(f"can't be read: {printable(error.strerror or error)}") from error
    return digest.hexdigest()


def _foreign(path: Path, head: bytes) -> str | None:
    """What a file is that isn't HDF5, with what to do; None where it is HDF5."""
    if head.startswith(_SIGNATURE) or _SIGNATURE in (head[512:520], head[1024:1032], head[2048:2056]):
        return None
    expected = "expected DenseDepth's weights as a Keras HDF5 file (.h5)"
    if not head:
        return f"the file is empty; {expected}"
    if head.startswith(b"PK\x03\x04"):
        return f"{_zip_kind(path)}; {expected}"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    if head.lstrip()[:1] == b"<":
        return f"a web page or XML, so the download went wrong; {expected}"
    if path.suffix.lower() == ".onnx" or re.match(rb"\x08[\x03-\x1f][\x12\x1a\x2a\x3a\x42]", head):
        if path.suffix.lower() != ".onnx":
            return f"an ONNX model, not Keras weights: rename the file to {printable(path.with_suffix('.onnx').name)}"
        return f"an ONNX model, not Keras weights: pass it as such; {expected}"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a Python pickle, as PyTorch saves; {expected}"
    if head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model; {expected}"
    if head[8:9] == b"{" and head[:8].endswith(b"\0\0"):
        return f"a safetensors file; {expected}"
    return f"no HDF5 file; {expected}"


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError):
        return "a damaged zip archive"
    if "config.json" in names and "model.weights.h5" in names:
        return "a model in Keras' newer format (.keras): load it in Keras and save with model.save('it.h5')"
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch file"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return "a zip archive: unpack it first"


def _names(group: h5py.Group, attribute: str) -> list[str] | None:
    """A list of names, which Keras splits over ``name0``, ``name1``, ... where it is beyond 64 KiB."""
    if attribute in group.attrs:
        parts = [group.attrs[attribute]]
    else:
        parts = []
        while f"{attribute}{len(parts)}" in group.attrs:
            parts.append(group.attrs[f"{attribute}{len(parts)}"])
        if not parts:
            return None
    values = [value for part in parts for value in np.ravel(part).tolist()]
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]


def _stored(file: h5py.File) -> tuple[list[str], dict[str, h5py.Dataset]]:
    """The names of all layers, and the tensors under our names."""
    import h5py

    root = file.get("model_weights", file)
    layer_names = _names(root, "layer_names") if isinstance(root, h5py.Group) else None
    if layer_names is None:
        if "layers" in file or "_layer_checkpoint_dependencies" in file:
            raise _Unusable(
                "weights in Keras' newer format (.weights.h5): load them in Keras and save with model.save('it.h5')"
            )
        raise _Unusable("an HDF5 file, but not one of Keras (no attribute 'layer_names')")
    known = _known_layers()
    found: dict[str, h5py.Dataset] = {}
    for layer in layer_names:
        if layer.startswith("time_distributed"):
            continue
        group = root.get(layer)
        if not isinstance(group, h5py.Group):
            raise _Unusable(f"the group of layer {_quoted(layer)} is missing; the file is incomplete, get it again")
        for weight in _names(group, "weight_names") or []:
            dataset = group.get(weight)
            if not isinstance(dataset, h5py.Dataset):
                raise _Unusable(f"tensor {_quoted(weight)} is missing; the file is incomplete, get it again")
            if dataset.shape is None:  # HDF5's null dataspace
                raise _Unusable(f"tensor {_quoted(weight)} is empty; the file is incomplete, get it again")
            inner, _, kind = weight.rpartition("/")
            kind = kind.partition(":")[0]
            # A layer that is a model itself (multi_gpu_model's) holds the tensors of many layers.
            name = _canonical(layer) if _canonical(layer) in known else _canonical(inner)
            if name not in known:
                name = layer
            found[f"{name}/{_KINDS.get(kind, kind)}"] = dataset
    return layer_names, found


def _canonical(layer: str) -> str:
    """Keras 3 allows no slash in a name: conv1_bn is what was conv1/bn."""
    return {"conv1_conv": "conv1/conv", "conv1_bn": "conv1/bn"}.get(layer, layer)


def _quoted(name: str) -> str:
    return f"'{printable(name[:80])}'"


# -- the network ---------------------------------------------------------------------------------------------


def _encoder() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of DenseNet-169 without top."""

    def batch_norm(layer: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for kind in _BATCH_NORM:
            yield f"{layer}/{kind}", (channels,)

    yield "conv1/conv/kernel", (7, 7, 3, 64)
    yield from batch_norm("conv1/bn", 64)
    channels = 64
    for stage, layers in enumerate(BLOCKS, start=2):
        for layer in range(1, layers + 1):
            name = f"conv{stage}_block{layer}"
            yield from batch_norm(f"{name}_0_bn", channels)
            yield f"{name}_1_conv/kernel", (1, 1, channels, 4 * GROWTH)
            yield from batch_norm(f"{name}_1_bn", 4 * GROWTH)
            yield f"{name}_2_conv/kernel", (3, 3, 4 * GROWTH, GROWTH)
            channels += GROWTH
        if stage < 5:
            yield from batch_norm(f"pool{stage}_bn", channels)
            yield f"pool{stage}_conv/kernel", (1, 1, channels, channels // 2)
            channels //= 2
    yield from batch_norm("bn", channels)


def _decoder(widths: list[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of the decoder, for the widths of conv2 and of the four blocks."""

    def conv(layer: str, size: int, *channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{layer}/kernel", (size, size, *channels)
        yield f"{layer}/bias", (channels[1],)

    yield from conv("conv2", 1, 1664, widths[0])
    for (block, skip), before, width in zip(SKIPS.items(), widths, widths[1:], strict=False):
        yield from conv(f"{block}_convA", 3, before + skip, width)
        yield from conv(f"{block}_convB", 3, width, width)
    yield from conv("conv3", 3, widths[-1], 1)


def tensor_shapes(widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a network, for the widths of conv2 and of the decoder's four blocks."""
    return dict([*_encoder(), *_decoder(list(widths))])


def _known_layers() -> set[str]:
    return {name.rpartition("/")[0] for name, _ in [*_encoder(), *_decoder([1] * 5)]}


def _check_layers(found: dict[str, h5py.Dataset]) -> None:
    """Raise unless exactly DenseDepth's tensors are there, saying what the network looks like."""
    encoder = {name for name, _ in _encoder()}
    decoder = {name for name, _ in _decoder([1] * 5)}
    missing = sorted((encoder | decoder) - found.keys())
    unexpected = sorted(found.keys() - encoder - decoder)
    if not missing and not unexpected:
        return
    if not found:
        raise _Unusable("no layer in it has weights; expected DenseDepth")
    layers = {name.rpartition("/")[0] for name in found}
    likeness = _likeness(layers)
    if not decoder & found.keys() or not any(re.fullmatch(r"up\d_conv[AB]", layer) for layer in layers):
        if likeness:
            raise _Unusable(f"Keras weights of {likeness} without DenseDepth's decoder (no layer 'up1_convA')")
        raise _Unusable(
            f"Keras weights of a model without DenseDepth's decoder (no layer 'up1_convA'); it has {_some(layers)}"
        )
    if likeness and likeness != "DenseNet-169":
        raise _Unusable(f"looks like DenseDepth on {likeness}; only DenseDepth on DenseNet-169 can be read")
    problems = [f"{verb} {_some(names)}" for verb, names in (("lacks", missing), ("also has", unexpected)) if names]
    raise _Unusable(f"not DenseDepth on DenseNet-169: it {' and '.join(problems)}")


def _likeness(layers: set[str]) -> str | None:
    """The known network that has such layers."""
    for suffix, family, networks in (("_2_bn", "ResNet", _RESNETS), ("_0_bn", "DenseNet", _DENSENETS)):
        numbers = [re.fullmatch(rf"conv([2-5])_block(\d{{1,3}}){suffix}", layer) for layer in layers]
        found = [(int(match[1]), int(match[2])) for match in numbers if match]
        counts = tuple(max((n for stage, n in found if stage == wanted), default=0) for wanted in range(2, 6))
        if all(counts):
            return networks.get(counts, f"a {family} with blocks of {', '.join(map(str, counts))}")
    for pattern, family in _FAMILIES:
        if any(re.fullmatch(pattern, layer) for layer in layers):
            return family
    return None


def _some(names: Any) -> str:
    """A few of the names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(_quoted(name) for name in names[:3]) + more


def _shapes(found: dict[str, h5py.Dataset]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor should have, with the decoder's widths as its biases have them."""
    biases = ["conv2/bias", *(f"{block}_convA/bias" for block in SKIPS)]
    return tensor_shapes([int(np.prod(found[name].shape, dtype=np.int64)) for name in biases])


def _check_shapes(found: dict[str, h5py.Dataset], shapes: dict[str, tuple[int, ...]]) -> None:
    wrong = [name for name, shape in shapes.items() if found[name].shape != shape]
    if wrong:
        name = wrong[0]
        got, expected = ("x".join(map(str, shape)) or "a scalar" for shape in (found[name].shape, shapes[name]))
        more = f" ({len(wrong) - 1} more tensors don't fit either)" if len(wrong) > 1 else ""
        raise _Unusable(f"tensor '{name}' is {got}, expected {expected}{more}")
    for name in shapes:
        if found[name].dtype.kind != "f":
            raise _Unusable(f"tensor '{name}' has type {found[name].dtype}, expected a float type")


def _tensor(name: str, dataset: h5py.Dataset) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a value beyond float32 is told below
        tensor = np.ascontiguousarray(dataset[()], np.float32)
    if not np.isfinite(tensor).all():
        count = tensor.size - int(np.isfinite(tensor).sum())
        raise _Unusable(f"tensor '{name}' has {count} of {tensor.size} values that are not finite float32 numbers")
    if name.endswith("/variance") and (tensor < 0).any():
        raise _Unusable(f"tensor '{name}' has a variance below zero ({tensor.min():g})")
    tensor.flags.writeable = False
    return tensor


# -- what the tensors don't show -----------------------------------------------------------------------------


def _layers(file: h5py.File, layer_names: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, class and options of all layers in order; class and options are empty where no config tells them."""
    try:
        config = file.attrs.get("model_config", b"{}")
        listed = list(_configured(json.loads(config)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        listed = []
    if any(name == "up1_convA" for name, _, _ in listed):
        return listed
    return [(name, "", {}) for name in layer_names]


def _configured(layer: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """All layers below one of a Keras config, models inside the model included."""
    options = layer.get("config", {})
    if isinstance(options, dict) and isinstance(options.get("layers"), list):
        for inner in options["layers"]:
            yield from _configured(inner)
    elif isinstance(options, dict):
        yield str(layer.get("name") or options.get("name")), str(layer.get("class_name")), options


def _check_options(layers: list[tuple[str, str, dict[str, Any]]]) -> None:
    """Raise where a layer's options, as far as they are told, make another network of the same tensors."""
    kernels = {name.rpartition("/")[0]: shape for name, shape in [*_encoder(), *_decoder([1] * 5)] if len(shape) == 4}
    norms = {name.rpartition("/")[0] for name, _ in _encoder() if name.endswith("/gamma")}
    for name, _, options in layers:
        layer = _canonical(name)
        expected: dict[str, Any] = {}
        if layer in kernels:
            first = layer == "conv1/conv"  # padded by a layer of its own
            expected = {"strides": [2, 2] if first else [1, 1], "dilation_rate": [1, 1]}
            if kernels[layer][0] > 1:
                expected["padding"] = "valid" if first else "same"
        elif layer in POOLS:
            expected = {"strides": [2, 2], "pool_size": [POOLS[layer]] * 2}
        elif layer in norms:
            expected = {"epsilon": EPSILON}
        for option, value in expected.items():
            found = options.get(option, value)
            same = found == value or (isinstance(value, list) and found == value[0])
            if isinstance(value, float) and isinstance(found, float):
                same = math.isclose(found, value, rel_tol=1e-6)
            if not same:
                shown = printable(str(found)[:40])
                raise _Unusable(f"layer {_quoted(name)} has {option} {shown}, expected {value} as in DenseDepth")


def _slope(name: str, options: dict[str, Any]) -> float:
    """Slope of a leaky ReLU below zero."""
    told = options.get("alpha", options.get("negative_slope", _LEAK))
    value = told.get("value") if isinstance(told, dict) else told  # some of Keras 2 write NumPy's numbers so
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        shown = printable(str(told)[:40])
        raise _Unusable(
            f"layer {_quoted(name)} has slope {shown}, expected a number from 0 to 1, {_LEAK} in DenseDepth"
        )
    return float(value)


def _activations(layers: list[tuple[str, str, dict[str, Any]]], weighted: set[str]) -> tuple[bool, float]:
    """Whether a leaky ReLU follows each convA, and the leaky ReLUs' slope.

    A file that lists nothing but layers that hold weights does not tell: then it is taken for what model.py builds.
    """
    names = [name for name, _, _ in layers]
    if weighted.issuperset(names):
        return True, _LEAK
    if not any("leaky" in f"{name} {kind}".lower() for name, kind, _ in layers):
        raise _Unusable(
            "it lists no leaky ReLU, so the decoder's activations are unknown: save the model by model.save('it.h5')"
        )

    def between(first: str, last: str) -> list[tuple[str, str, dict[str, Any]]]:
        try:
            return layers[names.index(first) + 1 : names.index(last)]
        except ValueError:
            raise _Unusable(f"doesn't list layers '{first}' and '{last}', so what lies between is unknown") from None

    if not any("relu" in f"{name} {kind} {options.get('activation')}".lower()
               for name, kind, options in between("bn", "conv2")):  # fmt: skip
        raise _Unusable("its encoder ends without a ReLU (made by an old Keras); expected one behind 'bn'")
    after_a, slopes = [], []
    for block, following in zip(SKIPS, ("up2_convA", "up3_convA", "up4_convA", "conv3"), strict=True):
        for first, last in ((f"{block}_convA", f"{block}_convB"), (f"{block}_convB", following)):
            leaky = []
            for name, kind, options in between(first, last):
                if "leaky" in f"{name} {kind}".lower():
                    leaky.append(_slope(name, options))
                elif not re.fullmatch(r"up\d_(upsampling2d|concat)", name):
                    raise _Unusable(f"layer {_quoted(name)} between '{first}' and '{last}' is not DenseDepth's")
            if len(leaky) > 1 or (not leaky and last != f"{block}_convB"):
                raise _Unusable(f"{len(leaky)} leaky ReLUs between '{first}' and '{last}', expected 1")
            slopes += leaky
            if last == f"{block}_convB":
                after_a.append(bool(leaky))
    for name, _, options in layers:
        if re.fullmatch(r"conv[23]|up\d_conv[AB]", name) and options.get("activation", "linear") != "linear":
            raise _Unusable(f"layer '{name}' has activation {_quoted(str(options['activation']))}, expected none")
    if len(set(after_a)) > 1 or len(set(slopes)) > 1:
        raise _Unusable("its decoder's blocks have different activations, expected the same in all")
    return after_a[0], round(slopes[0], 6)
