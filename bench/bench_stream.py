"""The stream: samples a second into memory, normalised, and what a training loop waits for; a user's blend; leaks.

    python bench/bench_stream.py [--device cuda] [--only feed,training,blend,leaks] [--batch 512,4096]

Frames of 224x224 over built-in pictures. Rates are wall time with one wait for the device at the end, after warm-up.
What training waits for is the time of a loop over the stream less that of the same loop over one batch that stays,
so it has all that rendering takes from the card. Blends are timed by device events. Memory is the process's and, on
a card, what CuPy's pool has taken and what the driver says is in use, while batches go by.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from bench_cuda import Table, device_name, seconds_a_call

from gpufgbg import Blend, Compositor, Recipe, prepare, stream
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


def bench_feed(table: Table, compositor: Compositor, batch: int, samples: int) -> None:
    device, count = compositor.backend.name, max(1, samples // batch)
    for shuffle, reuse in itertools.product((True, False), (0, 1)):
        with stream(compositor, batch_size=batch, shuffle=shuffle, reuse=reuse) as batches:
            found = batch * rate(batches, device, count, lambda _: None)
        order, arrays = "shuffled" if shuffle else "in order", "one ring of arrays" if reuse else "new arrays"
        table.add(f"feed: uint8 NHWC, {order}, {arrays}, batch {batch:,}", f"{found:,.0f} samples/s")
    for dtype in ("float32", "float16", "bfloat16"):
        conversion = Conversion("float NCHW", dtype=dtype, **IMAGENET)
        with stream(compositor, batch_size=batch) as batches:
            found = batch * rate(batches, device, count, conversion.arrays)
        table.add(f"feed: {dtype} NCHW, normalised, shuffled, batch {batch:,}", f"{found:,.0f} samples/s")


def bench_training(table: Table, compositor: Compositor, batch: int, steps: int) -> None:
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
    for name, found in (("one batch that stays", still), ("fed by the stream", fed)):
        table.add(f"U-Net in bfloat16, {name}, batch {batch}", f"{batch * max(found):,.0f} samples/s")
    table.add("U-Net: waiting and rendering, of the time of a step", f"{100 * (1 - max(fed) / max(still)):.2f} %")


def feather(fg, bg, alpha, x, y):
    """A softer edge: what is half transparent gives way."""
    soft = alpha * alpha // 255
    return (fg * soft + bg * (255 - soft)) // 255


def multiply(fg, bg, alpha, x, y):
    return (bg * (255 - alpha) + fg * bg // 255 * alpha) // 255


def bench_blend(table: Table, plain: Compositor) -> None:
    count = 8000
    composites, masks = plain.backend.frames(count)
    starts = [k * 37_000 % (len(plain) - count) for k in range(5)]
    plans = [plain.plan.placements(np.arange(start, start + count)) for start in starts]
    builtin = 0.0
    for name, function in (("built-in alpha", None), ("feather", feather), ("multiply", multiply)):
        begun = time.perf_counter()
        blend = None if function is None else Blend(function)
        render = Compositor(plain.assets, plain.recipe, plain.backend.name, blend=blend).backend.render
        render(plans[0], composites, masks)
        synchronise(plain.backend.name)
        ready, turn = time.perf_counter() - begun, itertools.cycle(plans)
        took = seconds_a_call(lambda r=render, t=turn: r(next(t), composites, masks), 20)
        builtin = builtin or took
        remark = f"{took / builtin:.2f} times the built-in's time" + (f", compiled in {ready:.1f} s" if blend else "")
        table.add(f"blend: {name}, batch {count:,}", f"{count / took / 1e6:.2f} M pairs/s", remark)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def bench_leaks(table: Table, compositor: Compositor, count: int) -> None:
    def seen() -> str:
        if compositor.backend.name == "cpu":
            return f"{resident_mb():.1f} MB"
        import cupy

        synchronise(compositor.backend.name)
        free, total = cupy.cuda.runtime.memGetInfo()
        pool = cupy.get_default_memory_pool().total_bytes()
        return f"{resident_mb():.1f} MB; card: pool {pool / 1e6:.1f} MB, in use {(total - free) / 1e6:.1f} MB"

    with stream(compositor, batch_size=8) as batches:
        for at, _ in enumerate(batches, 1):
            if at in (count // 100, count // 10, count // 2, count):
                table.add(f"memory after {at:,} batches of 8", seen())
            if at == count:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of the stream.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default="feed,training,blend,leaks")
    parser.add_argument("--samples", type=int, default=200_000, help="of each rate of feeding")
    parser.add_argument("--batch", default="512", help="sizes of the batches that are fed, with commas")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--training-batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="of the frame, a multiple of 4")
    parser.add_argument("--leaks", type=int, default=2000, help="batches while memory is watched")
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    given = parser.parse_args()
    recipe = Recipe(size=given.size, foreground_height=given.size * 105 // 224)
    with tempfile.TemporaryDirectory() as folder:
        compositor = Compositor(prepare(*write_sample_assets(folder, 20, 40), recipe=recipe), recipe, given.device)
    on_card = compositor.backend.name != "cpu"
    machine = f"{device_name() if on_card else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    table = Table()
    table.add("samples", f"{len(compositor):,}", f"{given.size}x{given.size} on {compositor.backend.name}")
    only = given.only.split(",")
    if "feed" in only:
        for batch in given.batch.split(","):
            bench_feed(table, compositor, int(batch), given.samples)
    if "training" in only:
        bench_training(table, compositor, given.training_batch, given.steps)
    if "blend" in only and on_card:
        bench_blend(table, compositor)
    if "leaks" in only:
        bench_leaks(table, compositor, given.leaks)
    if given.out:
        command = f"{machine}, {date.today()}: `python bench/bench_stream.py {' '.join(sys.argv[1:])}`"
        given.out.write_text(table.markdown(command))


if __name__ == "__main__":
    main()
