"""Depth maps end to end on the CPU: every sink, data sets that get them later, folders of pictures, arrays."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import oracle
import pages
import pytest
from conftest import smooth, start
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx_models
import onnxruntime
from test_depth_processing import reference_input, resized

from gpufgbg import (
    Compositor,
    DatasetError,
    DepthModel,
    DepthOptions,
    GpufgbgWarning,
    InputError,
    Interrupted,
    Moments,
    OptionError,
    Recipe,
    add_depth,
    dataset,
    generate,
    pipeline,
    predict_folder,
    prepare,
)
from gpufgbg.depth import engine_onnxruntime
from gpufgbg.depth.engine_onnxruntime import processor
from gpufgbg.depth.processing import NORMALISATIONS
from gpufgbg.layout import KINDS, TAR_SUFFIXES
from gpufgbg.manifest import Manifest
from gpufgbg.recipe import Shard

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=1)
COUNT = 24
SINKS = ("tree", "zip", "tar")
f32 = np.float32


# -- what is expected -----------------------------------------------------------------------------------


class Expected(NamedTuple):
    grey: np.ndarray
    file: bytes
    near: float
    far: float
    metres: np.ndarray


def expected_depth(
    pixels: np.ndarray,
    model: Path,
    *,
    size: tuple[int, int] | None = None,
    meaning: str = "metres",
    scale: float = 1.0,
    range: str = "unit",
    channels_last: bool = False,
    batch: int = 1,
    dtype: str = "float32",
) -> Expected:
    """The depth map of one picture (H, W, 3), by ONNX Runtime run plainly and the formula of docs/depth.md."""
    height, width = pixels.shape[:2]
    network = size or (width, height)
    layout = "NHWC" if channels_last else "NCHW"
    images = reference_input(pixels[None], network[::-1], layout, 3, np.dtype(dtype), *NORMALISATIONS[range])
    session = onnxruntime.InferenceSession(model.read_bytes(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: np.repeat(images, batch, axis=0)})[0]
    p = found[0].reshape([side for side in found.shape[1:] if side != 1]).astype(f32)
    if p.shape != (height, width):
        p = resized(p, (height, width), "edge")
    d = np.clip(f32(1000) / p, f32(10), f32(1000)) / f32(1000) if meaning == "inverse" else p
    q = (d - d.min()) / (d.max() - d.min())
    grey = np.minimum(255, np.floor(f32(256) * q)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "JPEG")
    return Expected(grey, file.getvalue(), float(d.min() * f32(scale)), float(d.max() * f32(scale)), d * f32(scale))


def formulas() -> list[str]:
    """What README and the page of depth maps say that metres are."""
    texts = [path.read_text() for path in (pages.README, pages.ROOT / "docs" / "depth.md")]
    found = [re.search(r"metres = (.*depth_max.*?)`?$", text, re.MULTILINE)[1] for text in texts]
    return [re.sub(r"row\[\"(\w+)\"\]", r"\1", formula) for formula in found]


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def stored(out: Path) -> dict[str, bytes]:
    """The samples' files of a data set, whatever its sink, under their paths in the folder tree."""
    folders = tuple(f"{KINDS[kind]}/" for kind in TAR_SUFFIXES)
    if (out / "dataset.zip").is_file():
        with zipfile.ZipFile(out / "dataset.zip") as archive:
            return {name: archive.read(name) for name in archive.namelist() if name.startswith(folders)}
    found = {name: data for name, data in oracle.tree_of(out).items() if name.startswith(folders)}
    kinds = {suffix: KINDS[kind] for kind, suffix in TAR_SUFFIXES.items()}
    for path in sorted(out.glob("shards/*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                stem, _, suffix = member.name.partition(".")
                if suffix in kinds:
                    data = archive.extractfile(member).read()
                    found[f"{kinds[suffix]}/{stem.split('_fg_')[0]}/{stem}.jpg"] = data
    return found


def depth_files(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in stored(out).items() if name.startswith("fg_bg_depth/")}


def table(out: Path) -> dict[str, list]:
    import pyarrow.parquet as pq

    return pq.read_table(out / "labels.parquet").to_pydict()


def without_depth(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in stored(out).items() if not name.startswith("fg_bg_depth/")}


# -- fixtures -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with blur.onnx, other.onnx (of other weights) and inverse.onnx."""
    folder = tmp_path_factory.mktemp("models")
    onnx_models.blur(folder / "blur.onnx")
    onnx_models.blur(folder / "other.onnx", seed=1)
    onnx_models.inverse(folder / "inverse.onnx")
    return folder


@pytest.fixture
def make(folders, models, tmp_path):
    """Makes a data set of the small input with depth in ``tmp_path / name``."""

    def call(name: str, recipe: Recipe = SMALL, depth="blur.onnx", **options):
        if isinstance(depth, str):
            depth = models / depth
        return generate(
            tmp_path / name, **folders, recipe=recipe, depth=depth, **{"workers": 2, "device": "cpu", **options}
        )

    return call


@pytest.fixture
def later(models, tmp_path):
    """Adds depth to the data set in ``tmp_path / name``."""

    def call(name: str, depth="blur.onnx", **options):
        depth = models / depth if isinstance(depth, str) else depth
        return add_depth(tmp_path / name, depth, **{"workers": 2, "device": "cpu", **options})

    return call


@pytest.fixture
def short_shards(monkeypatch):
    """Shards of a few samples, so that small data sets have many."""
    monkeypatch.setattr("gpufgbg.recipe._SHARD_SAMPLES", 7)


def engine(batch: int = 1, precision: str = "fp32") -> dict:
    return {
        "backend": "onnxruntime", "version": onnxruntime.__version__, "provider": "CPUExecutionProvider",
        "processor": processor(), "precision": precision, "batch": batch,
    }  # fmt: skip


# -- generate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize(
    ("model", "recipe", "options"),
    [
        ("inverse.onnx", SMALL, {"meaning": "inverse", "scale": 10.0}),
        (
            "blur.onnx",
            Recipe(1, size=(77, 37), foreground_height=20, quality=90, subsampling="444"),
            {"size": (64, 32)},
        ),
    ],
    ids=["inverse", "resized"],
)
def test_depth_maps_equal_a_plain_computation(make, models, tmp_path, sink, model, recipe, options):
    report = make("out", recipe, DepthOptions(models / model, **options), sink=sink)
    out = tmp_path / "out"
    files, rows = stored(out), table(out)
    assert len(files) == 3 * COUNT and report.complete
    greys = []
    for name, near, far in zip(rows["name"], rows["depth_min"], rows["depth_max"], strict=True):
        path = f"{name.split('_fg_')[0]}/{name}"
        expected = expected_depth(decoded(files[f"fg_bg/{path}"]), models / model, **options)
        assert files[f"fg_bg_depth/{path}"] == expected.file
        assert (near, far) == (expected.near, expected.far)
        assert decoded(files[f"fg_bg_depth/{path}"]).shape == (recipe.height, recipe.width)
        # README's and the page's formula: half a level off at most but for what JPEG does to the levels
        for formula in formulas():
            back = eval(formula, {"grey": expected.grey, "depth_min": near, "depth_max": far})
            assert np.abs(back - expected.metres).max() <= (far - near) / 512 * 1.001
        levels = decoded(files[f"fg_bg_depth/{path}"]).astype(float)
        assert np.abs(near + (levels + 0.5) / 256 * (far - near) - expected.metres).mean() < 4 / 256 * (far - near)
        greys.append(expected.grey)
    content = json.loads((out / "dataset.json").read_text())
    assert Moments.from_dict(content["statistics"]["depth"]) == Moments.of(np.stack(greys))
    assert report.statistics["depth"] == Moments.of(np.stack(greys))
    assert content["bytes"]["depth"] == report.size_bytes["depth"] == sum(map(len, depth_files(out).values()))
    assert report.counts["depth"] == COUNT


def test_composites_masks_and_labels_are_those_without_depth(make, tmp_path):
    make("with")
    make("without", depth=None)
    assert without_depth(tmp_path / "with") == stored(tmp_path / "without")
    ours, theirs = table(tmp_path / "with"), table(tmp_path / "without")
    assert {name: column for name, column in ours.items() if not name.startswith("depth")} == theirs


@pytest.mark.parametrize(
    ("form", "options", "plain"),
    [
        ({"channels_last": True}, {}, {"channels_last": True}),
        ({"channels_last": True, "rank": 3}, {}, {"channels_last": True}),
        ({"rank": 3}, {"range": "imagenet"}, {"range": "imagenet"}),
        ({"size": (32, 40)}, {"range": "255"}, {"range": "255", "size": (32, 40)}),
        ({"stride": 2}, {"size": (96, 80)}, {"size": (96, 80)}),
        ({"batch": 4}, {"meaning": "relative"}, {"batch": 4}),
        ({"dtype": "float16"}, {}, {"dtype": "float16"}),
        (
            {"metadata": {"range": "255", "meaning": "inverse"}, "tail": [("Mul", 0.2)]},
            {},
            {"range": "255", "meaning": "inverse"},
        ),
    ],
    ids=[
        "NHWC",
        "NHWC, rank 3",
        "imagenet",
        "own size",
        "half the size",
        "own batch",
        "fp16",
        "said",
    ],
)
def test_any_form_of_model(make, tmp_path, form, options, plain):
    path = onnx_models.blur(tmp_path / "model.onnx", **form)
    make("out", depth=DepthOptions(path, **options), samples=(0, 5))
    out = tmp_path / "out"
    files, rows = stored(out), table(out)
    for name, near, far in zip(rows["name"], rows["depth_min"], rows["depth_max"], strict=True):
        path_ = f"{name.split('_fg_')[0]}/{name}"
        expected = expected_depth(decoded(files[f"fg_bg/{path_}"]), path, **plain)
        assert files[f"fg_bg_depth/{path_}"] == expected.file
        assert (near, far) == (expected.near, expected.far)
    precision = "fp16" if form.get("dtype") == "float16" else "fp32"
    content = json.loads((out / "dataset.json").read_text())
    assert content["depth"]["engines"] == [engine(form.get("batch", 1), precision)]


OPEN = ("batch_size", "num_channels", "height", "width")  # as Hugging Face's exports have it


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"head": [("Sub", 0.5), ("Div", 0.25), ("Mul", 0.25), ("Add", 0.5)]},
        {"channels_last": True},
        {"said_input": (1, None, 20, 28)},
    ],
    ids=["convolution", "normalised first", "transposed first", "fixed sides"],
)
def test_model_with_open_channels(tmp_path, images, form):
    """What the first convolution takes for channels decides."""
    known = {name: value for name, value in form.items() if name != "said_input"}
    plain = DepthModel(onnx_models.blur(tmp_path / "plain.onnx", **known), (28, 20), "cpu").predict(images)
    path = onnx_models.blur(tmp_path / "open.onnx", **{"said_input": OPEN, **form})
    np.testing.assert_array_equal(DepthModel(path, (28, 20), "cpu").predict(images).metres, plain.metres)


