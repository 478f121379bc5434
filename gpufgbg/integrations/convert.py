"""What all integrations do to a batch: its arrays in a chosen layout, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.depth.processing import Triple
from gpufgbg.exceptions import OptionError
from gpufgbg.moments import Moments
from gpufgbg.normalise import check, normalise
from gpufgbg.streaming import StreamBatch, aligned

__all__ = ["LAYOUTS", "Conversion"]

LAYOUTS = ("uint8 NHWC", "float NCHW", "float NHWC")
_LABELS = ("background", "foreground", "repetition", "flip", "x", "y")


@dataclass(frozen=True)
class Conversion:
    """How a batch is handed over.

    Parameters
    ----------
    layout : {"uint8 NHWC", "float NCHW", "float NHWC"}
        Of the images: as they are made, without a copy, or normalised, in one pass.
    mean, std : float or (float, float, float)
        For float: ``(value / 255 - mean) / std``, over values scaled to 0..1.
    dtype : {"float32", "float16", "bfloat16"}
        For float.
    labels : bool
        Give background, foreground, repetition, flip, x, y and boxes too, where the images are.

    Raises
    ------
    OptionError
        A value is out of range.
    """

    layout: str = "uint8 NHWC"
    mean: float | Triple = 0.0
    std: float | Triple = 1.0
    dtype: str = "float32"
    labels: bool = False

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise OptionError("layout", f"got {self.layout!r}, expected {', '.join(LAYOUTS)}")
        if not isinstance(self.labels, bool):
            raise OptionError("labels", f"got {self.labels!r}, expected True or False")
        check(self.mean, self.std, self.dtype, "NCHW")

    @classmethod
    def of(
        cls,
        layout: str,
        mean: float | Triple | None,
        std: float | Triple | None,
        dtype: str,
        labels: bool,
        known: Moments | None,
    ) -> Conversion:
        """Like the constructor; mean and std may be left to the composites' own, ``known`` of a data set on disk.

        Raises
        ------
        OptionError
            A value is out of range, or mean or std is needed and nobody knows it.
        """
        cls(layout, dtype=dtype, labels=labels)  # told before what depends on it
        if layout != LAYOUTS[0] and (mean is None or std is None):
            if known is None or not known.pixels:
                raise OptionError(
                    "mean",
                    f"needed with std for layout {layout!r}: only a data set on disk knows its own; "
                    "gpufgbg.mean_std counts them",
                )
            mean = known.mean if mean is None else mean  # type: ignore[assignment]
            std = known.std if std is None else std  # type: ignore[assignment]
        return cls(layout, 0.0 if mean is None else mean, 1.0 if std is None else std, dtype, labels)

    @property
    def is_bfloat16(self) -> bool:
        """Whether images come as the bits of bfloat16, in uint16."""
        return self.layout != LAYOUTS[0] and self.dtype == "bfloat16"

    def arrays(self, batch: StreamBatch) -> dict[str, Any]:
        """NumPy's and CuPy's arrays of a batch by name, on CuPy's current stream.

        ``image``, ``mask``, ``index`` in the host's memory, with depth ``depth`` (grey levels), ``depth_range`` and
        ``metres``, with ``labels`` their names and ``boxes``.
        """
        image = batch.image
        if self.layout != LAYOUTS[0]:
            order = self.layout.split()[1]
            out = None
            if not hasattr(image, "__cuda_array_interface__"):
                n, height, width, _ = image.shape
                shape = (n, 3, height, width) if order == "NCHW" else image.shape
                out = self._room(batch, shape, np.uint16 if self.is_bfloat16 else self.dtype)
            image = normalise(
                image, self.mean, self.std, dtype=self.dtype, layout=order, out=out, workers=batch._workers
            )
        found = {"image": image, "mask": batch.mask, "index": batch.index}
        if batch.depth is not None:
            found.update(depth=batch.depth.grey, depth_range=batch.depth.range)
            if batch.depth.metres is not None:
                found["metres"] = batch.depth.metres
        if self.labels:
            found.update((name, getattr(batch.device_labels, name)) for name in _LABELS)
            found["boxes"] = batch.boxes
        return found

    def _room(self, batch: StreamBatch, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array for the batch's images: a new one or, of a stream that uses its own again, this turn's."""
        if batch._room is None:
            return aligned(shape, dtype)
        values = (np.broadcast_to(np.asarray(v, np.float64), 3).tobytes() for v in (self.mean, self.std))
        key = (self.layout, self.dtype, *values)  # another conversion of the same batch has its own
        kept = batch._room.get(key)
        if kept is None or len(kept) < len(batch):
            kept = batch._room[key] = aligned(shape, dtype)
        return kept[: len(batch)]
