"""Bad input for depth: every row of the list in issue 5; each ends in one line of error, with nothing written.

And the cache of TensorRT's engines, whose files may be anything, under a fake TensorRT that builds engines of a few
bytes: the real one is shown on a card, in test_cuda.py.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from test_bad_input import nobody

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("h5py")

import onnx
import onnx_models
from keras_densedepth import Layer, decoder_layers, encoder_layers, write_h5

from gpufgbg import DepthModel, DepthOptions, DeviceError, GpufgbgWarning, InputError, OptionError
from gpufgbg.backends import cuda
from gpufgbg.compositor import default_workers
from gpufgbg.depth import engine_tensorrt
from gpufgbg.depth.engine_tensorrt import OutOfMemory, TensorRTEngine


@pytest.fixture
def refused(refused):
    """As everywhere, in generate's words: the command ``depth`` calls --weights what generate calls --depth."""
    return lambda *words, **more: refused(*words, **more).replace("error: --weights", "error: --depth", 1)


@pytest.fixture(scope="session")
def h5_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """DenseDepth of the narrowest decoder."""
    path = write_h5(tmp_path_factory.mktemp("keras") / "small.h5", 16)
    yield path
    path.unlink()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return onnx_models.blur(tmp_path / "model.onnx")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 64, 3)).save(
        folder / "a.png"
    )
    return folder


@pytest.fixture
def refused_everywhere(refused, arguments, pictures, tmp_path):
    """What `generate --depth` and `depth FOLDER` say, which write nothing; they say the same."""

    def call(weights: object, *options: object) -> str:
        error = refused(*arguments, f"--depth={weights}", *options)
        theirs = refused(
            "depth", pictures, f"--weights={weights}", "--device=cpu", *options, out=tmp_path / "pictures_depth"
        )
        assert theirs == error
        return error.removeprefix("gpufgbg: error: ")

    return call


# -- weights --------------------------------------------------------------------------------------------


def test_no_such_file(refused_everywhere, tmp_path):
    error = refused_everywhere(tmp_path / "nyu.h5")
    assert error == (
        f"--depth {tmp_path / 'nyu.h5'}: can't be read: No such file or directory: expected a file of weights or "
        "'demo'"
    )


def test_a_folder(refused_everywhere, tmp_path):
    assert f"--depth {tmp_path}: can't be read: Is a directory" in refused_everywhere(tmp_path)


def test_an_empty_name(refused, arguments, pictures):
    assert "--depth: got '', expected a file of weights or 'demo'" in refused(*arguments, "--depth=")
    assert "--depth: got ''" in refused("depth", pictures, "--weights=", "--device=cpu")


@pytest.mark.parametrize("name", ["model.onnx", "weights.h5"])
def test_unreadable(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    path.chmod(0)
    with nobody(), pytest.raises(InputError, match=rf"^--depth .*{name}: can't be read: Permission denied"):
        DepthModel(path, 32, "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"just some text, and more of it", "no HDF5 file; expected DenseDepth's weights as a Keras HDF5 file (.h5)"),
        (b"<!DOCTYPE html><p>Access Denied", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(2000), "damaged HDF5 file"),
    ],
    ids=["empty", "text", "web page", "zeros"],
)
def test_no_hdf5(refused_everywhere, tmp_path, content, message):
    path = tmp_path / "nyu.h5"
    path.write_bytes(content)
    assert f"{path}: {message}" in refused_everywhere(path, "--depth-size=64")


def test_hdf5_of_another_network(refused_everywhere, tmp_path):
    dense = Layer("fc1", "Dense", ["input_1"], {}, {"kernel": (4, 3), "bias": (3,)})
    path = write_h5(tmp_path / "vgg.h5", layers=[Layer("input_1", "InputLayer", [], {}, {}), dense])
    assert f"{path}: " in (error := refused_everywhere(path, "--depth-size=64")) and "DenseDepth" in error


def test_truncated_hdf5(refused_everywhere, h5_file, tmp_path):
    path = tmp_path / "nyu.h5"
    with h5_file.open("rb") as file:
        path.write_bytes(file.read(300_000))
    assert f"{path}: truncated: 300000 of {h5_file.stat().st_size} bytes are there" in refused_everywhere(
        path, "--depth-size=64"
    )


def test_hdf5_whose_widths_do_not_fit(refused_everywhere, tmp_path):
    layers = [*encoder_layers(), *decoder_layers(16)]
    wide = next(layer for layer in layers if layer.name == "up2_convA")
    kernel = wide.shapes["kernel"]
    layers[layers.index(wide)] = Layer(
        wide.name, wide.kind, wide.inputs, wide.config, {**wide.shapes, "kernel": (3, 3, kernel[2] + 1, kernel[3])}
    )
    path = write_h5(tmp_path / "nyu.h5", layers=layers)
    error = refused_everywhere(path, "--depth-size=64")
    path.unlink()
    assert error.startswith(f"{path}: ") and "up2_convA" in error


