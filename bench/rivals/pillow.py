"""The original data set's recipe: Pillow, one sample at a time, in one process and in one a core."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from contenders import Contender, Job, Offer, Tolerance, started_processes
from PIL import Image, ImageStat
from pillow_recipe import PillowRecipe
from work import RECIPE, EncodeWork, MomentsWork, RenderWork

from gpufgbg import Assets, Placements
from gpufgbg.compositor import default_workers

__all__ = ["RIVAL", "consume", "in_processes"]

_recipe: PillowRecipe | None = None  # of a worker process


def consume(iterator: Iterable[Any]) -> None:
    """Take everything and keep nothing."""
    deque(iterator, maxlen=0)


def _start(assets: Assets) -> None:
    global _recipe
    _recipe = PillowRecipe(assets)


def _work(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    assert _recipe is not None
    function(_recipe, *arguments)


def in_processes(assets: Assets, workers: int) -> tuple[Callable[..., None], Callable[[], None]]:
    """Call ``function(recipe, part, ...)`` for parts of a batch in processes that wait for work; and their end.

    Their output stays there: nothing is paid for bringing it back.
    """
    pool = started_processes(workers, _start, assets)

    def call(function: Callable[..., None], placements: Placements, *more: Any) -> None:
        step = -(-len(placements) // workers)
        cuts = [placements[start : start + step] for start in range(0, len(placements), step)]
        for future in [pool.submit(_work, function, (cut, *more)) for cut in cuts]:
            future.result()

    return call, pool.shutdown


def _render(recipe: PillowRecipe, placements: Placements) -> None:
    consume(recipe.render(placements))


def render(work: RenderWork, device: str, workers: int) -> Job:
    """`Image.paste` of foreground and mask."""
    pillow = work.pillow

    def output(turn: int, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        placements = work.compositor.plan.placements(work.batches[turn].index[picks])
        pairs = [(np.asarray(image), np.asarray(mask)) for image, mask in pillow.render(placements)]
        return np.stack([image for image, _ in pairs]), np.stack([mask for _, mask in pairs])

    note = "the original recipe, and the judge of the others"
    return Job(lambda turn: _render(pillow, work.batches[turn]), output, note=note)


def render_in_processes(work: RenderWork, device: str, workers: int) -> Job:
    """The same, in one process a core."""
    call, close = in_processes(work.assets, default_workers())
    note = f"the original recipe in {default_workers()} processes, which keep what they make"
    return Job(lambda turn: call(_render, work.batches[turn]), render(work, device, 1).output, note=note, close=close)


def _file(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=RECIPE.quality, optimize=True)
    return file.getvalue()


def encode(work: EncodeWork, device: str, workers: int) -> Job:
    """`Image.save`."""

    def run(turn: int) -> None:
        consume(map(_file, work.batches[turn]))

    return Job(run, lambda turn, picks: [_file(picture) for picture in work.batches[turn][picks]])


def moments(work: MomentsWork, device: str, workers: int) -> Job:
    """`ImageStat.Stat` of each picture, its sums added up."""

    def run(turn: int) -> tuple[np.ndarray, np.ndarray]:
        total, squares, count = np.zeros(3), np.zeros(3), 0
        for picture in work.batches[turn]:
            found = ImageStat.Stat(Image.fromarray(picture))
            total, squares, count = total + found.sum, squares + found.sum2, count + found.count[0]
        mean = total / count / 255
        return mean, np.sqrt(squares / count / 255**2 - mean**2)

    return Job(run, run, tolerance=Tolerance(1e-6, 1e-6, "fp64"))


RIVAL = Contender(
    "Pillow", ("PIL",), "pillow",
    {
        "render": (
            Offer(render, variant="1 process"),
            Offer(render_in_processes, all_cores=True, variant=f"{default_workers()} processes"),
        ),
        "encode": (Offer(encode, variant="1 process"),),
        "moments": (Offer(moments),),
    },
)  # fmt: skip
