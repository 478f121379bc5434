"""OpenCV: regions blended with `multiply` and `add`; `imencode`; `meanStdDev`. In threads of ours, not its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from contenders import Contender, Job, Offer, Tolerance, in_threads
from work import RECIPE, EncodeWork, MomentsWork, RenderWork

__all__ = ["RIVAL"]

_CHUNK = 16  # samples a thread takes at a time


def render(work: RenderWork, device: str, workers: int) -> Job:
    """Foregrounds are multiplied with their alpha ahead, and flipped ahead."""
    import cv2

    cv2.setNumThreads(1)
    foregrounds = []
    for pixels, matte in work.foregrounds():
        alpha = np.repeat(pixels[..., 3:], 3, axis=2)
        scaled = cv2.multiply(np.ascontiguousarray(pixels[..., :3]), alpha, scale=1 / 255)
        foregrounds.append((scaled, 255 - alpha, matte))

    def sample(b: int, f: int, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
        scaled, keep, matte = foregrounds[f]
        height, width = matte.shape
        composite = work.assets.backgrounds[b].copy()
        region = composite[y : y + height, x : x + width]
        cv2.add(cv2.multiply(region, keep, scale=1 / 255), scaled, region)
        mask = np.zeros(composite.shape[:2], np.uint8)
        mask[y : y + height, x : x + width] = matte
        return composite, mask

    tables = [[column.tolist() for column in work.tables(turn)] for turn in range(work.turns)]

    def run(turn: int) -> None:
        columns = tables[turn]

        def part(start: int, stop: int) -> None:
            for at in range(start, stop):
                sample(*(column[at] for column in columns))

        in_threads(part, work.count, _CHUNK, workers)

    def output(turn: int, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = [sample(*(column[at] for column in tables[turn])) for at in picks]
        return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])

    return Job(run, output, tolerance=Tolerance(1, 0.2, "two roundings"))


def encode(work: EncodeWork, device: str, workers: int) -> Job:
    """`imencode`, of pictures that are in its order of colours already."""
    import cv2

    cv2.setNumThreads(1)
    options: list[int] = [cv2.IMWRITE_JPEG_QUALITY, RECIPE.quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    if work.kind == "RGB":
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    batches = [np.ascontiguousarray(b[..., ::-1]) if b.ndim == 4 else b for b in work.batches]

    def file(picture: np.ndarray) -> Any:
        return cv2.imencode(".jpg", picture, options)[1]

    def run(turn: int) -> None:
        pictures = batches[turn]
        in_threads(lambda start, stop: [file(p) for p in pictures[start:stop]], work.count, _CHUNK, workers)

    return Job(run, lambda turn, picks: [file(picture).tobytes() for picture in batches[turn][picks]])


def moments(work: MomentsWork, device: str, workers: int) -> Job:
    """`meanStdDev` of each picture, put together."""
    import cv2

    cv2.setNumThreads(1)

    def run(turn: int) -> tuple[np.ndarray, np.ndarray]:
        pictures = work.batches[turn]
        found = np.empty((len(pictures), 2, 3))

        def part(start: int, stop: int) -> None:
            for at in range(start, stop):
                found[at] = np.reshape(cv2.meanStdDev(pictures[at]), (2, 3))

        in_threads(part, work.count, _CHUNK, workers)
        mean = found[:, 0].mean(axis=0)
        variance = (found[:, 1] ** 2 + found[:, 0] ** 2).mean(axis=0) - mean**2
        return mean / 255, np.sqrt(variance) / 255

    return Job(run, run, tolerance=Tolerance(1e-6, 1e-6, "fp64"))


RIVAL = Contender(
    "OpenCV", ("cv2",), "opencv-python-headless",
    {
        "render": (Offer(render, threads=True),),
        "encode": (Offer(encode, threads=True),),
        "moments": (Offer(moments, threads=True),),
    },
)  # fmt: skip