def test_sizes_that_are_no_multiples_of_32(refused, refused_everywhere, arguments, h5_file):
    error = refused(*arguments, "--size=100", f"--depth={h5_file}")
    assert error.endswith(
        "--depth-size: got 200x200 (twice the frame of 100x100), expected multiples of 32, for example 224x224: the "
        "map is scaled to the frame"
    )
    error = refused_everywhere(h5_file, "--depth-size=64x100")
    assert error.startswith("--depth-size: got 64x100, expected multiples of 32, for example 64x128")


def test_any_frame_with_a_size_that_fits(run, arguments, h5_file, tmp_path):
    """What the message above tells to do."""
    code, _, error = run(
        *arguments, "--size=70x50", "--per-pair=1", "--samples=0:1", f"--depth={h5_file}", "--depth-size=32"
    )
    assert code == 0, error
    (path,) = (tmp_path / "out" / "fg_bg_depth").rglob("*.jpg")
    with Image.open(path) as depth:
        assert depth.size == (70, 50)


def test_densedepth_of_a_photo_is_bounded(run, h5_file, tmp_path, monkeypatch):
    """Twice the picture's size, as for a frame, would take minutes and gigabytes of a large one."""
    monkeypatch.setattr("gpufgbg.predict.LONGEST", 64)
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((60, 100, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    code, _, error = run("depth", tmp_path / "photos", f"--weights={h5_file}", "--device=cpu")
    line = "the depth network's input is 64x32 instead of the first picture's 192x128: --depth-size for another"
    assert code == 0 and f"gpufgbg: {line}" in error.splitlines()


# -- ONNX -----------------------------------------------------------------------------------------------


def without_data(path: Path, kept: int | None = None) -> None:
    """The file of a model's weights is gone, or has so many bytes left."""
    data = path.with_name("weights.data")
    if kept is None:
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:kept])


