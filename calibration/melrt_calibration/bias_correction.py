"""Bias correction: rounding and clipping shift the mean of a convolution's output; the shift is measured and subtracted.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", 4.2, in its empirical form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from melrt.types import Mel
from melrt_calibration.network import Network
from melrt_calibration.qdq import Repairs
from melrt_calibration.statistics import session_with_intermediates


def correct_biases(network: Network, names: Iterable[str]) -> Network:
    """Return the network with corrected biases for these layers, for the graph in which exactly these layers are in INT8."""
    names = tuple(names)
    uncorrected = replace(network, repairs=Repairs())
    float_graph = network.graphs["edge", "cpu"]
    float_outputs = {node.name: node.output[0] for node in float_graph.graph.node if node.name in names}
    float_means = _channel_means(float_graph, float_outputs, network.windows)
    # A layer's shift includes the shifts of the layers before it, so all layers are corrected once, with all of them in INT8.
    int8_means = _channel_means(uncorrected.model(names), {name: f"{name}.conv" for name in names}, network.windows)
    shifts = {name: (float_means[name] - int8_means[name]).astype(np.float32) for name in names}
    return replace(network, repairs=Repairs(shifts))


def _channel_means(model: onnx.ModelProto, tensors: dict[str, str], windows: Sequence[Mel]) -> dict[str, NDArray[np.float64]]:
    """Return each tensor's mean by channel, (C,)."""
    session = session_with_intermediates(model, tensors.values())
    sums: dict[str, NDArray[np.float64]] = {}
    for window in windows:
        for name, values in zip(tensors, session.run(list(tensors.values()), {"mel": window[None]}), strict=True):
            sums[name] = sums.get(name, np.zeros(values.shape[1])) + values.mean(axis=(0, 2, 3), dtype=np.float64)
    return {name: value / len(windows) for name, value in sums.items()}
