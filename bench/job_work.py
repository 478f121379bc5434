"""The work of a whole job: a data set from folders of pictures to files, and its statistics read back from them."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from contenders import HOST, Contender, Job, Offer, Tolerance, Unsupported, in_threads, started_processes
from PIL import Image
from pillow_recipe import PillowRecipe
from rivals.pytorch import torch_missing
from settings import Settings
from work import PICKS, RECIPE, Mismatch, compared, prepared, recipe_for

from gpufgbg import Plan
from gpufgbg.compositor import default_workers
from gpufgbg.decoding_dali import why_not as why_no_dali
from gpufgbg.layout import Layout
from gpufgbg.statistics import statistics

__all__ = ["DATASETS", "STATISTICS", "DatasetWork", "StatisticsWork"]

BOTH = ("cpu", "cuda")


def generate(settings: Settings, out: Path, device: str, count: int, sink: str) -> dict[str, Any]:
    """Run ``gpufgbg generate`` in a process of its own and return its report."""
    per_pair = recipe_for(prepared(settings)[0], count).per_pair
    given = [f"--{name}={path}" for name, path in settings.folders.items()]
    options = [
        f"--out={out}",
        f"--sink={sink}",
        f"--device={device}",
        f"--per-pair={per_pair}",
        f"--samples=0:{count}",
    ]
    command = [sys.executable, "-m", "gpufgbg", "generate", *given, *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else f"exit code {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


class DatasetWork:
    """Composites and masks of N samples as files: gpufgbg's whole process, from its start to the last fsync."""

    turns = 1

    def __init__(self, settings: Settings, device: str, count: int, sink: str) -> None:
        self.settings = settings
        self.device = device
        self.count = count
        self.sink = sink
        self.assets, _ = prepared(settings)
        recipe = recipe_for(self.assets, count)
        self.plan = Plan(recipe, self.assets.n_backgrounds, self.assets.widths, self.assets.heights)
        self.file_bytes = 0.0

    @classmethod
    def whole(cls, settings: Settings, count: int) -> int:
        """The whole data set of the pictures where it is about as large as ``count``, else ``count``."""
        assets, _ = prepared(settings)
        total = assets.n_backgrounds * assets.n_foregrounds * 2 * RECIPE.per_pair
        return total if 0.9 * count < total < 1.1 * count else count

    def folder(self) -> Path:
        """A new one: in one where files were deleted before, ext4 makes new ones slowly for a while."""
        root = self.settings.work / "datasets"
        root.mkdir(exist_ok=True)
        return root / f"{self.sink}{sum(1 for _ in root.iterdir())}"

    def needs(self, device: str) -> dict[str, float]:
        """Files are written, and on a card they come over PCIe first."""
        needed = {"disk, write": self.file_bytes}
        if self.sink == "tree":
            needed["disk, small files"] = 2.0 * self.count
        if device == "cuda":
            needed["PCIe, to the host"] = self.file_bytes
        return needed

    def check(self, job: Job, turn: int) -> str:
        """Judge some files byte for byte; ``job.output`` gives a folder and how many bytes of files are in it."""
        folder, self.file_bytes = job.output(turn)
        pillow, equal = PillowRecipe(self.assets), 0
        found = list(self._some_files(folder))
        for index, files in found:
            expected = next(pillow.encode(self.plan.placements([index])))
            equal += files == expected
        if equal < len(found) or not found:
            raise Mismatch(f"{equal} of {len(found)} samples have Pillow's bytes")
        return f"against Pillow's, {len(found)} samples: equal bytes"

    def _some_files(self, folder: Path) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
        """(index, (composite, mask)) of some samples."""
        tars = sorted(folder.rglob("*.tar"))
        if tars:
            found: dict[int, dict[str, bytes]] = {}
            with tarfile.open(tars[len(tars) // 2]) as tar:
                for member in tar:
                    stem, _, suffix = Path(member.name).name.partition(".")
                    if suffix in ("composite.jpg", "mask.jpg"):
                        data = tar.extractfile(member)
                        found.setdefault(int(stem.rpartition("_")[2]), {})[suffix] = data.read() if data else b""
                    if len(found) > PICKS:
                        break
            for index, files in list(found.items())[:PICKS]:
                yield index, (files.get("composite.jpg", b""), files.get("mask.jpg", b""))
            return
        for index in np.linspace(0, self.count - 1, min(PICKS, self.count)).astype(int).tolist():
            (stem,) = Layout.of(self.plan).stems(self.plan.placements([index]))
            paths = (folder / Layout.sample_path(kind, stem) for kind in ("composite", "composite_mask"))
            composite, mask = (path.read_bytes() for path in paths)
            yield index, (composite, mask)


def _dataset(work: DatasetWork, device: str, workers: int) -> Job:
    last: list[tuple[Path, float]] = []

    def run(turn: int) -> None:
        folder = work.folder()
        report = generate(work.settings, folder, device, work.count, work.sink)
        if report["samples"] != work.count:
            raise Mismatch(f"{report['samples']} samples were made, expected {work.count}")
        kinds = ("composite", "composite_mask")
        last[:] = [(folder, float(sum(report["bytes"][kind] for kind in kinds)))]

    def output(turn: int) -> tuple[Path, float]:
        run(turn)
        return last[0]

    return Job(run, output, HOST, "whole process: start, checks of the input, fsync")


def _pillow(work: DatasetWork, processes: int) -> Job:
    if work.sink != "tree":
        raise Unsupported("the original recipe writes a tree")
    if work.plan.recipe != RECIPE:
        raise Unsupported(f"{work.count:,} samples are more than the pictures make")
    last: list[Path] = []
    script = Path(__file__).with_name("pillow_job.py")

    def run(turn: int) -> None:
        last[:] = [work.folder()]
        folders = [str(work.settings.folders.get(name, "")) for name in ("backgrounds", "foregrounds", "masks")]
        command = [sys.executable, script, *folders, last[0], str(work.count), str(processes)]
        subprocess.run(command, check=True, capture_output=True)

    def output(turn: int) -> tuple[Path, float]:
        run(turn)
        return last[0], float(sum(path.stat().st_size for path in last[0].rglob("*.jpg")))

    return Job(run, output, HOST, "whole process, to the sync; without labels, statistics and checksums")


def pillow_one(work: DatasetWork, device: str, workers: int) -> Job:
    """The original recipe in one process."""
    return _pillow(work, 1)


def pillow_all(work: DatasetWork, device: str, workers: int) -> Job:
    """The original recipe in one process a core."""
    return _pillow(work, default_workers())


DATASETS = (
    Contender("gpufgbg", (), "gpufgbg", {"pipeline": (Offer(_dataset, BOTH, all_cores=True),)}, ours=True),
    Contender(
        "Pillow", ("PIL",), "pillow",
        {
            "pipeline": (
                Offer(pillow_one, variant="1 process"),
                Offer(pillow_all, all_cores=True, variant=f"{default_workers()} processes"),
            )
        },
    ),
)  # fmt: skip


# -- statistics -----------------------------------------------------------------------------------------


@lru_cache
def _stored(settings: Settings, count: int) -> Path:
    folder = settings.work / f"stored{count}"
    if not folder.exists():
        generate(settings, folder, "cpu" if settings.device == "cpu" else "auto", count, "tree")
    return folder


class StatisticsWork:
    """Mean and standard deviation of all composites and masks of a folder tree, decoded from its files."""

    turns = 1
    KINDS = ("composite", "composite_mask")

    def __init__(self, settings: Settings, device: str, count: int) -> None:
        self.count = count
        self.folder = _stored(settings, count)
        root = {
            kind: self.folder / {"composite": "fg_bg", "composite_mask": "fg_bg_masks"}[kind] for kind in self.KINDS
        }
        self.files = {kind: sorted(folder.rglob("*.jpg")) for kind, folder in root.items()}

    def needs(self, device: str) -> dict[str, float]:
        """Decoded pixels are written and read."""
        pixels = 2.0 * self.count * RECIPE.width * RECIPE.height * 4
        return {f"{'device' if device == 'cuda' else 'host'} memory, copy": pixels}

    def check(self, job: Job, turn: int) -> str:
        """Judge mean and std, over 0..1: of composites' three channels, then of masks."""
        assert all(len(files) == self.count for files in self.files.values())
        exact = statistics(self.folder, kinds=self.KINDS, device="cpu")
        expected = [value for kind in self.KINDS for m in [exact[kind].moments] for value in (*m.mean, *m.std)]
        said = compared(np.array(job.output(turn)), np.array(expected), job.tolerance, "mean and std", "of 0..1")
        return f"against exact sums over Pillow's pixels, {said}"


def _ours(work: StatisticsWork, device: str, workers: int) -> Job:
    def run(turn: int) -> list[float]:
        found = statistics(work.folder, workers if device == "cpu" else None, kinds=work.KINDS, device=device)
        return [value for kind in work.KINDS for m in [found[kind].moments] for value in (*m.mean, *m.std)]

    note = "" if device == "cpu" else "DALI decodes"
    return Job(run, run, HOST, note, Tolerance() if device == "cpu" else Tolerance(5e-4, 5e-4, "nvJPEG's pixels"))


def _sums(files: list[Path], mode: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Pixels, sums and sums of squares of pictures, by Pillow and NumPy."""
    pixels, total, squares = 0, np.zeros(len(mode)), np.zeros(len(mode))
    for path in files:
        values = np.asarray(Image.open(path)).reshape(-1, len(mode)).astype(np.float64)
        pixels += len(values)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    return pixels, total, squares


def _from_sums(parts: list[tuple[int, np.ndarray, np.ndarray]]) -> list[float]:
    pixels = sum(part[0] for part in parts)
    mean = sum(part[1] for part in parts) / pixels / 255
    return [*mean, *np.sqrt(sum(part[2] for part in parts) / pixels / 255**2 - mean**2)]


def _pillow_statistics(work: StatisticsWork, processes: int) -> Job:
    pool = started_processes(processes)

    def run(turn: int) -> list[float]:
        futures = []
        for kind, mode in zip(work.KINDS, ("RGB", "L"), strict=True):
            files = work.files[kind]
            step = -(-len(files) // processes)
            cuts = [files[start : start + step] for start in range(0, len(files), step)]
            futures.append([pool.submit(_sums, cut, mode) for cut in cuts])
        return [value for parts in futures for value in _from_sums([future.result() for future in parts])]

    return Job(run, run, tolerance=Tolerance(1e-6, 1e-6, "fp64"), close=pool.shutdown)


def statistics_one(work: StatisticsWork, device: str, workers: int) -> Job:
    """Pillow and NumPy in one process."""
    return _pillow_statistics(work, 1)


def statistics_all(work: StatisticsWork, device: str, workers: int) -> Job:
    """The same in one process a core."""
    return _pillow_statistics(work, default_workers())


def statistics_opencv(work: StatisticsWork, device: str, workers: int) -> Job:
    """`imread` and `meanStdDev` in threads."""
    import cv2

    cv2.setNumThreads(1)

    def run(turn: int) -> list[float]:
        found = []
        for kind, flag in zip(work.KINDS, (cv2.IMREAD_COLOR, cv2.IMREAD_GRAYSCALE), strict=True):
            files = work.files[kind]
            values = np.empty((len(files), 2, 3 if kind == "composite" else 1))

            def part(start: int, stop: int, files=files, values=values, flag=flag) -> None:
                for at in range(start, stop):
                    values[at] = np.reshape(cv2.meanStdDev(cv2.imread(str(files[at]), flag)), values.shape[1:])

            in_threads(part, len(files), 32, workers)
            mean = values[:, 0].mean(axis=0)
            std = np.sqrt((values[:, 1] ** 2 + values[:, 0] ** 2).mean(axis=0) - mean**2)
            found += [*(mean[::-1] / 255), *(std[::-1] / 255)]
        return found

    return Job(run, run, tolerance=Tolerance(1e-6, 1e-6, "fp64"))


def statistics_torchvision(work: StatisticsWork, device: str, workers: int) -> Job:
    """`decode_jpeg` of a list of files a call on a card, by nvJPEG; `std_mean` of what comes out."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def run(turn: int) -> list[float]:
        found: list[float] = []
        for kind, mode in zip(work.KINDS, (ImageReadMode.RGB, ImageReadMode.GRAY), strict=True):
            parts, files = [], work.files[kind]
            for start in range(0, len(files), 256):
                data = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in files[start : start + 256]]
                pictures = torch.stack(decode_jpeg(data, mode=mode, device=device)).float() / 255
                std, mean = torch.std_mean(pictures, dim=(0, 2, 3), correction=0)
                parts.append((len(data), mean.double(), std.double()))
            count = sum(part[0] for part in parts)
            mean = sum(part[0] * part[1] for part in parts) / count
            square = sum(part[0] * (part[2] ** 2 + part[1] ** 2) for part in parts) / count
            found += [*mean.tolist(), *(square - mean**2).sqrt().tolist()]
        return found

    return Job(run, run, tolerance=Tolerance(2e-3, 1e-3, "nvJPEG's pixels"))


def _no_dali(device: str) -> str | None:
    return None if device == "cpu" else why_no_dali()


STATISTICS = (
    Contender("gpufgbg", (), "gpufgbg", {"stats": (Offer(_ours, BOTH, threads=True, missing=_no_dali),)}, ours=True),
    Contender(
        "Pillow + NumPy", ("PIL",), "pillow",
        {
            "stats": (
                Offer(statistics_one, variant="1 process"),
                Offer(statistics_all, all_cores=True, variant=f"{default_workers()} processes"),
            )
        },
    ),
    Contender("OpenCV", ("cv2",), "opencv-python-headless", {"stats": (Offer(statistics_opencv, threads=True),)}),
    Contender(
        "torchvision", ("torch", "torchvision"), "torchvision",
        {"stats": (Offer(statistics_torchvision, ("cuda",), missing=torch_missing),)},
    ),
)  # fmt: skip
