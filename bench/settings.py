"""How large a run is: numbers of samples, rounds and seconds for each scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["SCALES", "Scale", "Settings"]


@dataclass(frozen=True)
class Scale:
    """Sizes of one scale; ``card_`` ones are for rows on a CUDA card.

    Attributes
    ----------
    pairs, card_pairs : int
        Samples a call renders.
    pictures, card_pictures : int
        Pictures a call encodes or counts; on the CPU in several threads, times half their number (`threaded`).
    slow_pictures : int
        Most pictures a call of a contender that makes thousands of calls for them.
    sizes, card_sizes : tuple of int
        Samples a call, for the plot of cost against size.
    job, card_job : int
        Samples of a whole ``gpufgbg generate``; a fifth of them by a single process of Pillow.
    job_sizes, card_job_sizes : tuple of int
        The same, for the plot.
    job_rounds : int
        Rounds of such a job, and of its statistics in a full run; five at least tell how far a median may be off.
    stats : int
        Samples of the data set that is decoded; a fifth of them by a single thread or process.
    stream : int
        Samples a call of the stream on a card; a tenth of it on the CPU, and where Pillow feeds it.
    depth, card_depth : int
        Pixels a side of the depth network's input.
    depth_pictures : int
        Pictures a call of depth on a card; on the CPU, one.
    least_rounds, seconds : int, float
        Rounds of a row: as many as fit, and at least so many; two of a call that takes longer than these seconds.
    limit_bytes : int
        Bytes of the files and copies by which limits are measured.
    compiled : bool
        Whether contenders that compile for tens of seconds take part.
    """

    pairs: int
    card_pairs: int
    pictures: int
    card_pictures: int
    slow_pictures: int
    sizes: tuple[int, ...]
    card_sizes: tuple[int, ...]
    job: int
    card_job: int
    job_sizes: tuple[int, ...]
    card_job_sizes: tuple[int, ...]
    job_rounds: int
    stats: int
    stream: int
    depth: int
    card_depth: int
    depth_pictures: int
    least_rounds: int
    seconds: float
    limit_bytes: int
    compiled: bool

    def threaded(self, workers: int) -> int:
        """Pictures a call of so many threads encodes or counts, so that it doesn't get short where there are many."""
        return self.pictures * max(1, min(workers, 16) // 2)


SCALES = {
    "full": Scale(
        pairs=4000, card_pairs=8000, pictures=1000, card_pictures=4000, slow_pictures=400,
        sizes=(16, 128, 1024, 4096), card_sizes=(1, 16, 128, 1024, 8192),
        job=20_000, card_job=100_000, job_sizes=(1000, 5000), card_job_sizes=(1000, 10_000), job_rounds=5,
        stats=20_000, stream=100_000, depth=224, card_depth=448, depth_pictures=64,
        least_rounds=5, seconds=0.6, limit_bytes=2 << 30, compiled=True,
    ),
    "quick": Scale(
        pairs=600, card_pairs=4000, pictures=96, card_pictures=1000, slow_pictures=200,
        sizes=(16, 128, 1024), card_sizes=(16, 256, 4096),
        job=2000, card_job=20_000, job_sizes=(500,), card_job_sizes=(5000,), job_rounds=1,
        stats=300, stream=5000, depth=64, card_depth=448, depth_pictures=64,
        least_rounds=3, seconds=0.3, limit_bytes=256 << 20, compiled=False,
    ),
    # For a test of the suites themselves: the figures mean nothing.
    "tiny": Scale(
        pairs=40, card_pairs=40, pictures=10, card_pictures=10, slow_pictures=10,
        sizes=(16,), card_sizes=(16,),
        job=40, card_job=40, job_sizes=(), card_job_sizes=(), job_rounds=1,
        stats=40, stream=640, depth=32, card_depth=32, depth_pictures=2,
        least_rounds=1, seconds=0.0, limit_bytes=4 << 20, compiled=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One run of a suite.

    Attributes
    ----------
    scale : Scale
    device : str
        ``auto`` for CPU and card, ``cpu``, or ``cuda[:N]`` for the card alone.
    backgrounds, foregrounds : Path
    masks : Path or None
    work : Path
        Folder for what is thrown away afterwards, on the disk that is measured.
    keep : Path
        Folder for what a later run in another interpreter may want.
    """

    scale: Scale
    device: str
    backgrounds: Path
    foregrounds: Path
    masks: Path | None
    work: Path
    keep: Path

    @property
    def card(self) -> str:
        """The CUDA device: ``cuda:N``."""
        return f"cuda:{int(self.device.partition(':')[2] or 0)}"

    @property
    def folders(self) -> dict[str, Path]:
        """The input as ``gpufgbg generate`` names it."""
        named = {"backgrounds": self.backgrounds, "foregrounds": self.foregrounds, "masks": self.masks}
        return {name: path for name, path in named.items() if path is not None}