def test_model_with_open_channels_and_no_convolution(tmp_path, images):
    maps = DepthModel(onnx_models.mean(tmp_path / "mean.onnx", OPEN), (28, 20), "cpu").predict(images)
    np.testing.assert_allclose(maps.metres, images.mean(3) / 255, rtol=1e-5)


def test_model_with_weights_in_a_file_beside_it(tmp_path, models, images):
    import hashlib

    path = onnx_models.external(tmp_path / "model.onnx")
    model = DepthModel(path, (28, 20), "cpu")
    expected = DepthModel(models / "blur.onnx", (28, 20), "cpu").predict(images)
    np.testing.assert_array_equal(model.predict(images).metres, expected.metres)
    both = path.read_bytes() + (tmp_path / "weights.data").read_bytes()
    sha256 = model.describe()["sha256"]
    assert sha256 == model.source.identity()["weights"] == hashlib.sha256(both).hexdigest()
    (tmp_path / "cache").mkdir()  # links, as Hugging Face's cache has them
    for name in ("model.onnx", "weights.data"):
        (tmp_path / "cache" / name).symlink_to(tmp_path / name)
    assert DepthModel(tmp_path / "cache" / "model.onnx", 32, "cpu").describe()["sha256"] == sha256
    (tmp_path / "weights.data").write_bytes(np.full(28, 0.5, f32).tobytes())
    other = DepthModel(path, (28, 20), "cpu")
    assert other.describe()["sha256"] != sha256 and (other.predict(images).metres != expected.metres).any()


def test_other_machines_get_all_files_of_weights(tmp_path, models):
    from gpufgbg.scaleout.worker import Job, _depth_options

    (tmp_path / "far").mkdir()
    for path, names in (
        (onnx_models.external(tmp_path / "far" / "model.onnx", "deep.data"), ["model.onnx", "deep.data"]),
        (models / "blur.onnx", ["blur.onnx"]),
    ):
        expected = DepthModel(path, 32, "cpu").describe()
        job = Job(None, None, "tar", tmp_path, 1, depth=DepthOptions(path)).carrying_weights()
        assert list(job.weights) == names
        with _depth_options(job) as depth:
            assert depth.weights != str(path) and DepthModel(depth, 32, "cpu").describe() == expected
    assert Job(None, None, "tar", tmp_path, 1, depth=DepthOptions("demo")).carrying_weights().weights is None


def test_the_models_are_what_they_say(models):
    """The blur against plain NumPy: what else is compared with ONNX Runtime stands on this."""
    images = np.random.default_rng(1).random((2, 3, 9, 11), f32)
    session = onnxruntime.InferenceSession((models / "blur.onnx").read_bytes())
    np.testing.assert_allclose(session.run(None, {"image": images})[0][:, 0], onnx_models.blurred(images), rtol=1e-5)


def test_rendered_input_is_the_render(make, models, folders, tmp_path):
    make("saved")
    make("rendered", depth=DepthOptions(models / "blur.onnx", input="rendered"))
    saved, rendered = depth_files(tmp_path / "saved"), depth_files(tmp_path / "rendered")
    assert saved.keys() == rendered.keys()
    assert all(saved[name] != rendered[name] for name in saved)
    assert without_depth(tmp_path / "saved") == without_depth(tmp_path / "rendered")
    batch = Compositor(prepare(**folders, recipe=SMALL), SMALL, "cpu").render(range(COUNT))
    for pixels, name in zip(batch.image, table(tmp_path / "rendered")["name"], strict=True):
        expected = expected_depth(pixels, models / "blur.onnx")
        assert rendered[f"fg_bg_depth/{name.split('_fg_')[0]}/{name}"] == expected.file


def test_tar_labels_tell_the_range(make, tmp_path):
    make("out", sink="tar")
    rows = table(tmp_path / "out")
    expected = dict(zip(rows["name"], zip(rows["depth_min"], rows["depth_max"], strict=True), strict=True))
    found = {}
    for path in (tmp_path / "out" / "shards").glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    label = json.load(archive.extractfile(member))
                    found[member.name.replace(".json", ".jpg")] = (label["depth_min"], label["depth_max"])
    assert found == expected and len(found) == COUNT


def test_dataset_json_says_what_depth_is(make, models, tmp_path):
    import hashlib

    make("out", depth=DepthOptions(models / "inverse.onnx", scale=80, size=(64, 64)))
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["depth"] == {
        "weights": "inverse.onnx",
        "sha256": hashlib.sha256((models / "inverse.onnx").read_bytes()).hexdigest(),
        "input": "saved", "size": [64, 64], "upsampling": "half-pixel", "range": "unit", "meaning": "inverse",
        "scale": 80.0, "engines": [engine()],
    }  # fmt: skip


def test_the_command_prints_the_row_and_stats_and_preview_show_it(run, arguments, models, tmp_path):
    code, printed, error = run(*arguments, "--depth", models / "blur.onnx", "--per-pair=1")
    assert code == 0, error
    row = next(line.split() for line in printed.splitlines() if line.startswith("depth map"))
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    moments = Moments.from_dict(content["statistics"]["depth"])
    assert row[2:4] == ["fg_bg_depth/", str(COUNT)]
    assert row[5:] == [f"{v:.4f}".removeprefix("0") for v in (*moments.mean, *moments.std)]
    assert "made on the CPU" not in printed and "trying out" not in printed
    code, printed, _ = run("stats", tmp_path / "out", "--json")
    found = json.loads(printed)["depth"]
    assert (found["images"], found["forms"]) == (COUNT, [[64, 48, "L", "JPEG"]])
    assert found["bytes"] == content["bytes"]["depth"]
    assert abs(found["statistics"]["mean"][0] - moments.mean[0]) < 0.01  # of the files, which JPEG has changed
    assert run("preview", tmp_path / "out", "--columns=3")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "out" / "preview.png"))
    strip = sheet[-52:-4]  # the last row: three maps, a gap of 4 below
    cell = (sheet.shape[1] - 4) // 3
    maps = {decoded(data).tobytes() for data in depth_files(tmp_path / "out").values()}
    for column in range(3):
        left = 4 + column * cell + (cell - 4 - 64) // 2
        shown = strip[:, left : left + 64]
        assert (shown == shown[..., :1]).all() and shown[..., 0].tobytes() in maps


