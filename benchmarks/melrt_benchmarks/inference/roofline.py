"""Where the time goes: each operation of the deploy graph in one window on one thread, against its own limit on this machine."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt_benchmarks.report.results import Layer
from melrt_export.parity import probe_mel

WINDOW = 128
RUNS = 15
# What ONNX Runtime adds to the name of a tensor in its blocked layout.
_BLOCKED = "_nchwc"
# A product this large is at the rate of the machine's GEMM, and its operands (3 MiB) stay near the core.
GEMM_SIZE = 512
# Copied back and forth within the second-level cache, as a window's tensors are.
COPY_BYTES = 512 << 10


def profile(bundle: Bundle) -> tuple[tuple[Layer, ...], dict[str, float]]:
    """The operations of the FP32 interior graph, longest first, and the ceilings that they are held against.

    Raises:
        MelrtError: The bundle has no FP32 interior graph.
    """
    entry = bundle.find("onnx", graph="interior", precision="fp32")
    if not entry:
        raise MelrtError(f"{bundle.path} has no interior graph in fp32 to profile.")
    data = bundle.read(entry[0])
    ceilings = {"gflops": gemm_gflops(), "gbytes": copy_gbytes()}
    model = onnx.load_from_string(data)
    work, fused = _work(model), _fused(model)
    measured = _times(data, probe_mel(bundle.manifest.spec, WINDOW)[None])
    times = {fused.get(name.removesuffix(_BLOCKED), name): value for name, value in measured.items()}
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
    """Billions of operations a second of a float32 matrix product on one thread, by ONNX Runtime's own GEMM."""
    shape = [GEMM_SIZE, GEMM_SIZE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "c")]
    weight = numpy_helper.from_array(np.ones(shape, np.float32), "b")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "gemm", ends[:1], ends[1:], [weight])
    session = _session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString())
    values = {"a": np.ones(shape, np.float32)}
    return 2 * GEMM_SIZE**3 / _best(lambda: session.run(None, values)) / 1e9


def copy_gbytes() -> float:
    """Billions of bytes a second, read and written, of a copy within the cache on one thread."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)
    return 2 * COPY_BYTES / _best(lambda: np.copyto(target, source)) / 1e9


def _best(run: Any) -> float:
    """The least seconds of a run: a ceiling is what the machine can do undisturbed."""
    least = np.inf
    for _ in range(200):
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return float(least)


def _session(model: bytes, folder: str | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _times(model: bytes, mel: np.ndarray) -> dict[str, tuple[str, float]]:
    """Kind and median microseconds of each node, as ONNX Runtime runs it (fused nodes under the name of the first)."""
    with tempfile.TemporaryDirectory() as folder:
        session = _session(model, folder)
        for _ in range(RUNS + 2):
            session.run(None, {"mel": mel})
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            found[name].append(float(event["dur"]))
            kinds[name] = event["args"]["op_name"]
    return {name: (kinds[name], float(np.median(values[2:]))) for name, values in found.items()}


def _fused(model: onnx.ModelProto) -> dict[str, str]:
    """The convolution that each tensor comes from: ONNX Runtime names a fused operation after the last tensor that it makes."""
    source: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            source[node.output[0]] = node.name
        elif node.op_type in ("LeakyRelu", "Tanh", "Add") and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
    return source


def _work(model: onnx.ModelProto) -> Mapping[str, tuple[float, float]]:
    """Operations and bytes of each convolution in one window; bytes are input, weights and output, each once."""
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
