"""Sensitivity: the quality that each convolution costs in INT8, the time that it saves, and the ranges that suit it best."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from melrt.types import Mel
from melrt_calibration import timing
from melrt_calibration.evaluation import Evaluator, Quality
from melrt_calibration.network import Network
from melrt_calibration.progress import ProgressReporter
from melrt_calibration.ranges import METHODS
from melrt_export.int8_plan import Int8Plan, LayerPlan

# Ranges whose ends differ by less than this share count as equal.
SAME_RANGE = 0.15


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Sensitivity of one convolution."""

    name: str
    alone: Quality
    """Quality with only this convolution in INT8."""
    leave_one_out: Quality
    """Quality with only this convolution in float and all others in INT8."""
    float_seconds: float
    """Time of its kernel in float, for one window on one thread."""
    int8_seconds: float
    """Time of its kernel in INT8."""
    method: str
    """Method of its ranges: the one with the smallest error."""
    errors: dict[str, float]
    """Log-mel error of each method whose ranges differ."""


def measure_sensitivities(
    network: Network, evaluator: Evaluator, window: Mel, steps: ProgressReporter
) -> tuple[Network, list[Sensitivity], Quality]:
    """Measure every layer alone in INT8, with each method of choosing its ranges, and alone in float.

    Returns:
        The network with the best ranges of each layer, the sensitivities, and the quality with all layers in INT8.
    """
    steps.begin("measuring the sensitivity of each convolution", 2 * len(network.names))
    float_kernels = timing.kernel_seconds(network.model((), "interior"), window)
    int8_kernels = timing.kernel_seconds(network.model(network.names, "interior"), window)
    alone = {}
    for layer in network.plan.layers:
        alone[layer.name] = _measure_methods(layer, network, evaluator)
        steps.advance()
    network = replace(network, plan=Int8Plan(tuple(alone[name][0] for name in network.names)))
    rows = []
    for name, (layer, quality, errors) in alone.items():
        leave_one_out = evaluator.quality(network.model(set(network.names) - {name}))
        rows.append(Sensitivity(name, quality, leave_one_out, float_kernels[name], int8_kernels[name], layer.input.method, errors))
        steps.advance()
    return network, rows, evaluator.quality(network.model(network.names))


def _measure_methods(layer: LayerPlan, network: Network, evaluator: Evaluator) -> tuple[LayerPlan, Quality, dict[str, float]]:
    """Return the layer with its best ranges, its quality with them, and the log-mel error of each method."""
    tried = {}
    for candidate in _candidates(layer, network):
        alone = replace(network, plan=Int8Plan((candidate,)))
        tried[candidate.input.method] = (evaluator.quality(alone.model([layer.name])), candidate)
    quality, best = min(tried.values(), key=lambda one: one[0].log_mel_error)
    return best, quality, {method: round(quality.log_mel_error, 6) for method, (quality, _) in tried.items()}


def _candidates(layer: LayerPlan, network: Network) -> list[LayerPlan]:
    """Return the layer with the ranges of each method, without those that equal an earlier one's."""
    statistics = network.statistics[layer.name]
    found: list[LayerPlan] = []
    for method in METHODS.values():
        candidate = replace(layer, input=method(statistics.input), output=method(statistics.output))
        if not any(_same_ranges(candidate, other) for other in found):
            found.append(candidate)
    return found


def _same_ranges(a: LayerPlan, b: LayerPlan) -> bool:
    pairs = ((a.input, b.input), (a.output, b.output))
    return all(np.allclose((x.low, x.high), (y.low, y.high), rtol=SAME_RANGE, atol=0) for x, y in pairs)