@pytest.mark.parametrize("sink", SINKS)
def test_verify_finds_no_fault_and_a_changed_depth_map(make, run, tmp_path, sink):
    make("out", sink=sink)
    out = tmp_path / "out"
    code, printed, _ = run("verify", out, "--rerender", 100, "--json")
    assert (code, json.loads(printed)) == (
        0, {"samples": COUNT, "files": 3 * COUNT, "rerendered": COUNT, "decoded": 0, "faults": []},
    )  # fmt: skip
    path = {"zip": out / "dataset.zip", "tar": out / "shards" / "shard-000000.tar"}.get(sink)
    path = path or sorted((out / "fg_bg_depth").rglob("*.jpg"))[5]
    data = path.read_bytes()
    name, depth = sorted(depth_files(out).items())[5]
    at = data.index(depth) + len(depth) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    code, printed, _ = run("verify", out)
    assert code == 1
    assert "the checksum differs" in printed or "can't be read" in printed or "Bad CRC" in printed, name
    if sink == "tree":
        path.unlink()
        assert f"{path}: can't be read" in run("verify", out)[1]
        path.write_bytes(data)
        (path.parent / "of_nobody.jpg").write_bytes(data)
        assert f"{path.parent / 'of_nobody.jpg'}: belongs to no sample" in run("verify", out)[1]


@pytest.mark.parametrize("sink", SINKS)
def test_batches_workers_and_slices_do_not_matter(make, tmp_path, sink, short_shards):
    make("whole", sink=sink)
    whole = oracle.tree_of(tmp_path / "whole")
    for batch_size, workers in ((1, 1), (3, 2), (256, 2)):
        name = f"b{batch_size}w{workers}"
        make(name, sink=sink, batch_size=batch_size, workers=workers)
        assert oracle.tree_of(tmp_path / name) == whole
    for name, cuts in {"slices": (0, 11, 13, 24), "backwards": (24, 17, 9, 0)}.items():
        parts = [tuple(sorted(pair)) for pair in itertools.pairwise(cuts)]
        for number, part in enumerate(parts):
            report = make(name, sink=sink, samples=part)
            assert report.samples == part[1] - part[0]
            assert report.complete == (number == len(parts) - 1)
            assert len(depth_files(tmp_path / name)) == report.done == len(table(tmp_path / name)["depth_min"])
        assert oracle.tree_of(tmp_path / name) == whole


def test_inferences_of_several_pictures_give_the_same_maps(make, models, tmp_path):
    make("one")
    report = make("five", depth=DepthOptions(models / "blur.onnx", batch=5))
    assert report.samples == COUNT
    assert depth_files(tmp_path / "one") == depth_files(tmp_path / "five")
    assert table(tmp_path / "one") == table(tmp_path / "five")
    content = json.loads((tmp_path / "five" / "dataset.json").read_text())
    assert content["depth"]["engines"] == [engine(5)]


def test_two_processes_fill_one_data_set(make, arguments, models, tmp_path):
    make("whole", Recipe(size=(64, 48), foreground_height=20, per_pair=2))
    arguments += ["--depth", models / "blur.onnx"]
    with (
        start(*arguments, "--samples=0:20") as first,
        start(*arguments, "--samples=20:48") as second,
    ):
        for process in (first, second):
            printed = process.communicate(timeout=120)
            assert process.returncode == 0, printed
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_all_engines_are_listed(make, models, tmp_path, monkeypatch):
    """One after the other, and one that another process adds while this one is at work."""
    five = DepthOptions(models / "blur.onnx", batch=5)
    make("out", samples=(0, 6))
    make("out", samples=(6, 12), depth=five)
    make("out", samples=(0, 12), depth=DepthOptions(models / "blur.onnx", batch=3))  # makes nothing
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["depth"]["engines"] == [engine(1), engine(5)]
    original = pipeline.select_maker

    def meanwhile(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "select_maker", original)
            make("out", samples=(20, 24), depth=DepthOptions(models / "blur.onnx", batch=7))
        return original(*arguments)

    monkeypatch.setattr(pipeline, "select_maker", meanwhile)
    make("out", samples=(12, 20), depth=five)
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["depth"]["engines"] == [engine(1), engine(5), engine(7)] and content["complete"]


# -- killed ---------------------------------------------------------------------------------------------


def killed(command: list, out: Path, seconds: float) -> bool:
    """Run the command line and kill it so many seconds after it has begun to work, unless it has ended by then."""
    runs = out / ".gpufgbg" / "runs"
    with start(*command) as process:
        while process.poll() is None and not (runs.is_dir() and any(runs.iterdir())):
            time.sleep(0.005)
        try:
            _, error = process.communicate(timeout=seconds)
            assert process.returncode == 0, error
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return True
    return False


@pytest.mark.parametrize("sink", SINKS)
def test_killed_at_random_moments_and_continued(make, later, arguments, models, tmp_path, sink, luck):
    """Made with depth; and made without, of which depth is added: all the same bytes in the end."""
    recipe = Recipe(size=(64, 48), foreground_height=20, per_pair=40)
    begun = time.monotonic()
    make("whole", recipe, sink=sink)
    took = time.monotonic() - begun
    whole = oracle.tree_of(tmp_path / "whole")
    command = [*arguments, "--per-pair=40", f"--sink={sink}", "--depth", models / "blur.onnx"]
    kills = killed(command, tmp_path / "out", took * luck.uniform(0, 0.6))
    make("out", recipe, sink=sink)
    assert oracle.tree_of(tmp_path / "out") == whole
    make("later", recipe, sink=sink, depth=None)
    command = ["depth", tmp_path / "later", "--weights", models / "blur.onnx", "--device=cpu", "--workers=2"]
    kills += killed(command, tmp_path / "later", took * luck.uniform(0, 0.6))
    assert len(stored(tmp_path / "later")) >= 2 * 960
    later("later")
    assert oracle.tree_of(tmp_path / "later") == whole
    assert kills > 0


class Killed(BaseException):
    """Stands for a kill at an exact place."""


def interrupt(*_: object) -> None:
    """Stands for Ctrl-C."""
    raise KeyboardInterrupt


def places() -> list[tuple[object, str]]:
    from gpufgbg.sinks import stored_zip, tar, tree

    return [
        (Manifest, "record"), (Manifest, "forget_pieces"), (Manifest, "write"), (dataset, "write_labels"),
        (dataset, "publish_labels"), (tree.TreeSink, "publish"), (tar.TarSink, "publish"),
        (stored_zip.ZipSink, "publish"), (tar.TarSink, "finish"), (stored_zip.ZipSink, "finish"),
    ]  # fmt: skip


@pytest.mark.parametrize("sink", SINKS)
def test_killed_at_every_step_of_committing(make, later, tmp_path, monkeypatch, sink, short_shards):
    """What changes the disk is interrupted before and after its first call, some of it before its second."""
    make("whole", sink=sink)
    whole = oracle.tree_of(tmp_path / "whole")
    make("bare", sink=sink, depth=None, samples=(0, 13))
    make("bare", sink=sink, depth=None)
    unlike = {"tree": ("TarSink", "ZipSink"), "zip": ("TarSink", "TreeSink"), "tar": ("ZipSink", "TreeSink")}[sink]
    for number, (owner, name) in enumerate(places()):
        if getattr(owner, "__name__", "") in unlike:
            continue
        for after, call in ((False, 1), (True, 1), (False, 2))[: 3 if name in ("record", "publish", "write") else 2]:
            calls = 0
            original = getattr(owner, name)

            def killing(*args, original=original, after=after, call=call, **kwargs):
                nonlocal calls
                calls += 1
                if calls == call and not after:
                    raise Killed
                result = original(*args, **kwargs)
                if calls == call and after:
                    raise Killed
                return result

            made, added = f"made{number}{after}{call}", f"added{number}{after}{call}"
            shutil.copytree(tmp_path / "bare", tmp_path / added)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, killing)
                with contextlib.suppress(Killed):
                    make(made, sink=sink, samples=(0, 13))
                    make(made, sink=sink)
                calls = 0
                with contextlib.suppress(Killed):
                    later(added)
            make(made, sink=sink)
            later(added)
            for out in (made, added):
                assert oracle.tree_of(tmp_path / out) == whole, (out, owner, name, after, call)
                shutil.rmtree(tmp_path / out)


