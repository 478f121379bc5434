"""Runs a network with ONNX Runtime: on the CPU, the portable way, or on CUDA where onnxruntime-gpu is installed.

On the CPU each inference takes one picture on the calling thread, so a prediction depends on nothing but its picture,
and callers get their parallelism from their own threads, as from the rest of the CPU backend. Where all but the
network is on a card, one thread calls, and an inference takes all cores: the bits were the same with 1 to 16 of them.

ONNX Runtime picks its kernels by the processor's vector instructions, and they round differently: so `processor` is
part of what made the predictions.

The CUDA way is written from ONNX Runtime's documentation (execution providers, I/O binding) and has not been run yet.
"""

from __future__ import annotations

import functools
import platform
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from gpufgbg.compositor import default_workers
from gpufgbg.depth.sources import NetworkSource, check_output, input_type
from gpufgbg.exceptions import DeviceError, InputError, OptionError, printable

__all__ = ["OnnxRuntimeEngine", "processor"]

_CPU = "CPUExecutionProvider"
#: what ONNX Runtime has kernels for, best first: its name here, and what LLVM calls the processor's feature
_INSTRUCTIONS = (
    ("avx512", "avx512f"), ("avx2", "avx2"), ("avx", "avx"), ("sse", "sse2"),
    ("sme", "sme"), ("neon fp16", "fullfp16"), ("neon", "neon"),
)  # fmt: skip


@functools.cache
def processor() -> str:
    """This machine's architecture and its widest vector instructions, for example ``"x86_64 avx512"``."""
    from llvmlite import binding  # Numba's

    try:
        features: dict[str, bool] = binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know how to ask here
        features = {}
    found = (name for name, feature in _INSTRUCTIONS if features.get(feature))
    return " ".join([platform.machine(), *list(found)[:1]])


class OnnxRuntimeEngine:
    """A network in ONNX Runtime.

    Parameters
    ----------
    source : NetworkSource
    precision : {"fp16", "fp32"}, optional
        By default the file's own, fp32 for DenseDepth.
    batch : int, optional
        Pictures of one inference, by default what the file fixes, or 1.
    device : int, optional
        Number of the CUDA device whose memory predictions are made from and put into; None for the CPU.

    Attributes
    ----------
    batch : int
    input_shape : tuple of int
    dtype : numpy.dtype
        Of the input.
    description : dict
        What made the predictions, as JSON values.
    on_cpu : bool
        It runs on the CPU, perhaps beside a card.

    Raises
    ------
    DeviceError
        ONNX Runtime is not installed.
    InputError
        It can't run the network, or the network does not give one map a picture.
    OptionError
        The network has another precision.
    """

    def __init__(
        self, source: NetworkSource, precision: str | None = None, batch: int | None = None, device: int | None = None
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise DeviceError("--depth: ONNX Runtime is not installed: pip install 'gpufgbg[depth]'") from None
        self._runtime = onnxruntime
        self.batch = source.batch or batch or 1
        self._device = device
        cuda = device is not None and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = 1 if device is None else default_workers()
        options.log_severity_level = 4  # errors come as exceptions
        providers: list[Any] = [("CUDAExecutionProvider", {"device_id": device})] if cuda else []
        model = source.graph(self.batch, precision or "fp32")
        self.dtype = input_type(model)
        own = "fp16" if self.dtype == np.float16 else "fp32"
        if precision not in (None, own):
            raise OptionError("depth_precision", f"got {precision}, {printable(source.name)} is {own}: leave it out")
        try:
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, [*providers, _CPU])
        except Exception as error:  # pybind's exceptions of ONNX Runtime derive from Exception alone
            raise _refused(source, error) from None
        provider = self._session.get_providers()[0]
        self.on_cpu = provider == _CPU
        self._input = self._session.get_inputs()[0].name
        self._output = self._session.get_outputs()[0].name
        width, height = source.size
        sides = (height, width, 3) if source.channels_last else (3, height, width)
        self.input_shape = (self.batch, *sides)
        self._name = source.name
        self._check_output(source)
        self.description = {
            "backend": "onnxruntime",
            "version": onnxruntime.__version__,
            "provider": provider,
            **({"processor": processor()} if self.on_cpu else {}),
            "precision": own,
            "batch": self.batch,
        }

    def _check_output(self, source: NetworkSource) -> None:
        """Raise `InputError` where the output is not one map a picture; found out by a run if it is not told."""
        shape: tuple[Any, ...] = tuple(self._session.get_outputs()[0].shape)
        if not shape or not all(isinstance(side, int) for side in shape):
            try:
                shape = self._run(np.zeros(self.input_shape, self.dtype)).shape
            except Exception as error:
                raise _refused(source, error) from None
        check_output(source, shape, self.batch)

    def infer(self, images: Any) -> Any:
        """Predictions of a batch of preprocessed pictures.

        Parameters
        ----------
        images : `input_shape`, `dtype`
            NumPy on the CPU; CuPy with a device.

        Returns
        -------
        array
            The output as the network shapes it, float16 or float32, beside ``images``; owned by the caller.
        """
        try:
            if self._device is None:
                return self._run(images)
            import cupy

            if self.on_cpu:
                return cupy.asarray(self._run(cupy.asnumpy(images)))
            return self._run_bound(images)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"--depth {printable(self._name)}: ONNX Runtime failed: {_first_line(error)}") from None

    def _run(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        output: npt.NDArray[Any] = self._session.run([self._output], {self._input: images})[0]
        return output

    def _run_bound(self, images: Any) -> Any:
        import cupy

        images = cupy.ascontiguousarray(images)
        cupy.cuda.get_current_stream().synchronize()  # ONNX Runtime has a stream of its own
        binding = self._session.io_binding()
        binding.bind_input(self._input, "cuda", self._device, self.dtype.type, tuple(images.shape), images.data.ptr)
        binding.bind_output(self._output, "cuda", self._device)
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        value = binding.get_outputs()[0]
        shape, dtype = tuple(value.shape()), np.dtype(np.float16 if "float16" in value.data_type() else np.float32)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = cupy.cuda.UnownedMemory(value.data_ptr(), size, value, self._device)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0)).copy()


def _refused(source: NetworkSource, error: Exception) -> InputError:
    width, height = source.size
    return InputError(
        f"--depth {printable(source.name)}: ONNX Runtime can't run it for {width}x{height} pixels (--depth-size): "
        f"{_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return printable(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line))
