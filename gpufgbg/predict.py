"""Depth maps for any folder of pictures, resumable; and building an engine ahead."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.backends.cpu import encode_jpeg
from gpufgbg.compositor import check_workers
from gpufgbg.depth.model import DEPTH_JPEG, DepthModel
from gpufgbg.depth.options import DepthOptions
from gpufgbg.exceptions import DatasetError, InputError, Interrupted, OptionError, printable
from gpufgbg.files import storage_errors, write_atomic
from gpufgbg.pictures import FORMATS, Picture, PictureError, quiet_decoding, raise_all, read_picture

__all__ = ["FolderReport", "build_engine", "predict_folder"]

INDEX = "depth.jsonl"
_AHEAD = 64  # pictures decoded ahead and kept in memory


@dataclass(frozen=True)
class FolderReport:
    """What `predict_folder` did.

    Attributes
    ----------
    out : Path
    pictures : int
        Depth maps that are there now.
    predicted : int
        Of them, those that this run made.
    seconds : float
        Wall time of the run.
    """

    out: Path
    pictures: int
    predicted: int
    seconds: float


def predict_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    depth: str | os.PathLike[str] | DepthOptions,
    *,
    device: str = "auto",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> FolderReport:
    """Predict a depth map for every picture in a folder and below it.

    Each map has its picture's size and is a grey JPEG (quality 75) under the picture's path with the ending ``.jpg``
    (``photo.png`` beside ``photo.jpg`` becomes ``photo.png.jpg``). ``depth.jsonl`` in ``out`` says first what they
    were predicted with, then for each map: file, picture, width, height, depth_min, depth_max.

    Parameters
    ----------
    folder : path
    out : path, optional
        Folder for the maps: new, empty, or one that this very call began before; by default the folder's name with
        ``_depth`` behind it.
    depth : path, "demo" or DepthOptions
    device : {"auto", "cpu", "cuda", "cuda:N"}
    workers : int, optional
        Threads that decode and encode, by default one a core.
    progress : callable, optional
        Called with (maps there are, maps there will be).
    tell : callable, optional
        Called with a line of text when something takes minutes.

    Returns
    -------
    FolderReport

    Raises
    ------
    InputError
        There are no pictures, or some can't be decoded; all of them are named, when the others are done.
    DatasetError
        ``out`` holds something else, or maps of other weights.
    OptionError, DeviceError, StorageError, Interrupted
    """
    start = time.perf_counter()
    workers = check_workers(workers)
    options = depth if isinstance(depth, DepthOptions) else DepthOptions(os.fspath(depth))
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{printable(root)}: no such folder: expected a data set or a folder of pictures")
    if out is not None and not os.fspath(out):
        raise OptionError("out", "got an empty name, expected a folder for the depth maps")
    target = Path(out) if out is not None else root.with_name(f"{root.resolve().name}_depth")
    if target.resolve() == root.resolve():
        raise OptionError("out", f"got {printable(target)}, the folder of the pictures: choose another")
    pictures = list(_pictures(root, target))
    if not pictures:
        raise InputError(f"{printable(root)}: no pictures in it: expected {', '.join(sorted(FORMATS))}")
    problems: list[str] = []
    with storage_errors(target):
        # The network's input follows from the first picture where the options leave it open.
        first = next((p for p in map(_read, pictures) if isinstance(p, Picture)), None)
        if first is None:
            raise InputError(f"{printable(root)}: none of its {len(pictures)} pictures can be decoded")
        width, height = (max(16, round(side / 16) * 16) for side in first.image.size)  # DenseDepth takes twice this
        model = DepthModel(options, (width, height), device, 1, tell)
        names = _names(root, pictures)
        index = _Index(target, model.describe() | {"engine": model.engine.description})
        todo = [path for path in pictures if names[path] not in index.done]
        count = len(pictures) - len(todo)
        try:
            for part, arrays in _decoded(todo, workers, problems):
                maps = model.predict_each(arrays)
                files = [encode_jpeg(grey[None], *DEPTH_JPEG)[0] for grey, _ in maps]
                for path, file, (grey, (near, far)) in zip(part, files, maps, strict=True):
                    write_atomic(target / names[path], file)
                    index.add(names[path], path.relative_to(root).as_posix(), grey.shape, near, far)
                count += len(part)
                if progress:
                    progress(count, len(pictures))
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: {count:,} of {len(pictures):,} depth maps are safe; the same command continues"
            ) from None
        finally:
            index.close()
    raise_all(problems)
    return FolderReport(target, count, len(todo), time.perf_counter() - start)


def build_engine(
    depth: DepthOptions, frame: tuple[int, int], device: str = "auto", tell: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Build the TensorRT engine for frames of this (width, height) ahead, and keep it in the cache.

    Returns
    -------
    dict
        The engine's description, and under ``built`` whether it was built now.

    Raises
    ------
    InputError, OptionError, DeviceError
    """
    if depth.backend == "onnxruntime":
        raise OptionError("depth_backend", "got 'onnxruntime', which has no engines to build: expected tensorrt")
    wanted = "cuda" if device == "auto" else device
    model = DepthModel(depth, frame, wanted, 1, tell)
    return {**model.engine.description, "built": model.engine.built}