MORE = r"( and the depth maps of \d more)?"


def test_interrupted_and_continued(make, later, tmp_path, short_shards):
    make("whole")
    make("bare", depth=None, samples=(0, 20))

    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(
        Interrupted,
        match=rf"interrupted: (\d|1\d) of 24 samples{MORE} are safe; the same command continues",
    ):
        make("out", batch_size=1, progress=stop)
    make("out")
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    with pytest.raises(
        Interrupted,
        match=rf"interrupted: (\d|1\d) of 20 samples{MORE} are safe; the same command continues",
    ):
        later("bare", batch_size=1, progress=stop)
    seen = []
    report = later("bare", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (20, 20) and 0 < report.samples < 20
    assert (report.done, report.total, report.complete) == (20, 24, False)
    assert make("bare").samples == 4
    assert oracle.tree_of(tmp_path / "bare") == oracle.tree_of(tmp_path / "whole")


# -- depth added later ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", SINKS)
def test_depth_added_later_gives_the_same_bytes(make, later, run, models, tmp_path, sink, short_shards):
    make("whole", sink=sink)
    make("out", sink=sink, depth=None)
    code, printed, error = run("depth", tmp_path / "out", "--weights", models / "blur.onnx", "--device=cpu")
    assert code == 0, error
    assert "depth map" in printed and "24 samples in" in printed and f"{tmp_path / 'out'}: complete" in printed
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    report = later("out")
    assert (report.samples, report.complete) == (0, True)
    assert make("out", sink=sink).samples == 0
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")
    assert run("verify", tmp_path / "out", "--rerender", 9)[0] == 0


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("cuts", [(0, 13), (5, 18), (4, 8)])
def test_depth_added_to_a_part_that_is_completed_later(make, later, run, tmp_path, sink, cuts, short_shards):
    make("whole", sink=sink)
    make("out", sink=sink, depth=None, samples=cuts)
    report = later("out")
    assert (report.samples, report.done, report.complete) == (cuts[1] - cuts[0], cuts[1] - cuts[0], False)
    assert len(depth_files(tmp_path / "out")) == report.done
    printed = run("verify", tmp_path / "out")[1]
    assert printed.splitlines()[0].endswith(f"incomplete: {report.done} of 24 samples are there")
    assert "1 fault\n" in printed
    assert make("out", sink=sink).samples == 24 - report.done
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


@pytest.mark.parametrize("sink", SINKS)
def test_half_added_and_continued_by_generate(make, later, run, tmp_path, monkeypatch, sink, short_shards):
    """Shards of odd cuts without depth, of which `generate --depth` makes some, by slices that cut through them."""
    make("whole", sink=sink)
    for part in ((0, 2), (2, 7), (9, 12), (12, 14)):
        make("bare", sink=sink, depth=None, samples=part)
    said = f"interrupted: 4 of 12 samples{MORE} are safe"
    with pytest.raises(Interrupted, match=said):  # 0:2, 2:4; not 4:7, 9:12, 12:14
        later("bare", batch_size=1, workers=1, progress=lambda done, total: done < 5 or interrupt())
    with (
        Manifest(tmp_path / "bare").claim(Shard(5, 8)),
        pytest.raises(DatasetError, match="another process is making samples 5:8"),
    ):
        make("bare", sink=sink, samples=(0, 5))  # which makes 4:7
    code, printed, _ = run("verify", tmp_path / "bare")
    assert code == 1 and "not all samples have their depth maps: continue with gpufgbg depth" in printed
    assert "1 fault\n" in printed  # no other
    for number, slices in enumerate([[(0, 5), (3, 11), (None, None)], [(6, 24), (0, 1), (1, 24)], [(None, None)]]):
        out = f"out{number}"
        shutil.copytree(tmp_path / "bare", tmp_path / out)
        for part in slices:
            seen = []
            report = make(out, sink=sink, samples=part, progress=lambda *counts, seen=seen: seen.append(counts))
            assert all(0 < done <= total for done, total in seen)
            assert all(done == total for done, total in seen[-1:])
            assert make(out, sink=sink, samples=part).samples == 0
        assert report.complete
        assert oracle.tree_of(tmp_path / out) == oracle.tree_of(tmp_path / "whole")
    later("bare")
    report = make("bare", sink=sink)
    assert oracle.tree_of(tmp_path / "bare") == oracle.tree_of(tmp_path / "whole")


def test_depth_is_not_begun_while_another_process_makes_samples(make, later, tmp_path):
    make("out", depth=None, samples=(0, 10))
    before = oracle.tree_of(tmp_path / "out")
    with (
        Manifest(tmp_path / "out").claim(Shard(5, 24)),
        pytest.raises(DatasetError, match="another process is making samples 5:24: wait for it"),
    ):
        later("out")
    assert oracle.tree_of(tmp_path / "out") == before
    later("out")


def test_joined_meanwhile(make, later, tmp_path, monkeypatch, short_shards):
    """Pieces that another process has joined while this one loaded its network."""
    make("whole")
    make("out", depth=None, samples=(0, 2))
    original = dataset.load_assets

    def meanwhile(*arguments):
        monkeypatch.setattr(dataset, "load_assets", original)
        make("out", depth=None)
        return original(*arguments)

    monkeypatch.setattr(dataset, "load_assets", meanwhile)
    assert later("out").complete
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def refusals() -> dict[str, tuple[dict, str]]:
    return {
        "weights": (
            {"weights": "other.onnx"},
            r"depth weights are blur.onnx \(\w+\) there and other.onnx \(\w+\) here",
        ),
        "input": ({"input": "rendered"}, "depth_input is 'saved' there and 'rendered' here"),
        "size": ({"size": (32, 32)}, r"depth_size is \[64, 48\] there and \[32, 32\] here"),
        "scale": ({"scale": 2}, "depth_scale is 1.0 there and 2.0 here"),
        "meaning": ({"meaning": "inverse"}, "depth_meaning is 'metres' there and 'inverse' here"),
        "range": ({"range": "255"}, "depth_range is 'unit' there and '255' here"),
    }


@pytest.mark.parametrize("what", refusals())
def test_other_weights_or_options_are_refused(make, later, models, tmp_path, what):
    options, message = refusals()[what]
    make("out", samples=(0, 8))
    before = oracle.tree_of(tmp_path / "out")
    depth = DepthOptions(
        **{"weights": models / "blur.onnx", **options}
        | ({"weights": models / options["weights"]} if "weights" in options else {})
    )
    with pytest.raises(DatasetError, match=rf"^--out .*out: holds a data set of .*: {message}: give the same ones"):
        make("out", depth=depth)
    with pytest.raises(DatasetError, match=rf"out: has depth maps of other weights or options: {message}: give the"):
        later("out", depth=depth)
    with pytest.raises(DatasetError, match="it has depth maps, this run has none: give the same ones"):
        make("out", depth=None)
    assert oracle.tree_of(tmp_path / "out") == before


def test_weights_may_have_another_name(make, later, models, tmp_path):
    make("out", samples=(0, 8))
    shutil.copy(models / "blur.onnx", tmp_path / "renamed.onnx")
    assert later("out", tmp_path / "renamed.onnx").samples == 0
    assert make("out", depth=tmp_path / "renamed.onnx").complete
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["depth"]["weights"] == "blur.onnx"


def test_generate_names_the_command_that_adds_depth(refused, run, arguments, models, tmp_path):
    assert run(*arguments)[0] == 0
    error = refused(*arguments, "--depth", models / "blur.onnx")
    assert error.endswith(f"holds a data set without depth maps: add them with gpufgbg depth {tmp_path / 'out'} "
                          "--weights FILE")  # fmt: skip
    error = refused(*arguments, "--seed=3", "--depth", models / "blur.onnx")
    assert "seed is 0 there and 3 here; it has none, this run has depth maps: give the same ones" in error


def test_depth_for_a_data_set_without_samples(make, later, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "select_maker", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make("out", depth=None)
    with pytest.raises(DatasetError, match="has no samples yet: make them with gpufgbg generate --depth"):
        later("out")


def test_out_goes_with_folders_alone(refused, make, models, tmp_path):
    make("out", samples=(0, 4), depth=None)
    error = refused("depth", tmp_path / "out", "--weights", models / "blur.onnx", "--out", tmp_path / "x")
    assert f"--out: {tmp_path / 'out'} is a data set of ours: its depth maps go into it" in error


# -- a folder of pictures -------------------------------------------------------------------------------


def write_pictures(folder: Path) -> dict[str, np.ndarray]:
    """Pictures of many kinds, and what a person sees of them as (H, W, 3) uint8."""
    rng = np.random.default_rng(4)
    colour = {name: smooth(rng, 31 + i, 50 - i, 3) for i, name in enumerate(("a", "b", "c", "d", "e", "f", "g"))}
    (folder / "deep" / "er").mkdir(parents=True)
    images = {
        "a.jpg": Image.fromarray(colour["a"]),
        "alpha.png": Image.fromarray(np.dstack([colour["b"], colour["b"][..., 0]])),
        "deep/palette.png": Image.fromarray(colour["c"]).quantize(40),
        "deep/er/grey.webp": Image.fromarray(colour["d"][..., 1]),
        "deep/er/Last.TIFF": Image.fromarray(colour["e"]),
    }
    for name, image in images.items():
        image.save(folder / name, **({"lossless": True} if name.endswith("webp") else {}))
    found = {name: np.asarray(Image.open(folder / name).convert("RGB")) for name in images}
    deep = (colour["f"][..., 0].astype(np.uint16) << 8) + 77
    Image.fromarray(deep).save(folder / "sixteen.png")
    found["sixteen.png"] = np.repeat(colour["f"][..., :1], 3, axis=2)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(colour["g"]).save(folder / "turned.png", exif=turned)
    found["turned.png"] = np.rot90(colour["g"], -1)
    Image.fromarray(colour["g"]).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("not a picture")
    return found


def index_of(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "depth.jsonl").read_text().splitlines()]
    return {line["picture"]: line for line in lines[1:]}


@pytest.fixture
def predict(models, tmp_path):
    """Predicts for ``tmp_path / 'pictures'``."""

    def call(out: str | None = "maps", depth="blur.onnx", folder: str = "pictures", **options):
        depth = models / depth if isinstance(depth, str) else depth
        target = None if out is None else tmp_path / out
        return predict_folder(tmp_path / folder, target, depth, **{"device": "cpu", "workers": 2, **options})

    return call


@pytest.mark.parametrize("size", [None, (40, 24)])
def test_folder_of_many_kinds_of_pictures(run, models, tmp_path, size):
    pictures = write_pictures(tmp_path / "pictures")
    option = [] if size is None else ["--depth-size=40x24"]
    code, printed, error = run(
        "depth", tmp_path / "pictures", "--weights", models / "inverse.onnx", "--device=cpu", *option
    )
    assert code == 0, error
    out = tmp_path / "pictures_depth"
    assert printed.startswith("7 depth maps in ") and f"; {out}: 7\n" in printed
    found = {name: data for name, data in oracle.tree_of(out).items() if name != "depth.jsonl"}
    entries = index_of(out)
    assert entries.keys() == pictures.keys() and not (out / ".depth").exists()
    for name, pixels in pictures.items():
        # the first picture, a.jpg of 31x50, decides the network's size where nothing else does
        expected = expected_depth(pixels, models / "inverse.onnx", meaning="inverse", size=size or (32, 48))
        assert found.pop(f"{name.rpartition('.')[0]}.jpg") == expected.file, name
        entry = entries[name]
        assert (entry["width"], entry["height"]) == (pixels.shape[1], pixels.shape[0])
        assert (entry["depth_min"], entry["depth_max"]) == (expected.near, expected.far)
        assert entry["file"] == f"{name.rpartition('.')[0]}.jpg"
    assert found == {}


def test_folder_does_not_depend_on_workers_or_order_of_runs(predict, models, tmp_path):
    write_pictures(tmp_path / "pictures")
    assert predict("one", workers=1).predicted == 7
    predict("many", workers=5)
    predict("batch", DepthOptions(models / "blur.onnx", batch=3))
    one, many, batch = (oracle.tree_of(tmp_path / name) for name in ("one", "many", "batch"))
    assert one == many
    assert {k: v for k, v in batch.items() if k != "depth.jsonl"} == {
        k: v for k, v in one.items() if k != "depth.jsonl"
    }
    # in two parts
    rest = tmp_path / "rest"
    rest.mkdir()
    for name in ("alpha.png", "turned.png"):
        (tmp_path / "pictures" / name).rename(rest / name)
    assert predict("parts").pictures == 5
    for path in rest.iterdir():
        path.rename(tmp_path / "pictures" / path.name)
    report = predict("parts")
    assert (report.pictures, report.predicted) == (7, 2)
    assert oracle.tree_of(tmp_path / "parts") == one
    # a picture that comes first, but too late to decide the network's size
    Image.fromarray(pixels := smooth(np.random.default_rng(1), 90, 70, 3)).save(tmp_path / "pictures" / "0.png")
    assert predict("parts").predicted == 1
    parts = oracle.tree_of(tmp_path / "parts")
    assert parts.pop("0.jpg") == expected_depth(pixels, models / "blur.onnx", size=(32, 48)).file
    assert {**parts, "depth.jsonl": one["depth.jsonl"]} == one


def test_folder_with_names_that_collide(predict, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(2)
    for name in ("x.bmp", "x.jpg", "x.jpg.png", "x.png", "y.png"):
        Image.fromarray(smooth(rng, 20, 20, 3)).save(folder / name)
    (folder / "y.jpg").mkdir()
    Image.fromarray(smooth(rng, 20, 20, 3)).save(folder / "y.jpg" / "z.png")
    predict()
    files = {picture: entry["file"] for picture, entry in index_of(tmp_path / "maps").items()}
    assert files == {
        "x.bmp": "x.jpg", "x.jpg": "x.jpg.jpg", "x.jpg.png": "x.jpg.png.jpg", "x.png": "x.png.jpg",
        "y.png": "y.png.jpg", "y.jpg/z.png": "y.jpg/z.jpg",
    }  # fmt: skip
    assert set(files.values()) == oracle.tree_of(tmp_path / "maps").keys() - {"depth.jsonl"}
    before = oracle.tree_of(tmp_path / "maps")
    Image.fromarray(smooth(rng, 20, 20, 3)).save(folder / "x.WEBP")  # sorted first: the others keep their names
    assert predict().predicted == 1
    after = oracle.tree_of(tmp_path / "maps")
    assert after.keys() - before.keys() == {"x.WEBP.jpg"}
    assert all(after[name] == data for name, data in before.items() if name != "depth.jsonl")


def test_folder_killed_and_continued(predict, models, tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures")
    predict("whole")
    whole = oracle.tree_of(tmp_path / "whole")
    from gpufgbg import predict as module

    for number, (owner, name) in enumerate(
        [(module, "encode_jpeg"), (module, "sync_file_system"), (module, "write_atomic")]
    ):
        for call in (1, 2):
            calls = 0
            original = getattr(owner, name)

            def killing(*args, original=original, call=call, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= call:
                    raise Killed
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, killing)
                patch.setattr(module, "_COMMIT_EVERY_S", 0)
                with pytest.raises(Killed):
                    predict(f"out{number}{call}")
            predict(f"out{number}{call}")
            assert oracle.tree_of(tmp_path / f"out{number}{call}") == whole
    with pytest.raises(Interrupted, match="interrupted: 2 of 7 depth maps are safe; the same command continues"):
        predict("out", progress=interrupt)
    assert len(index_of(tmp_path / "out")) == 2
    assert predict("out").predicted == 5
    assert oracle.tree_of(tmp_path / "out") == whole


def test_folder_killed_by_a_signal_and_continued(predict, models, tmp_path, luck):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for i in range(300):
        Image.fromarray(smooth(rng, 24 + i % 7, 20, 3)).save(folder / f"{i:03d}.jpg")
    begun = time.monotonic()
    predict("whole")
    took = time.monotonic() - begun
    index = tmp_path / "out" / "depth.jsonl"
    command = ["depth", folder, "--weights", models / "blur.onnx", "--device=cpu", "--out", tmp_path / "out"]
    with start(*command) as process:
        while not index.is_file() and process.poll() is None:
            time.sleep(0.002)
        time.sleep(took * luck.uniform(0, 0.5))
        process.kill()
        process.communicate()
    index.write_bytes(index.read_bytes() + b'{"file": "cut o')  # as a kill in the middle of a write leaves it
    assert predict("out").pictures == 300
    assert oracle.tree_of(tmp_path / "out") == oracle.tree_of(tmp_path / "whole")


def test_folder_broken_pictures_are_named_and_the_others_done(run, models, tmp_path):
    folder = tmp_path / "pictures"
    write_pictures(folder)
    data = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(data[:200])
    (folder / "deep" / "empty.png").write_bytes(b"")
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    command = ("depth", folder, "--weights", models / "blur.onnx", "--device=cpu")
    code, printed, error = run(*command)
    assert (code, printed) == (2, "")
    lines = [line for line in error.splitlines() if line.startswith("gpufgbg: ")]
    assert len(lines) == 1 and "4 problems with the input: " in lines[0]
    for name, problem in {
        "a.jpg": "damaged or truncated JPEG", "deep/empty.png": "zero bytes long",
        "gone.png": "can't be read: No such file or directory", "pipe.png": "neither a file nor a folder: remove it",
    }.items():  # fmt: skip
        assert f"{folder / name}: {problem}" in lines[0]
    assert index_of(tmp_path / "pictures_depth").keys() == {
        "alpha.png", "deep/palette.png", "deep/er/grey.webp", "deep/er/Last.TIFF", "sixteen.png", "turned.png",
    }  # fmt: skip
    for name in ("deep/empty.png", "gone.png", "pipe.png"):
        (folder / name).unlink()
    (folder / "a.jpg").write_bytes(data)
    code, printed, error = run(*command)
    assert code == 0 and printed.startswith("1 depth maps in "), error


def test_folder_refusals(refused, run, models, tmp_path):
    """One line each, and the folder of maps stays as it is."""
    folder, out = tmp_path / "pictures", tmp_path / "maps"
    write_pictures(folder)
    blur = ("--weights", models / "blur.onnx", "--device=cpu")
    command = ("depth", folder, *blur, "--out", out)
    assert run(*command)[0] == 0
    for option, message in {
        "--depth-scale=3": "scale is 1.0 there and 3.0 here",
        "--depth-size=64": r"size is [32, 48] there and [64, 64] here",
        "--depth-batch=2": "'batch': 1} there and {",
        f"--weights={models / 'other.onnx'}": "sha256 is ",
    }.items():
        error = refused(*command, option, out=out)
        assert f"--out {out}: holds depth maps of other weights, options or another engine: " in error
        assert message in error
    # other pictures under the same names, and other names
    shutil.copytree(folder, tmp_path / "others")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "others" / "deep" / "palette.png")
    error = refused("depth", tmp_path / "others", *blur, "--out", out, out=out)
    assert (
        f"--out {out}: {tmp_path / 'others' / 'deep' / 'palette.png'} has changed since its depth map was made"
        in error
    )
    (tmp_path / "others" / "deep" / "palette.png").rename(tmp_path / "others" / "deep" / "palette2.png")
    error = refused("depth", tmp_path / "others", *blur, "--out", out, out=out)
    assert "holds depth maps of other pictures, for example of deep/palette.png, which is not in" in error
    assert error.endswith(
        "remove their maps there to go on without them (deep/palette.jpg), or choose another folder"
    )
    assert run("depth", folder, *blur, "--out", out, "--json")[0] == 0
    # what it says: a map is made again once it is removed
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "deep" / "palette.png")
    assert f"remove {'deep/palette.jpg'} there to make it again" in refused(*command, out=out)
    (out / "deep" / "palette.jpg").unlink()
    assert run(*command)[1].startswith("1 depth maps")
    assert index_of(out)["deep/palette.png"]["width"] == 9
    # folders that are not ours
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("dear")
    for path in (tmp_path / "thesis", folder / "a.jpg"):
        error = refused("depth", folder, *blur, "--out", path, out=path)
        assert f"--out {path}: exists and holds no depth maps of ours: choose another folder" in error
    assert "the folder of the pictures: choose another" in refused(
        "depth", folder, *blur, "--out", folder, out=folder
    )
    assert "--out: got an empty name" in refused("depth", folder, *blur, "--out=")
    lines = (out / "depth.jsonl").read_text().splitlines()
    for spoiled in (
        "not json\n",
        "[]\n",
        "\n".join([lines[0], "{}", *lines[2:], ""]),
        "\n".join([lines[0], "3", ""]),
        "",
        "\xff\n",
    ):
        (out / "depth.jsonl").write_bytes(spoiled.encode("latin-1"))
        assert f"--out {out / 'depth.jsonl'}: damaged or not ours" in refused(*command, out=out), spoiled


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", {"sse2", "avx", "avx2", "avx512f"}, "x86_64 avx512"),
        ("x86_64", {"sse2", "avx", "avx2"}, "x86_64 avx2"),
        ("x86_64", {"sse2"}, "x86_64 sse"),
        ("aarch64", {"neon", "fullfp16"}, "aarch64 neon fp16"),
        ("riscv64", set(), "riscv64"),
    ],
)
def test_the_processor_is_told_by_its_instructions(monkeypatch, machine, features, expected):
    from llvmlite import binding

    known = {"sse2", "avx", "avx2", "avx512f", "neon", "fullfp16"}
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {name: name in features for name in known})
    monkeypatch.setattr(engine_onnxruntime.platform, "machine", lambda: machine)
    assert processor.__wrapped__() == expected


