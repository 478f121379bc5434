"""Depth maps for any folder of pictures, resumable; and building an engine ahead."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from gpufgbg.backends import check_device
from gpufgbg.backends.cpu import encode_jpeg
from gpufgbg.compositor import check_workers
from gpufgbg.depth.model import DepthModel, resolve
from gpufgbg.depth.options import DEPTH_JPEG, DepthOptions
from gpufgbg.depth.sources import open_source
from gpufgbg.exceptions import (
    DatasetError,
    DeviceError,
    GpufgbgWarning,
    InputError,
    Interrupted,
    OptionError,
    printable,
)
from gpufgbg.files import remove_tree, storage_errors, sync_file_system, write_atomic
from gpufgbg.layout import KINDS
from gpufgbg.pictures import FORMATS, PictureError, quiet_decoding, raise_all, read_picture, walk_pictures
from gpufgbg.recipe import MAX_FRAME
from gpufgbg.urls import local_path

__all__ = ["FolderReport", "build_engine", "predict_folder"]

INDEX = "depth.jsonl"
LONGEST = 640  # pixels, of a network's input that follows from the pictures: DenseDepth was trained with 640x480
_STATE = ".depth"  # in the folder of maps while a run is at it: its lock, its unfinished file
_AHEAD_BYTES = 256 << 20  # of decoded pictures, beside those that are worked on
_COMMIT_EVERY_S = 1.0


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
    were predicted with, then for each map: file, picture, sha256 (of the picture), width, height, depth_min,
    depth_max. Of a folder with ``fg_bg/`` in it, as the original data set is laid out, composites alone are taken. A
    folder below that has a ``depth.jsonl`` holds maps, not pictures, and is left out.

    Where neither options nor file say how large the network's input is, it follows from the first picture, with at
    most 640 pixels a side.

    Parameters
    ----------
    folder : path
    out : path, optional
        Folder for the maps: new, empty, or one that this very call began before, perhaps for fewer pictures; by
        default beside the folder, under its name with ``_depth`` behind it.
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
        ``out`` holds something else, maps of other weights, or maps of pictures that have changed or are gone; or
        another process is at it.
    OptionError, DeviceError, StorageError, Interrupted
    """
    start = time.perf_counter()
    workers = check_workers(workers)
    options = DepthOptions.of(depth)
    root = local_path(folder)
    if not os.fspath(folder) or not root.is_dir():
        what = "not a folder" if os.fspath(folder) and root.exists() else "no such folder"
        raise InputError(f"{printable(folder)}: {what}: expected a data set or a folder of pictures")
    composites = root / KINDS["composite"]
    if composites.is_dir():
        root = composites
    target = _target(root, out)
    problems: list[str] = []
    left_out = target.resolve()
    paths = list(
        walk_pictures(root, problems, without=lambda below: _holds_maps(below) or below.resolve() == left_out)
    )
    if not paths:
        raise_all(problems)
        raise InputError(f"{printable(root)}: no pictures in it: expected {', '.join(sorted(FORMATS))}")
    with storage_errors(target):
        index = _Index(target, root)
        index.check(paths, workers)
        frame = index.frame or _frame(paths)
        resolve(options, device)
        # What was begun with a larger input, by an option or an earlier version, does not go on with another.
        source = open_source(options, frame, LONGEST if max(index.size) <= LONGEST else None)
        if source.size != source.asked and tell:
            size, asked = ("x".join(map(str, sides)) for sides in (source.size, source.asked))
            line = f"the depth network's input is {size} instead of the first picture's {asked}"
            tell(f"{line}: --depth-size for another")
        model = DepthModel(options, frame, device, workers, tell, source)
        todo = [path for path in paths if path not in index.done]
        count = len(paths) - len(todo)
        with index.opened(model, frame), quiet_decoding:
            try:
                for part in _decoded(todo, workers, workers if model.index is None else model.batch, problems):
                    names = [os.fspath(picture.path) for picture in part]
                    found = model.predict_each([picture.pixels for picture in part], names)
                    for picture, (grey, depths) in zip(part, found, strict=True):
                        index.add(picture, encode_jpeg(grey[None], *DEPTH_JPEG)[0], depths)
                    count += len(part)
                    if progress:
                        progress(count, len(paths))
            except KeyboardInterrupt:
                raise Interrupted(
                    f"interrupted: {count:,} of {len(paths):,} depth maps are safe; the same command continues"
                ) from None
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
    if check_device(device) == "cpu":
        raise OptionError("device", "got 'cpu', which has no engines to build: expected cuda or cuda:N")
    from gpufgbg.backends.cuda import why_not

    wanted = "cuda" if device == "auto" else device
    reason = why_not(int(wanted.partition(":")[2] or 0))
    if reason is not None:
        raise DeviceError(f"device {wanted}: {reason}; engines are built on the machine that has the card")
    model = DepthModel(depth, frame, wanted, 1, tell)
    return {**model.engine.description, "built": model.engine.built}