def _pictures(root: Path, target: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name).resolve() != target.resolve()
        )
        for name in sorted(names):
            path = Path(parent, name)
            if path.suffix.lower() in FORMATS and not name.startswith("."):
                yield path


def _names(root: Path, pictures: list[Path]) -> dict[Path, str]:
    """The map's path for each picture; a name that two pictures would have goes to the first of them."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in pictures:
        relative = path.relative_to(root)
        name = relative.with_suffix(".jpg").as_posix()
        if name in taken:
            name = f"{relative.as_posix()}.jpg"
        taken.add(name)
        names[path] = name
    return names


def _read(path: Path) -> Picture | str:
    try:
        with quiet_decoding():
            return read_picture(path)
    except PictureError as error:
        return f"{printable(path)}: {error}"


def _decoded(
    paths: list[Path], workers: int, problems: list[str]
) -> Iterator[tuple[list[Path], list[npt.NDArray[np.uint8]]]]:
    """Groups of pictures, (H, W, 3) uint8 each, decoded while the group before is worked on."""

    def decode(path: Path) -> npt.NDArray[np.uint8] | str:
        picture = _read(path)
        return picture if isinstance(picture, str) else np.asarray(picture.image.convert("RGB"))

    groups = iter(paths)
    with ThreadPoolExecutor(workers, "decode") as pool:
        ahead: list[tuple[list[Path], Any]] = []
        while True:
            group = list(islice(groups, _AHEAD))
            if group:
                ahead.append((group, [pool.submit(decode, path) for path in group]))
            if not ahead:
                return
            if len(ahead) < 2 and group:
                continue
            paths_, futures = ahead.pop(0)
            good, arrays = [], []
            for path, future in zip(paths_, futures, strict=True):
                result = future.result()
                if isinstance(result, str):
                    problems.append(result)
                else:
                    good.append(path)
                    arrays.append(result)
            if good:
                yield good, arrays


class _Index:
    """``depth.jsonl``: its first line says what the maps are predicted with, each other one tells of a map."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.done: set[str] = set()
        path = folder / INDEX
        head = json.dumps(description, sort_keys=True)
        if path.is_file():
            lines = path.read_text("utf-8").split("\n")
            lines.pop()  # empty, or cut off by a kill
            if not lines or lines[0] != head:
                raise DatasetError(
                    f"--out {printable(folder)}: holds depth maps of other weights, options or another engine "
                    f"({INDEX}): give the same ones to continue, or choose another folder"
                )
            self.done = {json.loads(line)["file"] for line in lines[1:]}
            self.done = {name for name in self.done if (folder / name).is_file()}
            write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
        else:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise DatasetError(
                    f"--out {printable(folder)}: exists and holds no depth maps of ours: choose another folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, f"{head}\n".encode())
        self._file = path.open("a", encoding="utf-8")

    def add(self, name: str, picture: str, shape: tuple[int, ...], near: float, far: float) -> None:
        line = {
            "file": name, "picture": picture, "width": shape[1], "height": shape[0],
            "depth_min": near, "depth_max": far,
        }  # fmt: skip
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
