"""What dataset.json and the records of shards must hold, so that whoever reads them can rely on it.

::

    recipe        every field of `gpufgbg.Recipe`
    sink          tree, zip or tar
    depth         null, or the weights' name and sha256, options, engines
    labels        optional; false where there are no label files
    counts        backgrounds, foregrounds, samples, done
    complete      whether all samples are there
    assets        fingerprint, masks_from, and file, sha256, source and source_sha256 of each picture
    bytes         lengths of the files by kind; {} before the first shard
    statistics    sums by kind: images, pixels, sum, sum_of_squares, and what follows from them, mean and std
    shards        start, stop, sha256 of each, sorted; of a segment also the number of its shards

All checks raise `ValueError` that names the key, what was found and what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

from gpufgbg.exceptions import OptionError
from gpufgbg.layout import SAMPLE_KINDS, Layout
from gpufgbg.recipe import Recipe
from gpufgbg.sinks import SINKS

__all__ = ["check_description", "check_record"]

#: kind of asset -> where dataset.json lists it
ASSETS = {"background": "backgrounds", "foreground": "foregrounds", "foreground_mask": "masks"}
_TYPES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}
_SHA256 = re.compile("[0-9a-f]{64}")
_LONGEST = 60  # characters of a value that a message shows


def check_description(content: dict[str, Any]) -> None:
    """Raise `ValueError` where dataset.json's content lacks something or contradicts itself.

    What its numbers say of the files is not checked: `gpufgbg.verify` does.
    """
    recipe = _recipe(_field(content, "recipe", dict))
    sink = _field(content, "sink", str)
    if sink not in SINKS:
        raise _wrong("sink", sink, f"one of {', '.join(SINKS)}")
    if "depth" not in content:
        raise ValueError("depth is missing")
    if content["depth"] is not None:
        depth = _field(content, "depth", dict)
        for name in ("weights", "sha256"):
            _field(depth, name, str, "depth.")
        if "engines" in depth:
            _field(depth, "engines", list, "depth.")
    if "labels" in content:
        _field(content, "labels", bool)
    _field(content, "complete", bool)
    samples = _counts(_field(content, "counts", dict), recipe)
    _assets(_field(content, "assets", dict), content["counts"])
    listed = _shards(_field(content, "shards", list), samples)
    _sums(content, listed)


def check_record(fields: Any) -> None:
    """Raise `ValueError` where a shard's record lacks something or contradicts itself."""
    _object("the record", fields)
    start, stop = _range(fields, "")
    _sha256(fields, "sha256", "")
    if "shards" in fields:
        _whole(fields, "shards", "", 1)
    size_bytes, moments = (_field(fields, name, dict) for name in ("bytes", "moments"))
    if size_bytes.keys() != moments.keys():
        raise _wrong("bytes", list(size_bytes), f"the kinds of moments, {', '.join(map(str, moments))}")
    for kind in moments:
        _whole(size_bytes, kind, "bytes.")
        images = _moments(moments, kind, "moments.")
        if images != stop - start:
            raise _wrong(f"moments.{kind}.images", images, f"{stop - start}, as many as samples")


# -- parts of dataset.json ------------------------------------------------------------------------------


def _recipe(fields: dict[str, Any]) -> Recipe:
    for field in dataclasses.fields(Recipe):
        if field.name not in fields:
            raise ValueError(f"recipe.{field.name} is missing")
    _field(fields, "size", list, "recipe.")
    try:
        return Recipe.from_dict(fields)
    except OptionError as error:
        raise ValueError(f"recipe.{error}") from None


def _counts(counts: dict[str, Any], recipe: Recipe) -> int:
    """The number of samples."""
    backgrounds, foregrounds = (_whole(counts, name, "counts.", 1) for name in ("backgrounds", "foregrounds"))
    samples = backgrounds * foregrounds * recipe.per_pair * recipe.orientations
    if (found := _whole(counts, "samples", "counts.")) != samples:
        raise _wrong("counts.samples", found, f"{samples}, as the other counts and the recipe give")
    if (done := _whole(counts, "done", "counts.")) > samples:
        raise _wrong("counts.done", done, f"0 to {samples}")
    return samples