# -- the pictures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoded:
    path: Path
    sha256: str
    pixels: npt.NDArray[np.uint8]
    notes: tuple[str, ...]


def _target(root: Path, out: str | os.PathLike[str] | None) -> Path:
    if out is not None and not os.fspath(out):
        raise OptionError("out", "got an empty name, expected a folder for the depth maps")
    if out is None:
        named = root.resolve() if root.name in ("", "..") else root
        if not named.name:
            raise OptionError(
                "out", f"expected a folder for the depth maps: {printable(root)} has no folder beside it"
            )
        return named.with_name(f"{named.name}_depth")
    target = local_path(out)
    if target.resolve() == root.resolve():
        raise OptionError("out", f"got {printable(target)}, the folder of the pictures: choose another")
    return target


def _decode(path: Path) -> _Decoded | str:
    """A picture as (H, W, 3) uint8, or what is wrong with it. Call it inside `quiet_decoding`."""
    try:
        picture = read_picture(path)
    except PictureError as error:
        return f"{printable(path)}: {error}"
    width, height = picture.image.size
    if max(width, height) > MAX_FRAME:
        return f"{printable(path)}: {width}x{height}: expected at most {MAX_FRAME:,} pixels a side; scale it down"
    pixels = np.asarray(picture.image.convert("RGB"))
    return _Decoded(path, hashlib.sha256(picture.data).hexdigest(), pixels, picture.notes)


def _frame(paths: list[Path]) -> tuple[int, int]:
    """Width and height, like the first picture's, from which the network's input follows where nothing says it."""
    problems = []
    with quiet_decoding:
        for path in paths:
            found = _decode(path)
            if isinstance(found, _Decoded):
                height, width = (max(16, round(side / 16) * 16) for side in found.pixels.shape[:2])
                return width, height  # DenseDepth, which wants multiples of 32, takes twice this
            problems.append(found)
    raise InputError(*problems)


