"""Which layers in INT8: what each costs and gains, measured, and then the fastest set within the budget, measured as a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from melrt_calibration import timing
from melrt_calibration.evaluation import Budget, Evaluator, Quality
from melrt_calibration.network import Network
from melrt_calibration.ranges import METHODS
from melrt_export.int8_plan import LayerPlan, Plan

Step = Callable[[str], None]
# Two ranges closer than this are one choice.
ALIKE = 0.15
# Held-out speech is a sample: what only just holds on it need not hold on other speech.
SHARE_USED = 0.85
POINTS = 14


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Of one convolution."""

    name: str
    alone: Quality
    """With only this one in INT8."""
    float_seconds: float
    """Of its kernel, in one window on one thread."""
    int8_seconds: float
    """Of its kernel in INT8."""
    method: str
    """Of its ranges: the one with the least error of those tried."""
    tried: dict[str, float]
    """Log-mel error of each method whose ranges differ."""
    but_this: Quality | None = None
    """With every other layer in INT8 and this one in float."""


@dataclass(frozen=True, slots=True)
class Point:
    """One set of layers, measured."""

    names: tuple[str, ...]
    quality: Quality
    seconds: float = float("nan")
    """Of one window on one thread."""


def sensitivities(network: Network, judge: Evaluator, mel: NDArray[np.float32], on_step: Step) -> tuple[Network, list[Sensitivity]]:
    """Measure every layer alone, by each method of choosing its ranges; the network comes back with the best for each."""
    kernels = timing.kernel_seconds(network.model((), "interior"), mel)
    int8_kernels = timing.kernel_seconds(network.model(network.names, "interior"), mel)
    layers, rows = [], []
    for layer in network.plan.layers:
        on_step(f"sensitivity of {layer.name}")
        tried = {}
        for candidate in _candidates(layer, network):
            alone = replace(network, plan=Plan((candidate,)))
            tried[candidate.input.method] = (judge.quality(alone.model([layer.name])), candidate)
        method = min(tried, key=lambda m: tried[m][0].log_mel_error)
        quality, best = tried[method]
        layers.append(best)
        errors = {m: round(q.log_mel_error, 6) for m, (q, _) in tried.items()}
        rows.append(Sensitivity(layer.name, quality, kernels[layer.name], int8_kernels[layer.name], method, errors))
    chosen = replace(network, plan=Plan(tuple(layers)))
    return chosen, [_but_this(row, chosen, judge, on_step) for row in rows]


def _but_this(row: Sensitivity, network: Network, judge: Evaluator, on_step: Step) -> Sensitivity:
    on_step(f"all but {row.name}")
    return replace(row, but_this=judge.quality(network.model(set(network.names) - {row.name})))


def _candidates(layer: LayerPlan, network: Network) -> list[LayerPlan]:
    """This layer with the ranges of each method, without those that come to the same."""
    one = network.statistics[layer.name]
    found: list[LayerPlan] = []
    for method in METHODS.values():
        made = replace(layer, input=method(one.input), output=method(one.output))
        if not any(_alike(made, other) for other in found):
            found.append(made)
    return found


def _alike(a: LayerPlan, b: LayerPlan) -> bool:
    pairs = ((a.input, b.input), (a.output, b.output))
    return all(np.allclose((x.low, x.high), (y.low, y.high), rtol=ALIKE, atol=0) for x, y in pairs)


def search(
    network: Network, judge: Evaluator, budget: Budget, rows: Sequence[Sensitivity], mel: NDArray[np.float32], on_step: Step
) -> tuple[list[Point], Point | None]:
    """The fastest set within the budget.

    Layers are added in the order of what they cost for what they gain; then those that follow are tried one by one. Kernels are
    not all of the time (a lone INT8 layer pays for rounding on both sides), so every set is timed as a whole, all in turn.

    Returns:
        All measured sets, the float graph first, and the fastest that holds (None if that is the float graph).
    """
    reference = judge.quality(network.model(()))
    order = sorted((r for r in rows if r.float_seconds > r.int8_seconds), key=lambda r: _price(r, reference))
    points = [Point((), reference)]
    sizes = sorted({round(x) for x in np.linspace(1, len(order), POINTS)})
    for size in sizes:
        on_step(f"the first {size} layers")
        points.append(_measured(network, judge, [r.name for r in order[:size]]))
    holding = [p for p in points if budget.holds(p.quality, reference, SHARE_USED)]
    best = max(holding, key=lambda p: len(p.names))
    for row in order:
        if row.name in best.names or row.alone.above(reference) > budget.log_mel:
            continue
        on_step(f"also {row.name}")
        tried = _measured(network, judge, [*best.names, row.name])
        points.append(tried)
        if budget.holds(tried.quality, reference, SHARE_USED):
            best = tried
    on_step("timing the sets")
    timed = _timed(network, points, mel)
    fitting = [p for p in timed if budget.holds(p.quality, reference, SHARE_USED)]
    fastest = min(fitting, key=lambda p: p.seconds)
    return timed, fastest if fastest.names else None


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in both time and log-mel error, fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, p.quality.log_mel_error)):
        if not kept or point.quality.log_mel_error < kept[-1].quality.log_mel_error:
            kept.append(point)
    return kept


def _price(row: Sensitivity, reference: Quality) -> float:
    return max(row.alone.above(reference), 1e-6) / (row.float_seconds - row.int8_seconds)


def _measured(network: Network, judge: Evaluator, names: Sequence[str]) -> Point:
    ordered = tuple(name for name in network.names if name in set(names))
    return Point(ordered, judge.quality(network.model(ordered)))


def _timed(network: Network, points: Sequence[Point], mel: NDArray[np.float32]) -> list[Point]:
    models = {str(i): network.model(point.names, "interior") for i, point in enumerate(points)}
    seconds = timing.seconds(models, mel)  # the least of each: what a busy machine does to a run only adds
    return [replace(point, seconds=float(seconds[str(i)].min())) for i, point in enumerate(points)]
