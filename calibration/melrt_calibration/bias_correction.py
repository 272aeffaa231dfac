"""Bias correction: rounding and clipping shift the mean of what a convolution gives; the shift is measured and taken back.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", 4.2, in its empirical form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from melrt_calibration.network import Network
from melrt_calibration.qdq import Repairs
from melrt_calibration.statistics import session_with_intermediates


def corrected(network: Network, names: Iterable[str]) -> Network:
    """The network with the biases of these layers corrected, for the graph in which just these are in INT8."""
    names = tuple(names)
    plain = replace(network, repairs=Repairs())
    float_outputs = {n.name: n.output[0] for n in network.graphs["edge", "cpu"].graph.node if n.name in names}
    truth = _means(network.graphs["edge", "cpu"], float_outputs, network.windows)
    # what a layer inherits from those before it is in its shift, so it is corrected once, with all of them in INT8
    made = _means(plain.model(names), {name: f"{name}.conv" for name in names}, network.windows)
    inherited = {name: truth[name] - made[name] for name in names}
    return replace(network, repairs=Repairs({name: shift.astype(np.float32) for name, shift in inherited.items()}))


def _means(model: onnx.ModelProto, tensors: dict[str, str], windows: Sequence[NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
    """Mean of each tensor by channel (C,)."""
    session = session_with_intermediates(model, tensors.values())
    sums: dict[str, NDArray[np.float64]] = {}
    count = 0
    for window in windows:
        for name, values in zip(tensors, session.run(list(tensors.values()), {"mel": window[None]}), strict=True):
            sums[name] = sums.get(name, np.zeros(values.shape[1])) + values.mean(axis=(0, 2, 3), dtype=np.float64)
        count += 1
    return {name: value / count for name, value in sums.items()}
