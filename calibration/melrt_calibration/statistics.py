"""What flows through the network: streaming statistics of every convolution's input and output, memory bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from melrt.errors import CalibrationError

Frames = NDArray[np.float32]
# Bins of a histogram: 2048 as in ONNX Runtime's and TensorRT's calibrators; 16 of them for each step of a byte at first.
BINS = 2048


@dataclass(slots=True)
class Histogram:
    """Values seen, in bins of one width around zero; the width doubles when a value lies outside, so memory stays as it is."""

    width: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    low: float = 0.0
    high: float = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count these values.

        Raises:
            CalibrationError: One is not finite.
        """
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CalibrationError("the network gives values that are not finite on this data: its weights or the mels are damaged.")
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if not self.width:
            self.width = max(reach, 1e-12) / BINS
        while reach > self.width * BINS:
            self._double()
        index = np.clip(np.floor(values.ravel() / np.float32(self.width)).astype(np.int64) + BINS, 0, 2 * BINS - 1)
        self.counts += np.bincount(index, minlength=2 * BINS)

    @property
    def centers(self) -> NDArray[np.float64]:
        """Of the bins."""
        return np.asarray((np.arange(-BINS, BINS) + 0.5) * self.width, np.float64)

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(2 * BINS, np.int64)
        self.counts[BINS // 2 : BINS // 2 + BINS] = merged
        self.width *= 2


@dataclass(slots=True)
class Statistics:
    """Of one convolution."""

    input: Histogram = field(default_factory=Histogram)
    output: Histogram = field(default_factory=Histogram)
    peaks: NDArray[np.float64] | float = 0.0
    """Largest magnitude of the input, by channel."""


def observe(model: onnx.ModelProto, windows: Iterable[Frames], on_step: Callable[[], None] = lambda: None) -> dict[str, Statistics]:
    """Run windows through the float32 graph, one at a time, and count what each convolution takes and gives.

    Args:
        model: The `edge` graph in float32.
        windows: Mel frames (M, T) each.
        on_step: Called after each window.
    """
    layers = {node.name: (node.input[0], node.output[0]) for node in model.graph.node if node.op_type == "Conv"}
    names = sorted({tensor for pair in layers.values() for tensor in pair})
    session = session_with_intermediates(model, names)
    statistics = {name: Statistics() for name in layers}
    for window in windows:
        values = dict(zip(names, session.run(names, {"mel": window[None]}), strict=True))
        for name, (before, after) in layers.items():
            one = statistics[name]
            one.input.add(values[before])
            one.output.add(values[after])
            one.peaks = np.maximum(one.peaks, np.abs(values[before]).max(axis=(0, 2, 3)))
        on_step()
    return statistics


def session_with_intermediates(model: onnx.ModelProto, names: Iterable[str]) -> Any:
    """A session that gives these inner tensors too; without optimization, so that each is still there."""
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {output.name for output in copy.graph.output} | {value.name for value in copy.graph.input}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
