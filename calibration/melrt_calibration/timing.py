"""Time: of whole graphs, in turn, one thread for a window as the runtime runs them; of single layers, by ONNX Runtime's profiler."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from melrt.backends.onnxruntime import CPU_WINDOW, OnnxModel

# ONNX Runtime's threads spin for 20 to 50 ms after a run and would take the next one's core.
SETTLE = 0.06
ROUNDS = 7
PROFILED_RUNS = 6


def window(mel: NDArray[np.float32]) -> NDArray[np.float32]:
    """A window (1, M, T) as the CPU policy cuts it, from speech of any length."""
    return np.ascontiguousarray(np.tile(mel, (1, -(-CPU_WINDOW // mel.shape[1])))[None, :, :CPU_WINDOW])


def seconds(models: Mapping[str, onnx.ModelProto], mel: NDArray[np.float32], rounds: int = ROUNDS) -> dict[str, NDArray[np.float64]]:
    """Seconds of one window on one thread, of each round; all graphs in turn."""
    sessions = {name: OnnxModel(model.SerializeToString(), threads=1) for name, model in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for session in sessions.values():
        session.run(mel)
    for _ in range(rounds):
        for name, session in sessions.items():
            time.sleep(SETTLE)
            start = time.perf_counter()
            session.run(mel)
            taken[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in taken.items()}


def kernel_seconds(model: onnx.ModelProto, mel: NDArray[np.float32]) -> dict[str, float]:
    """Seconds of each convolution's own kernel, by name; what its neighbors cost only a whole graph's time can tell."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED_RUNS):
            session.run(None, {"mel": mel})
        events = json.loads(Path(session.end_profiling()).read_text())
    owners = _owners(model)
    taken: dict[str, float] = {}
    for event in events:
        kernel = str(event.get("name", "")).removesuffix("_kernel_time")
        if event.get("cat") == "Node" and event["args"].get("op_name") in ("Conv", "QLinearConv") and event["name"] != kernel:
            owner = owners.get(kernel.partition("_token")[0].removesuffix("_nchwc"))
            if owner:
                taken[owner] = taken.get(owner, 0.0) + event["dur"] / 1e6 / PROFILED_RUNS
    return taken


def _owners(model: onnx.ModelProto) -> dict[str, str]:
    """Convolutions by the names that the optimizer may give them: their own, their output's, or that of the activation they swallow."""
    by_input: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            by_input.setdefault(name, []).append(node)
    owners: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            owners |= {node.name: node.name, node.output[0]: node.name}
            owners |= {n.output[0]: node.name for n in by_input.get(node.output[0], []) if n.op_type in ("LeakyRelu", "Tanh")}
    return owners
