"""Batches as JAX arrays: normalise in the jitted step, and find how much of a picture its foreground covers.

    python examples/jax_batches.py [DATASET] --steps=10 --device=cpu

DATASET is a data set made by gpufgbg; without one, a few pictures are drawn first.
"""

from __future__ import annotations

import argparse
import tempfile

import jax
import jax.numpy as jnp

from gpufgbg import Compositor, Recipe, prepare
from gpufgbg.integrations.jax import JaxStream
from gpufgbg.sample_assets import write_sample_assets


def drawn(device: str) -> Compositor:
    """Samples over built-in pictures."""
    recipe = Recipe(size=128, foreground_height=64)
    with tempfile.TemporaryDirectory() as folder:
        return Compositor(prepare(*write_sample_assets(folder, 2, 3), recipe=recipe), recipe, device)


@jax.jit
def step(image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    pixels = image.astype(jnp.float32) / 255
    cover = (mask > 127).mean(axis=(1, 2))
    return pixels.mean(axis=(0, 1, 2)), cover.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description="Batches of the stream as JAX arrays.")
    parser.add_argument("dataset", nargs="?", help="folder of a data set made by gpufgbg")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = {"device": given.device} if given.dataset else {}
    with JaxStream(given.dataset or drawn(given.device), batch_size=given.batch, **device) as batches:
        for k in range(given.steps):
            batch = next(batches)
            colour, cover = step(batch["image"], batch["mask"])
            shown = " ".join(f"{value:.3f}" for value in colour.tolist())
            print(f"batch {k}: mean colour {shown}, foregrounds cover {100 * cover:.1f} %")
    print("state:", batches.state_dict())


if __name__ == "__main__":
    main()