def _assets(assets: dict[str, Any], counts: dict[str, int]) -> None:
    _sha256(assets, "fingerprint", "assets.")
    if (source := _field(assets, "masks_from", str, "assets.")) not in ("files", "alpha"):
        raise _wrong("assets.masks_from", source, "files or alpha")
    layout = Layout(counts["backgrounds"], counts["foregrounds"], counts["samples"])
    names = {"backgrounds": layout.background_file, "foregrounds": layout.foreground_file, "masks": layout.mask_file}
    for plural in ASSETS.values():
        listed = _field(assets, plural, list, "assets.")
        count = counts["backgrounds" if plural == "backgrounds" else "foregrounds"]
        if len(listed) != count:
            raise ValueError(f"assets.{plural}: got {len(listed)} of them, expected {count}")
        for i, entry in enumerate(listed):
            where = f"assets.{plural}[{i}]"
            _object(where, entry)
            expected = names[plural](i)  # a name that leads elsewhere is never opened
            if (file := _field(entry, "file", str, f"{where}.")) != expected:
                raise _wrong(f"{where}.file", file, expected)
            _sha256(entry, "sha256", f"{where}.")
            _field(entry, "source", str, f"{where}.")
            _sha256(entry, "source_sha256", f"{where}.")


def _shards(shards: list[Any], samples: int) -> int:
    """How many there are."""
    last = 0
    for i, entry in enumerate(shards):
        where = f"shards[{i}]"
        _object(where, entry)
        start, stop = _range(entry, f"{where}.")
        if start < last:
            raise _wrong(f"{where}.start", start, f"{last} or more, where the one before it stops")
        if stop > samples:
            raise _wrong(f"{where}.stop", stop, f"at most {samples}, the number of samples")
        _sha256(entry, "sha256", f"{where}.")
        if "shards" in entry:
            _whole(entry, "shards", f"{where}.", 1)
        last = stop
    return len(shards)


def _sums(content: dict[str, Any], shards: int) -> None:
    size_bytes, statistics = (_field(content, name, dict) for name in ("bytes", "statistics"))
    there: tuple[str, ...] = SAMPLE_KINDS[:-1] if shards else ()
    if "depth" in size_bytes or "depth" in statistics:
        there = SAMPLE_KINDS
        if content["depth"] is None:
            raise _wrong("depth", None, "the weights, as there are bytes or statistics of depth maps")
    _kinds("bytes", size_bytes, (*ASSETS, *there) if shards else ())
    _kinds("statistics", statistics, ("background", *there))
    for kind in size_bytes:
        _whole(size_bytes, kind, "bytes.")
    for kind in statistics:
        _moments(statistics, kind, "statistics.")


def _kinds(name: str, found: dict[str, Any], expected: Iterable[str]) -> None:
    expected = tuple(expected)
    for kind in expected:
        if kind not in found:
            raise ValueError(f"{name}.{kind} is missing")
    for kind in found:
        if kind not in expected:
            raise ValueError(f"{name}.{kind}: expected {', '.join(expected) or 'nothing yet'}, and no other kind")


# -- values ---------------------------------------------------------------------------------------------


def _moments(fields: dict[str, Any], kind: str, where: str) -> int:
    """The number of images of valid sums."""
    moments = _field(fields, kind, dict, where)
    where = f"{where}{kind}."
    channels = 3 if kind in ("background", "composite") else 1
    for name in ("sum", "sum_of_squares"):
        values = _field(moments, name, list, where)
        if len(values) != channels or not all(_is_whole(value) and value >= 0 for value in values):
            raise _wrong(f"{where}{name}", values, f"{channels} whole numbers")
    _whole(moments, "pixels", where)
    return _whole(moments, "images", where)


def _range(fields: dict[str, Any], where: str) -> tuple[int, int]:
    start = _whole(fields, "start", where)
    return start, _whole(fields, "stop", where, start + 1)


def _sha256(fields: dict[str, Any], key: str, where: str) -> None:
    if not _SHA256.fullmatch(value := _field(fields, key, str, where)):
        raise _wrong(f"{where}{key}", value, "64 hexadecimal digits")


def _whole(fields: dict[str, Any], key: str, where: str, low: int = 0) -> int:
    value: int = _field(fields, key, int, where)
    if value < low:
        raise _wrong(f"{where}{key}", value, f"{low} or more")
    return value


def _field(fields: dict[str, Any], key: str, kind: type, where: str = "") -> Any:
    if key not in fields:
        raise ValueError(f"{where}{key} is missing")
    value = fields[key]
    if not (_is_whole(value) if kind is int else isinstance(value, kind)):
        raise _wrong(f"{where}{key}", value, _TYPES[kind])
    return value


def _object(where: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise _wrong(where, value, _TYPES[dict])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return ValueError(f"{where}: got {text}, expected {expected}")
