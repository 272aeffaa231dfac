"""Interleaved timing: every contender once per round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime's thread pools spin for 20 to 50 ms after a run, on the cores that the next contender is about to need.
SETTLE = 0.06
# A contender is warm when a run is not this much faster than the best of those before it; at most so many runs.
WARM = 0.97
MOST_WARMUP = 12
# Half of the runs within this much of the median is what a quiet machine gives.
QUIET = 0.1


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each counted run, in the order of the rounds."""

    seconds: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    def percentile(self, percent: float) -> float:
        """Seconds that so many of the runs stay within; an order statistic, not a fitted normal distribution."""
        return float(np.percentile(self.seconds, percent, method="higher"))

    @property
    def unrest(self) -> float:
        """Width of the middle half of the runs over the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float((high - low) / self.median)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """This run's time over the other's of the same round: median, and the bounds of its 95 % interval."""
        return median_interval(self.seconds / other.seconds)


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median, and the order statistics that hold the true one in 95 of 100 cases, whatever the distribution.

    The number of values below the true median is binomial with probability 1/2 (Conover, Practical Nonparametric Statistics, 3.2).
    """
    ordered = np.sort(values)
    n = len(ordered)
    reach = 0.98 * np.sqrt(n)  # 1.96 standard deviations of that number
    low, high = int(np.floor(n / 2 - reach)), int(np.ceil(n / 2 + reach))
    return float(np.median(ordered)), float(ordered[max(low, 0)]), float(ordered[min(high, n - 1)])


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time each contender once per round, the order shuffled (by a fixed seed) and a short rest before each; each is warm before.

    Args:
        contenders: What to run, by name.
        rounds: Counted rounds.
    """
    for run in contenders.values():
        warm_up(run)
    names = list(contenders)
    shuffle = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in (names[i] for i in shuffle.permutation(len(names))):
            time.sleep(SETTLE)
            seconds[name].append(timed(contenders[name]))
    return {name: Timing(np.array(values)) for name, values in seconds.items()}


def warm_up(run: Callable[[], object]) -> None:
    """Run until a run brings nothing new."""
    best = timed(run)
    for _ in range(MOST_WARMUP):
        took = timed(run)
        if took > WARM * best:
            return
        best = took


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def noise_note(timings: Mapping[str, Timing]) -> str:
    """A sentence on what the machine's unrest makes uncertain; empty if it was quiet."""
    unrest = max((timing.unrest for timing in timings.values()), default=0.0)
    if unrest <= QUIET:
        return ""
    return f"The machine was busy: the middle half of a contender's runs spans {100 * unrest:.0f} % of its median. Only the ratios hold."
