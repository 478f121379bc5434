"""The command line.

Exit codes: 0 all well; 1 a fault was found (`verify`); 2 bad usage, bad input or a refusal of the machine; 130
interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from gpufgbg._version import __version__
from gpufgbg.depth.options import (
    BACKENDS,
    DEMO,
    INPUTS,
    MEANINGS,
    PRECISIONS,
    RANGES,
    UPSAMPLINGS,
    DepthOptions,
)
from gpufgbg.exceptions import (
    GpufgbgError,
    GpufgbgWarning,
    InputError,
    Interrupted,
    OptionError,
    StorageError,
    printable,
)
from gpufgbg.recipe import FLIPS, SUBSAMPLINGS, Recipe
from gpufgbg.urls import is_url, local_path
from gpufgbg.verify_report import NAMED

if TYPE_CHECKING:
    from gpufgbg.pipeline import GenerateReport

__all__ = ["main"]

_LINE_EVERY_S = 5.0  # progress where there is no terminal


class _Parser(argparse.ArgumentParser):
    """One line an error, and no abbreviations that a later option would make ambiguous."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpufgbg: error: {printable(message)} (see {self.prog} --help)\n")


def _number(text: str) -> int:
    if not re.fullmatch(r"[+-]?\d+", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of pixels (224) or WIDTHxHEIGHT (640x480)")
    return int(match[1]), int(match[2] or match[1])


def _range(text: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected A:B, the samples from A to B - 1 (either may be left out)"
        )
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] else None


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; a test keeps it and the README in step."""
    parser = _Parser(
        prog="gpufgbg",
        description="Labelled training pictures: foregrounds overlaid on backgrounds at random places, with "
        "the mask, the label and the exact statistics of every composite.",
    )
    parser.add_argument("--version", action="version", version=f"gpufgbg {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    made = commands.add_parser(
        "generate",
        help="make a data set from folders of pictures, or continue one",
        description="Make a data set from two folders of pictures. The same command continues a run that was "
        "stopped, however it was stopped.",
    )
    made.add_argument("--backgrounds", required=True, metavar="DIR", help="folder of background pictures")
    made.add_argument("--foregrounds", required=True, metavar="DIR", help="folder of cut-outs with transparency")
    made.add_argument(
        "--masks",
        metavar="DIR",
        help="folder of masks, named like the foregrounds, also with mask_ before or _mask behind "
        "(default: the foreground's alpha is its mask)",
    )
    made.add_argument(
        "--out", required=True, metavar="PATH", help="folder of the data set, or a URL such as s3://BUCKET/FOLDER"
    )
    _add_recipe(made)
    _add_depth(made, "--depth", "add depth maps, predicted with these weights")
    made.add_argument(
        "--sink",
        choices=("tree", "zip", "tar"),
        default="tree",
        help="files in folders, one stored zip, or WebDataset tar shards (default: tree)",
    )
    _add_machine(made)
    made.add_argument(
        "--samples",
        type=_range,
        metavar="A:B",
        help="make the samples from A to B - 1 only; several runs may fill one data set (default: all)",
    )
    made.add_argument(
        "--ray",
        metavar="ADDRESS|local",
        help="make the samples on all GPUs of a Ray cluster, or all machines of one without: HOST:PORT or auto, or "
        "local for one of this machine alone",
    )
    made.add_argument(
        "--labels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="labels/ and labels.parquet (default), or leave the labels to the tar shards, for very many samples",
    )
    made.set_defaults(run=_generate)

    demo = commands.add_parser(
        "demo",
        help="try it out: a small data set from built-in pictures, and a contact sheet",
        description="Draw 10 street scenes and 10 figures, make a data set of them, and show it on a contact sheet.",
    )
    demo.add_argument("out", nargs="?", default="gpufgbg-demo", metavar="OUT", help="folder (default: gpufgbg-demo)")
    demo.add_argument(
        "--per-pair", type=_number, default=1, metavar="N", help="repetitions of each pair (default: 1)"
    )
    demo.add_argument(
        "--sink", choices=("tree", "zip", "tar"), default="tree", help="as for generate (default: tree)"
    )
    demo.add_argument(
        "--depth",
        action=argparse.BooleanOptionalAction,
        help="depth maps by the built-in network (default: where ONNX Runtime is installed)",
    )
    _add_machine(demo)
    demo.set_defaults(run=_demo)

    depth = commands.add_parser(
        "depth",
        help="add depth maps to a data set, predict them for a folder of pictures, or build the engine ahead",
        description="Add depth maps to a data set that gpufgbg made, predict them for any folder of pictures, or "
        "build the TensorRT engine ahead. The same command continues a run that was stopped.",
    )
    depth.add_argument(
        "target", metavar="DATASET|FOLDER|build", help="a data set's folder, a folder of pictures, or the word build"
    )
    _add_depth(depth, "--weights", "weights of the network")
    depth.add_argument("--out", metavar="DIR", help="for a folder of pictures: where the depth maps go")
    depth.add_argument(
        "--frame",
        type=_size,
        metavar="N|WxH",
        help="for build: the data set's frame (default: 224)",
    )
    _add_machine(depth)
    depth.set_defaults(run=_depth)

    joined = commands.add_parser(
        "merge",
        help="make one data set of several that were made apart with --samples",
        description="Make one data set of several that hold different samples of the same recipe and pictures. Every "
        "file is checked on the way; samples that are missing or there twice are named. The same command continues.",
    )
    joined.add_argument("out", metavar="OUT", help="folder of the data set: new, empty, or one to be added to")
    joined.add_argument("parts", nargs="+", metavar="PART", help="data sets to be merged; they stay as they are")
    joined.add_argument("--workers", type=_number, metavar="N", help="threads that copy (default: one a core)")
    _add_json(joined)
    joined.set_defaults(run=_merge)

    stats = commands.add_parser(
        "stats",
        help="count, size, mean and std of a data set, by decoding it",
        description="Decode every picture of a data set (folder tree, zip or tar shards; not only ours) and print "
        "count, size, mean and standard deviation by kind.",
    )
    stats.add_argument("dataset", metavar="DATASET", help="a data set's folder, or a zip or tar file")
    _add_device(stats, "where pictures are decoded; on a card by DALI (default: auto)")
    stats.add_argument("--workers", type=_number, metavar="N", help="threads that decode (default: one a core)")
    _add_json(stats)
    stats.set_defaults(run=_stats)

    check = commands.add_parser(
        "verify",
        help="check a data set: counts, names, checksums, samples rendered again, pictures decoded",
        description="Check a data set made by gpufgbg against its own record; of any other, check that its pictures "
        "decode and belong together. Exit code 1 where a fault is found.",
    )
    check.add_argument("dataset", metavar="DATASET", help="a data set's folder, or another's zip or tar file")
    check.add_argument(
        "--rerender",
        type=_number,
        default=0,
        metavar="N",
        help="render N samples again and compare them byte for byte (default: 0)",
    )
    check.add_argument(
        "--decode",
        action="store_true",
        help="decode every picture and check its size and mode (always, where gpufgbg did not make the data set)",
    )
    _add_device(check, "where samples are rendered and pictures decoded, on a card by DALI (default: auto)")
    check.add_argument(
        "--workers", type=_number, metavar="N", help="threads that render and decode (default: one a core)"
    )
    _add_json(check)
    check.set_defaults(run=_verify)

    strips = commands.add_parser(
        "preview",
        help="a picture of a data set: a strip of samples for each kind",
        description="Draw strips of a data set's pictures, a row a kind, as one PNG.",
    )
    strips.add_argument("dataset", metavar="DATASET", help="a data set's folder, or a zip or tar file")
    strips.add_argument("--out", metavar="PNG", help="the picture (default: preview.png in the data set's folder)")
    strips.add_argument("--columns", type=_number, default=10, metavar="N", help="pictures a strip (default: 10)")
    _add_json(strips)
    strips.set_defaults(run=_preview)

    _add_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure every operation here, beside its rivals and the machine's limits",
        description="Measure every operation on this machine, on the CPU and on a card, beside what people would use "
        "instead and the limits of the machine, and write results.json, report.md and pictures. Exit code 1 where "
        "one of our own operations failed.",
    )
    bench.add_argument("--quick", action="store_true", help="less of everything: 2 minutes on 2 cores")
    bench.add_argument(
        "--only", default="", metavar="NAME,...", help="these suites alone, with the machine's limits (default: all)"
    )
    bench.add_argument(
        "--device",
        default="auto",
        metavar="auto|cpu|cuda[:N]",
        help="what to measure: CPU and card, or one of the two (default: auto, both where there are)",
    )
    bench.add_argument("--input", metavar="DIR", help="folder with bg/, fg/, fg_mask/ (default: built-in pictures)")
    bench.add_argument(
        "--out", default="gpufgbg-bench", metavar="DIR",
        help="folder of the results; rows that are there and not measured again stay (default: gpufgbg-bench)",
    )  # fmt: skip
    bench.add_argument("--profile", action="store_true", help="our kernels under Nsight Compute (ncu), too")
    _add_json(bench)
    bench.set_defaults(run=_bench)
    tasks = bench.add_subparsers(dest="task", metavar="compare|report", help="in place of measuring")
    compare = tasks.add_parser(
        "compare",
        help="two files of results against each other",
        description="Ratios of two files of results, row by row. Exit code 1 where an operation of ours became "
        "slower by more than the noise, or was lost.",
    )
    compare.add_argument("old", metavar="OLD.json", help="results.json of a run")
    compare.add_argument("new", metavar="NEW.json", help="results.json of a later one, on the same machine")
    compare.add_argument("--force", action="store_true", help="compare other machines or scales, too")
    compare.set_defaults(run=_bench_compare)
    again = tasks.add_parser(
        "report",
        help="write report.md and pictures again",
        description="Write report.md and the pictures of a folder of results again, as after a run.",
    )
    again.add_argument("folder", metavar="DIR", help="folder with a results.json")
    again.set_defaults(run=_bench_report)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--per-pair",
        type=_number,
        default=20,
        metavar="N",
        help="repetitions of each background, foreground and orientation (default: 20)",
    )
    parser.add_argument(
        "--flip",
        choices=FLIPS,
        default="both",
        help="show each foreground flipped left to right and as it is, or one of the two (default: both)",
    )
    parser.add_argument(
        "--size", type=_size, default=(224, 224), metavar="N|WxH", help="frame in pixels (default: 224)"
    )
    parser.add_argument(
        "--foreground-height",
        type=_number,
        default=105,
        metavar="N",
        help="height in pixels that foregrounds are scaled to (default: 105)",
    )
    parser.add_argument("--seed", type=_number, default=0, metavar="N", help="seed of the placements (default: 0)")
    parser.add_argument(
        "--quality", type=_number, default=65, metavar="N", help="JPEG quality, 1 to 100 (default: 65)"
    )
    parser.add_argument(
        "--subsampling", choices=SUBSAMPLINGS, default="420", help="chroma subsampling (default: 420)"
    )
    parser.add_argument(
        "--optimize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="optimal Huffman tables for each picture (default), or the standard's",
    )


def _add_depth(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    parser.add_argument(
        name,
        dest="depth",
        required=name != "--depth",
        metavar=f"FILE|{DEMO}",
        help=f"{what}: DenseDepth's HDF5 (nyu.h5), any monocular model in ONNX, or the built-in {DEMO} network",
    )
    parser.add_argument(
        "--depth-input",
        choices=INPUTS,
        default="saved",
        help="predict from composites as their files decode, or as they were rendered (default: saved)",
    )
    parser.add_argument(
        "--depth-backend",
        choices=BACKENDS,
        default="auto",
        help="what runs the network (default: TensorRT on a card, ONNX Runtime on the CPU)",
    )
    parser.add_argument("--depth-precision", choices=PRECISIONS, help="default: fp16 with TensorRT, else fp32")
    parser.add_argument(
        "--depth-size",
        type=_size,
        metavar="N|WxH",
        help="the network's input (default: twice the frame, or the file's; for a folder of pictures 640 at most)",
    )
    parser.add_argument(
        "--depth-batch", type=_number, metavar="N", help="pictures an inference (default: 64 on a card)"
    )
    parser.add_argument(
        "--depth-upsampling",
        choices=UPSAMPLINGS,
        default=UPSAMPLINGS[0],
        help="DenseDepth's bilinear x2, as TensorFlow 2 or TensorFlow 1 computes it (default: half-pixel)",
    )
    parser.add_argument(
        "--depth-range", choices=RANGES, help="values that an ONNX model takes (default: unit, 0 to 1)"
    )
    parser.add_argument(
        "--depth-meaning",
        choices=MEANINGS,
        help="what an ONNX model gives: disparity for MiDaS, DPT, Depth Anything (default: what it says, or metres)",
    )
    parser.add_argument(
        "--depth-scale",
        type=_positive,
        metavar="METRES",
        help="metres of one unit of depth (default: 10 for DenseDepth, as for nyu.h5; kitti.h5 has 80; else 1)",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    _add_device(parser, "where samples are made; cuda:0,2 or cuda:all takes several cards (default: auto)")
    parser.add_argument("--workers", type=_number, metavar="N", help="threads that work (default: one a core)")
    _add_json(parser)


def _add_device(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]", help=meaning)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")


# -- commands -------------------------------------------------------------------------------------------


def _generate(options: argparse.Namespace) -> int:
    from gpufgbg.pipeline import generate

    recipe = Recipe(
        per_pair=options.per_pair,
        flip=options.flip,
        size=options.size,
        foreground_height=options.foreground_height,
        seed=options.seed,
        quality=options.quality,
        subsampling=options.subsampling,
        optimize=options.optimize,
    )
    depth = _depth_options(options)
    with _progress("samples", quiet=options.json) as progress:
        report = generate(
            options.out,
            options.backgrounds,
            options.foregrounds,
            options.masks,
            recipe,
            depth=depth,
            sink=options.sink,
            device=options.device,
            ray=options.ray,
            labels=options.labels,
            samples=options.samples,
            workers=options.workers,
            progress=progress,
            tell=None if options.json else _tell,
        )
    return _print_report(report, options, depth)


def _print_report(report: GenerateReport, options: argparse.Namespace, depth: DepthOptions | None) -> int:
    from gpufgbg.report import format_table

    if options.json:
        _print_json(
            {
                "out": str(report.out),
                "samples": report.samples,
                "done": report.done,
                "total": report.total,
                "complete": report.complete,
                "device": report.device,
                "seconds": round(report.seconds, 3),
                "memory": report.memory,
                "transferred": report.transferred,
                "timeline": {phase: round(seconds, 3) for phase, seconds in report.timeline.items()},
                "bytes": report.size_bytes,
                "statistics": {k: m.to_dict(summary=True) for k, m in report.statistics.items()},
            }
        )
        return 0
    _print(format_table(report.counts, report.size_bytes, report.statistics))
    rate = f", {report.samples / report.seconds:,.0f}/s" if report.samples else ""
    state = "complete" if report.complete else f"{report.done:,} of {report.total:,} samples"
    _print(f"{report.samples:,} samples in {report.seconds:.1f} s{rate}; {printable(report.out)}: {state}")
    _print_remarks(options, depth)
    return 0


def _print_remarks(options: argparse.Namespace, depth: DepthOptions | None) -> None:
    from gpufgbg.backends import why_cpu

    if depth is not None and depth.weights == DEMO:
        _print("depth maps are the built-in demo network's: for trying out, not for training")
    if options.device == "auto" and not getattr(options, "ray", None) and (reason := why_cpu(options.device)):
        _print(f"made on the CPU: {reason}")


def _tell(text: str) -> None:
    _note(f"gpufgbg: {text}")


def _depth_options(options: argparse.Namespace) -> DepthOptions | None:
    if options.depth is None:
        for field in dataclasses.fields(DepthOptions)[1:]:
            if getattr(options, f"depth_{field.name}", field.default) != field.default:
                raise OptionError(f"depth_{field.name}", "is for depth maps: give their weights too, with --depth")
        return None
    return DepthOptions(
        options.depth,
        input=options.depth_input,
        backend=options.depth_backend,
        precision=options.depth_precision,
        size=options.depth_size,
        batch=options.depth_batch,
        upsampling=options.depth_upsampling,
        range=options.depth_range,
        meaning=options.depth_meaning,
        scale=options.depth_scale,
    )


def _demo(options: argparse.Namespace) -> int:
    from gpufgbg.compositor import check_workers
    from gpufgbg.depth.model import resolve
    from gpufgbg.depth.sources import open_source
    from gpufgbg.files import storage_errors
    from gpufgbg.report import preview
    from gpufgbg.sample_assets import write_sample_assets
    from gpufgbg.scaleout.devices import several_devices

    if not options.out:
        raise OptionError("OUT", "got an empty name, expected a folder")
    if is_url(options.out):
        raise OptionError("OUT", f"got {printable(options.out)}, expected a folder on this machine")
    out = local_path(options.out)
    recipe = Recipe(per_pair=options.per_pair)
    check_workers(options.workers)
    wanted = options.depth
    if wanted is None:
        wanted = find_spec("onnxruntime") is not None and find_spec("onnx") is not None
    defaults = DepthOptions()
    for device in several_devices(options.device) or (options.device,):
        resolve(defaults if wanted else DepthOptions(backend="onnxruntime"), device)
    if wanted:
        open_source(defaults, recipe.size)
    assets, dataset, sheet = out / "assets", out / "dataset", out / "contact_sheet.png"
    with storage_errors(out):
        if not _is_free_for_demo(out, assets, dataset, sheet):
            raise OptionError("OUT", f"{printable(out)} exists and is not a demo of ours: choose another folder")
        backgrounds, foregrounds = write_sample_assets(assets)
    options.backgrounds, options.foregrounds, options.masks = backgrounds, foregrounds, None
    options.out, options.samples, options.ray, options.labels = dataset, None, None, True
    options.depth = DEMO if wanted else None
    for field in dataclasses.fields(defaults)[1:]:
        setattr(options, f"depth_{field.name}", getattr(defaults, field.name))
    for name in ("flip", "size", "foreground_height", "seed", "quality", "subsampling", "optimize"):
        setattr(options, name, getattr(recipe, name))
    code = _generate(options)
    preview(dataset, sheet)
    if not options.json:
        _print(f"contact sheet: {printable(sheet)}")
    return code


def _is_free_for_demo(out: Path, assets: Path, dataset: Path, sheet: Path) -> bool:
    """Whether there is nothing but a demo of ours, which may have been stopped at any moment."""
    from gpufgbg.manifest import Manifest

    if not out.exists() and not out.is_symlink():
        return True
    if not out.is_dir() or not {*out.iterdir()} <= {assets, dataset, sheet}:
        return False
    drawn = re.compile(r"(backgrounds/street_\d+\.jpg|foregrounds/figure_\d+\.png|backgrounds|foregrounds)")
    if not all(drawn.fullmatch(path.relative_to(assets).as_posix()) for path in assets.rglob("*")):
        return False
    if not dataset.exists() and not dataset.is_symlink():
        return True
    return dataset.is_dir() and (Manifest(dataset).started or not any(dataset.iterdir()))


def _depth(options: argparse.Namespace) -> int:
    from gpufgbg.manifest import Manifest
    from gpufgbg.pipeline import add_depth
    from gpufgbg.predict import build_engine, predict_folder

    depth = _depth_options(options)
    assert depth is not None
    tell = None if options.json else _tell
    if not options.target:
        raise OptionError("DATASET|FOLDER|build", "got an empty name, expected a folder")
    if options.target == "build":
        if options.out is not None:
            raise OptionError("out", "is for a folder of pictures; build keeps the engine in the cache folder")
        engine = build_engine(depth, options.frame or (224, 224), options.device, tell)
        if options.json:
            _print_json(engine)
        else:
            state = "built now" if engine["built"] else "was there"
            batch = f"{engine['batch']} pictures at a time"
            _print(f"{engine['version']} engine for {engine['device']}, {batch}: {state}")
        return 0
    if options.frame is not None:
        raise OptionError("frame", "is for build: a data set or a folder of pictures has its own")
    if is_url(options.target) or Manifest(local_path(options.target)).file.is_file():
        if options.out is not None:
            raise OptionError("out", f"{printable(options.target)} is a data set of ours: its depth maps go into it")
        with _progress("samples", quiet=options.json) as progress:
            report = add_depth(
                options.target, depth, device=options.device, workers=options.workers, progress=progress, tell=tell
            )
        return _print_report(report, options, depth)
    with _progress("pictures", quiet=options.json) as progress:
        found = predict_folder(
            options.target,
            options.out,
            depth,
            device=options.device,
            workers=options.workers,
            progress=progress,
            tell=tell,
        )
    if options.json:
        _print_json(dataclasses.asdict(found) | {"out": str(found.out), "seconds": round(found.seconds, 3)})
    else:
        _print(f"{found.predicted:,} depth maps in {found.seconds:.1f} s; {printable(found.out)}: {found.pictures:,}")
        _print_remarks(options, depth)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from gpufgbg.merging import merge, ranges

    with _progress("samples", quiet=options.json) as progress:
        report = merge(options.out, options.parts, workers=options.workers, progress=progress)
    if options.json:
        gaps = [[gap.start, gap.stop] for gap in report.gaps]
        _print_json(dataclasses.asdict(report) | {"out": str(report.out), "gaps": gaps, "complete": report.complete})
        return 0
    state = "complete" if report.complete else f"{report.done:,} of {report.total:,} samples"
    _print(f"{report.samples:,} samples in {report.seconds:.1f} s; {printable(report.out)}: {state}")
    if report.gaps:
        _print(f"missing: samples {ranges(report.gaps)}: make them with gpufgbg generate --samples, here or apart")
    return 0


def _check_name(options: argparse.Namespace) -> None:
    if not options.dataset:
        raise OptionError("DATASET", "got an empty name, expected a data set's folder, or a zip or tar file")


def _stats(options: argparse.Namespace) -> int:
    from gpufgbg.decoding import why_cpu
    from gpufgbg.report import statistics_table
    from gpufgbg.statistics import statistics

    _check_name(options)
    with _progress("pictures", quiet=options.json) as progress:
        found = statistics(options.dataset, options.workers, lambda done: progress(done, 0), device=options.device)
    if options.json:
        _print_json(
            {
                kind: {
                    "images": s.images,
                    "bytes": s.size_bytes,
                    "forms": sorted([w, h, mode, form] for w, h, mode, form in s.forms),
                    **({"statistics": s.moments.to_dict(summary=True)} if s.moments.images else {}),
                }
                for kind, s in found.items()
            }
        )
    else:
        _print(statistics_table(found))
        if reason := why_cpu(options.device):
            _print(f"decoded on the CPU: {reason}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from gpufgbg import backends, decoding
    from gpufgbg.verify import verify

    _check_name(options)
    with _progress("samples", quiet=options.json) as progress:
        report = verify(options.dataset, options.rerender, options.workers, progress, options.device, options.decode)
    if options.json:
        _print_json(
            {
                "samples": report.samples,
                "files": report.files,
                "rerendered": report.rerendered,
                "decoded": report.decoded,
                "faults": report.faults,
            }
        )
    else:
        for fault in report.faults:
            _print(f"fault: {printable(fault)}")
        count = len(report.faults)
        verdict = "no faults" if not count else "1 fault" if count == 1 else f"{count:,} faults"
        decoded = f", {report.decoded:,} pictures decoded" if report.decoded else ""
        _print(
            f"{report.samples:,} samples, {report.files:,} files read, {report.rerendered:,} samples rendered "
            f"again{decoded}: {verdict}"
        )
        if report.decoded and (reason := decoding.why_cpu(options.device)):
            _print(f"decoded on the CPU: {reason}")
        elif report.rerendered and (reason := backends.why_cpu(options.device)):
            _print(f"rendered on the CPU: {reason}")
    return 1 if report.faults else 0


def _preview(options: argparse.Namespace) -> int:
    from gpufgbg.report import preview

    _check_name(options)
    written = preview(options.dataset, options.out, options.columns)
    if options.json:
        _print_json({"preview": str(written)})
    else:
        _print(printable(written))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from gpufgbg.benchmarks.report import summary_table, write
    from gpufgbg.benchmarks.results import Results
    from gpufgbg.benchmarks.runner import RESULTS_FILE, BenchOptions, run

    chosen = BenchOptions(
        Path(options.out),
        tuple(name for name in options.only.split(",") if name),
        options.device,
        "quick" if options.quick else "full",
        None if options.input is None else Path(options.input),
        options.profile,
    )
    began = False

    def tell(text: str) -> None:
        nonlocal began
        began = True
        if not options.json:
            _print(text)

    try:
        results = run(chosen, tell)
    except BaseException:  # Ctrl-C among them: what was measured until then is reported
        if began and (chosen.out / RESULTS_FILE).is_file():
            with suppress(GpufgbgError):
                page, _ = write(Results.load(chosen.out / RESULTS_FILE), chosen.out, "report")
                _note(f"report of what there is: {printable(page)}")
        raise
    page, left_out = write(results, chosen.out, "report")
    failed = [row for row in results.rows.values() if row.ours and row.status == "failed"]
    if options.json:
        _print_json({"results": str(chosen.out / RESULTS_FILE), "report": str(page), "failed": len(failed)})
    else:
        _print(summary_table(results))
        if left_out:
            _print(f"no pictures: {left_out}")
        _print(f"report: {printable(page)}; rows: {printable(chosen.out / RESULTS_FILE)}")
        for row in failed:
            _print(f"fault: {row.work}: {row.name} ({row.device}): {printable(row.reason)}")
    return 1 if failed else 0


def _bench_compare(options: argparse.Namespace) -> int:
    from gpufgbg.benchmarks.compare import changes, changes_table, check_alike, head
    from gpufgbg.benchmarks.results import Results

    old, new = (Results.load(Path(path)) for path in (options.old, options.new))
    if not options.force:
        check_alike(old, new)
    found = changes(old, new)
    worse = [change for change in found if change.is_regression]
    if options.json:
        _print_json(
            [
                {
                    "suite": c.row.suite, "work": c.row.work, "name": c.row.name, "device": c.row.device,
                    "ratio": c.ratio, "noise": c.noise, "verdict": c.verdict, "regression": c.is_regression,
                }
                for c in found
            ]
        )  # fmt: skip
    else:
        _print(f"old: {printable(head(old))}\nnew: {printable(head(new))}\n")
        _print(changes_table(found))
        verdict = f"{len(worse)} regressions" if worse else "no regression"
        _print(f"{len(found)} rows: {verdict} of ours beyond the noise")
    return 1 if worse else 0


def _bench_report(options: argparse.Namespace) -> int:
    from gpufgbg.benchmarks.report import summary_table, write
    from gpufgbg.benchmarks.results import Results
    from gpufgbg.benchmarks.runner import RESULTS_FILE

    folder = Path(options.folder)
    results = Results.load(folder / RESULTS_FILE)
    page, left_out = write(results, folder, "report")
    if options.json:
        _print_json({"report": str(page)})
        return 0
    _print(summary_table(results))
    if left_out:
        _print(f"no pictures: {left_out}")
    _print(f"report: {printable(page)}")
    return 0


def _print(text: str, end: str = "\n") -> None:
    """Text on standard output; what keeps it from there, but for a reader who has gone, is an error of ours."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(sys.stdout)
        raise StorageError(f"standard output: can't be written: {error.strerror or error}") from None


