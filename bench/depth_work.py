"""The work of depth: pictures to grey depth maps, the network and what is done before and after it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import densedepth
import numpy as np
from contenders import EVENTS, HOST, Contender, Job, Offer, Tolerance, Unsupported
from rivals.pytorch import torch_missing
from settings import Settings
from work import compared, compositor_on, host, rotating

from gpufgbg import DepthModel, DepthOptions
from gpufgbg.compositor import default_workers
from gpufgbg.depth.sources import DenseDepth

__all__ = ["CONTENDERS", "DepthWork"]

JUDGED = 4  # pictures
METRES = 10.0  # of depth 1


@lru_cache
def _weights(settings: Settings) -> Path:
    path = settings.work / "densedepth.h5"
    return path if path.is_file() else densedepth.write_weights(path)


@lru_cache
def _source(settings: Settings, frame: tuple[int, int]) -> DenseDepth:
    return DenseDepth(_weights(settings), DepthOptions(str(_weights(settings))), frame)


@lru_cache
def _judge(settings: Settings, frame: tuple[int, int]) -> DepthModel:
    return DepthModel(DepthOptions(str(_weights(settings))), frame, "cpu", source=_source(settings, frame))


class DepthWork:
    """uint8 pictures (N, H, W, 3) in the device's memory to their uint8 depth maps (N, H, W), by DenseDepth."""

    def __init__(self, settings: Settings, device: str, count: int, side: int) -> None:
        self.settings = settings
        self.device = device
        self.count = count
        self.side = side
        self.frame = side // 2, side // 2
        self.turns = rotating(settings, device, count * 3 * (side // 2) ** 2, most=16)
        compositor = compositor_on(settings, device)
        self.batches = []
        for turn in range(self.turns):
            batch = compositor.render((np.arange(count) * 7919 + turn * 37_003) % len(compositor)).image
            self.batches.append(batch[:, : self.frame[1], : self.frame[0]].copy())

    @property
    def weights(self) -> Path:
        """The network's file."""
        return _weights(self.settings)

    def source(self) -> DenseDepth:
        """The network as gpufgbg reads it."""
        return _source(self.settings, self.frame)

    def needs(self, device: str) -> dict[str, float]:
        """The network's arithmetic."""
        limit = "fp16 matrix product" if device == "cuda" else "host fp32 matrix product"
        return {limit: self.count * densedepth.flop((self.side, self.side))}

    def check(self, job: Job, turn: int) -> str:
        """Judge some maps of a batch against ONNX Runtime in fp32 on the CPU."""
        pictures = host(self.batches[turn][:JUDGED])
        found = host(job.output(turn))[:JUDGED]
        said = compared(found, self._reference(pictures), job.tolerance, "depth maps")
        return f"against ONNX Runtime fp32, {len(pictures)} pictures: {said}"

    def _reference(self, pictures: np.ndarray) -> np.ndarray:
        """The maps, which are kept: an interpreter with TensorRT may have no ONNX Runtime."""
        name = hashlib.sha256(pictures.tobytes() + self.source().sha256.encode()).hexdigest()[:16]
        path = self.settings.keep / f"depth_reference_{self.side}_{name}.npy"
        if not path.is_file():
            try:
                import onnxruntime  # noqa: F401  # told apart from other failures
            except ImportError:
                raise Unsupported(
                    f"no reference to judge by: run --only depth with the same --out in a Python that has ONNX "
                    f"Runtime first ({path.name})"
                ) from None
            np.save(path, _judge(self.settings, self.frame).predict(pictures).grey)
        return np.load(path)


def ours(work: DepthWork, device: str, workers: int) -> Job:
    """`DepthModel`: TensorRT in fp16 on a card, ONNX Runtime in fp32 on the CPU, a thread a core."""
    batch = None if device == "cpu" else work.count
    options = DepthOptions(str(work.weights), batch=batch)
    source = work.source()
    model = DepthModel(options, work.frame, device, tell=lambda text: print(text, flush=True), source=source)
    if device == "cpu":
        return Job(
            lambda turn: model.predict(work.batches[turn], metres=False),
            lambda turn: model.predict(work.batches[turn], metres=False).grey,
        )
    return Job(
        lambda turn: model.maps(work.batches[turn]), lambda turn: model.maps(work.batches[turn]).grey, EVENTS,
        tolerance=Tolerance(12, 1.5, "fp16"),
    )  # fmt: skip


def _no_runtime(device: str) -> str | None:
    if device == "cpu":
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return f"ONNX Runtime can't be imported ({error}): pip install 'gpufgbg[depth]'"
        return None
    from gpufgbg.depth.engine_tensorrt import why_not

    return why_not()


def onnx_runtime(work: DepthWork, device: str, workers: int) -> Job:
    """One session with all cores, or CUDA, a whole batch a run; before and after it, NumPy."""
    import onnxruntime

    precision = "fp32" if device == "cpu" else "fp16"
    provider: Any = "CPUExecutionProvider"
    if device != "cpu":
        provider = ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2])})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_workers()
    session = onnxruntime.InferenceSession(
        work.source().graph(work.count, precision).SerializeToString(), options, [provider]
    )
    dtype = np.float32 if precision == "fp32" else np.float16

    def maps(turn: int) -> np.ndarray:
        from PIL import Image

        pictures = host(work.batches[turn])
        size = (work.side, work.side)
        doubled = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BILINEAR)) for p in pictures])
        given = np.ascontiguousarray((doubled / np.float32(255)).transpose(0, 3, 1, 2).astype(dtype))
        return _grey(session.run(None, {"image": given})[0][:, 0].astype(np.float32), np)

    note = "the network in ONNX Runtime's CUDA provider, pictures through the host" if device != "cpu" else ""
    return Job(maps, maps, HOST, note, Tolerance(24, 2.0, "rounded before the network"))