def test_another_processor_is_another_engine(make, predict, models, tmp_path, monkeypatch):
    """Its depth files differ: a folder of maps refuses it, dataset.json lists it; an entry of old tells of none."""
    write_pictures(tmp_path / "pictures")
    predict("maps")
    make("out", samples=(0, 6))
    monkeypatch.setattr(engine_onnxruntime, "processor", lambda: "x86_64 none")
    with pytest.raises(DatasetError, match=r"'processor': '.*'.* there and \{.*'processor': 'x86_64 none'.* here"):
        predict("maps")
    make("out")
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["depth"]["engines"] == [engine(), engine() | {"processor": "x86_64 none"}] and content["complete"]
    index = tmp_path / "maps" / "depth.jsonl"
    head, _, rest = index.read_text().partition("\n")
    head = json.loads(head)
    del head["engine"]["processor"]
    index.write_text(json.dumps(head) + "\n" + rest)
    (tmp_path / "maps" / "a.jpg").unlink()
    assert predict("maps").predicted == 1
    del head["engine"]["batch"]
    index.write_text(json.dumps(head) + "\n" + rest)
    with pytest.raises(DatasetError, match="another engine"):
        predict("maps")


def test_folder_goes_on_without_pictures_whose_maps_are_removed(run, models, tmp_path):
    """What the refusal says: nothing of them is left, nor are other maps made again."""
    folder = tmp_path / "pictures"
    write_pictures(folder)
    command = ("depth", folder, "--weights", models / "blur.onnx", "--device=cpu")
    assert run(*command)[0] == 0
    out = tmp_path / "pictures_depth"
    gone = sorted(index_of(out))[:5]
    files = [index_of(out)[name]["file"] for name in gone]
    for name in gone:
        (folder / name).unlink()
    error = run(*command)[2]
    assert f"({', '.join(files[:3])} and 2 more), or choose another folder" in error
    for file in files:
        (out / file).unlink()
    assert run(*command)[1].startswith("0 depth maps in ")
    assert len(index_of(out)) == 2 and not index_of(out).keys() & set(gone)


