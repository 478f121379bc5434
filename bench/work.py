"""The work of each operation: its input, what of the machine it can't do without, and the judge of its output.

The judge is Pillow throughout, and for depth ONNX Runtime in fp32. A contender whose output is off by more than its
stated tolerance gets no time.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from contenders import Job, Tolerance
from PIL import Image
from pillow_recipe import PillowRecipe
from settings import Settings

from gpufgbg import Assets, Compositor, Recipe, prepare
from gpufgbg.compositor import default_workers

__all__ = [
    "EncodeWork", "Mismatch", "MomentsWork", "RenderWork", "StreamWork", "compared", "compositor_on", "host",
    "prepared", "recipe_for", "rotating",
]  # fmt: skip

PICKS = 24  # samples of a batch that are judged
_LARGE = 512 << 20
_SAMPLES = 100_000  # of the data set that batches are taken from
RECIPE = Recipe()
#: of ImageNet, as training loops normalise
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Mismatch(Exception):
    """An output that is not what it should be."""


@lru_cache
def prepared(settings: Settings) -> tuple[Assets, PillowRecipe]:
    """The pictures, and Pillow's way with them."""
    assets = prepare(settings.backgrounds, settings.foregrounds, settings.masks, RECIPE, default_workers())
    return assets, PillowRecipe(assets)


@lru_cache
def compositor_on(settings: Settings, device: str) -> Compositor:
    """gpufgbg's compositor of the whole data set."""
    assets, _ = prepared(settings)
    return Compositor(assets, recipe_for(assets, _SAMPLES), device)


def recipe_for(assets: Assets, samples: int) -> Recipe:
    """The usual recipe, with more repetitions where the pictures make fewer samples than that."""
    pairs = RECIPE.orientations * assets.n_backgrounds * assets.n_foregrounds
    return replace(RECIPE, per_pair=max(RECIPE.per_pair, math.ceil(samples / pairs)))


def rotating(settings: Settings, device: str, batch_bytes: int, most: int = 1024) -> int:
    """Batches that take turns, together larger than twice the card's L2 cache; on the CPU, 3 or 2."""
    if device == "cpu":
        return 3 if batch_bytes < _LARGE else 2  # a large one is no longer in a cache when its turn comes
    import cupy

    cache = cupy.cuda.Device(int(device.partition(":")[2])).attributes["L2CacheSize"]
    return max(3, min(most, math.ceil(2 * cache / batch_bytes)))


def host(array: Any) -> np.ndarray:
    """An array of NumPy, CuPy or PyTorch in host memory."""
    if isinstance(array, np.ndarray):
        return array
    return array.cpu().numpy() if hasattr(array, "cpu") else array.get()


def compared(found: np.ndarray, expected: np.ndarray, tolerance: Tolerance, what: str, unit: str = "levels") -> str:
    """What a comparison shows; `Mismatch` where it shows more than the tolerance."""
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: shape {found.shape}, expected {expected.shape}")
    difference = np.abs(found.astype(np.float64) - expected)
    greatest, mean = float(difference.max()), float(difference.mean())
    if not (greatest <= tolerance.greatest and (mean <= tolerance.mean or greatest == 0)):
        raise Mismatch(
            f"{what}: off by {greatest:.3g} {unit} at most, {mean:.3g} on average; "
            f"allowed {tolerance.greatest:g} and {tolerance.mean:g}"
        )
    if greatest == 0:
        return f"{what}: equal"
    why = f" ({tolerance.why})" if tolerance.why else ""
    return f"{what}: within {greatest:.3g} {unit}, mean {mean:.2g}{why}"


