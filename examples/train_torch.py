"""Train a small U-Net in PyTorch to find the foreground, on samples that are made while it trains.

    python examples/train_torch.py [DATASET] --steps=50 --device=cuda

DATASET is a data set made by gpufgbg; without one, a few pictures are drawn first.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from torch import nn

from gpufgbg import Compositor, Recipe, prepare
from gpufgbg.integrations.torch import StreamDataset
from gpufgbg.sample_assets import write_sample_assets


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


class UNet(nn.Module):
    """(N, 3, H, W) to (N, H, W) logits; H and W are multiples of 4."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.rise, self.top = block(6 * width, 2 * width), block(3 * width, width)
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.first(images)
        second = self.second(nn.functional.max_pool2d(first, 2))
        bottom = self.bottom(nn.functional.max_pool2d(second, 2))
        rise = self.rise(torch.cat([second, nn.functional.interpolate(bottom, scale_factor=2)], 1))
        return self.last(self.top(torch.cat([first, nn.functional.interpolate(rise, scale_factor=2)], 1)))[:, 0]


def drawn(device: str) -> tuple[Compositor, dict[str, tuple[float, ...]]]:
    """Samples over built-in pictures, and the mean and std of some of them."""
    recipe = Recipe(size=128, foreground_height=64)
    with tempfile.TemporaryDirectory() as folder:
        compositor = Compositor(prepare(*write_sample_assets(folder, 3, 4), recipe=recipe), recipe, device)
    known = compositor.render(range(0, len(compositor), 3)).moments["composite"]
    return compositor, {"mean": known.mean, "std": known.std}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small U-Net on the stream.")
    parser.add_argument("dataset", nargs="?", help="folder of a data set made by gpufgbg")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    source, statistics = (given.dataset, {}) if given.dataset else drawn(given.device)

    torch.manual_seed(0)
    device = {} if isinstance(source, Compositor) else {"device": given.device}
    data = StreamDataset(
        source, batch_size=given.batch, epochs=None, layout="float NCHW", as_tuple=True, **statistics, **device
    )
    network = UNet().to(given.device)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    batches, waited, begun = iter(data), 0.0, time.perf_counter()
    for step in range(given.steps):
        asked = time.perf_counter()
        images, masks = next(batches)
        waited += time.perf_counter() - asked
        loss = nn.functional.binary_cross_entropy_with_logits(network(images), masks / 255)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == given.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    batches.close()
    seconds = time.perf_counter() - begun
    print(f"{given.steps * given.batch / seconds:.0f} samples/s, {100 * waited / seconds:.1f} % of the time waiting")


if __name__ == "__main__":
    main()