ONNX = {
    "two inputs": (onnx_models.two_inputs, "2 inputs (left, right), expected one picture as input"),
    "two outputs": (onnx_models.two_outputs, "2 outputs (depth, sureness), expected one map as output"),
    "dynamic rank": (onnx_models.dynamic_rank, "input image has a dynamic rank, expected a shape with 4 dimensions"),
    "dynamic rank of the output": (
        lambda path: onnx_models.blur(path, said=()), "output depth has a dynamic rank, expected a shape with",
    ),
    "uint8 input": (onnx_models.whole_numbers, "input image holds UINT8, expected FLOAT or FLOAT16"),
    "double output": (
        lambda path: onnx_models.blur(path, said_type="float64"), "output depth holds DOUBLE, expected FLOAT",
    ),
    "RGBA input": (onnx_models.four_channels, "input image is ?x4x?x?, expected Nx3xHxW or NxHxWx3"),
    "RGBA input, open sides": (
        lambda path: onnx_models.mean(path, ("N", "H", "W", 4)), "input image is ?x?x?x4, expected Nx3xHxW or NxHxWx3"
    ),
    "open channels of which 1 is taken": (
        lambda path: onnx_models.grey(path, ("N", "C", "H", "W")),
        "input image is ?x?x?x?, of 1 channels, expected Nx3xHxW or NxHxWx3",
    ),
    "weights beside it that are missing": (
        lambda path: without_data(onnx_models.external(path)),
        "its weights lie in weights.data, which can't be read: No such file or directory: put that file beside the",
    ),
    "weights beside it that are cut off": (
        lambda path: without_data(onnx_models.external(path), 100),
        "its weights lie in weights.data, which is cut off: 100 bytes, expected 108: get it again",
    ),
    "weights of another folder": (
        lambda path: path.write_bytes(
            onnx_models.external(path).read_bytes().replace(b"weights.data", b"../dear.data")
        ),
        "its weights lie in ../dear.data, expected a file in the model's own folder: export the model again",
    ),
    "weights at no place": (
        lambda path: path.write_bytes(onnx_models.external(path).read_bytes().replace(b"108", b"-10")),
        "its weights lie in weights.data at no possible place: export the model again",
    ),
    "unknown operator": (onnx_models.unknown_operator, "no usable ONNX model: No Op registered for Mystery"),
    "unknown domain": (
        lambda path: onnx_models.unknown_operator(path, "com.example"),
        "ONNX Runtime can't run it for 64x48 pixels (--depth-size): Fatal error: com.example:Mystery",
    ),
    "two maps": (
        lambda path: onnx_models.blur(path, size=(64, 48), channels=2, said=(1, 2, 48, 64)),
        "output depth is 1x2x48x64, expected one map a picture: NxHxW, Nx1xHxW or NxHxWx1",
    ),
    "two maps, not told": (lambda path: onnx_models.blur(path, channels=2), "the output is 1x2x48x64, expected one"),
    "three maps for any batch": (onnx_models.without_batch, "the output is 3x48x64, expected one map a picture: 1xH"),
    "one size": (onnx_models.only_32, "ONNX Runtime can't run it for 64x48 pixels (--depth-size): Node"),
    "tiles": (onnx_models.only_16s, "the output is 12x1x16x16, expected one map a picture: 1xHxW"),
    "garbage": (lambda path: path.write_bytes(b"\x08\x08" + bytes(range(256)) * 9), "no usable ONNX model: "),
    "text": (lambda path: path.write_bytes(b"not a model"), "no usable ONNX model: "),
    "empty": (lambda path: path.write_bytes(b""), "no usable ONNX model: no graph in it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ONNX)
def test_onnx_that_can_not_be_used(refused_everywhere, tmp_path, kind):
    write, message = ONNX[kind]
    path = tmp_path / "model.onnx"
    write(path)
    error = refused_everywhere(path)
    assert error.startswith("--depth ") and "model.onnx: " in error
    assert message in error


def test_a_size_that_a_model_turns_out_not_to_take(refused_everywhere, tmp_path):
    error = refused_everywhere(onnx_models.only_16s(tmp_path / "model.onnx"), "--depth-size=40x30")
    assert error.startswith("--depth model.onnx: ONNX Runtime can't run it for 40x30 pixels (--depth-size): ")


def test_truncated_onnx(refused_everywhere, model):
    data = model.read_bytes()
    for length in (3, len(data) // 2, len(data) - 1):
        model.write_bytes(data[:length])
        assert "no usable ONNX model: " in refused_everywhere(model)


def test_onnx_under_another_name(refused, arguments, model):
    other = model.rename(model.with_name("model.bin"))
    error = refused(*arguments, f"--depth={other}", "--depth-size=64")
    assert error.endswith(f"{other}: an ONNX model, not Keras weights: rename the file to model.onnx")


def test_a_size_that_the_file_does_not_take(refused_everywhere, tmp_path):
    path = onnx_models.blur(tmp_path / "fixed.onnx", size=(32, 40), batch=2)
    assert refused_everywhere(path, "--depth-size=64").startswith("--depth-size: got 64x64, fixed.onnx takes 32x40")
    assert refused_everywhere(path, "--depth-batch=3").startswith("--depth-batch: got 3, fixed.onnx takes 2")


@pytest.mark.parametrize(("dtype", "asked"), [("float32", "fp16"), ("float16", "fp32")])
def test_a_precision_that_the_file_does_not_have(refused_everywhere, tmp_path, dtype, asked):
    path = onnx_models.blur(tmp_path / "model.onnx", dtype=dtype)
    own = {"fp16": "fp32", "fp32": "fp16"}[asked]
    error = refused_everywhere(path, f"--depth-precision={asked}")
    assert error == f"--depth-precision: got {asked}, model.onnx is {own}: leave it out"


# -- options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--depth-size=0", "--depth-size: got (0, 0), expected 1 to 16,384 pixels a side"),
        ("--depth-size=64x16385", "--depth-size: got (64, 16385), expected 1 to"),
        ("--depth-size=big", "--depth-size: got 'big', expected a number of pixels"),
        ("--depth-batch=0", "--depth-batch: got 0, expected 1 to 1,024"),
        ("--depth-batch=1025", "--depth-batch: got 1025"),
        ("--depth-batch=many", "--depth-batch: got 'many', expected a whole number"),
        ("--depth-scale=0", "--depth-scale: got '0', expected a positive number"),
        ("--depth-scale=-1", "--depth-scale: got '-1'"),
        ("--depth-scale=nan", "--depth-scale: got 'nan'"),
        ("--depth-scale=inf", "--depth-scale: got 'inf'"),
        ("--depth-scale=1e-45", "--depth-scale: got 1e-45, expected a positive number of metres"),
        ("--depth-scale=1e39", "--depth-scale: got 1e+39, expected a positive number of metres"),
        ("--depth-input=half", "--depth-input: invalid choice"),
        ("--depth-backend=torch", "--depth-backend: invalid choice"),
        ("--depth-precision=int8", "--depth-precision: invalid choice"),
        ("--depth-range=0..1", "--depth-range: invalid choice"),
        ("--depth-meaning=nearness", "--depth-meaning: invalid choice"),
        ("--depth-upsampling=nearest", "--depth-upsampling: invalid choice"),
    ],
)
def test_values_out_of_range(refused_everywhere, model, run, arguments, option, message, tmp_path):
    if "invalid choice" in message or "got '" in message:  # usage errors name the command in their help
        for command in ((*arguments, f"--depth={model}"), ("depth", tmp_path, f"--weights={model}")):
            code, printed, error = run(*command, option)
            assert (code, printed, error.count("\n")) == (2, "", 1) and message in error
        assert not (tmp_path / "out").exists()
    else:
        assert refused_everywhere(model, option).startswith(message)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": None}, {"weights": 3}, {"input": None}, {"input": ["saved"]}, {"backend": "cuda"},
        {"precision": 16}, {"size": 2.5}, {"size": (3,)}, {"size": "64"}, {"size": True}, {"batch": 2.0},
        {"batch": True}, {"range": "0"}, {"meaning": ""}, {"scale": "2"}, {"scale": True}, {"scale": float("nan")},
        {"scale": -0.0}, {"upsampling": None},
    ],
    ids=repr,
)  # fmt: skip
def test_options_of_other_types(options):
    with pytest.raises(OptionError, match=r"^depth(_[a-z]+)?: got .*, expected "):
        DepthOptions(**options)


