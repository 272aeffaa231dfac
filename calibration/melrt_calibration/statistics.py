"""Streaming statistics: histograms of every convolution's input and output, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from melrt.errors import CalibrationError
from melrt.types import Mel

# Bins on each side of zero: 2048, as in the calibrators of ONNX Runtime and TensorRT; 16 bins for each step of a byte at first.
BINS = 2048
# Values that are counted of one tensor in one window, evenly spaced; the late tensors of a voice have 500,000. Both ends of a range are
# exact. The spacing is odd, because upsampling gives neighboring samples different statistics with periods of 2, 4 and 8.
COUNTED = 1 << 16


@dataclass(slots=True)
class Histogram:
    """Counts of values in bins of equal width around zero. The width doubles for a value beyond the last bin, so memory is constant."""

    width: float = 0.0
    """Width of a bin; 0 before the first value."""
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    """Number of values in each bin, (2 * BINS,)."""
    low: float = 0.0
    """Smallest value, at most 0."""
    high: float = 0.0
    """Largest value, at least 0."""

    def add(self, values: NDArray[np.float32]) -> None:
        """Count these values, or evenly spaced ones of them if they are many.

        Raises:
            CalibrationError: A value is not finite.
        """
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CalibrationError(
                "The network's values are not finite on this speech, so its weights or the mels are damaged. "
                "Check the voice with `melrt verify`, and compute the mels again."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if not self.width:
            self.width = max(largest, 1e-12) / BINS
        while largest > self.width * BINS:
            self._double()
        counted = values.ravel()[:: values.size // COUNTED | 1]
        index = np.clip(np.floor(counted / np.float32(self.width)).astype(np.int64) + BINS, 0, 2 * BINS - 1)
        self.counts += np.bincount(index, minlength=2 * BINS)

    @property
    def centers(self) -> NDArray[np.float64]:
        """Centers of the bins, (2 * BINS,)."""
        return np.asarray((np.arange(-BINS, BINS) + 0.5) * self.width, np.float64)

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(2 * BINS, np.int64)
        self.counts[BINS // 2 : BINS // 2 + BINS] = merged
        self.width *= 2


@dataclass(slots=True)
class Statistics:
    """Statistics of one convolution."""

    input: Histogram = field(default_factory=Histogram)
    output: Histogram = field(default_factory=Histogram)
    peaks: NDArray[np.float64] | float = 0.0
    """Largest magnitude of each input channel, (C,)."""


def observe(model: onnx.ModelProto, windows: Iterable[Mel], on_window: Callable[[], None] = lambda: None) -> dict[str, Statistics]:
    """Run windows through the float32 graph, one at a time, and count the inputs and outputs of each convolution.

    Args:
        model: The `edge` graph in float32.
        windows: Mel frames, (M, T) each.
        on_window: Called after each window.
    """
    layers = {node.name: (node.input[0], node.output[0]) for node in model.graph.node if node.op_type == "Conv"}
    tensors = sorted({tensor for pair in layers.values() for tensor in pair})
    session = session_with_intermediates(model, tensors)
    statistics = {name: Statistics() for name in layers}
    for window in windows:
        values = dict(zip(tensors, session.run(tensors, {"mel": window[None]}), strict=True))
        for name, (before, after) in layers.items():
            layer = statistics[name]
            layer.input.add(values[before])
            layer.output.add(values[after])
            layer.peaks = np.maximum(layer.peaks, np.abs(values[before]).max(axis=(0, 2, 3)))
        on_window()
    return statistics


def session_with_intermediates(model: onnx.ModelProto, names: Iterable[str]) -> Any:
    """Open a session that can also return these inner tensors. Graph outputs remain under every optimization."""
    import onnxruntime

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {output.name for output in copy.graph.output} | {value.name for value in copy.graph.input}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
