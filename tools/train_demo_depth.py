"""Trains gpufgbg/depth/demo.onnx, the small depth network behind ``--depth demo``.

    python tools/train_demo_depth.py

Needs torch and onnx; onnxruntime, where it is there, checks the file. No weights or pictures are downloaded: the
network learns from the package's own street scenes (`gpufgbg.sample_assets`), whose depth is known, with figures
pasted at random places as the pipeline does and most of them saved as JPEG. It knows nothing but such scenes.

Training uses streets from 1000 on and figures 10 to 99; the demo's streets and figures, 0 to 9, are never seen, and
streets 10 to 39 choose the weights that are kept. The same options on the same machine give the same file.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from gpufgbg.recipe import Recipe
from gpufgbg.sample_assets import FAR_M, NEAR_M, draw_figure, draw_street

OUT = Path(__file__).parents[1] / "gpufgbg" / "depth" / "demo.onnx"
SIZE = 224  # pixels a side of the input; the output has half of it
DRAWN = 448  # pixels a side of the sample backgrounds, which preparation scales to SIZE
TRAIN_STREETS = 1000  # the first street of training
CHOOSING_STREETS = range(10, 40)
DEMO_STREETS = range(10)
TRAIN_FIGURES, DEMO_FIGURES = range(10, 100), range(10)  # `draw_figure` repeats itself after 100
FOCAL = 0.62 * SIZE  # pixels, of draw_street's camera
TALL_M = 1.7  # a figure's height in the world: each is taken for a grown-up, the dog and the cat too

DOC = (
    "gpufgbg's demo network: monocular depth, for trying the pipeline out only. Trained by "
    "tools/train_demo_depth.py on gpufgbg's procedural street scenes, on nothing else; on photographs its answer "
    "is a guess. Input: RGB, 0 to 1. Output: metres along the viewing axis, 1 to 80 (sky), at half the resolution."
)

# --------------------------------------------------------------------------- scenes


class Scene(NamedTuple):
    """A background with its depth, at the sizes that the network sees."""

    picture: Image.Image  # RGB, SIZE a side
    depth: NDArray[np.float32]  # (SIZE / 2, SIZE / 2), metres


class Sample(NamedTuple):
    """A composite, its true depth, and where the figure is."""

    picture: NDArray[np.uint8]  # (SIZE, SIZE, 3)
    depth: NDArray[np.float32]  # (SIZE / 2, SIZE / 2), metres
    figure: NDArray[np.bool_]  # (SIZE / 2, SIZE / 2)


def draw_scene(index: int) -> Scene:
    """Street ``index`` as preparation gives it, and its depth at the output's size."""
    picture, depth = draw_street(index, (DRAWN, DRAWN))
    small = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    # The median of each block: the surface that fills most of it, and no depths between two surfaces.
    side, step = SIZE // 2, DRAWN // (SIZE // 2)
    blocks = depth.reshape(side, step, side, step).swapaxes(1, 2).reshape(side, side, step * step)
    return Scene(small, np.partition(blocks, step * step // 2 - 1)[..., step * step // 2 - 1].copy())


def draw_scenes(indices: Sequence[int], workers: int) -> list[Scene]:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(draw_scene, indices, chunksize=8)


def paste(scene: Scene, figure: Image.Image, x: int, y: int) -> Sample:
    """The figure in front of the scene, with its top-left corner at (x, y)."""
    picture, cover = scene.picture.copy(), Image.new("L", (SIZE, SIZE))
    alpha = figure.getchannel("A")
    picture.paste(figure.convert("RGB"), (x, y), alpha)
    cover.paste(alpha, (x, y))
    inside = np.asarray(cover.reduce(2)) >= 128
    depth = scene.depth.copy()
    depth[inside] = FOCAL * TALL_M / figure.height
    return Sample(np.asarray(picture), depth, inside)


def through_jpeg(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a saved composite decodes to, with the default recipe."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=Recipe.quality, subsampling="4:2:0")
    return np.asarray(Image.open(file))


class Figures:
    """Figures to be pasted at random, on scenes that are flipped, recoloured and saved in part."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.figures = [Image.fromarray(draw_figure(index)) for index in indices]

    def on(self, scene: Scene, rng: np.random.Generator, vary: bool) -> Sample:
        """A sample; without ``vary`` as the demo makes it, with the default recipe."""
        if vary and rng.random() < 0.1:
            sample = Sample(np.asarray(scene.picture), scene.depth, np.zeros_like(scene.depth, bool))
        else:
            figure = self.figures[rng.integers(len(self.figures))]
            height = int(rng.integers(60, 141)) if vary and rng.random() < 0.4 else Recipe.foreground_height
            width = (2 * figure.width * height + figure.height) // (2 * figure.height)
            figure = figure.resize((width, height), Image.Resampling.LANCZOS)
            if rng.random() < 0.5:
                figure = ImageOps.mirror(figure)
            x, y = rng.integers(SIZE - width + 1), rng.integers(SIZE - height + 1)
            sample = paste(scene, figure, int(x), int(y))
        picture = sample.picture
        if vary and rng.random() < 0.5:
            gain, gamma = rng.uniform(0.85, 1.15, 3), rng.uniform(0.8, 1.25)
            curve = 255.0 * (np.arange(256)[:, None] / 255.0) ** gamma * gain
            table = np.rint(curve.clip(0.0, 255.0)).astype(np.uint8)
            picture = np.stack([table[picture[..., c], c] for c in range(3)], axis=-1)
        if not vary or rng.random() < 0.75:
            picture = through_jpeg(picture)
        if vary and rng.random() < 0.5:
            return Sample(picture[:, ::-1], sample.depth[:, ::-1], sample.figure[:, ::-1])
        return Sample(picture, sample.depth, sample.figure)


def as_tensors(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, SIZE, SIZE) from 0 to 1, and the logarithms of their depths (N, 1, SIZE / 2, SIZE / 2)."""
    pictures = torch.from_numpy(np.stack([s.picture for s in samples])).permute(0, 3, 1, 2)
    depths = torch.from_numpy(np.stack([s.depth for s in samples]))
    return pictures.float() / 255.0, depths.log()[:, None]


# --------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Layer:
    """A convolution over the concatenated inputs; those marked ``^`` are first enlarged to twice their size."""

    name: str  # names end in the pixels a side of what they give
    inputs: tuple[str, ...]
    width: int
    kernel: int = 3
    stride: int = 1
    place: int = 0  # side of a learned map that is added: what a scene looks like there, on the whole


# The one description that both the trained and the exported network follow.
LAYERS = (
    Layer("shrink_112", ("image",), 16, stride=2),
    Layer("shrink_56", ("shrink_112",), 24, stride=2),
    Layer("see_56", ("shrink_56",), 24),
    Layer("shrink_28", ("see_56",), 32, stride=2),
    Layer("see_28", ("shrink_28",), 32),
    Layer("shrink_14", ("see_28",), 48, stride=2),
    Layer("see_14", ("shrink_14",), 48),
    Layer("shrink_7", ("see_14",), 64, stride=2, place=7),
    Layer("see_7", ("shrink_7",), 64, kernel=1),
    Layer("grow_14", ("see_7^", "see_14"), 32),
    Layer("grow_28", ("grow_14^", "see_28"), 24),
    Layer("grow_56", ("grow_28^", "see_56"), 20),
    Layer("grow_112", ("grow_56^", "shrink_112"), 16),
    Layer("smooth_112", ("grow_112",), 16),
)
HEAD = Layer("log_metres", ("smooth_112",), 1)
LOG_LOW, LOG_HIGH = math.log(NEAR_M), math.log(FAR_M)


def widths_in() -> dict[str, int]:
    """The number of channels that each layer reads."""
    widths = {"image": 3} | {layer.name: layer.width for layer in LAYERS}
    return {layer.name: sum(widths[name.rstrip("^")] for name in layer.inputs) for layer in (*LAYERS, HEAD)}


class Network(nn.Module):
    """The network as it is trained; gives the logarithm of the depth in metres."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions, self.norms, self.places = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        reads = widths_in()
        for layer in (*LAYERS, HEAD):
            self.convolutions[layer.name] = nn.Conv2d(
                reads[layer.name], layer.width, layer.kernel, layer.stride, layer.kernel // 2, bias=layer is HEAD
            )
            if layer is not HEAD:
                self.norms[layer.name] = nn.BatchNorm2d(layer.width)
            if layer.place:
                self.places[layer.name] = nn.Parameter(torch.zeros(1, layer.width, layer.place, layer.place))
        nn.init.constant_(self.convolutions[HEAD.name].bias, math.log(10.0))

    def forward(self, pictures: Tensor) -> Tensor:
        values = {"image": pictures}
        for layer in (*LAYERS, HEAD):
            parts = [
                functional.interpolate(values[name[:-1]], scale_factor=2) if name[-1] == "^" else values[name]
                for name in layer.inputs
            ]
            value = self.convolutions[layer.name](torch.cat(parts, 1) if len(parts) > 1 else parts[0])
            if layer is HEAD:
                return value
            value = self.norms[layer.name](value)
            if layer.place:
                value = value + self.places[layer.name]
            values[layer.name] = functional.relu(value)
        raise AssertionError("the head comes last")

    def metres(self, pictures: Tensor) -> NDArray[np.float32]:
        """Depths (N, SIZE / 2, SIZE / 2) in metres, as the exported network gives them."""
        self.eval()
        with torch.no_grad():
            parts = [self(part).clamp(LOG_LOW, LOG_HIGH).exp()[:, 0] for part in pictures.split(16)]
        return torch.cat(parts).numpy()


def to_onnx(network: Network, notes: dict[str, str]) -> onnx.ModelProto:
    """The trained network with its batch norms folded, written out node by node."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []

    def keep(name: str, values: Tensor | NDArray[np.float32]) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
        return name

    def node(operation: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operation, inputs, [output], name=f"{output}/{operation}", **attributes))
        return output

    scales = keep("twice", np.array([1, 1, 2, 2], np.float32))
    for layer in (*LAYERS, HEAD):
        parts = []
        for name in layer.inputs:
            if name[-1] == "^":
                name = node(
                    "Resize", [name[:-1], "", scales], f"{layer.name}.enlarged", mode="nearest",
                    coordinate_transformation_mode="asymmetric", nearest_mode="floor",
                )  # fmt: skip
            parts.append(name)
        value = parts[0] if len(parts) == 1 else node("Concat", parts, f"{layer.name}.joined", axis=1)
        convolution = network.convolutions[layer.name]
        weight, bias = convolution.weight.detach().double(), convolution.bias
        if layer is not HEAD:
            norm = network.norms[layer.name]
            gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * gain[:, None, None, None]
            bias = norm.bias.detach().double() - norm.running_mean.double() * gain
        weights = [keep(f"{layer.name}.weight", weight), keep(f"{layer.name}.bias", bias.detach())]
        pad, output = [layer.kernel // 2] * 4, layer.name if layer is HEAD else f"{layer.name}.sum"
        shape = {"kernel_shape": [layer.kernel] * 2, "strides": [layer.stride] * 2, "pads": pad}
        value = node("Conv", [value, *weights], output, **shape)
        if layer.place:
            place = keep(f"{layer.name}.place", network.places[layer.name].detach())
            value = node("Add", [value, place], f"{layer.name}.placed")
        if layer is not HEAD:
            node("Relu", [value], layer.name)
    bounds = [keep("log_near", np.array(LOG_LOW)), keep("log_far", np.array(LOG_HIGH))]
    node("Clip", [HEAD.name, *bounds], "log_metres.bounded")
    node("Exp", ["log_metres.bounded"], "depth")

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE], "RGB, 0 to 1")
    depth = helper.make_tensor_value_info("depth", TensorProto.FLOAT, ["batch", 1, SIZE // 2, SIZE // 2], "metres")
    graph = helper.make_graph(nodes, "gpufgbg_demo_depth", [image], [depth], tensors, doc_string=DOC)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, producer_name="gpufgbg", doc_string=DOC)
    model.ir_version = 8  # the one of opset 17: older importers refuse newer ones
    helper.set_model_props(model, {"range": "unit", "meaning": "metres", **notes})
    onnx.checker.check_model(model, full_check=True)
    return model


def multiply_adds() -> int:
    """Of one picture, convolutions only."""
    reads = widths_in()
    sides = [int(layer.name.rpartition("_")[2]) for layer in LAYERS] + [SIZE // 2]
    return sum(
        side * side * layer.kernel**2 * reads[layer.name] * layer.width
        for side, layer in zip(sides, (*LAYERS, HEAD), strict=True)
    )


# --------------------------------------------------------------------------- training


class Errors(NamedTuple):
    """How far predictions are from the truth."""

    relative: float  # mean of |prediction - truth| / truth
    close: float  # share of pixels with max(prediction / truth, truth / prediction) < 1.25

    def __str__(self) -> str:
        return f"relative error {self.relative:.4f}, within 1.25x {self.close:.4f}"


def errors(prediction: NDArray[np.float32], truth: NDArray[np.float32]) -> Errors:
    ratio = np.maximum(prediction / truth, truth / prediction)
    return Errors(float((np.abs(prediction - truth) / truth).mean()), float((ratio < 1.25).mean()))


def loss_of(prediction: Tensor, truth: Tensor) -> Tensor:
    """L1 of the logarithms, and of their slopes at three scales, which keeps edges sharp and surfaces even."""
    difference = prediction - truth
    loss = difference.abs().mean()
    for _ in range(3):
        loss = loss + 0.5 * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())
        difference = functional.avg_pool2d(difference, 2)
    return loss


def batches(
    scenes: Sequence[Scene], figures: Figures, size: int, count: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random samples; the next ones are made while one is in use."""

    def make(step: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((seed, step))
        return as_tensors([figures.on(scenes[rng.integers(len(scenes))], rng, vary=True) for _ in range(size)])

    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(make, step) for step in range(min(2, count)))
        for step in range(2, count + 2):
            batch = ahead.popleft().result()
            if step < count:
                ahead.append(pool.submit(make, step))
            yield batch


def train(network: Network, scenes: Sequence[Scene], choosing: Sequence[Sample], options: argparse.Namespace) -> None:
    """Trains until the steps or the minutes are over or Ctrl-C; leaves the best weights in the network."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps, pct_start=0.08)
    pictures, truth = as_tensors(choosing)[0], np.stack([s.depth for s in choosing])
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    training = batches(scenes, Figures(TRAIN_FIGURES), options.batch, options.steps, options.seed)
    best, kept, total, start = math.inf, {}, 0.0, time.monotonic()
    try:
        for step, (inputs, targets) in enumerate(training, 1):
            network.train()
            loss = loss_of(network(inputs.contiguous(memory_format=torch.channels_last)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            late = time.monotonic() - start > 60 * options.minutes
            if step % options.every == 0 or step == options.steps or late:
                found = errors(network.metres(pictures), truth)
                if found.relative < best:
                    best = found.relative
                    kept = {name: value.clone() for name, value in network.state_dict().items()}
                minutes = (time.monotonic() - start) / 60
                loss_mean = total / ((step - 1) % options.every + 1)
                print(f"{minutes:5.1f} min  step {step}/{options.steps}  loss {loss_mean:.4f}  {found}", flush=True)
                total = 0.0
            if late:
                print("out of time: the best weights so far are kept")
                break
    except KeyboardInterrupt:
        print("stopped: the best weights so far are kept")
    if kept:
        network.load_state_dict(kept)


def picture_of(samples: Sequence[Sample], depths: NDArray[np.float32]) -> Image.Image:
    """Rows of composite, true depth and predicted depth; near is light."""

    def shade(depth: NDArray[np.float32]) -> Image.Image:
        grey = 255.0 * (1.0 - np.log(depth / NEAR_M) / math.log(FAR_M / NEAR_M))
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
        return image.resize((SIZE, SIZE), Image.Resampling.NEAREST).convert("RGB")

    sheet = Image.new("RGB", (3 * SIZE, len(samples) * SIZE))
    for row, (sample, depth) in enumerate(zip(samples, depths, strict=True)):
        for column, image in enumerate((Image.fromarray(sample.picture), shade(sample.depth), shade(depth))):
            sheet.paste(image, (column * SIZE, row * SIZE))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (default: the package's own)")
    parser.add_argument("--picture", type=Path, help="also write a picture: composite, truth, prediction")
    parser.add_argument("--scenes", type=int, default=1500, help="streets to train on (default: 1500)")
    parser.add_argument("--steps", type=int, default=2000, help="batches (default: 2000)")
    parser.add_argument("--batch", type=int, default=16, help="samples a batch (default: 16)")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate (default: 4e-3)")
    parser.add_argument("--every", type=int, default=250, help="steps between two validations (default: 250)")
    parser.add_argument("--minutes", type=float, default=25.0, help="stop training after this time (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use (default: 2)")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    train_streets = range(TRAIN_STREETS, TRAIN_STREETS + options.scenes)
    scenes = draw_scenes([*DEMO_STREETS, *CHOOSING_STREETS, *train_streets], options.threads)
    demo, choosing, training = scenes[:10], scenes[10:40], scenes[40:]
    print(f"{len(scenes)} scenes drawn in {time.monotonic() - start:.0f} s", flush=True)

    figures = Figures(DEMO_FIGURES)

    def fixed(scenes: Sequence[Scene], each: int) -> list[Sample]:
        rng = np.random.default_rng(options.seed)
        return [figures.on(scene, rng, vary=False) for scene in scenes for _ in range(each)]

    network = Network().to(memory_format=torch.channels_last)
    train(network, training, fixed(choosing, 2), options)

    samples = fixed(demo, 10)
    pictures, truth = as_tensors(samples)[0], np.stack([s.depth for s in samples])
    figure = np.stack([s.figure for s in samples])
    depths = network.metres(pictures)
    found = errors(depths, truth)
    print(f"demo's streets:  {found}")
    sky = truth == FAR_M
    for name, part in (("figures", figure), ("sky", sky), ("the rest", ~figure & ~sky)):
        print(f"  {name}: {errors(depths[part], truth[part])}")
    notes = {"relative_error": f"{found.relative:.4f}", "within_1.25": f"{found.close:.4f}"}
    model = to_onnx(network, notes)
    data = model.SerializeToString()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(data)
    weights = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    print(f"{options.out}: {len(data):,} bytes, {weights:,} weights, {multiply_adds() / 1e6:.0f} M multiply-adds")
    if options.picture:
        picture_of(samples[:80:11], depths[:80:11]).save(options.picture)

    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (again,) = session.run(None, {"image": pictures[:16].numpy()})
    ratio = np.maximum(again[:, 0] / depths[:16], depths[:16] / again[:, 0])
    print(f"ONNX Runtime gives the same to {100 * (ratio.max() - 1):.4f} %")


if __name__ == "__main__":
    main()
