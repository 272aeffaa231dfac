"""Roofline: the time of each operation of the deploy graph, in one window on one thread, against the limits of this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from melrt.backends.kernel_profile import profile_kernels
from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt.timing import timed
from melrt_benchmarks.report.results import Layer
from melrt_export.parity import probe_mel

WINDOW = 128
RUNS = 15
WARM_UP_RUNS = 2
# A product of this size runs at the rate of the machine's GEMM, and its operands (3 MiB) stay near the core.
GEMM_SIZE = 512
# Half a MiB stays in the second-level cache, as the tensors of a window do.
COPY_BYTES = 512 << 10
# The best of this many runs is the ceiling: what the machine can do undisturbed.
CEILING_RUNS = 200


def profile(bundle: Bundle) -> tuple[tuple[Layer, ...], dict[str, float]]:
    """Profile the operations of the FP32 interior graph, and measure the ceilings that limit them.

    Returns:
        The operations, longest first, and the ceilings: `gflops` of `gemm_gflops` and `gbytes` of `copy_gbytes`.

    Raises:
        MelrtError: The bundle has no FP32 interior graph.
    """
    entry = bundle.find("onnx", graph="interior", precision="fp32")
    if not entry:
        raise MelrtError(f"{bundle.path} has no FP32 interior graph to profile; export the voice with `--precision fp32`.")
    data = bundle.read(entry[0])
    ceilings = {"gflops": gemm_gflops(), "gbytes": copy_gbytes()}
    model = onnx.load_from_string(data)
    work, fused = _work(model), _fused(model)
    kernels = profile_kernels(data, probe_mel(bundle.manifest.spec, WINDOW)[None], RUNS + WARM_UP_RUNS)
    times = {fused.get(k.origin, k.name): (k.kind, 1e6 * float(np.median(k.seconds[WARM_UP_RUNS:]))) for k in kernels}
    total = sum(microseconds for _, microseconds in times.values())
    layers = []
    for name, (kind, microseconds) in sorted(times.items(), key=lambda item: -item[1][1]):
        flop, size = work.get(name, (0.0, 0.0))
        limit = max(flop / ceilings["gflops"], size / ceilings["gbytes"]) / 1e3
        layers.append(Layer(
            name=name, kind=kind, microseconds=round(microseconds, 1), share=round(microseconds / total, 4), mflop=round(flop / 1e6, 2),
            kilobytes=round(size / 1e3, 1), limit_microseconds=round(limit, 1),
        ))  # fmt: skip
    return tuple(layers), {name: round(value, 1) for name, value in ceilings.items()}


def gemm_gflops() -> float:
    """Measure the rate of ONNX Runtime's float32 matrix product on one thread, in billions of operations per second."""
    shape = [GEMM_SIZE, GEMM_SIZE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("mel", "product")]
    weight = numpy_helper.from_array(np.ones(shape, np.float32), "weight")
    graph = helper.make_graph([helper.make_node("MatMul", ["mel", "weight"], ["product"])], "gemm", ends[:1], ends[1:], [weight])
    model = OnnxModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString(), threads=1)
    values = np.ones(shape, np.float32)
    return 2 * GEMM_SIZE**3 / _least_seconds(lambda: model.run(values)) / 1e9


def copy_gbytes() -> float:
    """Measure the rate of a copy within the cache on one thread, in billions of bytes read and written per second."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    return 2 * COPY_BYTES / _least_seconds(lambda: np.copyto(target, source)) / 1e9


def _least_seconds(run: Callable[[], object]) -> float:
    return min(timed(run) for _ in range(CEILING_RUNS))


def _fused(model: onnx.ModelProto) -> dict[str, str]:
    """Map each tensor to the convolution that produces it: ONNX Runtime names a fused kernel after its last tensor."""
    source: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            source[node.output[0]] = node.name
        elif node.op_type in ("LeakyRelu", "Tanh", "Add") and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
    return source


def _work(model: onnx.ModelProto) -> Mapping[str, tuple[float, float]]:
    """Count the operations and bytes of each convolution in one window; the bytes are input, weights and output, each once."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = WINDOW
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in (*graph.value_info, *graph.input)}
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    work = {}
    for node in graph.node:
        if node.op_type == "Conv" and all(shapes.get(name) for name in (node.input[0], node.output[0])):
            positions = shapes[node.output[0]][-1]
            kernel = float(np.prod(weights[node.input[1]]))
            touched = np.prod(shapes[node.input[0]]) + kernel + np.prod(shapes[node.output[0]])
            work[node.name] = (2 * kernel * positions, 4 * float(touched))
    return work