def _note(text: str) -> None:
    """A line on standard error, where somebody reads it: a run does not end because nobody does.

    On a terminal it stands above the bar of progress.
    """
    try:
        bars = sys.modules.get("tqdm")
        if bars is None:
            print(text, file=sys.stderr, flush=True)
        else:
            bars.tqdm.write(text, file=sys.stderr)
    except (OSError, ValueError):
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """From here on what is written to a standard stream is lost, also what it still holds at the process's end."""
    with suppress(OSError, ValueError):  # ValueError: closed, or none of the system's
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _print_json(content: Any) -> None:
    _print(json.dumps(content, indent=1))


# -- progress and errors --------------------------------------------------------------------------------


@contextmanager
def _progress(unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Something to call with (done, total): a live bar on a terminal, a line every few seconds elsewhere."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(unit=f" {unit}", unit_scale=True, smoothing=0.05, dynamic_ncols=True) as bar:

            def show(done: int, total: int) -> None:
                if total and bar.total != total:
                    bar.total, bar.initial = total, done
                    bar.n = bar.last_print_n = done
                bar.update(done - bar.n)

            yield show
    else:
        start = last = time.monotonic()
        first: int | None = None

        def line(done: int, total: int) -> None:
            nonlocal last, first
            now = time.monotonic()
            if first is None:
                first = done
            if (now - last < _LINE_EVERY_S and done != total) or not done:
                return
            last = now
            made = done - first or done  # all of them at once, where the first call is the last
            rate = made / max(now - start, 1e-9)
            text = f"{done:,} {unit}"
            if total:
                text = f"{done:,} of {total:,} {unit} ({100 * done // total} %)"
                if rate:
                    text += f", {(total - done) / rate:.0f} s left"
            _note(f"{text}, {rate:,.0f}/s" if rate else text)

        yield line


def _warn(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    if issubclass(category, GpufgbgWarning):
        _note(f"gpufgbg: warning: {message}")


def _spelled(error: OptionError) -> str:
    option = error.option if error.option.isupper() else f"--{error.option.replace('_', '-')}"
    return f"{option}: {error.problem}"


def _as_named(message: str, options: argparse.Namespace) -> str:
    """A message that begins with what Python calls an argument, with what this command calls it."""
    if options.command == "depth":
        message = re.sub(r"^--depth(?=[ :])", "--weights", message)
    elif options.command == "merge":
        message = re.sub(r"^--out(?=[ :])", "OUT", message)
    elif options.command in ("stats", "verify"):
        message = re.sub(r"^--out(?=[ :])", "DATASET", message)
    return message


def _shortened(error: InputError) -> str:
    """The message, options spelled as they are given; of very many problems the first, and the others' number."""
    problems = [re.sub(r"^(?=(backgrounds|foregrounds|masks): )", "--", problem) for problem in error.problems]
    if len(problems) <= NAMED:
        return str(InputError(*problems))
    rest = len(problems) - NAMED
    return f"{len(problems):,} problems with the input: {'; '.join(problems[:NAMED])}; and {rest:,} more"


def _terminate(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is Ctrl-C inside the block; in the main thread alone: elsewhere the caller handles signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; by default those of the process.
    """
    try:
        code = _run(arguments)
        _print("", "")  # help and the version too are flushed here, where it can be told what keeps them from it
        return code
    except BrokenPipeError:  # the reader of our output has gone
        _discard(sys.stdout)
        return 141  # 128 + SIGPIPE, which Windows lacks
    except OSError as error:
        named = error.filename2 or error.filename
        where = f"{printable(os.fsdecode(named))}: " if isinstance(named, (str, bytes, os.PathLike)) else ""
        _note(f"gpufgbg: error: {where}{printable(error.strerror or error)}")
    return 2


def _run(arguments: Sequence[str] | None) -> int:
    """`main` but for what the file system says last: an exit code."""
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as error:  # help, version or a usage error, printed already
        return int(error.code or 0)
    with _sigterm_interrupts(), warnings.catch_warnings():
        warnings.simplefilter("always", GpufgbgWarning)
        warnings.showwarning = _warn  # restored by catch_warnings
        try:
            return int(options.run(options))
        except Interrupted as error:
            _note(f"gpufgbg: {error}")
            return 130
        except KeyboardInterrupt:
            _note("gpufgbg: interrupted")
            return 130
        except OptionError as error:
            _note(f"gpufgbg: error: {printable(_as_named(_spelled(error), options))}")
        except InputError as error:
            _note(f"gpufgbg: error: {printable(_as_named(_shortened(error), options))}")
        except GpufgbgError as error:
            _note(f"gpufgbg: error: {printable(_as_named(str(error), options))}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