def test_folder_leaves_out_maps_of_earlier_runs(predict, tmp_path):
    """Wherever they lie below; and of a tree of the original's layout it still takes fg_bg/."""
    write_pictures(tmp_path / "all" / "pictures")
    predict("all/pictures_depth", folder="all/pictures")
    predict("all/pictures/deep/maps", folder="all/pictures/deep")
    assert predict("maps", folder="all").pictures == 7
    assert {name.partition("/")[0] for name in index_of(tmp_path / "maps")} == {"pictures"}
    for kind in ("fg_bg", "fg_bg_masks"):
        (tmp_path / "tree" / kind / "bg_00").mkdir(parents=True)
        Image.fromarray(smooth(np.random.default_rng(1), 20, 30, 3)).save(
            tmp_path / "tree" / kind / "bg_00" / "a.jpg"
        )
    report = predict(None, folder="tree")
    assert (report.out, report.pictures) == (tmp_path / "tree" / "fg_bg_depth", 1)
    assert predict(None, folder="tree").predicted == 0


SIDES = [((1000, 600), (640, 384)), ((600, 1000), (384, 640)), ((640, 480), (640, 480)), ((4000, 10), (640, 32))]


@pytest.mark.parametrize(("picture", "expected"), SIDES, ids=str)
def test_folder_of_photos_bounds_the_input(run, models, tmp_path, picture, expected):
    (tmp_path / "photos").mkdir()
    image = smooth(np.random.default_rng(2), *picture, 3)
    Image.fromarray(image).save(tmp_path / "photos" / "a.png")
    command = ("depth", tmp_path / "photos", "--weights", models / "blur.onnx", "--device=cpu")
    asked = "x".join(str(max(16, round(side / 16) * 16)) for side in picture)
    size = "x".join(map(str, expected))
    line = f"the depth network's input is {size} instead of the first picture's {asked}: --depth-size for another"
    told = [] if picture == expected else [f"gpufgbg: {line}"]
    for made in (1, 0):
        code, printed, error = run(*command)
        assert code == 0 and printed.startswith(f"{made} depth maps"), error
        assert [found for found in error.splitlines() if "input is" in found] == told
    out = tmp_path / "photos_depth"
    head = json.loads((out / "depth.jsonl").read_text().partition("\n")[0])
    assert tuple(head["size"]) == expected
    assert (out / "a.jpg").read_bytes() == expected_depth(image, models / "blur.onnx", size=expected).file
    assert "input is" not in run(*command, "--depth-size=704", "--out", tmp_path / "own")[2]
    assert json.loads((tmp_path / "own" / "depth.jsonl").read_text().partition("\n")[0])["size"] == [704, 704]


