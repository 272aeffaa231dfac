"""Repairs of the quality that INT8 loses: choose the equalization, try bias correction, and compare what each one brings."""

from __future__ import annotations

from dataclasses import dataclass, replace

from melrt_calibration.bias_correction import correct_biases
from melrt_calibration.equalization import POWERS, layer_of
from melrt_calibration.evaluation import Evaluator, Quality
from melrt_calibration.network import Network
from melrt_calibration.progress import ProgressReporter
from melrt_calibration.search import LayerSet


@dataclass(frozen=True, slots=True)
class Repair:
    """Quality after one repair and those before it."""

    name: str
    chosen: Quality
    """Quality with the chosen layers in INT8."""
    all_layers: Quality
    """Quality with all layers in INT8."""


def choose_equalization(plain: Network, evaluator: Evaluator, steps: ProgressReporter) -> dict[str, float]:
    """Choose the power of each stage with which its layers, alone in INT8, have the smallest error.

    Returns:
        Power of each tensor, by the name of its first consumer.
    """
    tensors = plain.shared_tensors
    stages = {stage: [t for t in tensors if _stage(t.consumers[0]) == stage] for stage in (_stage(t.consumers[0]) for t in tensors)}
    steps.begin("collecting statistics of equalized networks", len(POWERS) * len(plain.windows))
    networks: dict[float, Network] = {}
    for power in POWERS:
        networks[power] = plain.equalized({t.consumers[0]: power for t in tensors}, steps.advance)
    steps.begin("choosing the equalization of each stage", len(POWERS) * len(stages))
    powers: dict[str, float] = {}
    for group in stages.values():
        layers = {layer_of(name) for t in group for name in (*t.producers, *t.consumers)}
        errors = {}
        for power, network in networks.items():
            errors[power] = evaluator.quality(network.model(layers)).log_mel_error
            steps.advance()
        best = min(errors, key=lambda power: errors[power])
        powers |= {t.consumers[0]: best for t in group}
    return powers


def repair(
    plain: Network, network: Network, chosen: LayerSet, evaluator: Evaluator, steps: ProgressReporter
) -> tuple[Network, LayerSet, list[Repair]]:
    """Correct the biases, keep the correction if it measures better, and compare the repairs.

    Args:
        plain: Network before equalization.
        network: Network with the ranges and the equalization that were chosen.
        chosen: Layers in INT8.
        evaluator: Held-out speech.
        steps: Progress of the run.

    Returns:
        The network, the chosen layers with their quality, and one row per repair.
    """
    steps.begin("measuring the repairs")

    def measure(name: str, one: Network, all_layers: Network) -> Repair:
        return Repair(name, evaluator.quality(one.model(chosen.names)), evaluator.quality(all_layers.model(all_layers.names)))

    minmax = plain.with_ranges("minmax")
    corrected, corrected_all = correct_biases(network, chosen.names), correct_biases(network, network.names)
    rows = [
        measure("min-max ranges", minmax, minmax),
        measure("mean-squared-error ranges", plain, plain),
        uncorrected := measure("equalization, ranges by measurement", network, network),
        correction := measure("bias correction", corrected, corrected_all),
    ]
    keep = correction.chosen.log_mel_error < uncorrected.chosen.log_mel_error
    best, quality = (corrected, correction.chosen) if keep else (network, uncorrected.chosen)
    equalized = any(layer.input_factors for layer in network.plan.layers)
    names = ("equalization",) * equalized + ("bias correction",) * keep
    return replace(best, plan=replace(best.plan, repairs=names)), replace(chosen, quality=quality), rows


def _stage(name: str) -> str:
    return ".".join(name.split(".")[:2])
