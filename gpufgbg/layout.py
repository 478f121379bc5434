"""Names and folders of a data set: those of the original, wider where the counts need it."""

from __future__ import annotations

from dataclasses import dataclass

from gpufgbg.recipe import Placements, Plan

__all__ = ["KINDS", "SAMPLE_KINDS", "TAR_SUFFIXES", "Layout"]

#: kind -> folder of the original data set
KINDS = {
    "background": "bg",
    "foreground": "fg",
    "foreground_mask": "fg_mask",
    "composite": "fg_bg",
    "composite_mask": "fg_bg_masks",
    "depth": "fg_bg_depth",
}
#: kinds of which there is one picture a sample, in the order in which a sample's files are kept
SAMPLE_KINDS = ("composite", "composite_mask", "depth")
#: kind -> the part of a WebDataset member's name behind the key
TAR_SUFFIXES = {"composite": "composite.jpg", "composite_mask": "mask.jpg", "depth": "depth.jpg"}


@dataclass(frozen=True)
class Layout:
    """Names for a data set of given counts; digits never fewer than the original's.

    Parameters
    ----------
    n_backgrounds, n_foregrounds, n_samples : int
        Counts of the whole data set.
    """

    n_backgrounds: int
    n_foregrounds: int
    n_samples: int

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        """The layout for a plan's counts."""
        return cls(plan.n_backgrounds, plan.n_foregrounds, len(plan))

    def background(self, b: int) -> str:
        """``bg_00``: a background's stem, and the folder of the samples on it."""
        return f"bg_{b:0{max(2, len(str(self.n_backgrounds - 1)))}d}"

    def foreground(self, f: int) -> str:
        """``fg_00``: the stem of a foreground and of its mask."""
        return f"fg_{f:0{max(2, len(str(self.n_foregrounds - 1)))}d}"

    def background_file(self, b: int) -> str:
        """Path of a background in the data set."""
        return f"bg/{self.background(b)}.jpg"

    def foreground_file(self, f: int) -> str:
        """Path of a foreground in the data set."""
        return f"fg/{self.foreground(f)}.png"

    def mask_file(self, f: int) -> str:
        """Path of a foreground's mask in the data set."""
        return f"fg_mask/{self.foreground(f)}.jpg"

    def label_file(self, b: int) -> str:
        """Path of a background's label file in the data set."""
        return f"labels/{self.background(b)}_label_info.txt"

    @staticmethod
    def sample_path(kind: str, stem: str) -> str:
        """Path of a sample's picture in the folder tree."""
        return f"{KINDS[kind]}/{stem[: stem.index('_fg_')]}/{stem}.jpg"

    def stems(self, placements: Placements) -> list[str]:
        """``bg_00_fg_00_T_000000`` for each sample of a batch: its file name without ``.jpg``."""
        backgrounds = {int(b): self.background(b) for b in set(placements.background.tolist())}
        foregrounds = {int(f): self.foreground(f) for f in set(placements.foreground.tolist())}
        digits = max(6, len(str(self.n_samples - 1)))
        return [
            f"{backgrounds[b]}_{foregrounds[f]}_{'T' if flip else 'F'}_{index:0{digits}d}"
            for b, f, flip, index in zip(
                placements.background.tolist(),
                placements.foreground.tolist(),
                placements.flip.tolist(),
                placements.index.tolist(),
                strict=True,
            )
        ]