def test_options_become_plain_values(tmp_path):
    options = DepthOptions(
        tmp_path / "x.h5", size=np.int16(64), batch=np.int64(3), scale=np.float32(2)  # type: ignore[arg-type]
    )  # fmt: skip
    assert json.loads(json.dumps([options.weights, options.size, options.batch, options.scale])) == [
        str(tmp_path / "x.h5"), [64, 64], 3, 2.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--depth-range=imagenet",
            "--depth-range: got 'imagenet': DenseDepth's is unit; the option is for models in ONNX",
        ),
        (
            "--depth-meaning=metres",
            "--depth-meaning: got 'metres': DenseDepth's is inverse; the option is for models in",
        ),
    ],
)
def test_options_that_do_not_go_with_hdf5(refused_everywhere, h5_file, option, message):
    assert refused_everywhere(h5_file, option, "--depth-size=64").startswith(message)


def test_options_that_do_not_go_with_onnx(refused_everywhere, model):
    error = refused_everywhere(model, "--depth-upsampling=align-corners")
    assert error == "--depth-upsampling: model.onnx is ONNX: the option is for DenseDepth's HDF5"


# -- predictions ----------------------------------------------------------------------------------------


def test_not_a_number(run, arguments, tmp_path):
    path = onnx_models.not_numbers(tmp_path / "odd.onnx")
    code, printed, error = run(*arguments, f"--depth={path}")
    (line,) = [line for line in error.splitlines() if not line.endswith("/s")]
    assert (code, printed) == (2, "")
    assert line.startswith("gpufgbg: error: --depth odd.onnx: ")
    assert "values of the prediction for picture " in line and "are no numbers: the weights are damaged" in line


def test_what_helps_where_fp16_gives_no_numbers(tensorrt, model, h5_file, tmp_path):
    """A file's own fp16 is the same with --depth-precision fp32, which ONNX Runtime refuses for it."""

    def hint(weights: Path, device: str, **options: Any) -> str:
        made = DepthModel(DepthOptions(weights, **options), (32, 32), device)
        with pytest.raises(InputError) as caught:
            made.check(np.array([0, 3], np.int32))
        return str(caught.value).partition("not meant for these options")[2]

    half = onnx_models.blur(tmp_path / "half.onnx", dtype="float16")
    assert hint(half, "cpu") == hint(half, "cuda") == ", or too large for fp16: export it in fp32"
    assert hint(model, "cuda") == ", or too large for fp16: try --depth-precision fp32"
    assert hint(h5_file, "cpu", precision="fp16") == ", or too large for fp16: try --depth-precision fp32"
    assert hint(model, "cpu") == hint(h5_file, "cpu") == ""


@pytest.mark.parametrize("meaning", ["metres", "inverse"])
def test_a_flat_prediction_is_grey_0(run, arguments, tmp_path, meaning):
    import pyarrow.parquet as pq

    path = onnx_models.flat(tmp_path / "flat.onnx")
    assert run(*arguments, f"--depth={path}", f"--depth-meaning={meaning}", "--depth-scale=3")[0] == 0
    files = sorted((tmp_path / "out" / "fg_bg_depth").rglob("*.jpg"))
    assert len(files) == 48
    assert all(not np.asarray(Image.open(file)).any() for file in files)
    rows = pq.read_table(tmp_path / "out" / "labels.parquet").to_pydict()
    level = 6.0 if meaning == "metres" else 1.5
    assert rows["depth_min"] == rows["depth_max"] == [level] * 48
    assert run("verify", tmp_path / "out")[0] == 0


