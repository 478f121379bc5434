"""Labelled training pictures: foregrounds overlaid on backgrounds, with mask, label and exact statistics.

Every sample is a pure function of (assets, recipe, index); the bytes are those of Pillow and libjpeg-turbo.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpufgbg._version import __version__

if TYPE_CHECKING:
    from gpufgbg.assets import Assets, prepare
    from gpufgbg.blend import Blend
    from gpufgbg.compositor import Batch, Compositor
    from gpufgbg.depth.model import DepthMaps, DepthModel
    from gpufgbg.depth.options import DepthOptions
    from gpufgbg.exceptions import (
        DatasetError,
        DeviceError,
        GpufgbgError,
        GpufgbgWarning,
        InputError,
        Interrupted,
        OptionError,
        StorageError,
    )
    from gpufgbg.jpeg import EncodedImages, JpegEncoder
    from gpufgbg.measure import mean_std
    from gpufgbg.merging import MergeReport, merge
    from gpufgbg.moments import Moments
    from gpufgbg.pipeline import GenerateReport, add_depth, generate
    from gpufgbg.predict import FolderReport, predict_folder
    from gpufgbg.recipe import Placements, Plan, Recipe
    from gpufgbg.streaming import SampleStream, StreamBatch, stream

__all__ = [
    "Assets",
    "Batch",
    "Blend",
    "Compositor",
    "DatasetError",
    "DepthMaps",
    "DepthModel",
    "DepthOptions",
    "DeviceError",
    "EncodedImages",
    "FolderReport",
    "GenerateReport",
    "GpufgbgError",
    "GpufgbgWarning",
    "InputError",
    "Interrupted",
    "JpegEncoder",
    "MergeReport",
    "Moments",
    "OptionError",
    "Placements",
    "Plan",
    "Recipe",
    "SampleStream",
    "StorageError",
    "StreamBatch",
    "__version__",
    "add_depth",
    "generate",
    "mean_std",
    "merge",
    "predict_folder",
    "prepare",
    "stream",
]

_MODULES = {
    "assets": ("Assets", "prepare"),
    "blend": ("Blend",),
    "compositor": ("Batch", "Compositor"),
    "depth.model": ("DepthMaps", "DepthModel"),
    "depth.options": ("DepthOptions",),
    "exceptions": (
        "DatasetError", "DeviceError", "GpufgbgError", "GpufgbgWarning", "InputError", "Interrupted",
        "OptionError", "StorageError",
    ),
    "jpeg": ("EncodedImages", "JpegEncoder"),
    "measure": ("mean_std",),
    "merging": ("MergeReport", "merge"),
    "pipeline": ("GenerateReport", "add_depth", "generate"),
    "predict": ("FolderReport", "predict_folder"),
    "moments": ("Moments",),
    "recipe": ("Placements", "Plan", "Recipe"),
    "streaming": ("SampleStream", "StreamBatch", "stream"),
}  # fmt: skip
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import gpufgbg`` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpufgbg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gpufgbg.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
