"""torchvision: `encode_jpeg`, on a card with nvJPEG."""

from __future__ import annotations

from typing import Any

import numpy as np
from contenders import HOST, SYNCHRONISED, Contender, Job, Offer, Unsupported, in_threads
from work import RECIPE, EncodeWork

from rivals.pytorch import torch_missing

__all__ = ["RIVAL"]

_CHUNK = 32  # pictures a thread takes at a time


def encode(work: EncodeWork, device: str, workers: int) -> Job:
    """A list of pictures a call; it has no option for optimal tables."""
    import torch
    from torchvision.io import encode_jpeg

    if device != "cpu" and work.kind != "RGB":
        raise Unsupported("encode_jpeg takes RGB alone on a card")

    def planes(batch: Any) -> Any:
        given = torch.from_numpy(batch) if device == "cpu" else torch.from_dlpack(batch)
        return (given.permute(0, 3, 1, 2) if given.ndim == 4 else given[:, None]).contiguous()

    batches = [list(planes(batch)) for batch in work.batches]

    def run(turn: int) -> None:
        pictures = batches[turn]
        if device == "cpu":
            in_threads(lambda start, stop: files(pictures[start:stop]), work.count, _CHUNK, workers)
        else:
            files(pictures)

    def files(pictures: list[Any]) -> list[Any]:
        if device == "cpu":
            return [encode_jpeg(picture, quality=RECIPE.quality) for picture in pictures]
        return encode_jpeg(pictures, quality=RECIPE.quality)

    def output(turn: int, picks: np.ndarray) -> list[bytes]:
        return [file.cpu().numpy().tobytes() for file in files([batches[turn][int(pick)] for pick in picks])]

    return Job(
        run, output, HOST if device == "cpu" else SYNCHRONISED,
        note="the standard's Huffman tables; planes in memory, not pixels",
    )  # fmt: skip


RIVAL = Contender(
    "torchvision", ("torch", "torchvision"), "torchvision",
    {"encode": (Offer(encode, ("cpu", "cuda"), threads=True, missing=torch_missing),)},
)  # fmt: skip