def _decoded(paths: list[Path], workers: int, size: int, problems: list[str]) -> Iterator[list[_Decoded]]:
    """Groups of up to ``size`` pictures, decoded while the group before is worked on."""
    rest = iter(paths)
    pending: deque[Future[_Decoded | str]] = deque()
    group: list[_Decoded] = []
    largest = 1
    pool = ThreadPoolExecutor(workers, "decode")
    try:
        while True:
            room = max(1, min(size, _AHEAD_BYTES // largest))
            while len(pending) < max(room, workers) and (path := next(rest, None)) is not None:
                pending.append(pool.submit(_decode, path))
            if not pending:
                break
            found = pending.popleft().result()
            if isinstance(found, str):
                problems.append(found)
                continue
            for note in found.notes:
                warnings.warn(note, GpufgbgWarning, stacklevel=2)
            largest = max(largest, found.pixels.nbytes)
            group.append(found)
            if len(group) >= room:
                yield group
                group = []
        if group:
            yield group
    finally:
        pool.shutdown(cancel_futures=True)


# -- what is there --------------------------------------------------------------------------------------


class _Index:
    """``depth.jsonl``: its first line says what the maps are predicted with, each other one tells of a map.

    Attributes
    ----------
    frame : (int, int) or None
        What the network's input followed from when the maps were begun.
    size : (int, int)
        That input then; (0, 0) where none are begun.
    done : dict of Path to str
        The pictures that have maps, and their files.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.root = root
        self.path = folder / INDEX
        self.frame: tuple[int, int] | None = None
        self.size = (0, 0)
        self.done: dict[Path, str] = {}
        self._head: dict[str, Any] | None = None
        self._entries: dict[str, dict[str, Any]] = {}  # by picture
        self._names: dict[Path, str] = {}
        self._new: list[dict[str, Any]] = []
        self._committed = time.monotonic()
        self._bytes = b""
        self._file: Any = None
        if self.path.is_file():
            self._read()
        elif not _is_free(folder):
            raise DatasetError(
                f"--out {printable(folder)}: exists and holds no depth maps of ours: choose another folder"
            )

    def _read(self) -> None:
        self._bytes = self.path.read_bytes()
        lines = self._bytes.split(b"\n")
        try:
            self._head, *entries = [
                json.loads(line) for line in lines[:-1]
            ]  # the last is empty, or cut off by a kill
            self._entries = {entry["picture"]: entry for entry in entries if (self.folder / entry["file"]).is_file()}
            assert self._head is not None
            width, height = self._head["frame"]
            self.size = (int(self._head["size"][0]), int(self._head["size"][1]))
        except (ValueError, LookupError, TypeError, AssertionError):
            raise DatasetError(
                f"--out {printable(self.path)}: damaged or not ours: remove the folder, or choose another"
            ) from None
        self.frame = width, height

    def check(self, paths: list[Path], workers: int) -> None:
        """Raise `DatasetError` where a picture that has a map is gone or another; name the files of all maps."""
        known = {path: self._entries.get(path.relative_to(self.root).as_posix()) for path in paths}
        self.done = {path: entry["file"] for path, entry in known.items() if entry}
        gone = self._entries.keys() - {entry["picture"] for entry in known.values() if entry}
        if gone:
            first = sorted(gone)[:3]
            maps = ", ".join(printable(self._entries[picture]["file"]) for picture in first)
            more = f" and {len(gone) - len(first):,} more" if len(gone) > len(first) else ""
            raise DatasetError(
                f"--out {printable(self.folder)}: holds depth maps of other pictures, for example of "
                f"{printable(first[0])}, which is not in {printable(self.root)}: remove their maps there to go on "
                f"without them ({maps}{more}), or choose another folder"
            )
        with ThreadPoolExecutor(workers) as pool:
            sums = pool.map(_sum, self.done)
            for path, found in zip(self.done, sums, strict=True):
                if found != (known[path] or {}).get("sha256"):
                    raise DatasetError(
                        f"--out {printable(self.folder)}: {printable(path)} has changed since its depth map was "
                        f"made: remove {printable(self.done[path])} there to make it again, or choose another folder"
                    )
        self._name(paths)

    def _name(self, paths: list[Path]) -> None:
        """Each map's file; a name that two pictures would have goes to the first of them."""
        relative = {path: path.relative_to(self.root) for path in paths}
        taken = {parent.as_posix() for path in relative.values() for parent in path.parents} | {*self.done.values()}
        for path, name in relative.items():
            file = self.done.get(path)
            if file is None:
                file = name.with_suffix(".jpg").as_posix()
                if file in taken:
                    file = f"{name.as_posix()}.jpg"
                while file in taken:
                    file += ".jpg"
                taken.add(file)
            self._names[path] = file

    @contextmanager
    def opened(self, model: DepthModel, frame: tuple[int, int]) -> Iterator[None]:
        """Around the making of maps: begins or continues the folder, alone; what is made is committed at the end.

        Raises
        ------
        DatasetError
            The folder's maps are of another network, or another process is at it.
        """
        head = {**model.describe(), "frame": list(frame), "engine": model.engine.description}
        there = dict(self._head or head)
        if isinstance(there.get("engine"), dict) and "processor" not in there["engine"]:  # of an earlier version
            there["engine"] = there["engine"] | {n: v for n, v in head["engine"].items() if n == "processor"}
        differences = [
            f"{name} is {there.get(name)!r} there and {value!r} here"
            for name, value in head.items()
            if name != "weights" and there.get(name) != value  # a file may have any name
        ]
        if differences:
            raise DatasetError(
                f"--out {printable(self.folder)}: holds depth maps of other weights, options or another engine: "
                f"{'; '.join(differences)}: give the same ones to continue, or choose another folder"
            )
        state = self.folder / _STATE
        state.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(state / "lock", timeout=0)
            with lock:
                if self._bytes != (self.path.read_bytes() if self.path.is_file() else b""):
                    raise Timeout(str(self.path))
                self._head = self._head or head
                self._write()
                with self.path.open("a", encoding="ascii") as self._file:
                    try:
                        yield
                    finally:
                        self.commit()
                        self._write()
                        remove_tree(state)
        except Timeout:
            raise DatasetError(f"--out {printable(self.folder)}: another process is at it: wait for it") from None

    def _write(self) -> None:
        """The whole file, in order of pictures."""
        assert self._head is not None
        lines = [self._head, *(self._entries[picture] for picture in sorted(self._entries))]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines).encode(), self.folder / _STATE)

    def add(self, picture: _Decoded, file: bytes, depths: tuple[float, float]) -> None:
        """Keep a map; it counts once it is committed."""
        target = self.folder / self._names[picture.path]
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / _STATE / "map"
        unfinished.write_bytes(file)
        unfinished.replace(target)
        height, width = picture.pixels.shape[:2]
        self._new.append(
            {
                "file": self._names[picture.path],
                "picture": picture.path.relative_to(self.root).as_posix(),
                "sha256": picture.sha256,
                "width": width,
                "height": height,
                "depth_min": depths[0],
                "depth_max": depths[1],
            }
        )
        if time.monotonic() - self._committed > _COMMIT_EVERY_S:
            self.commit()

    def commit(self) -> None:
        """Make the maps so far durable, and then say that they are there."""
        if self._new:
            sync_file_system(self.folder)
            self._file.writelines(json.dumps(line) + "\n" for line in self._new)
            self._file.flush()
            self._entries.update((line["picture"], line) for line in self._new)
            self._new = []
        self._committed = time.monotonic()


def _holds_maps(folder: Path) -> bool:
    try:
        return (folder / INDEX).is_file()
    except OSError:  # whoever reads the folder says so
        return False


def _is_free(folder: Path) -> bool:
    if not folder.exists() and not folder.is_symlink():
        return True
    return folder.is_dir() and all(path.name == _STATE for path in folder.iterdir())


def _sum(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