# -- packages and machines ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("onnx", "--depth: the package onnx is not installed: pip install 'gpufgbg[depth]'"),
        ("onnxruntime", "--depth: ONNX Runtime is not installed: pip install 'gpufgbg[depth]'"),
        ("h5py", "reading DenseDepth's weights needs h5py: pip install 'gpufgbg[depth]'"),
    ],
)
def test_missing_packages(refused_everywhere, model, h5_file, monkeypatch, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    if package != "h5py":
        assert refused_everywhere(model) == message
    if package != "onnxruntime":
        assert refused_everywhere(h5_file, "--depth-size=64") == message


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """As if there were a CUDA device, of 8 GB; arrays in its memory are NumPy's. TensorRT is not installed."""
    cupy = MagicMock(name="cupy")
    cupy.cuda.runtime.getDeviceProperties.return_value = {
        "name": b"Fake A1", "major": 9, "minor": 0, "multiProcessorCount": 7,
    }  # fmt: skip
    cupy.cuda.Device.return_value.id = 0
    cupy.cuda.Device.return_value.mem_info = (1 << 30, 8 << 30)
    cupy.asarray, cupy.asnumpy, cupy.ascontiguousarray = np.asarray, np.asarray, np.ascontiguousarray
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(cuda, "why_not", lambda index=0: None)
    return cupy


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_no_tensorrt_on_a_card(a_card, refused, arguments, model, pictures, device):
    expected = (
        "gpufgbg: error: --depth: TensorRT is not installed: pip install 'gpufgbg[tensorrt]', or use "
        "--depth-backend onnxruntime, which works everywhere and is slower"
    )
    assert refused(*arguments, f"--depth={model}", f"--device={device}") == expected
    assert refused("depth", pictures, f"--weights={model}", f"--device={device}") == expected
    assert refused("depth", "build", f"--weights={model}", f"--device={device}") == expected


def test_onnxruntime_works_on_a_card_without_tensorrt(a_card, model):
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), np.uint8)
    alone = DepthModel(model, (32, 24), "cpu")
    here = alone.predict(images)
    told: list[str] = []
    there = DepthModel(DepthOptions(model, backend="onnxruntime"), (32, 24), "cuda", tell=told.append)
    assert there.device == "cuda:0"
    assert told == ["the depth network runs on the CPU, on all cores: for the card, install onnxruntime-gpu"]
    assert there.engine.description == alone.engine.description
    threads = [depth.engine._session.get_session_options().intra_op_num_threads for depth in (alone, there)]
    assert threads == [1, default_workers()]
    maps = there.predict(images)
    np.testing.assert_array_equal(maps.grey, here.grey)
    np.testing.assert_array_equal(maps.range, here.range)


def test_tensorrt_without_a_card(refused, arguments, model, pictures):
    expected = "--depth-backend tensorrt: needs a CUDA device: use --depth-backend onnxruntime"
    assert expected in refused(*arguments, f"--depth={model}", "--depth-backend=tensorrt")
    assert expected in refused("depth", pictures, f"--weights={model}", "--depth-backend=tensorrt", "--device=cpu")


def test_build_without_a_card(refused, model, monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda index=0: f"there is no device {index}")
    for device, number in (("auto", 0), ("cuda", 0), ("cuda:3", 3)):
        assert refused("depth", "build", f"--weights={model}", f"--device={device}") == (
            f"gpufgbg: error: device {'cuda' if device == 'auto' else device}: there is no device {number}; engines "
            "are built on the machine that has the card"
        )


def test_the_frame_is_for_build(refused, model, pictures):
    error = refused("depth", pictures, f"--weights={model}", "--frame=64x48")
    assert error == "gpufgbg: error: --frame: is for build: a data set or a folder of pictures has its own"


def test_build_is_for_tensorrt(refused, model, tmp_path):
    build = ("depth", "build", f"--weights={model}")
    assert "--depth-backend: got 'onnxruntime', which has no engines" in refused(
        *build, "--depth-backend=onnxruntime"
    )
    assert "--device: got 'cpu', which has no engines to build" in refused(*build, "--device=cpu")
    assert "--out: is for a folder of pictures" in refused(*build, f"--out={tmp_path / 'out'}")


# -- the cache of engines -------------------------------------------------------------------------------