def _no_cuda_provider(device: str) -> str | None:
    import onnxruntime

    if device == "cpu" or "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return "this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu"


def _grey(prediction: Any, xp: Any) -> Any:
    """DenseDepth's inverse depth as grey levels, each picture over its own range; NumPy or PyTorch."""
    depth = (1000 / prediction).clip(10, 1000) / 1000
    flat = depth.reshape(len(depth), -1)
    low, high = (getattr(xp, name)(flat, 1)[:, None, None] for name in ("amin", "amax"))
    grey = ((depth - low) / (high - low) * 256).clip(0, 255)
    return grey.astype(np.uint8) if xp is np else grey.to(xp.uint8)


def _pytorch(work: DepthWork, device: str, *, compiled: bool) -> Job:
    import torch
    from torch.nn import functional

    kind = device.partition(":")[0]
    dtype = torch.float32 if kind == "cpu" else torch.float16
    # Tensor cores want channels last; on the CPU that form is the slower one.
    form = torch.contiguous_format if kind == "cpu" else torch.channels_last
    network = densedepth.torch_module(work.source().weights).to(device, dtype, memory_format=form)
    if compiled:
        network = torch.compile(network)
    batches = [torch.from_numpy(b) if kind == "cpu" else torch.from_dlpack(b) for b in work.batches]

    @torch.inference_mode()
    def maps(turn: int) -> Any:
        pictures = batches[turn].permute(0, 3, 1, 2).to(dtype) / 255
        doubled = functional.interpolate(pictures, scale_factor=2, mode="bilinear", align_corners=False)
        prediction = network(doubled.contiguous(memory_format=form))
        return _grey(prediction[:, 0].float(), torch)

    tolerance = Tolerance(24, 2.0, "edges resized otherwise" + ("" if kind == "cpu" else ", fp16"))
    return Job(maps, maps, HOST if kind == "cpu" else EVENTS, tolerance=tolerance)


def pytorch(work: DepthWork, device: str, workers: int) -> Job:
    """Eager."""
    return _pytorch(work, device, compiled=False)


def pytorch_compiled(work: DepthWork, device: str, workers: int) -> Job:
    """`torch.compile`."""
    return _pytorch(work, device, compiled=True)


_BOTH = ("cpu", "cuda")
CONTENDERS = (
    Contender(
        "gpufgbg", (), "gpufgbg", {"depth": (Offer(ours, _BOTH, all_cores=True, missing=_no_runtime),)}, ours=True
    ),
    Contender(
        "ONNX Runtime", ("onnxruntime", "onnx"), "'gpufgbg[depth]'",
        {"depth": (Offer(onnx_runtime, all_cores=True), Offer(onnx_runtime, ("cuda",), missing=_no_cuda_provider))},
    ),
    Contender(
        "PyTorch", ("torch",), "torch",
        {
            "depth": (
                Offer(pytorch, _BOTH, all_cores=True, variant="eager", missing=torch_missing),
                Offer(pytorch_compiled, ("cuda",), variant="compiled", compiled=True, missing=torch_missing),
            )
        },
    ),
)  # fmt: skip