def test_folder_begun_without_the_bound_goes_on(run, models, tmp_path, monkeypatch):
    """By an earlier version, whose input was as large as the first picture."""
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.fromarray(smooth(np.random.default_rng(2), 700, 40, 3)).save(tmp_path / "photos" / f"{name}.png")
    command = ("depth", tmp_path / "photos", "--weights", models / "blur.onnx", "--device=cpu")
    with monkeypatch.context() as patch:
        patch.setattr("gpufgbg.predict.LONGEST", 16384)
        assert run(*command)[0] == 0
    out = tmp_path / "photos_depth"
    whole = oracle.tree_of(out)
    (out / "b.jpg").unlink()
    code, printed, error = run(*command)
    assert code == 0 and printed.startswith("1 depth maps") and "input is" not in error
    assert oracle.tree_of(out) == whole


def test_folder_that_another_process_is_at(predict, tmp_path, monkeypatch):
    from filelock import FileLock

    write_pictures(tmp_path / "pictures")
    (tmp_path / "maps" / ".depth").mkdir(parents=True)
    with (
        FileLock(tmp_path / "maps" / ".depth" / "lock"),
        pytest.raises(DatasetError, match="another process is at it: wait for it"),
    ):
        predict()
    from gpufgbg import predict as module

    def meanwhile(*arguments):
        monkeypatch.setattr(module, "DepthModel", DepthModel)
        predict()
        return DepthModel(*arguments)

    monkeypatch.setattr(module, "DepthModel", meanwhile)
    with pytest.raises(DatasetError, match="another process is at it: wait for it"):
        predict()
    assert predict().pictures == 7


def test_folder_without_pictures(refused, models, tmp_path):
    weights = ("--weights", models / "blur.onnx", "--device=cpu")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.txt").write_text("none")
    out = tmp_path / "pictures_depth"
    assert "pictures: no pictures in it: expected .bmp, " in refused(
        "depth", tmp_path / "pictures", *weights, out=out
    )
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    assert "a.png: zero bytes long" in refused("depth", tmp_path / "pictures", *weights, out=out)
    error = refused("depth", tmp_path / "nowhere", *weights)
    assert f"{tmp_path / 'nowhere'}: no such folder: expected a data set or a folder of pictures" in error
    assert "a.txt: not a folder: expected a data set" in refused("depth", tmp_path / "pictures" / "a.txt", *weights)
    assert "DATASET|FOLDER|build: got an empty name" in refused("depth", "", *weights)


def test_folder_out_inside_and_default_names(predict, models, tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures")
    predict("pictures/maps")
    assert len(index_of(tmp_path / "pictures" / "maps")) == 7
    assert predict("pictures/maps").predicted == 0  # maps are no pictures
    shutil.rmtree(tmp_path / "pictures" / "maps")
    monkeypatch.chdir(tmp_path / "pictures" / "deep")
    options = {"device": "cpu", "workers": 2}
    assert predict_folder(".", None, models / "blur.onnx", **options).out == tmp_path / "pictures" / "deep_depth"
    shutil.rmtree(tmp_path / "pictures" / "deep_depth")
    assert predict_folder("..", None, models / "blur.onnx", **options).out == tmp_path / "pictures_depth"
    assert predict_folder("er/", None, models / "blur.onnx", **options).out.resolve() == (
        tmp_path / "pictures" / "deep" / "er_depth"
    )


def test_folder_of_the_originals_layout(predict, make, models, tmp_path):
    """A tree with the original's names, not made by us: composites alone, beside themselves."""
    make("tree", depth=None)
    make("whole")
    for path in (tmp_path / "tree" / "dataset.json", tmp_path / "tree" / "labels.parquet"):
        path.unlink()
    shutil.rmtree(tmp_path / "tree" / ".gpufgbg")
    report = predict(None, folder="tree")
    assert report.out == tmp_path / "tree" / "fg_bg_depth" and report.pictures == COUNT
    assert predict(None, folder="tree/fg_bg").predicted == 0
    assert depth_files(tmp_path / "tree").items() >= depth_files(tmp_path / "whole").items()
    assert depth_files(tmp_path / "tree").keys() - depth_files(tmp_path / "whole").keys() == {
        "fg_bg_depth/depth.jsonl"
    }


def test_folder_with_a_picture_that_gives_no_numbers(run, tmp_path):
    path = onnx_models.not_numbers(tmp_path / "odd.onnx")
    (tmp_path / "pictures").mkdir()
    for name, level in {"a": 255, "b": 0}.items():
        Image.fromarray(np.full((40, 40, 3), level, np.uint8)).save(tmp_path / "pictures" / f"{name}.png")
    code, _, error = run("depth", tmp_path / "pictures", "--weights", path, "--device=cpu")
    assert code == 2
    assert f"values of the prediction for {tmp_path / 'pictures'}" in error and "are no numbers" in error


# -- arrays ---------------------------------------------------------------------------------------------


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(8).integers(0, 256, (7, 20, 28, 3), np.uint8)


def test_model_predicts_arrays(models, images):
    model = DepthModel(models / "inverse.onnx", (28, 20), "cpu")
    assert (model.device, model.batch, model.index) == ("cpu", 1, None)
    maps = model.predict(images)
    assert (maps.grey.shape, maps.grey.dtype) == ((7, 20, 28), np.uint8)
    assert (maps.range.shape, maps.range.dtype) == ((7, 2), f32)
    assert (maps.metres.shape, maps.metres.dtype) == ((7, 20, 28), f32)
    for n, image in enumerate(images):
        expected = expected_depth(image, models / "inverse.onnx", meaning="inverse")
        np.testing.assert_array_equal(maps.grey[n], expected.grey)
        np.testing.assert_array_equal(maps.metres[n], expected.metres)
        assert tuple(maps.range[n]) == (expected.near, expected.far)
        assert (maps.metres[n].min(), maps.metres[n].max()) == tuple(maps.range[n])
        blur = onnx_models.blurred(image.transpose(2, 0, 1)[None] / 255)[0]
        np.testing.assert_allclose(maps.metres[n], np.clip(1000 / (30 * blur), 10, 1000) / 1000, rtol=1e-5)
    assert model.predict(images, metres=False).metres is None


@pytest.mark.parametrize("options", [{}, {"batch": 3}, {"batch": 16}])
def test_model_does_not_depend_on_workers_order_or_company(models, images, options):
    def predict(images, workers: int):
        depth = DepthOptions(models / "blur.onnx", scale=10, size=(32, 32), **options)
        return DepthModel(depth, (28, 20), "cpu", workers).predict(images)

    whole = predict(images, 1)
    order = np.random.default_rng(0).permutation(7)
    for maps, picked in [
        (predict(images, 2), slice(None)), (predict(images, 50), slice(None)), (predict(images[order], 3), order),
        (predict(images[2:3], 4), slice(2, 3)), (predict(images[::2], 2), slice(None, None, 2)),
    ]:  # fmt: skip
        for name in ("grey", "range", "metres"):
            np.testing.assert_array_equal(getattr(maps, name), getattr(whole, name)[picked], err_msg=name)


def test_model_of_other_shapes(models, images):
    model = DepthModel(models / "blur.onnx", 32, "cpu", 2)
    assert model.source.size == (32, 32)
    expected = expected_depth(images[0], models / "blur.onnx", size=(32, 32))
    for given in (images[:1], np.asfortranarray(images[:1]), [images[0].tolist()]):
        if isinstance(given, list):
            with pytest.raises(
                InputError, match=r"images: got int64 \(1, 20, 28, 3\), expected uint8 \(N, H, W, 3\)"
            ):
                model.predict(given)
            continue
        np.testing.assert_array_equal(model.predict(given).grey[0], expected.grey)
    mirrored = model.predict(images[:, :, ::-1])
    np.testing.assert_array_equal(mirrored.grey, model.predict(images[:, :, ::-1].copy()).grey)
    nothing = model.predict(images[:0])
    assert (nothing.grey.shape, nothing.range.shape, nothing.metres.shape) == ((0, 20, 28), (0, 2), (0, 20, 28))
    for image, (grey, (near, far)) in zip(
        [images[0], images[1, :9]], model.predict_each([images[0], images[1, :9]]), strict=True
    ):
        expected = expected_depth(image, models / "blur.onnx", size=(32, 32))
        np.testing.assert_array_equal(grey, expected.grey)
        assert (near, far) == (expected.near, expected.far)
    assert model.predict_each([]) == []


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((1, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4), np.uint8),
     np.zeros((1, 4, 4, 4), np.uint8), np.zeros((1, 0, 4, 3), np.uint8)],
)  # fmt: skip
def test_model_refuses_other_arrays(models, wrong):
    with pytest.raises(InputError, match=r"^images: got .*, expected uint8 \(N, H, W, 3\)$"):
        DepthModel(models / "blur.onnx", 32, "cpu").predict(wrong)


