"""dataset.json: whatever is missing or of another type is told in one line that names it, by every command."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpufgbg import DatasetError, Interrupted, Recipe, generate, merge, stream
from gpufgbg.description import check_description
from gpufgbg.manifest import Manifest

SMALL = Recipe(size=(64, 48), foreground_height=20, per_pair=2)
OTHERS = (None, True, -1, 2.5, "?", [], {}, [[]], {"a": 1}, 10**30)  # values that a key doesn't have
UNCHECKED = {"versions", "format_version", "format"}
OPTIONAL = {"labels", "engines", "shards[].shards", "mean", "std"}


@pytest.fixture(scope="module")
def good(folders, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    generate(root / "set", **folders, recipe=SMALL, sink="tar", samples=(0, 20), device="cpu")
    return root / "set"


@pytest.fixture
def dataset(good, tmp_path) -> Path:
    shutil.copytree(good, tmp_path / "set")
    return tmp_path / "set"


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset.json").read_text())


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The ways to all values inside of a value; of a list to the first and the last entry."""
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = {0: value[0], len(value) - 1: value[-1]}.items() if value else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(content: dict[str, Any], path: tuple, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


def name_of(path: tuple) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def told(folder: Path, content: Any) -> str:
    """The error that dataset.json with this content gives."""
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError) as error:
        Manifest(folder).read()
    text = str(error.value)
    assert text.startswith(f"{folder / 'dataset.json'}: damaged or not ours: ") and text.isprintable(), text
    return text


def test_whatever_is_missing_is_named(dataset):
    content = content_of(dataset)
    for path in places(content):
        if path[0] in UNCHECKED or path[-1] in OPTIONAL or isinstance(path[-1], int):
            continue
        if not any(key in OPTIONAL for key in path):
            assert f": {name_of(path)} is missing: restore it" in told(dataset, changed(content, path, KeyError))
    check_description(content)


def test_whatever_is_of_another_type_is_named(dataset):
    """Each value in turn is replaced by others."""
    content, tried = content_of(dataset), 0
    for path in places(content):
        if path[0] in UNCHECKED or any(key in OPTIONAL for key in path):
            continue
        there = content
        for key in path:
            there = there[key]
        for value in OTHERS:
            free = isinstance(there, (bool, str)) or path[0] in ("bytes", "statistics", "counts")
            if free and type(value) is type(there):
                continue  # a value like any other, or checked below: gpufgbg verify compares it with the files
            if (path, value) in ((("depth",), None), (("shards",), [])):
                continue
            tried += 1
            text = told(dataset, changed(content, path, value))
            assert path[0] in text, (path, value, text)
    assert tried > 500


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("recipe", "seed"), -1, "recipe.seed: got -1, expected 0 to"),
        (("recipe", "turbo"), 1, "recipe.turbo: no such field of a recipe; it was made by a newer version"),
        (("recipe", "size"), [64], "recipe.size: got"),
        (("sink",), "cube", 'sink: got "cube", expected one of tree, zip, tar'),
        (("depth",), {"sha256": ""}, "depth.weights is missing"),
        (("labels",), "no", 'labels: got "no", expected true or false'),
        (("counts", "samples"), 47, "counts.samples: got 47, expected 48, as the other counts and the recipe give"),
        (("counts", "done"), 49, "counts.done: got 49, expected 0 to 48"),
        (("assets", "backgrounds"), [], "assets.backgrounds: got 0 of them, expected 3"),
        (("assets", "masks", 1, "file"), "../../mine", 'masks[1].file: got "../../mine", expected fg_mask/fg_01.jpg'),
        (("assets", "fingerprint"), "f" * 63, "expected 64 hexadecimal digits"),
        (("shards", 0, "stop"), 0, "shards[0].stop: got 0, expected 1 or more"),
        (("shards", 0, "stop"), 49, "shards[0].stop: got 49, expected at most 48, the number of samples"),
        (("bytes", "depth"), 5, "depth: got null, expected the weights"),
        (("bytes", "moon"), 5, "bytes.moon: expected background"),
        (("statistics", "composite", "sum"), [1], "statistics.composite.sum: got [1], expected 3 whole numbers"),
    ],
)
def test_what_contradicts_itself_is_named(dataset, path, value, message):
    assert message in told(dataset, changed(content_of(dataset), path, value))


def test_shards_in_order(dataset):
    content = content_of(dataset)
    (entry,) = content["shards"]
    content["shards"] = [{**entry, "start": 0, "stop": 9}, {**entry, "start": 8, "stop": 20}]
    assert "shards[1].start: got 8, expected 9 or more, where the one before it stops" in told(dataset, content)


@pytest.mark.parametrize("damage", [b"[" * 100_000, b"[]", b"5", b"null", b'"gpufgbg"', b"{}"])
def test_what_is_no_description_at_all(dataset, damage):
    (dataset / "dataset.json").write_bytes(damage)
    with pytest.raises(DatasetError, match="damaged or not ours: expected JSON with format gpufgbg"):
        Manifest(dataset).read()


@pytest.mark.parametrize("key", ["recipe", "assets", "shards", "counts", "bytes", "sink", "complete", "statistics"])
@pytest.mark.parametrize("value", [KeyError, 5])
def test_every_command_says_so_in_one_line(dataset, arguments, run, tmp_path, key, value):
    (dataset / "dataset.json").write_text(json.dumps(changed(content_of(dataset), (key,), value)))
    problem = f"{key} is missing" if value is KeyError else f"{key}: got 5, expected"
    given = [argument for argument in arguments if not argument.startswith("--out")]
    for command in (
        ["verify", dataset],
        ["verify", dataset, "--rerender=2", "--decode", "--device=cpu"],
        [*given, f"--out={dataset}", "--sink=tar"],
        ["merge", tmp_path / "new", dataset],
        ["merge", dataset, tmp_path / "other"],
        ["depth", dataset, "--weights=demo", "--device=cpu"],
    ):
        if command[:2] == ["merge", dataset]:
            shutil.copytree(dataset, tmp_path / "other", dirs_exist_ok=True)
        code, printed, error = run(*command)
        assert (code, printed, error.count("\n")) == (2, "", 1), error
        assert f"dataset.json: damaged or not ours: {problem}" in error
    for call in (lambda: stream(dataset, device="cpu"), lambda: merge(tmp_path / "new", [dataset])):
        with pytest.raises(DatasetError, match="damaged or not ours"):
            call()
    assert not (tmp_path / "new").exists()


def test_a_merge_writes_nothing_outside(dataset, tmp_path):
    """A name that leads out of the folder is neither read nor written."""
    content = content_of(dataset)
    content["assets"]["backgrounds"][0]["file"] = "../escaped.jpg"
    shutil.copy(dataset / "bg" / "bg_00.jpg", tmp_path / "escaped.jpg")
    (dataset / "dataset.json").write_text(json.dumps(content))
    (tmp_path / "deep").mkdir()
    with pytest.raises(DatasetError, match=r"assets.backgrounds\[0\].file: got"):
        merge(tmp_path / "deep" / "new", [dataset])
    assert not any((tmp_path / "deep").iterdir())


def test_what_was_begun_is_read(folders, tmp_path):

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted"):
        generate(tmp_path / "out", **folders, recipe=SMALL, device="cpu", workers=1, batch_size=1, progress=stop)
    content = Manifest(tmp_path / "out").read()
    assert content is not None and content["shards"] == [] and content["bytes"] == {}
