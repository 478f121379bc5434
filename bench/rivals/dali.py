"""DALI: `multi_paste` puts pictures into frames, its arithmetic blends them."""

from __future__ import annotations

from typing import Any

import numpy as np
from contenders import HOST, SYNCHRONISED, Contender, Job, Offer
from work import RenderWork

__all__ = ["RIVAL"]


def render(work: RenderWork, device: str, workers: int) -> Job:
    """Every table of pictures is a batch; `multi_paste` takes from it by number, once for each layer."""
    from nvidia.dali import fn, pipeline_def, types

    kind = "cpu" if device == "cpu" else "gpu"
    both = work.foregrounds()
    tables = {
        "colour": [np.ascontiguousarray(pixels[..., :3]) for pixels, _ in both],
        "alpha": [np.repeat(pixels[..., 3:], 3, axis=2) for pixels, _ in both],
        "matte": [matte[..., None] for _, matte in both],
        "background": list(work.assets.backgrounds),
    }
    # Batches of some 500 that divide the work; a table has to fit into a batch.
    size = max(work.count // max(1, work.count // 500), *map(len, tables.values()))
    pictures = {name: _on(kind, [table[i % len(table)] for i in range(size)]) for name, table in tables.items()}
    columns = [work.tables(turn) for turn in range(work.turns)]
    queue: list[tuple[np.ndarray, ...]] = []

    def numbers() -> list[list[np.ndarray]]:
        background, foreground, x, y = (column.astype(np.int32) for column in queue.pop(0))
        return [list(background[:, None]), list(foreground[:, None]), list(np.stack([y, x], 1)[:, None])]

    @pipeline_def(
        batch_size=size, num_threads=workers if kind == "cpu" else 4,
        device_id=None if kind == "cpu" else int(device.partition(":")[2]), prefetch_queue_depth=1,
        exec_async=False, exec_pipelined=False,
    )  # fmt: skip
    def pipeline() -> Any:
        background, foreground, corner = fn.external_source(numbers, num_outputs=3, batch=True, dtype=types.INT32)
        frame = list(work.assets.backgrounds.shape[1:3])

        def pasted(name: str, ids: Any, **more: Any) -> Any:
            table = fn.external_source(
                lambda: pictures[name], device=kind, batch=True, layout="HWC", no_copy=True, dtype=types.UINT8
            )
            return fn.multi_paste(table, in_ids=ids, output_size=frame, **more)

        alpha, colour, mask = (pasted(n, foreground, out_anchors=corner) for n in ("alpha", "colour", "matte"))
        behind = fn.cast(pasted("background", background), dtype=types.INT32)
        alpha = fn.cast(alpha, dtype=types.INT32)
        value = behind * (255 - alpha) + fn.cast(colour, dtype=types.INT32) * alpha + 128
        return fn.cast((value + value // 256) // 256, dtype=types.UINT8), mask

    pipe = pipeline()
    pipe.build()

    def parts(turn: int) -> Any:
        for start in range(0, work.count, size):
            chosen = np.arange(start, start + size) % work.count  # what is left of the last batch is filled up
            queue.append(tuple(column[chosen] for column in columns[turn]))
            yield pipe.run()

    def run(turn: int) -> None:
        for _ in parts(turn):
            pass

    def output(turn: int, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found: list[list[np.ndarray]] = [[], []]
        for part in parts(turn):
            for kept, tensors in zip(found, part, strict=True):
                kept.append(np.asarray((tensors if kind == "cpu" else tensors.as_cpu()).as_array()))
        images, masks = (np.concatenate(kept) for kept in found)
        return images[picks], masks[picks][..., 0]

    return Job(run, output, HOST if kind == "cpu" else SYNCHRONISED)


def _on(kind: str, arrays: list[np.ndarray]) -> list[Any]:
    if kind == "cpu":
        return arrays
    import cupy

    return [cupy.asarray(array) for array in arrays]


RIVAL = Contender(
    "DALI", ("nvidia.dali",), "nvidia-dali-cuda130 (or nvidia-dali-cuda120)",
    {"render": (Offer(render, ("cpu", "cuda"), all_cores=True),)},
)  # fmt: skip
