"""PyTorch: samples composited with whole-batch indexing and integer arithmetic, eager and compiled; moments."""

from __future__ import annotations

from typing import Any

import numpy as np
from contenders import EVENTS, HOST, Contender, Job, Offer, Tolerance
from work import MomentsWork, RenderWork

__all__ = ["RIVAL", "torch_missing"]

_CHUNK = {"cpu": 32, "cuda": 2000}  # samples at a time: what the temporary arrays of a batch allow


def torch_missing(device: str) -> str | None:
    """Why PyTorch has no card, or None."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"torch {torch.__version__} has no CUDA: install a build that has"
    return None


def _composite(frames: Any, masks: Any, colour: Any, matte: Any, x: Any, y: Any) -> None:
    """Blend each sample's foreground into its frame, as Pillow does.

    frames (N, H, W, 3) uint8 hold backgrounds, masks (N, H, W) uint8 zeros; colour (N, h, w, 4) and matte (N, h, w)
    uint8 are canvases of one size, transparent around the foreground; x, y (N,) int64.
    """
    import torch

    n, height, width, _ = colour.shape
    # A canvas may stick out of the frame where its foreground does not: move the window in, and the canvas within it.
    left, top = x.clamp(max=frames.shape[2] - width), y.clamp(max=frames.shape[1] - height)
    rows, columns = (torch.arange(side, device=frames.device) for side in (height, width))
    from_row, from_column = rows - (y - top)[:, None], columns - (x - left)[:, None]
    inside = (from_row >= 0)[:, :, None] & (from_column >= 0)[:, None, :]
    each = torch.arange(n, device=frames.device)[:, None, None]
    at = (each, from_row.clamp(min=0)[:, :, None], from_column.clamp(min=0)[:, None, :])
    moved = colour[at].int()
    alpha = moved[..., 3:] * inside[..., None]
    to = (each, (top[:, None] + rows)[:, :, None], (left[:, None] + columns)[:, None, :])
    value = frames[to].int() * (255 - alpha) + moved[..., :3] * alpha + 128
    frames[to] = ((value + (value >> 8)) >> 8).to(torch.uint8)
    masks[to] = matte[at] * inside


def _render(work: RenderWork, device: str, composite: Any) -> Job:
    import torch

    kind = device.partition(":")[0]
    backgrounds = torch.from_numpy(work.assets.backgrounds).to(device)
    both = work.foregrounds()
    height, width = (max(matte.shape[axis] for _, matte in both) for axis in (0, 1))
    colours = np.zeros((len(both), height, width, 4), np.uint8)
    mattes = np.zeros((len(both), height, width), np.uint8)
    for i, (pixels, matte) in enumerate(both):
        colours[i, : matte.shape[0], : matte.shape[1]] = pixels
        mattes[i, : matte.shape[0], : matte.shape[1]] = matte
    colour, matte = torch.from_numpy(colours).to(device), torch.from_numpy(mattes).to(device)
    tables = [[torch.from_numpy(column).to(device) for column in work.tables(turn)] for turn in range(work.turns)]
    shape = tuple(work.assets.backgrounds.shape[1:3])

    def part(columns: Any) -> tuple[Any, Any]:
        background, foreground, x, y = columns
        frames = backgrounds[background]
        masks = torch.zeros((len(x), *shape), dtype=torch.uint8, device=device)
        composite(frames, masks, colour[foreground], matte[foreground], x, y)
        return frames, masks

    def run(turn: int) -> None:
        for start in range(0, work.count, _CHUNK[kind]):
            part([column[start : start + _CHUNK[kind]] for column in tables[turn]])

    def output(turn: int, picks: np.ndarray) -> tuple[Any, Any]:
        chosen = torch.from_numpy(picks).to(device)
        return part([column[chosen] for column in tables[turn]])

    return Job(run, output, HOST if kind == "cpu" else EVENTS)


def render(work: RenderWork, device: str, workers: int) -> Job:
    """Eager."""
    return _render(work, device, _composite)


def render_compiled(work: RenderWork, device: str, workers: int) -> Job:
    """The blend fused by `torch.compile`."""
    import torch

    return _render(work, device, torch.compile(_composite, dynamic=True))


def moments(work: MomentsWork, device: str, workers: int) -> Job:
    """`std_mean` in fp32 over chunks of the batch, put together in fp64."""
    import torch

    batches = [torch.from_numpy(b) if device == "cpu" else torch.from_dlpack(b) for b in work.batches]

    def run(turn: int) -> tuple[Any, Any]:
        pictures = batches[turn]
        parts = [torch.std_mean(chunk.float() / 255, dim=(0, 1, 2), correction=0) for chunk in pictures.split(64)]
        weights = torch.tensor([len(chunk) for chunk in pictures.split(64)], dtype=torch.float64) / len(pictures)
        stds, means = (torch.stack([part[i] for part in parts]).double() for i in (0, 1))
        weights = weights.to(means.device)
        mean = weights @ means
        return mean, (weights @ (stds**2 + means**2) - mean**2).sqrt()

    def output(turn: int) -> list[Any]:
        return [value.cpu().numpy() for value in run(turn)]

    return Job(run, output, HOST if device == "cpu" else EVENTS, tolerance=Tolerance(1e-5, 1e-5, "fp32"))


_DEVICES = ("cpu", "cuda")
RIVAL = Contender(
    "PyTorch", ("torch",), "torch",
    {
        "render": (
            Offer(render, _DEVICES, all_cores=True, variant="eager", missing=torch_missing),
            Offer(
                render_compiled, _DEVICES, all_cores=True, variant="compiled", compiled=True, missing=torch_missing
            ),
        ),
        "moments": (Offer(moments, _DEVICES, all_cores=True, missing=torch_missing),),
    },
)  # fmt: skip