class RenderWork:
    """Composites (N, H, W, 3) and masks (N, H, W) of N samples, out of prepared pictures in the device's memory.

    Placements are given; the foregrounds may be flipped ahead.
    """

    def __init__(self, settings: Settings, device: str, count: int) -> None:
        self.settings = settings
        self.count = count
        self.assets, self.pillow = prepared(settings)
        self.compositor = compositor_on(settings, "cpu" if device == "cpu" else device)
        self.pixels = RECIPE.width * RECIPE.height
        self.turns = rotating(settings, device, 4 * count * self.pixels)
        total = len(self.compositor)
        count = min(count, total)
        self.starts = [turn * 37_003 % max(1, total - count) for turn in range(self.turns)]
        self.batches = [
            self.compositor.plan.placements(np.arange(start, start + self.count) % total) for start in self.starts
        ]

    @property
    def picks(self) -> np.ndarray:
        """Numbers of the samples that are judged."""
        return np.unique(np.linspace(0, self.count - 1, min(PICKS, self.count)).astype(int))

    def foregrounds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """RGBA and the mask as it is pasted onto black, of each foreground, and then of each flipped."""
        both = []
        for f in range(self.assets.n_foregrounds):
            mask = self.assets.mask(f).astype(np.uint16)
            blended = mask * mask + np.uint16(128)
            both.append((self.assets.foreground(f), ((blended + (blended >> 8)) >> 8).astype(np.uint8)))
        return both + [(np.ascontiguousarray(a[:, ::-1]), np.ascontiguousarray(m[:, ::-1])) for a, m in both]

    def tables(self, turn: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(N,) background, number in `foregrounds`, x and y of a batch, int64."""
        at = self.batches[turn]
        return (
            at.background.astype(np.int64),
            at.foreground.astype(np.int64) + self.assets.n_foregrounds * at.flip,
            at.x.astype(np.int64),
            at.y.astype(np.int64),
        )

    def needs(self, device: str) -> dict[str, float]:
        """Every byte of the frames is written once."""
        return {"device memory, write" if device == "cuda" else "host memory, write": 4.0 * self.count * self.pixels}

    def check(self, job: Job, turn: int) -> str:
        """Judge a batch; the result tells how."""
        picks = self.picks
        placements = self.compositor.plan.placements(self.batches[turn].index[picks])
        expected = [(np.asarray(image), np.asarray(mask)) for image, mask in self.pillow.render(placements)]
        found = job.output(turn, picks)
        said = [
            compared(host(found[i]), np.stack([pair[i] for pair in expected]), job.tolerance, what)
            for i, what in enumerate(("composites", "masks"))
        ]
        return f"against Pillow's, {len(picks)} samples: {'; '.join(said)}"


class EncodeWork:
    """JPEG files of N pictures in the device's memory: RGB at 4:2:0 or grey; quality 65, optimal tables."""

    def __init__(self, settings: Settings, device: str, count: int, kind: str) -> None:
        self.settings = settings
        self.count = count
        self.kind = kind
        self.device = device
        channels = 3 if kind == "RGB" else 1
        self.batch_bytes = count * RECIPE.width * RECIPE.height * channels
        self.turns = rotating(settings, device, self.batch_bytes)
        compositor = compositor_on(settings, device)
        total = len(compositor)
        self.batches = []
        for turn in range(self.turns):
            batch = compositor.render((np.arange(count) + turn * 97_001) % total)
            self.batches.append(batch.image if kind == "RGB" else batch.mask)
        self.file_bytes = 0.0

    @property
    def picks(self) -> np.ndarray:
        """Numbers of the pictures that are judged."""
        return np.unique(np.linspace(0, self.count - 1, min(PICKS, self.count)).astype(int))

    def needs(self, device: str) -> dict[str, float]:
        """Pixels are read, files are written."""
        moved = self.batch_bytes + self.file_bytes * self.count
        return {"device memory, copy" if device == "cuda" else "host memory, copy": moved}

    def check(self, job: Job, turn: int) -> str:
        """Judge a batch's files; the result tells how. Other bytes than Pillow's must show the picture as well."""
        pictures = host(self.batches[turn][self.picks])
        files = [bytes(file) for file in job.output(turn, self.picks)]
        expected = [self._pillow(picture) for picture in pictures]
        self.file_bytes = float(np.mean([len(file) for file in files]))
        judged = f"against Pillow's, {len(files)} files"
        if files == expected:
            return f"{judged}: equal bytes, {self.file_bytes:,.0f} a file"
        own, pillows = (
            float(np.abs(np.stack([self._decoded(file) for file in given]).astype(float) - pictures).mean())
            for given in (files, expected)
        )
        if not own <= 1.2 * pillows + 0.2:
            raise Mismatch(f"files show the pictures off by {own:.2f} levels on average, Pillow's by {pillows:.2f}")
        size = np.mean([len(file) for file in expected])
        return (
            f"{judged}: other bytes, {self.file_bytes:,.0f} a file to {size:,.0f}; off the pictures by {own:.2f} "
            f"levels on average to {pillows:.2f}"
        )

    @staticmethod
    def _pillow(picture: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=RECIPE.quality, optimize=True)
        return file.getvalue()

    def _decoded(self, file: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(file)).convert("RGB" if self.kind == "RGB" else "L"))


