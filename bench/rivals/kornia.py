"""kornia: foregrounds moved to their place by `warp_affine`, then blended in floating point."""

from __future__ import annotations

from typing import Any

import numpy as np
from contenders import EVENTS, HOST, Contender, Job, Offer, Tolerance
from work import RenderWork

from rivals.pytorch import torch_missing

__all__ = ["RIVAL"]

_CHUNK = {"cpu": 16, "cuda": 500}


def render(work: RenderWork, device: str, workers: int) -> Job:
    """Canvases of RGBA and mask, (N, 5, h, w) fp32, warped into the frame by a translation."""
    import torch
    from kornia.geometry.transform import warp_affine

    kind = device.partition(":")[0]
    both = work.foregrounds()
    height, width = (max(matte.shape[axis] for _, matte in both) for axis in (0, 1))
    canvases = np.zeros((len(both), 5, height, width), np.float32)
    for i, (pixels, matte) in enumerate(both):
        h, w = matte.shape
        canvases[i, :4, :h, :w], canvases[i, 4, :h, :w] = pixels.transpose(2, 0, 1), matte
    canvas = torch.from_numpy(canvases).to(device)
    backgrounds = torch.from_numpy(work.assets.backgrounds).to(device).permute(0, 3, 1, 2).contiguous()
    tables = [[torch.from_numpy(column).to(device) for column in work.tables(turn)] for turn in range(work.turns)]
    frame = tuple(work.assets.backgrounds.shape[1:3])

    def part(columns: Any) -> tuple[Any, Any]:
        background, foreground, x, y = columns
        move = torch.zeros((len(x), 2, 3), device=device)
        move[:, 0, 0] = move[:, 1, 1] = 1
        move[:, 0, 2], move[:, 1, 2] = x.float(), y.float()
        placed = warp_affine(
            canvas[foreground], move, frame, mode="nearest", padding_mode="zeros", align_corners=True
        )
        alpha = placed[:, 3:4] / 255
        blended = backgrounds[background] * (1 - alpha) + placed[:, :3] * alpha
        return blended.round().to(torch.uint8), placed[:, 4].to(torch.uint8)

    def run(turn: int) -> None:
        for start in range(0, work.count, _CHUNK[kind]):
            part([column[start : start + _CHUNK[kind]] for column in tables[turn]])

    def output(turn: int, picks: np.ndarray) -> tuple[Any, Any]:
        chosen = torch.from_numpy(picks).to(device)
        images, masks = part([column[chosen] for column in tables[turn]])
        return images.permute(0, 2, 3, 1), masks

    return Job(
        run, output, HOST if kind == "cpu" else EVENTS, note="planes in memory, not pixels",
        tolerance=Tolerance(1, 0.2, "floating point"),
    )  # fmt: skip


RIVAL = Contender(
    "kornia", ("torch", "kornia"), "kornia",
    {"render": (Offer(render, ("cpu", "cuda"), all_cores=True, missing=torch_missing),)},
)  # fmt: skip
