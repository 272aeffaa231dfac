"""Timing on one thread: whole graphs, interleaved, for one window as the runtime cuts it; single kernels with ONNX Runtime's profiler."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx

from melrt.backends.kernel_profile import profile_kernels
from melrt.backends.onnxruntime import CPU_WINDOW, OnnxModel
from melrt.timing import Timing, interleave
from melrt.types import Mel
from melrt_calibration.equalization import layer_of

ROUNDS = 7
# Rounds of the comparison that decides whether INT8 pays.
FINAL_ROUNDS = 15
PROFILED_RUNS = 6


def cut_window(mel: Mel) -> Mel:
    """Return one window (1, M, T) of the CPU policy's length from the start of an utterance (M, T), repeated if it is shorter."""
    return np.ascontiguousarray(np.tile(mel, (1, -(-CPU_WINDOW // mel.shape[1])))[None, :, :CPU_WINDOW])


def time_graphs(models: Mapping[str, onnx.ModelProto], window: Mel, rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time each graph on one window and one thread, interleaved."""
    sessions = {name: OnnxModel(model.SerializeToString(), threads=1) for name, model in models.items()}
    return interleave({name: partial(session.run, window) for name, session in sessions.items()}, rounds)


def measure_speedup(fp32: onnx.ModelProto, int8: onnx.ModelProto, window: Mel) -> float:
    """Return the median ratio of FP32's time to INT8's time."""
    timings = time_graphs({"fp32": fp32, "int8": int8}, window, FINAL_ROUNDS)
    return timings["fp32"].ratio_to(timings["int8"])[0]


def kernel_seconds(model: onnx.ModelProto, window: Mel) -> dict[str, float]:
    """Return the mean seconds of each layer's kernels, without the conversions around them; a merged layer in float has two kernels."""
    owners = _owners(model)
    seconds: dict[str, float] = {}
    for kernel in profile_kernels(model.SerializeToString(), window, PROFILED_RUNS):
        owner = owners.get(kernel.origin)
        if owner and kernel.kind in ("Conv", "QLinearConv"):
            seconds[owner] = seconds.get(owner, 0.0) + float(kernel.seconds.mean())
    return seconds


def _owners(model: onnx.ModelProto) -> dict[str, str]:
    """Map every name that the optimizer may give a kernel to its convolution: the node, its output, or that of a fused activation."""
    by_input: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            by_input.setdefault(name, []).append(node)
    owners: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            owners |= dict.fromkeys((node.name, node.output[0]), layer_of(node.name))
            owners |= {n.output[0]: layer_of(node.name) for n in by_input.get(node.output[0], []) if n.op_type in ("LeakyRelu", "Tanh")}
    return owners
