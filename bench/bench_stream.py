"""The stream: samples a second into memory, normalised, and what a training loop waits for.

    python bench/bench_stream.py [--device cuda] [--samples 200000] [--batch 512] [--steps 200]

Frames of 224x224 over built-in pictures. Rates are wall time with one wait for the device at the end, after warm-up.
What training waits for is the time of a loop over the stream less that of the same loop over one batch that stays,
so it has all that rendering takes from the card.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gpufgbg import Compositor, Recipe, prepare, stream
from gpufgbg.integrations.convert import Conversion
from gpufgbg.sample_assets import write_sample_assets

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def synchronise(device: str) -> None:
    if device != "cpu":
        import cupy

        cupy.cuda.Device(int(device.partition(":")[2])).synchronize()


def rate(batches: Iterable[Any], device: str, count: int, use: Callable[[Any], Any]) -> float:
    """Batches a second."""
    batches = iter(batches)
    for batch in itertools.islice(batches, 5):
        use(batch)
    synchronise(device)
    begun = time.perf_counter()
    for batch in itertools.islice(batches, count):
        use(batch)
    synchronise(device)
    return count / (time.perf_counter() - begun)


def bench_feed(compositor: Compositor, batch: int, samples: int) -> None:
    device, count = compositor.backend.name, max(1, samples // batch)
    for shuffle, reuse in itertools.product((True, False), (0, 1)):
        with stream(compositor, batch_size=batch, shuffle=shuffle, reuse=reuse) as batches:
            found = batch * rate(batches, device, count, lambda _: None)
        name = (
            f"uint8 NHWC, {'shuffled' if shuffle else 'in order'}, {'one ring of arrays' if reuse else 'new arrays'}"
        )
        print(f"{name:<60} {found:>14,.0f} samples/s", flush=True)
    for dtype in ("float32", "float16", "bfloat16"):
        conversion = Conversion("float NCHW", dtype=dtype, **IMAGENET)
        with stream(compositor, batch_size=batch) as batches:
            found = batch * rate(batches, device, count, conversion.arrays)
        print(f"{f'{dtype} NCHW, normalised, shuffled, new arrays':<60} {found:>14,.0f} samples/s", flush=True)


def bench_training(compositor: Compositor, batch: int, steps: int) -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from train_torch import UNet

    from gpufgbg.integrations.torch import StreamDataset

    device = compositor.backend.name
    data = StreamDataset(
        compositor, batch_size=batch, epochs=None, layout="float NCHW", as_tuple=True,
        **({} if device == "cpu" else {"device": device}), **IMAGENET,
    )  # fmt: skip
    network = UNet().to(device)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)

    def step(given: tuple[Any, Any]) -> None:
        images, masks = given
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(network(images), masks / 255)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    batches = iter(data)
    still = [rate(itertools.repeat(next(batches)), device, steps, step)]
    fed = [rate(batches, device, steps, step)]
    still.append(rate(itertools.repeat(next(batches)), device, steps, step))
    fed.append(rate(batches, device, steps, step))
    batches.close()
    for name, found in (("U-Net, one batch that stays", still), ("U-Net, fed by the stream", fed)):
        print(f"{name:<60} {batch * max(found):>14,.0f} samples/s", flush=True)
    print(f"{'of the time of a step, waiting and rendering':<60} {100 * (1 - max(fed) / max(still)):>14.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of the stream.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=200_000, help="of each rate")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200, help="of training; 0 for none")
    parser.add_argument("--training-batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="of the frame, a multiple of 4")
    given = parser.parse_args()
    recipe = Recipe(size=given.size, foreground_height=given.size * 105 // 224)
    with tempfile.TemporaryDirectory() as folder:
        compositor = Compositor(prepare(*write_sample_assets(folder, 6, 6), recipe=recipe), recipe, given.device)
    print(
        f"{len(compositor):,} samples of {given.size}x{given.size} on {compositor.backend.name}, batch {given.batch}"
    )
    bench_feed(compositor, given.batch, given.samples)
    if given.steps:
        bench_training(compositor, given.training_batch, given.steps)


if __name__ == "__main__":
    main()
