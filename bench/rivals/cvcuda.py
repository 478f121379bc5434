"""CV-CUDA: foregrounds and masks put into frames by `padandstack`, blended by `composite`."""

from __future__ import annotations

from typing import Any

import numpy as np
from contenders import EVENTS, Contender, Job, Offer, Tolerance
from work import RenderWork

__all__ = ["RIVAL"]

_CHUNK = 1000  # samples at a time


def render(work: RenderWork, device: str, workers: int) -> Job:
    """Each sample is three small pictures of any size, wrapped without a copy, in batches that are made anew.

    Everything is put on the default stream, which is CV-CUDA's where none is named, and CuPy's.
    """
    import cupy
    import cvcuda

    chunk = min(_CHUNK, work.count)
    backgrounds = cupy.asarray(work.assets.backgrounds)
    forms = cvcuda.Format.RGB8, cvcuda.Format.U8, cvcuda.Format.U8
    layers = []
    for pixels, matte in work.foregrounds():
        parts = zip((pixels[..., :3], pixels[..., 3:], matte[..., None]), forms, strict=True)
        layers.append([cvcuda.as_image(cupy.asarray(np.ascontiguousarray(part)), form) for part, form in parts])
    frame = tuple(work.assets.backgrounds.shape[1:3])
    tables = [work.tables(turn) for turn in range(work.turns)]
    buffers: dict[int, Any] = {}

    def outputs(count: int) -> Any:
        if count not in buffers:
            arrays = [cupy.empty((count, *frame, channels), np.uint8) for channels in (3, 1, 1, 3)]
            buffers[count] = arrays, [cvcuda.as_tensor(array, "NHWC") for array in arrays]
        return buffers[count]

    def part(background: np.ndarray, foreground: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[Any, Any]:
        count = len(x)
        (_, _, masks, composites), tensors = outputs(count)
        corners = [cvcuda.as_tensor(_corners(values), "NHWC") for values in (y, x)]
        for layer, tensor in enumerate(tensors[:3]):
            images = cvcuda.ImageBatchVarShape(count)
            images.pushback([layers[f][layer] for f in foreground.tolist()])
            cvcuda.padandstack_into(tensor, images, *corners, cvcuda.Border.CONSTANT, 0.0)
        behind = cvcuda.as_tensor(backgrounds[cupy.asarray(background)], "NHWC")
        cvcuda.composite_into(tensors[3], tensors[0], behind, tensors[1])
        return composites, masks[..., 0]

    def run(turn: int) -> None:
        for start in range(0, work.count, chunk):
            part(*(column[start : start + chunk] for column in tables[turn]))

    return Job(
        run, lambda turn, picks: part(*(column[picks] for column in tables[turn])), EVENTS,
        tolerance=Tolerance(2, 0.5, "floating point"),
    )  # fmt: skip


def _corners(values: np.ndarray) -> Any:
    """(1, 1, N, 1) int32 on the card, as `padandstack` wants distances from the frame's edge."""
    import cupy

    return cupy.asarray(values.astype(np.int32)).reshape(1, 1, -1, 1)


RIVAL = Contender(
    "CV-CUDA", ("cupy", "cvcuda"), "cvcuda-cu13 (or cvcuda-cu12)", {"render": (Offer(render, ("cuda",)),)}
)
