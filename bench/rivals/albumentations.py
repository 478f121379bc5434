"""albumentations: `OverlayElements`, the transform that pastes one picture onto another."""

from __future__ import annotations

import numpy as np
from contenders import Contender, Job, Offer, Tolerance, in_threads
from work import RenderWork

__all__ = ["RIVAL"]


def render(work: RenderWork, device: str, workers: int) -> Job:
    """It pastes where the mask is set and does not blend, so soft edges differ."""
    import albumentations

    overlay = albumentations.Compose([albumentations.OverlayElements(p=1.0)])
    foregrounds = [
        (np.ascontiguousarray(pixels[..., :3]), (pixels[..., 3] > 127).astype(np.uint8))
        for pixels, _ in work.foregrounds()
    ]
    height, width = work.assets.backgrounds.shape[1:3]
    tables = [[column.tolist() for column in work.tables(turn)] for turn in range(work.turns)]

    def sample(b: int, f: int, x: int, y: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = foregrounds[f]
        h, w = mask.shape
        # A quarter of a pixel more, so that the transform's truncation lands on the very pixel.
        box = [(x + 0.25) / width, (y + 0.25) / height, (x + w + 0.25) / width, (y + h + 0.25) / height]
        made = overlay(
            image=work.assets.backgrounds[b],
            mask=np.zeros((height, width), np.uint8),
            overlay_metadata={"image": image, "bbox": np.minimum(box, 1.0), "mask": mask, "mask_id": 255},
        )
        return made["image"], made["mask"]

    def run(turn: int) -> None:
        columns = tables[turn]

        def part(start: int, stop: int) -> None:
            for at in range(start, stop):
                sample(*(column[at] for column in columns))

        in_threads(part, work.count, 16, workers)

    def output(turn: int, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = [sample(*(column[at] for column in tables[turn])) for at in picks]
        return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])

    return Job(
        run, output, note="pastes where alpha is over a half; does not blend",
        tolerance=Tolerance(255, 3.0, "soft edges are hard"),
    )  # fmt: skip


RIVAL = Contender("albumentations", ("albumentations",), "albumentations", {"render": (Offer(render),)})