class OnlyDlpack:
    """An array of another library in host memory."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def test_model_takes_dlpack_and_lists(models, images):
    model = DepthModel(models / "blur.onnx", (28, 20), "cpu", 2)
    expected = model.predict(images)
    for given in (OnlyDlpack(images), list(images)):
        np.testing.assert_array_equal(model.predict(given).metres, expected.metres)


def test_model_refuses_pictures_of_several_sizes_and_memory_of_a_card(models, images):
    model = DepthModel(models / "blur.onnx", (28, 20), "cpu")
    with pytest.raises(InputError) as caught:
        model.predict([images[0], images[1, :9], images[2]])
    assert str(caught.value) == (
        "images: got pictures of 2 shapes, (9, 28, 3) and (20, 28, 3) among them, expected one: "
        "DepthModel.predict_each takes any"
    )
    with pytest.raises(InputError, match=r"^images: .*, expected uint8 \(N, H, W, 3\)$"):
        model.predict([[[1, 2, 3]], [[1, 2]]])

    class OnACard:
        __cuda_array_interface__: ClassVar[dict] = {}

    with pytest.raises(InputError, match=r"^images: got an array in a card's memory, expected one in host memory"):
        model.predict(OnACard())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size: got 0, expected 1 to 16384"),
        ({"size": (3, 4, 5)}, "size: got"),
        ({"size": "big"}, "size: got 'big'"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"workers": 0}, "workers: got 0"),
        ({"weights": 5}, "depth: got 5, expected a file of weights or 'demo'"),
        ({"weights": ""}, "depth: got ''"),
    ],
)
def test_model_refuses_other_arguments(models, arguments, message):
    with pytest.raises(OptionError, match=message):
        DepthModel(**{"weights": models / "blur.onnx", "size": 32, "device": "cpu", **arguments})


def midas(path: Path) -> Path:
    """Relative inverse depth as MiDaS gives it: far beyond 100, larger is nearer."""
    return onnx_models.blur(path, tail=[("Mul", 500.0), ("Add", 100.0)])


CLIPPED = (
    r"^--depth midas.onnx: all depth maps of a batch are flat: the predictions lie outside 1 to 100, to which "
    r"--depth-meaning inverse clips them: for relative inverse depth \(MiDaS, DPT, Depth Anything\) use "
    r"--depth-meaning disparity$"
)


def test_model_of_disparity(tmp_path, images):
    model = DepthModel(DepthOptions(midas(tmp_path / "midas.onnx"), meaning="disparity"), (28, 20), "cpu", 2)
    maps = model.predict(images)
    assert model.describe()["meaning"] == "disparity"
    for image, grey, metres in zip(images, maps.grey, maps.metres, strict=True):
        p = 500 * onnx_models.blurred(image.transpose(2, 0, 1)[None] / 255)[0] + 100
        np.testing.assert_allclose(metres, -p, rtol=1e-5)
        assert (grey[np.unravel_index(p.argmax(), p.shape)], grey[np.unravel_index(p.argmin(), p.shape)]) == (0, 255)
    said = onnx_models.blur(tmp_path / "said.onnx", metadata={"meaning": "disparity"})
    assert DepthModel(said, 32, "cpu").source.meaning == "disparity"


def test_maps_that_the_clip_flattens_are_told_once(tmp_path, images, run, arguments):
    path = midas(tmp_path / "midas.onnx")
    inverse = DepthOptions(path, meaning="inverse", scale=3)
    model = DepthModel(inverse, (28, 20), "cpu", 2)
    with pytest.warns(GpufgbgWarning, match=CLIPPED) as told:
        assert not model.predict(images).grey.any()
        model.predict(images)
    assert len(told) == 1
    with pytest.warns(GpufgbgWarning, match=CLIPPED):
        DepthModel(inverse, (28, 20), "cpu", 2).predict_each(list(images[:3]))
    (tmp_path / "pictures").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "pictures" / "a.png")
    for command in (
        [*arguments, f"--depth={path}"],
        [*arguments, f"--depth={path}", "--device=cpu,cpu", f"--out={tmp_path / 'two'}"],
        ["depth", tmp_path / "pictures", f"--weights={path}", "--device=cpu"],
    ):
        code, _, error = run(*command, "--depth-meaning=inverse")
        (line,) = [line for line in error.splitlines() if "maps of a batch are flat" in line]
        assert code == 0 and "use --depth-meaning disparity" in line


def test_maps_that_are_not_clipped_or_not_all_are_not_told(tmp_path, models, images):
    """Warnings are errors here."""
    model = DepthModel(DepthOptions(onnx_models.flat(tmp_path / "flat.onnx"), meaning="inverse"), (28, 20), "cpu")
    assert not model.predict(images).grey.any()  # 2 everywhere, which lies within
    model = DepthModel(models / "inverse.onnx", (28, 20), "cpu")
    some = np.stack([np.zeros_like(images[0]), images[0]])
    assert model.predict(some).grey.any() and model.predict_each([]) == []


def test_model_names_pictures_that_give_no_numbers(tmp_path, images):
    model = DepthModel(onnx_models.not_numbers(tmp_path / "odd.onnx"), (28, 20), "cpu", 2)
    bright = np.full((4, 20, 28, 3), 255, np.uint8)
    dark = bright.copy()
    dark[2, 5:9, 5:9] = 0
    assert np.isfinite(model.predict(bright).metres).all()
    count = (onnx_models.blurred(dark[2].transpose(2, 0, 1)[None] / 255) < 2).sum()
    with pytest.raises(
        InputError, match=rf"^--depth odd.onnx: {count} values of the prediction for picture 2 are no numbers"
    ):
        model.predict(dark)
    with pytest.raises(InputError, match=r"values of the prediction for c are no numbers"):
        model.predict_each(list(dark), ["a", "b", "c", "d"])
