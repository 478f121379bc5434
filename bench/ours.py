"""gpufgbg itself as a contender: the same calls that its pipelines make."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from contenders import EVENTS, HOST, SYNCHRONISED, Contender, Job, Offer, in_threads
from work import MEAN, STD, EncodeWork, MomentsWork, RenderWork, StreamWork, rotating

from gpufgbg import JpegEncoder, stream
from gpufgbg.backends import cuda
from gpufgbg.backends.cpu import moments
from gpufgbg.cpu_pipeline import BATCH
from gpufgbg.integrations.convert import Conversion
from gpufgbg.moments import Moments

__all__ = ["OURS"]

BOTH = ("cpu", "cuda")


def render(work: RenderWork, device: str, workers: int) -> Job:
    """Into frames of each sample's own, which hold nothing yet; on a card those of several calls take turns."""
    backend = work.compositor.backend
    if device == "cpu":
        composites, masks = backend.frames(work.count)

        def run(turn: int) -> None:
            placements = work.batches[turn]

            def part(start: int, stop: int) -> None:
                backend.render(placements[start:stop], composites[start:stop], masks[start:stop])

            in_threads(part, work.count, BATCH, workers)

        def output(turn: int, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            run(turn)
            return composites[picks], masks[picks]

        return Job(run, output)
    frames = [backend.frames(work.count)]
    while len(frames) < rotating(work.settings, device, 4 * work.count * work.pixels):
        frames.append(backend.frames(work.count))
    turns = itertools.cycle(frames)

    def render_next(turn: int) -> tuple[Any, Any]:
        composites, masks = next(turns)
        backend.render(work.batches[turn], composites, masks)
        return composites, masks

    def fetch(turn: int, picks: np.ndarray) -> tuple[Any, Any]:
        composites, masks = render_next(turn)
        return composites[picks], masks[picks]

    return Job(render_next, fetch, EVENTS)


def render_reusing(work: RenderWork, device: str, workers: int) -> Job:
    """Like its pipeline on the CPU: a few frames at a time, used again for the next samples of their background."""
    backend = work.compositor.backend

    def run(turn: int) -> None:
        placements = work.batches[turn]
        in_threads(
            lambda start, stop: backend.render_reusing(placements[start:stop], BATCH), work.count, BATCH, workers
        )

    def output(turn: int, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        placements = work.compositor.plan.placements(work.batches[turn].index[picks])
        images, masks, _ = backend.render_reusing(placements, len(picks))
        return images.copy(), masks.copy()

    return Job(run, output, aside="its frames keep their background, which others write for each sample")


def encode(work: EncodeWork, device: str, workers: int) -> Job:
    """`JpegEncoder`, as many pictures a task as the pipeline's; on a card the files stay there, as one buffer."""
    if device == "cpu":
        encoder = JpegEncoder(65, "420", True, "cpu")

        def run(turn: int) -> None:
            pictures = work.batches[turn]
            in_threads(lambda start, stop: encoder.encode(pictures[start:stop]), work.count, BATCH, workers)

        return Job(run, lambda turn, picks: list(encoder.encode(work.batches[turn][picks])))
    encoder = JpegEncoder(65, "420", True, device)

    def output(turn: int, picks: np.ndarray) -> list[bytes]:
        files = encoder.encode(work.batches[turn])
        return [files[int(pick)] for pick in picks]

    return Job(lambda turn: encoder.encode(work.batches[turn]), output, EVENTS)


def moments_of(work: MomentsWork, device: str, workers: int) -> Job:
    """Exact integer sums."""
    if device == "cpu":

        def total(turn: int) -> Moments:
            pictures, parts = work.batches[turn], []
            in_threads(lambda start, stop: parts.append(moments(pictures[start:stop])), work.count, 32, workers)
            return Moments.total(parts)

    else:

        def total(turn: int) -> Moments:
            return cuda.moments(work.batches[turn])

    def output(turn: int) -> tuple[Any, Any]:
        found = total(turn)
        return found.mean, found.std

    return Job(total, output, HOST if device == "cpu" else EVENTS)


def stream_of(work: StreamWork, device: str, workers: int) -> Job:
    """`gpufgbg.stream` with one ring of arrays, each batch normalised."""
    batches = iter(stream(work.compositor, batch_size=work.batch, reuse=2))
    conversion = Conversion("float NCHW", mean=MEAN, std=STD, dtype="float32")

    def run(turn: int) -> None:
        for batch in itertools.islice(batches, work.steps):
            conversion.arrays(batch)

    def output(turn: int) -> tuple[Any, Any, Any]:
        batch = next(batches)
        arrays = conversion.arrays(batch)
        return batch.index[:8], arrays["image"][:8], arrays["mask"][:8]

    return Job(run, output, HOST if device == "cpu" else SYNCHRONISED, close=batches.close)


OURS = Contender(
    "gpufgbg", (), "gpufgbg",
    {
        "render": (
            Offer(render, BOTH, threads=True),
            Offer(render_reusing, threads=True, variant="frames used again"),
        ),
        "encode": (Offer(encode, BOTH, threads=True),),
        "moments": (Offer(moments_of, BOTH, threads=True),),
        "stream": (Offer(stream_of, BOTH, all_cores=True),),
    },
    ours=True,
)  # fmt: skip
