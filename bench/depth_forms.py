"""Forms of a DenseNet's pre-activation, each in a small TensorRT engine: which runs fastest on this card.

    python bench/depth_forms.py c4,bn,64 c4,conv,64 c2,bn,64,vc …       # part, form, batch[, vc][, jit]

Parts: c2 … c5, a few layers of DenseNet-169's dense blocks at 448x448 input; up4, the decoder's last block. Forms of
scale + shift + ReLU before a 1x1 convolution: bn (BatchNormalization), mul (Mul and Add), conv (a 1x1 convolution of
each channel by itself), max (Max alone: what is left when the scale is folded into the convolution behind it), relu
(ReLU alone: the least that any form can take). fp16, random weights; microseconds an image, from device events around
a CUDA graph, and by TensorRT's own profile. vc: VERSION_COMPATIBLE; jit: with the tactic source JIT_CONVOLUTIONS.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

#: part -> channels of its input, pixels a side, layers
PARTS = {"c2": (64, 112, 4), "c3": (256, 56, 5), "c4": (640, 28, 6), "c5": (1152, 14, 6), "up4": (208, 112, 0)}
GROWTH = 32
X2 = np.array([1, 1, 2, 2], np.float32)


class Part:
    """Collects nodes and constants of an ONNX graph."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, values: np.ndarray, dtype: Any = np.float16) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values, dtype), name))
        return name

    def add(self, operator: str, name: str, inputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def conv(self, name: str, x: str, before: int, after: int, side: int) -> str:
        kernel = self.random.normal(0, (2 / (before * side * side)) ** 0.5, (after, before, side, side))
        inputs = [x, self.constant(f"{name}/kernel", kernel), self.constant(f"{name}/bias", np.zeros(after))]
        return self.add("Conv", name, inputs, kernel_shape=[side, side], pads=[side // 2] * 4)

    def activated(self, name: str, x: str, channels: int) -> str:
        scale, shift = self.random.uniform(0.5, 1.5, channels), self.random.normal(0, 0.3, channels)
        one, column = np.ones(channels), (1, channels, 1, 1)
        if self.form == "relu":
            return self.add("Relu", f"{name}_pre_relu", [x])
        if self.form == "max":
            return self.add("Max", f"{name}_pre_max", [x, self.constant(f"{name}/shift", shift.reshape(column))])
        if self.form == "bn":
            values = {"scale": scale, "shift": shift, "mean": 0 * one, "variance": one}
            rest = [self.constant(f"{name}/{key}", value) for key, value in values.items()]
            y = self.add("BatchNormalization", f"{name}_pre_bn", [x, *rest], epsilon=0.0)
        elif self.form == "mul":
            y = self.add("Mul", f"{name}_pre_mul", [x, self.constant(f"{name}/scale", scale.reshape(column))])
            y = self.add("Add", f"{name}_pre_add", [y, self.constant(f"{name}/shift", shift.reshape(column))])
        else:
            kernel = self.constant(f"{name}/scale", scale[:, None, None, None])
            inputs = [x, kernel, self.constant(f"{name}/shift", shift)]
            y = self.add("Conv", f"{name}_pre_conv", inputs, kernel_shape=[1, 1], group=channels)
        return self.add("Relu", f"{name}_pre_relu", [y])

    def model(self, part: str, batch: int) -> Any:
        from onnx import helper

        channels, side, layers = PARTS[part]
        before, x, after_side = channels, "image", side
        if part == "up4":
            x2 = self.constant("x2", X2, np.float32)
            x = self.add(
                "Resize", "resize", ["image", "", x2], mode="linear", coordinate_transformation_mode="half_pixel"
            )
            x = self.add("LeakyRelu", "leakyA", [self.conv("convA", x, 208, 104, 3)], alpha=0.2)
            x = self.add("LeakyRelu", "leakyB", [self.conv("convB", x, 104, 104, 3)], alpha=0.2)
            x, after, after_side = self.conv("last", x, 104, 8, 3), 8, 2 * side
        else:
            for i in range(layers):
                y = self.activated(f"layer{i}", x, channels)
                y = self.add("Relu", f"layer{i}_relu", [self.conv(f"layer{i}_conv1", y, channels, 128, 1)])
                y = self.conv(f"layer{i}_conv2", y, 128, GROWTH, 3)
                x = self.add("Concat", f"layer{i}_concat", [x, y], axis=1)
                channels += GROWTH
            x, after = self.conv("last", self.activated("last", x, channels), channels, 64, 1), 64
        graph = helper.make_graph(
            self.nodes,
            part,
            [helper.make_tensor_value_info("image", 10, (batch, before, side, side))],
            [helper.make_tensor_value_info(x, 10, (batch, after, after_side, after_side))],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def engine(model: Any, flags: list[str]) -> Any:
    """The part's engine, built as the product builds its own."""
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    builder.max_threads = 1
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise SystemExit(parser.get_error(0).desc())
    config = builder.create_builder_config()
    for flag in (trt.BuilderFlag.FP16, trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS):
        config.set_flag(flag)
    if "vc" in flags:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 512 << 20)
    sources = [
        trt.TacticSource.EDGE_MASK_CONVOLUTIONS,
        *([trt.TacticSource.JIT_CONVOLUTIONS] if "jit" in flags else []),
    ]
    config.set_tactic_sources(sum(1 << int(source) for source in sources))
    config.avg_timing_iterations, config.builder_optimization_level = 1, 2
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type not in (trt.LayerType.CONSTANT, trt.LayerType.SHAPE):
            layer.precision = trt.float16
            for output in range(layer.num_outputs):
                layer.set_output_type(output, trt.float16)
    for tensor in (network.get_input(0), network.get_output(0)):
        tensor.dtype, tensor.allowed_formats = trt.float16, 1 << int(trt.TensorFormat.HWC8)
    return trt.Runtime(logger).deserialize_cuda_engine(builder.build_serialized_network(network, config))


def measure(part: str, form: str, batch: int, flags: list[str]) -> None:
    """Build, time and print one."""
    import cupy
    import tensorrt as trt

    begun = time.perf_counter()
    built = engine(Part(form).model(part, batch), flags)
    seconds = time.perf_counter() - begun
    context, stream = built.create_execution_context(), cupy.cuda.Stream(non_blocking=True)
    held = []
    for i in range(built.num_io_tensors):
        name = built.get_tensor_name(i)
        held.append(cupy.random.random(int(np.prod(built.get_tensor_shape(name))) * 2).astype(cupy.float16))
        context.set_tensor_address(name, held[-1].data.ptr)
    context.execute_async_v3(stream.ptr)
    stream.synchronize()
    with stream:
        stream.begin_capture()
        context.execute_async_v3(stream.ptr)
        graph = stream.end_capture()
    times = []
    for _ in range(6):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        for _ in range(10):
            graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) * 100 / batch)

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            super().__init__()
            self.sums = {"pre-activation": 0.0, "convolutions": 0.0, "copies": 0.0}

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            kind = "pre-activation" if "_pre_" in name else "convolutions" if "conv" in name else "copies"
            self.sums[kind] += milliseconds * 1e3 / 3 / batch

    context.profiler = profiler = Profiler()
    for _ in range(3):
        context.execute_async_v3(stream.ptr)
        stream.synchronize()
    kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in profiler.sums.items())
    what = " ".join([part, form, *flags])
    print(f"{what:<14} batch {batch:3d}: {np.median(times[1:]):7.2f} us an image ({kinds}); built in {seconds:.0f} s")


if __name__ == "__main__":
    for job in sys.argv[1:]:
        wanted, shape, size, *more = job.split(",")
        measure(wanted, shape, int(size), more)