class Fake:
    """A TensorRT whose engines are b"engine" and what they were built from; counts builds."""

    def __init__(self, version: str) -> None:
        self.builds: list[int] = []
        self.fits: Callable[[int], bool] = lambda batch: True
        self.failure = ""
        self.during: Callable[[], object] = lambda: None
        self.module = module = MagicMock(name="tensorrt")
        module.__version__ = version
        del module.IProgressMonitor
        module.ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "WARNING": 2})
        module.Runtime.return_value.deserialize_cuda_engine = self.load
        module.Builder = self.builder
        module.OnnxParser.return_value.parse = self.parse
        self.parses = True
        self.read_times: Callable[[bytes], object] = lambda data: object()
        self.take_times: Callable[[object], bool] = lambda cache: True

    def load(self, plan: bytes) -> bytes | None:
        return plan if plan.startswith(b"engine") else None

    def parse(self, model: bytes) -> bool:
        import onnx

        self.model = onnx.load_model_from_string(model)
        return self.parses

    def builder(self, logger: Any) -> Any:
        def build(network: Any, config: Any) -> bytes | None:
            batch = self.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
            self.builds.append(batch)
            self.during()
            if self.failure or not self.fits(batch):
                logger.log(1, self.failure or "Error Code 2: OutOfMemory (no further information)\nand more")
                return None
            return b"engine %d" % batch

        made = MagicMock()
        made.build_serialized_network = build
        config = made.create_builder_config.return_value
        config.get_timing_cache.return_value.serialize.return_value = b"times"
        config.create_timing_cache = self.read_times

        def take(cache: object, ignore_mismatch: bool) -> bool:
            if cache is None:
                raise TypeError("set_timing_cache(): incompatible function arguments")
            return self.take_times(cache)

        config.set_timing_cache = take
        return made


