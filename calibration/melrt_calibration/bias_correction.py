"""Bias correction: rounding and clipping shift the mean of a convolution's output; the shift is measured and subtracted.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", 4.2, in its empirical form. Layers are
corrected in the order of the network, each after all before it: a layer's measured shift includes those that it inherits, and these would
be subtracted twice if all layers were measured at once.
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
from melrt_export.graph.rewrites import merge_shortcuts

# Observed windows that shifts are measured on, spread over all kinds. Both networks run on the same windows, so few suffice, and each
# layer needs a run of its own.
WINDOWS = 16


def correct_biases(network: Network, names: Iterable[str]) -> Network:
    """Return the network with corrected biases for these layers, for the graph in which exactly these layers are in INT8."""
    plan = network.selected(names)
    windows = network.windows[:: -(-len(network.windows) // WINDOWS)]
    float_graph = merge_shortcuts(network.graphs["edge", "cpu"], plan.merged_blocks)
    outputs = {node.name: node.output[0] for node in float_graph.graph.node if node.name in plan.names}
    means = dict(zip(outputs, channel_means(float_graph, list(outputs.values()), windows), strict=True))
    shifts: dict[str, NDArray[np.float32]] = {}
    for layer in plan.layers:
        model = replace(network, repairs=Repairs(dict(shifts))).model(plan.names)
        tensor = f"{layer.name}.output.bytes"
        scale, zero = layer.output.affine
        (rounded,) = channel_means(_truncated(model, tensor), [tensor], windows)
        shifts[layer.name] = (means[layer.name] - scale * (rounded - zero)).astype(np.float32)
    return replace(network, repairs=Repairs(shifts))


def channel_means(model: onnx.ModelProto, tensors: Sequence[str], windows: Sequence[Mel]) -> list[NDArray[np.float64]]:
    """Return the mean of each of these tensors by channel, (C,), over all windows."""
    session = session_with_intermediates(model, tensors)
    rows = [[values.mean(axis=(0, 2, 3), dtype=np.float64) for values in session.run(tensors, {"mel": window[None]})] for window in windows]
    return [np.mean(means, axis=0) for means in zip(*rows, strict=True)]


def _truncated(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Return the part of a graph that computes one tensor of bytes."""
    needed, kept = {tensor}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[:], part.graph.output[:]
    part.graph.node.extend(reversed(kept))
    return part