class MomentsWork:
    """Mean and standard deviation of each channel of N pictures in the device's memory."""

    def __init__(self, settings: Settings, device: str, count: int) -> None:
        self.count = count
        self.batch_bytes = count * RECIPE.width * RECIPE.height * 3
        self.turns = rotating(settings, device, self.batch_bytes)
        compositor = compositor_on(settings, device)
        total = len(compositor)
        self.batches, self.expected = [], []
        for turn in range(self.turns):
            batch = compositor.render((np.arange(count) + turn * 59_009) % total)
            self.batches.append(batch.image)
            self.expected.append(batch.moments["composite"])

    def needs(self, device: str) -> dict[str, float]:
        """Pixels are read."""
        return {f"{'device' if device == 'cuda' else 'host'} memory, copy": float(self.batch_bytes)}

    def check(self, job: Job, turn: int) -> str:
        """Judge (mean, std) over values scaled to 0..1 against the exact sums."""
        exact = self.expected[turn]
        found = np.array(job.output(turn), np.float64).reshape(2, 3)
        said = compared(found, np.array([exact.mean, exact.std]), job.tolerance, "mean and std", "of 0..1")
        return f"against exact sums, {said}"


class StreamWork:
    """Shuffled batches of composites, float32 NCHW normalised as ImageNet's, and masks, where training happens."""

    BATCH = 256
    turns = 1

    def __init__(self, settings: Settings, device: str, count: int) -> None:
        self.settings = settings
        self.device = device
        self.assets, self.pillow = prepared(settings)
        self.compositor = compositor_on(settings, device)
        self.batch = min(self.BATCH, count)
        self.steps = count // self.batch

    @classmethod
    def whole(cls, count: int, together: int = 1) -> int:
        """Samples of whole batches, as near ``count`` as there are any, in a multiple of ``together``."""
        step = cls.BATCH * together
        return count if count < cls.BATCH else max(1, count // step) * step

    def needs(self, device: str) -> dict[str, float]:
        """Every value of the batches is written once."""
        written = self.steps * self.batch * RECIPE.width * RECIPE.height * (3 * 4 + 1)
        return {f"{'device' if device == 'cuda' else 'host'} memory, write": float(written)}

    def check(self, job: Job, turn: int) -> str:
        """Judge some samples of a batch: ``job.output`` gives their numbers, images and masks."""
        index, images, masks = (host(value) for value in job.output(turn))
        placements = self.compositor.plan.placements(index)
        expected = [(np.asarray(image), np.asarray(mask)) for image, mask in self.pillow.render(placements)]
        composites = np.stack([image for image, _ in expected]).transpose(0, 3, 1, 2) / 255
        wanted = (composites - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        said = compared(images, wanted, Tolerance(1e-5, 1e-5, "fp32"), "images", "of the normalised value")
        masks = compared(masks, np.stack([mask for _, mask in expected]), Tolerance(), "masks")
        return f"against Pillow's, {len(index)} samples: {said}; {masks}"