@pytest.fixture
def tensorrt(a_card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    fake = Fake("8.6.1")
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setenv("GPUFGBG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TensorRTEngine, "_prepare", lambda self, source: None)
    return fake


def load(weights: Path, tell: Callable[[str], None] | None = None, **options: Any) -> DepthModel:
    return DepthModel(DepthOptions(weights, **options), (32, 32), "cuda", tell=tell)


def engine_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").glob("*.engine")
    return path


def test_engines_are_kept(tensorrt, model, tmp_path):
    first = load(model)
    assert first.engine.built and tensorrt.builds == [64] and first.batch == 64
    head, _, plan = engine_file(tmp_path).read_bytes().partition(b"\n")
    assert plan == b"engine 64"
    header = json.loads(head)
    assert header["weights"] == first.source.sha256 and header["version"] == "8.6.1" and header["size"] == [32, 32]
    again = load(model)
    assert not again.engine.built and tensorrt.builds == [64]
    assert again.engine.description == first.engine.description == {
        "backend": "tensorrt", "version": "8.6.1", "device": "Fake A1", "precision": "fp16", "batch": 64,
    }  # fmt: skip


def test_engines_for_anything_else_are_others(tensorrt, model, a_card, tmp_path):
    load(model)
    load(model, batch=32)
    load(model, precision="fp32")
    load(model, size=(48, 32))
    load(onnx_models.blur(tmp_path / "other.onnx", seed=1))
    tensorrt.module.__version__ = "8.6.2"
    load(model)
    a_card.cuda.runtime.getDeviceProperties.return_value["multiProcessorCount"] = 8
    load(model)
    assert len(tensorrt.builds) == len(list((tmp_path / "cache").glob("*.engine"))) == 7
    load(model, scale=3, meaning="relative", input="rendered")  # of no concern to the engine
    assert len(tensorrt.builds) == 7


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "cut in the header": lambda data: data[:20],
    "longer": lambda data: data + b"\0",
    "a byte is another": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "no header": lambda data: data.partition(b"\n")[2],
    "foreign": lambda data: data.replace(b"Fake A1", b"Fake B2"),
    "random": lambda data: bytes(range(256)) * 300,
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_engine_is_built_again(tensorrt, model, tmp_path, how):
    load(model)
    path = engine_file(tmp_path)
    data = path.read_bytes()
    path.write_bytes(SPOILED[how](data))
    assert load(model).engine.built and tensorrt.builds == [64, 64]
    assert path.read_bytes() == data
    assert not load(model).engine.built


def test_an_engine_that_tensorrt_does_not_take_is_built_again(tensorrt, model, tmp_path, monkeypatch):
    load(model)
    refused = iter([None, None])
    monkeypatch.setattr(
        tensorrt.module.Runtime.return_value, "deserialize_cuda_engine", lambda plan: next(refused, plan)
    )
    assert load(model).engine.built and len(tensorrt.builds) == 2


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder that everybody may read and only root write."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    yield root
    shutil.rmtree(root)


def test_a_cache_that_can_not_be_written(tensorrt, model, closed, monkeypatch):
    """It works, says so, and builds each time; an engine that lies there is used."""
    monkeypatch.setenv("GPUFGBG_CACHE", str(closed))
    model.parent.chmod(0o755)
    shared = shutil.copy(model, closed / "model.onnx")
    with nobody():
        for number in (1, 2):
            with pytest.warns(
                GpufgbgWarning, match=rf"the depth engine can't be kept in {closed} \(Permission denied\)"
            ):
                assert load(shared).engine.built
            assert len(tensorrt.builds) == number
    load(shared)
    with nobody(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load(shared).engine.built


def test_a_cache_that_is_a_file(tensorrt, model, tmp_path):
    (tmp_path / "cache").write_bytes(b"dear")
    with pytest.warns(GpufgbgWarning, match="the depth engine can't be kept in .*make the folder writable or set"):
        assert load(model).engine.built
    assert (tmp_path / "cache").read_bytes() == b"dear"


def test_a_full_disk(tensorrt, model, monkeypatch, tmp_path):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine_tensorrt, "write_atomic", full)
    with pytest.warns(GpufgbgWarning, match=r"can't be kept in .*cache \(No space left on device\)"):
        assert load(model).engine.built
    assert list((tmp_path / "cache").glob("*.engine")) == []


def test_a_lock_of_a_process_that_died(tensorrt, model, tmp_path):
    load(model)
    path = engine_file(tmp_path)
    path.unlink()
    code = (
        "import sys, time; from filelock import FileLock\n"
        "FileLock(sys.argv[1]).acquire(); print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(path.with_suffix(".lock"))]
    told: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"locked\n"
        killer = threading.Timer(0.2, process.send_signal, [signal.SIGKILL])
        killer.start()
        assert load(model, told.append).engine.built
    assert tensorrt.builds == [64, 64]
    assert path.with_suffix(".lock").exists() and not load(model).engine.built


def test_two_builders_at_once(tensorrt, model):
    """The second waits, says so, and takes what the first has built."""
    told: list[str] = []
    waiting = threading.Event()
    building = threading.Event()

    def during() -> None:
        building.set()
        assert waiting.wait(20)

    def tell(text: str) -> None:
        told.append(text)
        waiting.set()

    tensorrt.during = during
    found: list[DepthModel] = []
    first = threading.Thread(target=lambda: found.append(load(model)))
    first.start()
    assert building.wait(20)
    second = load(model, tell)
    first.join()
    assert tensorrt.builds == [64]
    assert found[0].engine.built and not second.engine.built
    assert told == ["another process is building the depth engine: waiting for it"]


@pytest.mark.parametrize("where", ["while it is built", "when it is loaded"])
def test_out_of_memory_takes_smaller_batches(tensorrt, model, monkeypatch, where):
    if where == "while it is built":
        tensorrt.fits = lambda batch: batch <= 16
    else:

        def prepare(self: TensorRTEngine, source: object) -> None:
            if self.batch > 16:
                raise OutOfMemory("cudaMalloc")

        monkeypatch.setattr(TensorRTEngine, "_prepare", prepare)
    told: list[str] = []
    assert load(model, told.append).batch == 16
    assert tensorrt.builds == [64, 32, 16]
    assert [line for line in told if "memory" in line] == [
        "out of the card's memory: trying 32 pictures at a time",
        "out of the card's memory: trying 16 pictures at a time",
    ]


def test_out_of_memory_with_a_batch_that_was_asked_for(tensorrt, model, tmp_path):
    tensorrt.fits = lambda batch: False
    with pytest.raises(DeviceError) as caught:
        load(model, batch=48)
    assert str(caught.value) == (
        "device cuda:0: out of memory: the depth engine for 48 pictures at a time does not fit, 1,024 MB of 8,192 MB "
        "are free: choose a smaller --depth-batch, or free some"
    )
    assert tensorrt.builds == [48]
    with pytest.raises(DeviceError, match=r"for 1 pictures at a time does not fit, .* are free: free some$"):
        load(model)
    with pytest.raises(DeviceError, match=r"for 5 pictures at a time does not fit, .* are free: free some$"):
        load(onnx_models.blur(tmp_path / "five.onnx", batch=5))
    assert list((tmp_path / "cache").glob("*.engine")) == []


def test_networks_that_tensorrt_can_not_run(tensorrt, model):
    tensorrt.failure = "Error Code 10: could not find any implementation\nfor node x"
    with pytest.raises(DeviceError) as caught:
        load(model)
    assert str(caught.value) == (
        "--depth model.onnx: TensorRT can't build an engine: Error Code 10: could not find any implementation for "
        "node x: try --depth-backend onnxruntime"
    )
    tensorrt.parses = False
    parser = tensorrt.module.OnnxParser.return_value
    parser.num_errors = 1
    error = parser.get_error.return_value
    error.desc.return_value = "Plugin not\nfound"
    first = onnx.load(model).graph.node[0].op_type
    for node, said in ((0, f"operator {first}: Plugin not found"), (-1, "Plugin not found")):
        error.node.return_value = node
        with pytest.raises(InputError, match=rf"^--depth model.onnx: TensorRT can't import it: {said}$"):
            load(model)


@pytest.mark.parametrize("why", ["damaged", "of another card", "none at all"])
def test_times_that_are_of_no_use_are_replaced(tensorrt, model, tmp_path, why):
    load(model)
    (path,) = (tmp_path / "cache").glob("*.timing")
    assert path.read_bytes() == b"times"
    path.write_bytes(b"old")
    read: list[bytes] = []

    def times(data: bytes) -> object:
        read.append(data)
        return None if (data and why == "damaged") or why == "none at all" else data or b"new"

    tensorrt.read_times = times
    tensorrt.take_times = lambda cache: cache == b"new"
    assert load(model, batch=3).engine.built
    assert read == [b"old", b""] and path.read_bytes() == (b"old" if why == "none at all" else b"times")


def test_a_context_may_need_no_memory():
    assert engine_tensorrt._context_bytes(SimpleNamespace(device_memory_size=7)) == 7
    assert engine_tensorrt._context_bytes(SimpleNamespace(device_memory_size=7, device_memory_size_v2=9)) == 9
    assert engine_tensorrt._context_bytes(SimpleNamespace(device_memory_size_v2=0)) == 0


def test_tensorrt_that_picks_no_types(tensorrt, model, h5_file, tmp_path):
    """TensorRT 11: an ONNX file's types are the engine's, and what is told of it."""
    tensorrt.module.__version__ = "11.0.0"
    told: list[str] = []
    half = onnx_models.blur(tmp_path / "half.onnx", dtype="float16")
    assert load(model, told.append).engine.description["precision"] == "fp16"
    del tensorrt.module.BuilderFlag.FP16
    for weights, precision in ((model, "fp32"), (half, "fp16"), (h5_file, "fp16")):
        shutil.rmtree(tmp_path / "cache")
        assert load(weights, told.append).engine.description["precision"] == precision
        assert json.loads(engine_file(tmp_path).read_bytes().partition(b"\n")[0])["precision"] == precision
    assert [line for line in told if "fp32" in line] == [
        "the depth engine is fp32, as model.onnx is, which TensorRT 11.0.0 keeps: one in fp16 is faster"
    ]
    assert load(model, precision="fp32").engine.description["precision"] == "fp32"
    assert load(h5_file, precision="fp32").engine.description["precision"] == "fp32"
    with pytest.raises(OptionError) as caught:
        load(model, precision="fp16")
    assert str(caught.value) == (
        "depth_precision: got fp16, model.onnx is fp32, which TensorRT 11.0.0 keeps: leave it out"
    )


@pytest.mark.parametrize("version", ["8.5.3", "7.2.0", "8.6.1.post1", "10.0.0b6", "11.1"])
def test_versions(tensorrt, model, version):
    tensorrt.module.__version__ = version
    if version < "8.6" and version[1] == ".":
        with pytest.raises(
            DeviceError, match=rf"^--depth: TensorRT {version} is too old, expected 8.6 or newer: pip"
        ):
            load(model)
    else:
        assert load(model).engine.built


def test_build_ahead(tensorrt, run, model, tmp_path):
    command = ("depth", "build", f"--weights={model}", "--frame=32", "--depth-batch=8")
    code, printed, error = run(*command)
    assert (code, printed) == (0, "8.6.1 engine for Fake A1, 8 pictures at a time: built now\n")
    assert error.startswith("gpufgbg: building the depth engine for Fake A1 (once; takes minutes)")
    assert run(*command)[:2] == (0, "8.6.1 engine for Fake A1, 8 pictures at a time: was there\n")
    code, printed, _ = run(*command, "--json")
    assert json.loads(printed)["built"] is False and tensorrt.builds == [8]
    assert not load(model, batch=8).engine.built


def test_the_users_cache_folder(monkeypatch, tmp_path):
    for name in ("GPUFGBG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert engine_tensorrt.cache_folder() == tmp_path / ".cache" / "gpufgbg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert engine_tensorrt.cache_folder() == tmp_path / "xdg" / "gpufgbg"
    monkeypatch.setenv("GPUFGBG_CACHE", str(tmp_path / "own"))
    assert engine_tensorrt.cache_folder() == tmp_path / "own"
