"""Runs a network with TensorRT, on the caller's stream and in CuPy's memory; one code for TensorRT 8.6, 10 and 11.

Building an engine takes minutes, so engines are kept in the user's cache folder (``$GPUFGBG_CACHE``, else
``$XDG_CACHE_HOME/gpufgbg``, else ``~/.cache/gpufgbg``), under a key of everything that matters: the network and its
weights, the graph's version, the card, TensorRT's version, precision, batch and size. A file holds one line of JSON
(its key's content and the engine's checksum) and the engine; one that is not exactly what was asked for is built
again.

Run so far: 8.6. What 10 and 11 want otherwise (strong typing, no flag for the explicit batch, `IProgressMonitor`, the
memory's allocation strategy) is written from their documentation and marked "10+"; it has not been run yet.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from gpufgbg.depth.sources import NetworkSource, check_output, key_of
from gpufgbg.exceptions import DeviceError, GpufgbgWarning, InputError, OptionError, printable
from gpufgbg.files import write_atomic

__all__ = ["TensorRTEngine", "cache_folder", "why_not"]

Tell = Callable[[str], None]

BATCH = 64
_SETTINGS = 1  # part of the key: raise it with every change of how engines are built
_LEVEL = 2  # builder optimisation level: 4 takes half as long again and was not faster
_WORKSPACE_BYTES = 512 << 20
_HEADER_BYTES = 1 << 16
_TELL_EVERY_S = 5.0


def why_not() -> str | None:
    """What keeps this machine from TensorRT, with what to do; None where nothing does."""
    try:
        import tensorrt
    except ImportError:
        return (
            "TensorRT is not installed: pip install 'gpufgbg[tensorrt]', or use --depth-backend onnxruntime, which "
            "works everywhere and is slower"
        )
    major, minor = _version(tensorrt)
    if (major, minor) < (8, 6):
        return f"TensorRT {tensorrt.__version__} is too old, expected 8.6 or newer: pip install 'gpufgbg[tensorrt]'"
    return None


def cache_folder() -> Path:
    """Where engines are kept."""
    own = os.environ.get("GPUFGBG_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpufgbg"


def _version(tensorrt: Any) -> tuple[int, int]:
    major, minor = tensorrt.__version__.split(".")[:2]
    return int(major), int(minor)


class TensorRTEngine:
    """A network in TensorRT, on the current CUDA device.

    Parameters
    ----------
    source : NetworkSource
    precision : {"fp16", "fp32"}, optional
        By default fp16; from TensorRT 11 on the file's own where it has one.
    batch : int, optional
        Pictures of one inference, by default what the file fixes, or 64.
    tell : callable, optional
        Called with a line of text while an engine is built, and where it is slower than it could be.

    Attributes
    ----------
    batch : int
    input_shape : tuple of int
    dtype : numpy.dtype
        Of the input.
    description : dict
        What made the predictions, as JSON values.
    built : bool
        Whether the engine was built now, instead of found in the cache.

    Raises
    ------
    DeviceError
        TensorRT is missing, or the card's memory does not suffice.
    InputError
        TensorRT can't import the network.
    OptionError
        The network has another precision, which TensorRT 11 can't change.
    """

    def __init__(
        self,
        source: NetworkSource,
        precision: str | None = None,
        batch: int | None = None,
        tell: Tell | None = None,
    ) -> None:
        reason = why_not()
        if reason is not None:
            raise DeviceError(f"--depth: {reason}")
        import cupy
        import tensorrt

        self.batch = source.batch or batch or BATCH
        precision = _precision(source, precision, tell)
        device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self.description = {
            "backend": "tensorrt",
            "version": tensorrt.__version__,
            "device": device["name"].decode(),
            "precision": precision,
            "batch": self.batch,
        }
        key = {
            **source.identity(),
            **self.description,
            "compute_capability": [device["major"], device["minor"]],
            "multiprocessors": device["multiProcessorCount"],
            "settings": _SETTINGS,
        }
        self._logger, self._messages = _logging()
        self._runtime = tensorrt.Runtime(self._logger)
        self.built = False
        self._engine = self._load_or_build(source, precision, key, tell)
        self._prepare(source)

    # -- the cache --------------------------------------------------------------------------------------

    def _load_or_build(self, source: NetworkSource, precision: str, key: dict[str, Any], tell: Tell | None) -> Any:
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(source.name).stem)[:40]
        path = cache_folder() / f"{stem}-{key_of(key)}.engine"
        engine = self._load(path, key)
        if engine is not None:
            return engine
        lock: Any = FileLock(path.with_suffix(".lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _wait_for(lock, tell)
        except OSError as error:
            self._warn_unkept(path, error)
            lock = None
        try:
            engine = self._load(path, key)  # another process may have built it meanwhile
            if engine is not None:
                return engine
            plan = self._build(source, precision, key, tell)
            if lock is not None:
                try:
                    write_atomic(path, _header(key, plan) + plan)
                except OSError as error:
                    self._warn_unkept(path, error)
        finally:
            if lock is not None:
                lock.release()
        self.built = True
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise DeviceError(f"--depth: the engine can't be loaded: {self._messages.last()}")
        return engine

    def _warn_unkept(self, path: Path, error: OSError) -> None:
        warnings.warn(
            f"the depth engine can't be kept in {printable(path.parent)} ({error.strerror or error}) and is built "
            "again next time: make the folder writable or set GPUFGBG_CACHE to another",
            GpufgbgWarning,
            stacklevel=2,
        )

    def _load(self, path: Path, key: dict[str, Any]) -> Any:
        """The engine of the file if it is whole, and the one that the key describes; else None."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        head, _, plan = data[:_HEADER_BYTES].partition(b"\n")
        plan = data[len(head) + 1 :]
        if head + b"\n" != _header(key, plan):
            return None
        return self._runtime.deserialize_cuda_engine(plan)

    # -- building ---------------------------------------------------------------------------------------

    def _build(self, source: NetworkSource, precision: str, key: dict[str, Any], tell: Tell | None) -> bytes:
        import tensorrt as trt

        typed = source.typed(precision)
        model = source.graph(self.batch, precision)
        builder = trt.Builder(self._logger)
        builder.max_threads = 1  # with more, 8.6 times tactics beside each other and picks others each time
        flags = 0
        kinds = trt.NetworkDefinitionCreationFlag
        if _version(trt)[0] < 10:
            flags |= 1 << int(kinds.EXPLICIT_BATCH)
        elif typed and hasattr(kinds, "STRONGLY_TYPED"):  # 10+; in 11 every network is
            flags |= 1 << int(kinds.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(model.SerializeToString()):
            reason = _import_error(parser.get_error(0), model) if parser.num_errors else self._messages.last()
            raise InputError(
                f"--depth {printable(source.name)}: TensorRT can't import it: {printable(_short(reason))}"
            )
        config = self._config(builder, network, typed, precision, source)
        cache_path, cache = self._timing_cache(config)
        progress = _Progress(tell, str(key["device"]))
        with progress.of(config):
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            reason = self._messages.last()
            if "memory" in reason.lower() or "OutOfMemory" in reason:
                raise OutOfMemory(reason)
            raise DeviceError(
                f"--depth {printable(source.name)}: TensorRT can't build an engine: {printable(_short(reason))}: try "
                "--depth-backend onnxruntime"
            )
        times = None if cache is None else config.get_timing_cache()
        if times is not None:
            with suppress(OSError):  # it saves time, nothing depends on it
                write_atomic(cache_path, bytes(times.serialize()))
        return bytes(plan)

    def _config(self, builder: Any, network: Any, typed: bool, precision: str, source: NetworkSource) -> Any:
        import tensorrt as trt

        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
        # Its own kernels alone: cuBLAS and cuDNN are then not needed, and gave nothing here.
        config.set_tactic_sources(1 << int(trt.TacticSource.EDGE_MASK_CONVOLUTIONS))
        config.avg_timing_iterations = 1
        config.builder_optimization_level = _LEVEL
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if precision == "fp32" or typed:
            config.clear_flag(trt.BuilderFlag.TF32)
        if _version(trt)[0] >= 10 and typed:
            return config  # 10+: types are the graph's own
        if precision == "fp16" and hasattr(trt.BuilderFlag, "FP16"):
            config.set_flag(trt.BuilderFlag.FP16)
            if typed:  # else it times float formats too, and takes many times as long
                config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
                for i in range(network.num_layers):
                    layer = network.get_layer(i)
                    if layer.type in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
                        continue
                    layer.precision = trt.float16
                    for output in range(layer.num_outputs):
                        layer.set_output_type(output, trt.float16)
                network.get_input(0).dtype = network.get_output(0).dtype = trt.float16
        return config

    def _timing_cache(self, config: Any) -> tuple[Path, Any]:
        """Tactics' times of earlier builds on this card; TensorRT takes none of another card or version.

        Returns the file to keep them in, and a cache, new where the file's are of no use; None where there is none.
        """
        name = "".join(c if c.isalnum() else "_" for c in str(self.description["device"]))
        path = cache_folder() / f"{name}-tensorrt-{self.description['version']}.timing"
        data = b""
        with suppress(OSError):
            data = path.read_bytes()
        for known in (data, b""):
            cache = config.create_timing_cache(known)  # None for what it can't read
            if cache is not None and config.set_timing_cache(cache, False):
                return path, cache
        return path, None

    # -- running ----------------------------------------------------------------------------------------

    def _prepare(self, source: NetworkSource) -> None:
        import cupy
        import tensorrt as trt

        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._input, self._output = sorted(names, key=lambda n: engine.get_tensor_mode(n) != trt.TensorIOMode.INPUT)
        types = {trt.float16: np.float16, trt.float32: np.float32}
        self.dtype = np.dtype(types[engine.get_tensor_dtype(self._input)])
        self.input_shape = tuple(engine.get_tensor_shape(self._input))
        check_output(source, tuple(engine.get_tensor_shape(self._output)), self.batch)
        output_dtype = types[engine.get_tensor_dtype(self._output)]
        try:
            if hasattr(trt, "ExecutionContextAllocationStrategy"):  # 10+
                strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
                self._context = engine.create_execution_context(strategy)
            else:
                self._context = engine.create_execution_context_without_device_memory()
            size = _context_bytes(engine)
            if self._context is None:
                raise OutOfMemory(self._messages.last())
            self._memory = cupy.empty(max(1, size), np.uint8)  # intermediate tensors
            self._images = cupy.zeros(self.input_shape, self.dtype)
            self._predictions = cupy.empty(tuple(engine.get_tensor_shape(self._output)), output_dtype)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from None
        if hasattr(self._context, "set_device_memory"):  # 10+
            self._context.set_device_memory(self._memory.data.ptr, size)
        else:
            self._context.device_memory = self._memory.data.ptr
        self._context.set_tensor_address(self._input, self._images.data.ptr)
        self._context.set_tensor_address(self._output, self._predictions.data.ptr)
        self.memory_bytes = size + self._images.nbytes + self._predictions.nbytes
        self._graph = self._captured()

    def _captured(self) -> Any:
        """The inference as a CUDA graph: some 300 launches as one."""
        import cupy

        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            self._enqueue(stream)  # TensorRT wants one run before a capture
            stream.synchronize()
            stream.begin_capture()
            self._enqueue(stream)
            return stream.end_capture()

    def _enqueue(self, stream: Any) -> None:
        if not self._context.execute_async_v3(stream.ptr):
            raise DeviceError(f"--depth: TensorRT failed: {printable(_short(self._messages.last()))}")

    @property
    def images(self) -> Any:
        """The input, `input_shape` of `dtype` in the card's memory: fill it, on the stream of the next `infer`."""
        return self._images

    def infer(self, images: Any) -> Any:
        """Predictions of a batch of preprocessed pictures, on the current stream, without waiting.

        Parameters
        ----------
        images : `input_shape`, `dtype`
            CuPy; `images` itself is not copied.

        Returns
        -------
        array
            The output as the network shapes it; valid until the next call, owned by the engine.
        """
        import cupy

        if images is not self._images:
            self._images[...] = images
        self._graph.launch(cupy.cuda.get_current_stream())
        return self._predictions

    def layers(self, repeats: int = 3) -> dict[str, float]:
        """Milliseconds of each layer of the engine, in order; for benchmarks."""
        import cupy
        import tensorrt as trt

        class Profiler(trt.IProfiler):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.times: dict[str, float] = {}

            def report_layer_time(self, name: str, milliseconds: float) -> None:
                self.times[name] = self.times.get(name, 0.0) + milliseconds / repeats

        stream, profiler = cupy.cuda.get_current_stream(), Profiler()
        self._context.profiler = profiler
        for _ in range(repeats):
            self._enqueue(stream)
            stream.synchronize()
        return profiler.times


class OutOfMemory(Exception):
    """The card's memory does not suffice for this batch; the caller takes a smaller one or says so."""


def _precision(source: NetworkSource, asked: str | None, tell: Tell | None) -> str:
    """What the engine will compute in: where TensorRT picks no types itself (11 on), what an ONNX file says."""
    import tensorrt as trt

    own = source.precision
    if own is None or hasattr(trt.BuilderFlag, "FP16"):
        return asked or "fp16"
    name = printable(source.name)
    if asked not in (None, own):
        raise OptionError(
            "depth_precision", f"got {asked}, {name} is {own}, which TensorRT {trt.__version__} keeps: leave it out"
        )
    if own == "fp32" and tell:
        tell(f"the depth engine is fp32, as {name} is, which TensorRT {trt.__version__} keeps: one in fp16 is faster")
    return own


def _context_bytes(engine: Any) -> int:
    """Memory that a context of the engine needs, which may be none."""
    size = getattr(engine, "device_memory_size_v2", None)  # 10+
    return int(engine.device_memory_size if size is None else size)


def _header(key: dict[str, Any], plan: bytes) -> bytes:
    content = {"format": "gpufgbg engine", **key, "sha256": hashlib.sha256(plan).hexdigest()}
    return json.dumps(content, sort_keys=True).encode() + b"\n"


def _wait_for(lock: Any, tell: Tell | None) -> None:
    """Take the lock; it ends with the process that holds it, however that ends."""
    try:
        lock.acquire(timeout=1)
    except Timeout:
        if tell:
            tell("another process is building the depth engine: waiting for it")
        lock.acquire()


class _Messages:
    """TensorRT's errors, of which the last ones go into ours."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def add(self, text: str) -> None:
        self.errors = [*self.errors[-7:], text]

    def last(self) -> str:
        return self.errors[-1] if self.errors else "no reason given"


@functools.cache
def _logging() -> tuple[Any, _Messages]:
    """The logger and what it keeps: one for the process, since TensorRT takes the first and ignores others."""
    import tensorrt as trt

    messages = _Messages()

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.add(text)

    return Logger(), messages


def _import_error(error: Any, model: Any) -> str:
    """What TensorRT's parser says of an ONNX model, with the operator that it says it of: 8.6 leaves that out."""
    nodes, index = model.graph.node, error.node()
    said = str(error.desc())
    if not 0 <= index < len(nodes) or nodes[index].op_type in said:
        return said
    return f"operator {nodes[index].op_type}: {said}"


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


class _Progress:
    """Tells how far a build is: by TensorRT's own account where it gives one, else by the time it has taken."""

    def __init__(self, tell: Tell | None, device: str) -> None:
        self._tell = tell
        self._what = f"building the depth engine for {device} (once; takes minutes)"
        self._step = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def of(self, config: Any) -> _Progress:
        """Follow the build with this configuration."""
        import tensorrt as trt

        if self._tell is not None and hasattr(trt, "IProgressMonitor"):  # 10+
            config.progress_monitor = self._monitor(trt)
        return self

    def _monitor(self, trt: Any) -> Any:
        progress = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.steps: dict[str, int] = {}

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                self.steps[name] = steps

            def step_complete(self, name: str, step: int) -> bool:
                progress._step = f", {name}: {step + 1} of {self.steps.get(name, 0)}"
                return True

            def phase_finish(self, name: str) -> None:
                self.steps.pop(name, None)

        return Monitor()

    def _run(self) -> None:
        assert self._tell is not None
        start = time.monotonic()
        while not self._done.wait(_TELL_EVERY_S):
            self._tell(f"{self._what}: {time.monotonic() - start:.0f} s{self._step}")

    def __enter__(self) -> _Progress:
        if self._tell is not None:
            self._tell(self._what)
            self._thread = threading.Thread(target=self._run, name="engine progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *rest: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
