"""Composites as the source of an NVIDIA DALI pipeline that mirrors and normalises them.

    python examples/dali_pipeline.py [DATASET] --steps=10 --device=cuda

DATASET is a data set made by gpufgbg; without one, a few pictures are drawn first.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from nvidia.dali import fn, pipeline_def, types

from gpufgbg import Compositor, Recipe, SampleStream, prepare, stream
from gpufgbg.integrations.dali import external_source
from gpufgbg.sample_assets import write_sample_assets


def drawn(device: str) -> Compositor:
    """Samples over built-in pictures."""
    recipe = Recipe(size=128, foreground_height=64)
    with tempfile.TemporaryDirectory() as folder:
        return Compositor(prepare(*write_sample_assets(folder, 2, 3), recipe=recipe), recipe, device)


@pipeline_def
def augmented(samples: SampleStream) -> tuple[Any, Any]:
    image, mask = external_source(samples)
    mirrored = fn.random.coin_flip()
    image = fn.crop_mirror_normalize(
        image, mirror=mirrored, mean=[127.5] * 3, std=[63.75] * 3, dtype=types.FLOAT, output_layout="CHW"
    )
    mask = fn.flip(fn.expand_dims(mask, axes=2, new_axis_names="C"), horizontal=mirrored)
    return image, mask


def main() -> None:
    parser = argparse.ArgumentParser(description="The stream as a source of a DALI pipeline.")
    parser.add_argument("dataset", nargs="?", help="folder of a data set made by gpufgbg")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = {"device": given.device} if given.dataset else {}
    with stream(given.dataset or drawn(given.device), batch_size=given.batch, drop_last=True, **device) as samples:
        card = None if samples.device == "cpu" else int(samples.device.partition(":")[2])
        pipeline = augmented(samples, batch_size=given.batch, num_threads=2, device_id=card, seed=1)
        pipeline.build()
        for k in range(given.steps):
            image, mask = pipeline.run()
            print(f"batch {k}: images {image.shape()[0]}, masks {mask.shape()[0]}, {len(image)} of them")
        del pipeline


if __name__ == "__main__":
    main()
