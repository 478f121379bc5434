"""The original's recipe as its authors ran it: one sample at a time with Pillow. The rival of the CPU benchmarks."""

from __future__ import annotations

import io

from PIL import Image

from gpufgbg import Assets, Placements

FLIP = Image.Transpose.FLIP_LEFT_RIGHT


class PillowRecipe:
    """The same samples as gpufgbg's, made by Pillow alone.

    Parameters
    ----------
    assets : Assets
        Turned into Pillow images once, before anything is timed.
    """

    def __init__(self, assets: Assets) -> None:
        self.backgrounds = [Image.fromarray(frame) for frame in assets.backgrounds]
        self.foregrounds = [Image.fromarray(assets.foreground(f)) for f in range(assets.n_foregrounds)]
        self.masks = [Image.fromarray(assets.mask(f)) for f in range(assets.n_foregrounds)]
        self.flipped = [image.transpose(FLIP) for image in self.foregrounds]
        self.flipped_masks = [image.transpose(FLIP) for image in self.masks]

    def render(self, placements: Placements, flip_ahead: bool = False):
        """(composite, mask) of each sample; with ``flip_ahead``, flipped foregrounds come from a table."""
        columns = (placements.background, placements.foreground, placements.flip, placements.x, placements.y)
        for b, f, flip, x, y in zip(*(column.tolist() for column in columns), strict=True):
            foreground, mask = self.foregrounds[f], self.masks[f]
            if flip and flip_ahead:
                foreground, mask = self.flipped[f], self.flipped_masks[f]
            elif flip:
                foreground, mask = foreground.transpose(FLIP), mask.transpose(FLIP)
            composite = self.backgrounds[b].copy()
            composite.paste(foreground, (x, y), foreground)
            frame = Image.new("L", composite.size)
            frame.paste(mask, (x, y), mask)
            yield composite, frame

    def encode(self, placements: Placements, quality: int = 65):
        """(composite, mask) of each sample as JPEG bytes in memory."""
        for pair in self.render(placements):
            files = []
            for image in pair:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=quality, optimize=True)
                files.append(file.getvalue())
            yield tuple(files)
