"""Depth maps of pictures: a network, the engine that runs it, and what is done before and after.

The original's way (docs/depth.md): a picture scaled to 0..1 and resized bilinearly to the network's input goes
through DenseDepth; d = clip(1000 / prediction, 10, 1000) / 1000; then per picture q = (d - min) / (max - min) and
grey = min(255, floor(256 q)). ``min`` and ``max``, in metres, are kept, so that a grey level leads back to metres.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.backends import check_device, why_cpu
from gpufgbg.backends.cuda import as_array, is_on_card
from gpufgbg.compositor import check_workers
from gpufgbg.depth.options import DepthOptions
from gpufgbg.depth.processing import NORMALISATIONS, Maps, are_clipped, postprocess, preprocess
from gpufgbg.depth.sources import DenseDepth, NetworkSource, open_source
from gpufgbg.exceptions import DeviceError, GpufgbgWarning, InputError, OptionError, printable
from gpufgbg.recipe import Recipe

__all__ = ["DepthMaps", "DepthModel"]


@dataclass(frozen=True)
class DepthMaps:
    """Depth of N pictures, in the model's memory (NumPy on the CPU, CuPy on a card), owned by the caller.

    Attributes
    ----------
    grey : (N, H, W) uint8
        Depth from 0, the nearest of the picture, to 255, the farthest.
    range : (N, 2) float32
        Least and greatest depth of each picture, in metres where the model gives metres.
    metres : (N, H, W) float32 or None
        Depth itself, where it was asked for.
    """

    grey: Any
    range: Any
    metres: Any


class DepthModel:
    """Predicts monocular depth with DenseDepth, with any model in ONNX, or with the built-in demo network.

    Parameters
    ----------
    weights : path, "demo" or DepthOptions
        A file of weights, or all options.
    size : int or (int, int)
        Width and height of the pictures in pixels; decides the network's input where the options don't.
    device : {"auto", "cpu", "cuda", "cuda:N"}
    workers : int, optional
        Threads of `predict` on the CPU, by default one a core.
    tell : callable, optional
        Called with a line of text when something takes minutes (building a TensorRT engine).

    Raises
    ------
    InputError
        The file can't be used.
    OptionError, DeviceError
        An option is out of range; or the device, TensorRT or ONNX Runtime is missing or out of memory.

    Warns
    -----
    GpufgbgWarning
        An engine can't be kept in the cache; or, once, depth maps are all flat for what the model's meaning clips.

    Examples
    --------
    >>> model = DepthModel("demo", size=224)           # doctest: +SKIP
    >>> maps = model.predict(batch.image)              # doctest: +SKIP
    >>> maps.grey.shape, maps.metres.dtype             # doctest: +SKIP
    ((8, 224, 224), dtype('float32'))
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | DepthOptions,
        size: int | tuple[int, int] = 224,
        device: str = "auto",
        workers: int | None = None,
        tell: Callable[[str], None] | None = None,
        source: NetworkSource | None = None,
    ) -> None:
        options = DepthOptions.of(weights)
        frame = Recipe(size=size, foreground_height=1).size  # type: ignore[arg-type]  # one number is square
        self.options = options
        self.workers = check_workers(workers)
        self.index = resolve(options, device)
        self.device = "cpu" if self.index is None else f"cuda:{self.index}"
        self.source = source or open_source(options, frame)
        self.engine = self._engine(tell)
        self._clipping = threading.Lock()  # taken by the one warning about it

    def _engine(self, tell: Callable[[str], None] | None) -> Any:
        options, batch = self.options, self.options.batch
        fixed = self.source.batch
        if batch is not None and fixed is not None and batch != fixed:
            raise OptionError("depth_batch", f"got {batch}, {printable(self.source.name)} takes {fixed}")
        if options.backend == "onnxruntime" or self.index is None:
            from gpufgbg.depth.engine_onnxruntime import OnnxRuntimeEngine

            runtime = OnnxRuntimeEngine(self.source, options.precision, batch, self.index)
            if runtime.on_cpu and self.index is not None and tell:
                tell("the depth network runs on the CPU, on all cores: for the card, install onnxruntime-gpu")
            return runtime
        import cupy

        from gpufgbg.depth.engine_tensorrt import BATCH, OutOfMemory, TensorRTEngine

        tried = fixed or batch or BATCH
        with cupy.cuda.Device(self.index):
            while True:
                try:
                    return TensorRTEngine(self.source, options.precision, tried, tell)
                except OutOfMemory:
                    cupy.get_default_memory_pool().free_all_blocks()
                    if tried == 1 or batch or fixed:
                        free, total = cupy.cuda.Device().mem_info
                        smaller = "" if tried == 1 or fixed else "choose a smaller --depth-batch, or "
                        raise DeviceError(
                            f"device {self.device}: out of memory: the depth engine for {tried} pictures at a time "
                            f"does not fit, {free >> 20:,} MB of {total >> 20:,} MB are free: {smaller}free some"
                        ) from None
                    tried //= 2
                    if tell:
                        tell(f"out of the card's memory: trying {tried} pictures at a time")

    @property
    def batch(self) -> int:
        """Pictures of one inference."""
        return int(self.engine.batch)

    def predict(self, images: Any, metres: bool = True) -> DepthMaps:
        """Depth maps of a batch of pictures.

        Parameters
        ----------
        images : (N, H, W, 3) uint8
            RGB: a NumPy array, an object with DLPack, or a list of pictures of one size. On a card: a CuPy array, or
            any object with ``__cuda_array_interface__`` or DLPack, is taken without a copy where it is contiguous;
            arrays in host memory are copied to the card. Runs on CuPy's current stream and waits for it once, to look
            for values that are no numbers.
        metres : bool
            Give float metres too, not grey levels alone.

        Returns
        -------
        DepthMaps

        Raises
        ------
        InputError
            Another shape or dtype, pictures of several sizes, images in a card's memory for a model on the CPU, or
            the network gives values that are no numbers.
        """
        if self.index is None:
            if is_on_card(images):
                raise InputError(
                    "images: got an array in a card's memory, expected one in host memory: device is cpu"
                )
            pictures = _checked(_one_array(images))
            if self.workers > 1 and len(pictures) > 1:
                step = max(self.batch, -(-len(pictures) // self.workers))
                cuts = [pictures[at : at + step] for at in range(0, len(pictures), step)]
                with ThreadPoolExecutor(self.workers) as pool:
                    parts = list(pool.map(lambda cut: self.maps(cut, metres), cuts))
                maps = _joined(parts)
            else:
                maps = self.maps(pictures, metres)
        else:
            import cupy

            with cupy.cuda.Device(self.index):
                pictures = _checked(cupy.asarray(_one_array(images)))
                maps = self.maps(cupy.ascontiguousarray(pictures), metres)
        self.check(maps.faults)
        self.warn_clipped(maps.range)
        return DepthMaps(maps.grey, maps.range, maps.metres)

    def maps(self, images: Any, metres: bool = False) -> Maps:
        """Like `predict`, without checks, threads or waiting: what pipelines call.

        Safe to call from many threads on the CPU, from one at a time on a card.
        """
        source, engine = self.source, self.engine
        parts = []
        for start in range(0, max(1, len(images)), engine.batch):
            part = images[start : start + engine.batch]
            inputs = self._inputs(images)
            self._preprocess(part, inputs[: len(part)])
            prediction = _as_maps(engine.infer(inputs), source)[: len(part)]
            parts.append(self._postprocess(prediction, images.shape[1:3], metres))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def predict_each(
        self, images: Sequence[Any], names: Sequence[str] | None = None
    ) -> list[tuple[npt.NDArray[np.uint8], tuple[float, float]]]:
        """Depth maps of pictures of any sizes, in host memory.

        Parameters
        ----------
        images : sequence of (H, W, 3) uint8
            RGB, NumPy.
        names : sequence of str, optional
            What messages call them.

        Returns
        -------
        list of ((H, W) uint8, (float, float))
            Grey levels, and the least and greatest depth, of each.

        Raises
        ------
        InputError
            As for `predict`.
        """
        each: list[tuple[npt.NDArray[np.uint8], tuple[float, float]]]
        if self.index is None:
            with ThreadPoolExecutor(self.workers) as pool:
                each_maps = list(pool.map(lambda image: self.maps(_checked(image[None])), images))
            for i, maps in enumerate(each_maps):
                self.check(maps.faults, i, names)
            each = [(maps.grey[0], tuple(maps.range[0].tolist())) for maps in each_maps]
            self.warn_clipped(np.array([depths for _, depths in each], np.float32).reshape(-1, 2))
            return each
        import cupy

        each = []
        with cupy.cuda.Device(self.index):
            for start in range(0, len(images), self.batch):
                part = [cupy.asarray(image[None]) for image in images[start : start + self.batch]]
                inputs = self._inputs(part[0])
                for i, image in enumerate(part):
                    self._preprocess(image, inputs[i : i + 1])
                prediction = _as_maps(self.engine.infer(inputs), self.source)
                for i, image in enumerate(part):
                    maps = self._postprocess(prediction[i : i + 1], image.shape[1:3], False)
                    self.check(maps.faults, start + i, names)
                    each.append((maps.grey[0].get(), tuple(maps.range[0].tolist())))
        self.warn_clipped(np.array([depths for _, depths in each], np.float32).reshape(-1, 2))
        return each

    def _inputs(self, like: Any) -> Any:
        """The engine's own input, or a new one beside ``like``."""
        own = getattr(self.engine, "images", None)
        return own if own is not None else _zeros(like, self.engine.input_shape, self.engine.dtype)

    def _preprocess(self, images: Any, inputs: Any) -> None:
        scale, bias = NORMALISATIONS[self.source.range]
        width, height = self.source.size
        layout = "NHWC" if self.source.channels_last else "NCHW"
        preprocess(images, (height, width), layout=layout, dtype=inputs.dtype, scale=scale, bias=bias, out=inputs)

    def _postprocess(self, prediction: Any, size: tuple[int, int], metres: bool) -> Maps:
        source = self.source
        return postprocess(prediction, size, meaning=source.meaning, scale=source.scale, metres=metres)

    def check(self, faults: Any, first: int = 0, names: Sequence[str] | None = None) -> None:
        """Raise `InputError` where a prediction has values that are no numbers.

        ``faults`` are those of pictures ``first`` and on, of which ``names`` may hold all names.
        """
        counts = faults if isinstance(faults, np.ndarray) else faults.get()
        bad = np.flatnonzero(counts)
        if len(bad):
            index = first + int(bad[0])
            name = f"picture {index}" if names is None else printable(names[index])
            hint = ""
            if self._half:
                known = self.source.precision == "fp16"  # the file's, which no option changes everywhere
                hint = f", or too large for fp16: {'export it in fp32' if known else 'try --depth-precision fp32'}"
            raise InputError(
                f"--depth {printable(self.source.name)}: {int(counts[bad[0]])} values of the prediction for {name} "
                f"are no numbers: the weights are damaged, or not meant for these options{hint}"
            )

    def warn_clipped(self, ranges: Any) -> None:
        """Warn, once, where the clip left nothing of a batch's depth: maps of these ``ranges`` are all flat.

        ``ranges`` (N, 2) float32, in any memory.
        """
        source = self.source
        if source.meaning != "inverse" or self._clipping.locked():
            return
        found = ranges if isinstance(ranges, np.ndarray) else ranges.get()
        if not are_clipped(found, source.scale) or not self._clipping.acquire(blocking=False):
            return
        advice = "the weights are damaged or not trained"
        if not isinstance(source, DenseDepth):
            advice = "for relative inverse depth (MiDaS, DPT, Depth Anything) use --depth-meaning disparity"
        warnings.warn(
            f"--depth {printable(source.name)}: all depth maps of a batch are flat: the predictions lie outside 1 to "
            f"100, to which --depth-meaning inverse clips them: {advice}",
            GpufgbgWarning,
            stacklevel=2,
        )

    @property
    def _half(self) -> bool:
        return bool(self.engine.description["precision"] == "fp16")

    def describe(self) -> dict[str, Any]:
        """What decides the maps but for the engine, as JSON values; goes into dataset.json."""
        return describe(self.options, self.source)


def resolve(options: DepthOptions, device: str) -> int | None:
    """The CUDA device's number, None for the CPU, where the options can be had there.

    Raises
    ------
    OptionError, DeviceError
        No such device, or the backend asked for is missing.
    """
    kind, _, number = check_device(device).partition(":")
    cuda = kind == "cuda" or (kind == "auto" and why_cpu(device) is None)
    if not cuda and options.backend == "tensorrt":
        raise DeviceError("--depth-backend tensorrt: needs a CUDA device: use --depth-backend onnxruntime")
    if not cuda:
        return None
    from gpufgbg.backends.cuda import why_not

    reason = why_not(int(number or 0))
    if reason is not None:
        raise DeviceError(f"device {device}: {reason}; or use device cpu")
    if options.backend != "onnxruntime":
        from gpufgbg.depth.engine_tensorrt import why_not as why_not_tensorrt

        missing = why_not_tensorrt()
        if missing is not None:
            raise DeviceError(f"--depth: {missing}")
    return int(number or 0)


def describe(options: DepthOptions, source: NetworkSource) -> dict[str, Any]:
    """What decides depth maps but for the engine, as JSON values."""
    return {
        "weights": source.name,
        "sha256": source.sha256,
        "input": options.input,
        "size": list(source.size),
        "upsampling": options.upsampling,
        "range": source.range,
        "meaning": source.meaning,
        "scale": source.scale,
    }


def _one_array(images: Any) -> Any:
    """Images of any kind as one array of NumPy or CuPy; `InputError` where they are of several shapes."""
    try:
        return as_array(images)
    except (ValueError, TypeError, BufferError) as error:  # ValueError: NumPy's for lists of several lengths
        shapes = sorted({np.shape(image) for image in images if hasattr(image, "shape")})
        if len(shapes) < 2:
            raise InputError(f"images: {printable(error)}, expected uint8 (N, H, W, 3)") from None
        raise InputError(
            f"images: got pictures of {len(shapes)} shapes, {shapes[0]} and {shapes[1]} among them, expected one: "
            "DepthModel.predict_each takes any"
        ) from None


def _checked(images: Any) -> Any:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise InputError(f"images: got {images.dtype} {images.shape}, expected uint8 (N, H, W, 3)")
    return images


def _zeros(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.zeros(shape, dtype)
    import cupy

    return cupy.zeros(shape, dtype)


def _as_maps(prediction: Any, source: NetworkSource) -> Any:
    """A network's output, (N, h, w), (N, 1, h, w) or (N, h, w, 1), as (N, h, w)."""
    if prediction.ndim == 4 and 1 in (prediction.shape[1], prediction.shape[3]):
        prediction = prediction[:, 0] if prediction.shape[1] == 1 else prediction[..., 0]
    if prediction.ndim != 3:
        raise InputError(
            f"--depth {printable(source.name)}: the output is {'x'.join(map(str, prediction.shape))}, expected one "
            "map a picture"
        )
    return prediction


def _joined(parts: list[Maps]) -> Maps:
    first = parts[0]
    if isinstance(first.grey, np.ndarray):
        join: Any = np.concatenate
    else:
        import cupy

        join = cupy.concatenate
    grey, ranges, faults = (join([getattr(part, name) for part in parts]) for name in ("grey", "range", "faults"))
    return Maps(grey, ranges, faults, None if first.metres is None else join([part.metres for part in parts]))
