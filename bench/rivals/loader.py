"""What a training loop mostly does: a PyTorch `DataLoader` whose workers make samples with Pillow."""

from __future__ import annotations

import itertools
import multiprocessing
from typing import Any

import numpy as np
from contenders import HOST, SYNCHRONISED, Contender, Job, Offer
from pillow_recipe import PillowRecipe
from work import MEAN, STD, StreamWork

from gpufgbg.compositor import default_workers
from rivals.pytorch import torch_missing

__all__ = ["RIVAL"]


class Samples:
    """A dataset for `DataLoader`: sample i as (number, composite, mask)."""

    def __init__(self, work: StreamWork) -> None:
        self.assets = work.assets
        self.plan = work.compositor.plan
        self.recipe: PillowRecipe | None = None  # made in each worker

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, np.ndarray]:
        if self.recipe is None:
            self.recipe = PillowRecipe(self.assets)
        ((image, mask),) = self.recipe.render(self.plan.placements([index]))
        return index, np.array(image), np.array(mask)


def stream(work: StreamWork, device: str, workers: int) -> Job:
    """A worker process a core; batches are normalised where they are trained on.

    The workers are forked off a process that has imported all they need, which takes seconds, once.
    """
    import torch
    from torch.utils.data import DataLoader

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])
    loader = DataLoader(
        Samples(work), batch_size=work.batch, shuffle=True, num_workers=default_workers(), drop_last=True,  # type: ignore[arg-type]
        pin_memory=device != "cpu", persistent_workers=True, multiprocessing_context=context,
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    scale = torch.tensor([1 / (255 * s) for s in STD], device=device).view(1, 3, 1, 1)
    bias = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], device=device).view(1, 3, 1, 1)

    def take() -> tuple[Any, Any, Any]:
        index, images, masks = next(batches)
        planes = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
        return index, (planes * scale + bias).contiguous(), masks.to(device, non_blocking=True)

    def run(turn: int) -> None:
        for _ in range(work.steps):
            take()

    def output(turn: int) -> list[Any]:
        return [value[:8] for value in take()]

    note = f"{default_workers()} worker processes"
    return Job(run, output, HOST if device == "cpu" else SYNCHRONISED, note)


RIVAL = Contender(
    "PyTorch DataLoader + Pillow", ("torch",), "torch",
    {"stream": (Offer(stream, ("cpu", "cuda"), all_cores=True, missing=torch_missing),)},
)  # fmt: skip
