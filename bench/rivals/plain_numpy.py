"""NumPy, as mean and std of a data set are mostly computed."""

from __future__ import annotations

import numpy as np
from contenders import Contender, Job, Offer, Tolerance
from work import MomentsWork

__all__ = ["RIVAL"]


def moments(work: MomentsWork, device: str, workers: int) -> Job:
    """`mean` and `std` over all pixels, a chunk of pictures at a time."""

    def run(turn: int) -> tuple[np.ndarray, np.ndarray]:
        pictures = work.batches[turn]
        parts = [pictures[start : start + 64] / 255 for start in range(0, len(pictures), 64)]
        means = np.array([part.mean(axis=(0, 1, 2)) for part in parts])
        variances = np.array([part.var(axis=(0, 1, 2)) for part in parts])
        weights = np.array([len(part) for part in parts]) / len(pictures)
        mean = weights @ means
        return mean, np.sqrt(weights @ (variances + means**2) - mean**2)

    return Job(run, run, tolerance=Tolerance(1e-6, 1e-6, "fp64"))


RIVAL = Contender("NumPy", ("numpy",), "numpy", {"moments": (Offer(moments),)})
