"""Search for the fastest set of INT8 layers within the budget; every set is measured as a whole, in quality and in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from melrt.types import Mel
from melrt_calibration import timing
from melrt_calibration.evaluation import Budget, Evaluator, Quality
from melrt_calibration.network import Network
from melrt_calibration.progress import ProgressReporter
from melrt_calibration.sensitivity import Sensitivity

# Share of the budget that a set may use on held-out speech. That speech is a sample: other speech can need more.
SHARE_USED = 0.85
# Number of set sizes that are measured in the first pass.
SET_SIZES = 14


@dataclass(frozen=True, slots=True)
class LayerSet:
    """One set of layers in INT8, measured."""

    names: tuple[str, ...]
    quality: Quality
    seconds: float = float("nan")
    """Time of one window on one thread; NaN if it was not measured."""


def search(
    network: Network, evaluator: Evaluator, budget: Budget, rows: Sequence[Sensitivity], window: Mel, steps: ProgressReporter
) -> tuple[list[LayerSet], LayerSet | None]:
    """Find the fastest set within the budget.

    Layers are added in the order of quality lost per second saved. Then each layer that the best set lacks is tried in turn. Kernels
    are only part of the time (a single INT8 layer pays for a conversion on both sides), so every set is timed as a whole, interleaved.

    Returns:
        All measured sets, the float graph first, and the fastest within the budget (None if that is the float graph).
    """
    reference = evaluator.quality(network.model(()))
    order = sorted((row for row in rows if row.float_seconds > row.int8_seconds), key=lambda row: _price(row, reference))
    sets = [LayerSet((), reference)]
    sizes = sorted({round(size) for size in np.linspace(1, len(order), SET_SIZES)})
    steps.begin("adding convolutions in order of their cost", len(sizes))
    for size in sizes:
        sets.append(_measure(network, evaluator, [row.name for row in order[:size]]))
        steps.advance()
    best = max(_within(budget, sets), key=lambda one: len(one.names))
    rest = [row for row in order if row.name not in best.names and row.alone.error_increase(reference) <= budget.log_mel]
    steps.begin("trying the remaining convolutions one by one", len(rest))
    for row in rest:
        candidate = _measure(network, evaluator, [*best.names, row.name])
        sets.append(candidate)
        if budget.allows(candidate.quality, reference, SHARE_USED):
            best = candidate
        steps.advance()
    steps.begin(f"timing {len(sets)} sets of convolutions")
    sets = _timed(network, sets, window)
    fastest = min(_within(budget, sets), key=lambda one: one.seconds)
    return sets, fastest if fastest.names else None


def pareto_front(sets: Sequence[LayerSet]) -> list[LayerSet]:
    """Return the sets that no other set beats in both time and log-mel error, fastest first."""
    front: list[LayerSet] = []
    for one in sorted(sets, key=lambda one: (one.seconds, one.quality.log_mel_error)):
        if not front or one.quality.log_mel_error < front[-1].quality.log_mel_error:
            front.append(one)
    return front


def _within(budget: Budget, sets: Sequence[LayerSet]) -> list[LayerSet]:
    """Return the sets within the usable share of the budget; the first set is the float graph, which always is."""
    return [one for one in sets if budget.allows(one.quality, sets[0].quality, SHARE_USED)]


def _price(row: Sensitivity, reference: Quality) -> float:
    return max(row.alone.error_increase(reference), 1e-6) / (row.float_seconds - row.int8_seconds)


def _measure(network: Network, evaluator: Evaluator, names: Sequence[str]) -> LayerSet:
    ordered = tuple(name for name in network.names if name in set(names))
    return LayerSet(ordered, evaluator.quality(network.model(ordered)))


def _timed(network: Network, sets: Sequence[LayerSet], window: Mel) -> list[LayerSet]:
    models = {str(i): network.model(one.names, "interior") for i, one in enumerate(sets)}
    timings = timing.time_graphs(models, window)
    # The minimum of each, since a busy machine can only add to a run.
    return [replace(one, seconds=float(timings[str(i)].seconds.min())) for i, one in enumerate(sets)]
