"""Interleaved timing: every contender runs once per round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime's thread pools spin for 20 to 50 ms after a run and would keep cores from the next contender: wait this many seconds.
SETTLE = 0.06
# A contender is warm once a run takes more than this share of the best time so far.
WARM = 0.97
MAX_WARM_UP_RUNS = 12
# Largest spread on a quiet machine, and the largest at which the ratios of two contenders can still be trusted.
QUIET_SPREAD = 0.1
RELIABLE_SPREAD = 1.0

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of one contender."""

    seconds: NDArray[np.float64]
    """Seconds of each counted run, (rounds,), in the order of the rounds."""

    @property
    def median(self) -> float:
        """Median time in seconds."""
        return float(np.median(self.seconds))

    def percentile(self, percent: float) -> float:
        """Return the seconds that this percentage of the runs does not exceed: an order statistic, not a fitted distribution."""
        return float(np.percentile(self.seconds, percent, method="higher"))

    @property
    def spread(self) -> float:
        """Interquartile range of the times, as a share of the median."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float((high - low) / self.median)

    def ratio_to(self, other: Timing) -> tuple[float, float, float]:
        """Return the median of the per-round ratios of this time to the other, and the bounds of its 95 % interval."""
        return median_interval(self.seconds / other.seconds)


def median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the median, and two order statistics that enclose the true median with 95 % confidence for any distribution.

    The number of values below the true median is binomial with probability 1/2 (Conover, Practical Nonparametric Statistics, 3.2).
    """
    ordered = np.sort(values)
    n = len(ordered)
    reach = 0.98 * np.sqrt(n)  # 1.96 standard deviations of that number
    low, high = int(np.floor(n / 2 - reach)), int(np.ceil(n / 2 + reach))
    return float(np.median(ordered)), float(ordered[max(low, 0)]), float(ordered[min(high, n - 1)])


def interleave(
    contenders: Mapping[Key, Callable[[], object]], rounds: int, on_timed: Callable[[], None] = lambda: None, pause: float = SETTLE
) -> dict[Key, Timing]:
    """Warm up each contender, then time each one once per round, in a shuffled order (with a fixed seed) and after a short pause.

    Args:
        contenders: The functions to time, by name.
        rounds: Number of counted rounds.
        on_timed: Called after each counted run, `rounds * len(contenders)` times.
        pause: Seconds before each counted run.
    """
    for run in contenders.values():
        warm_up(run)
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    for name in shuffled(contenders, rounds):
        time.sleep(pause)
        seconds[name].append(timed(contenders[name]))
        on_timed()
    return {name: Timing(np.array(values)) for name, values in seconds.items()}


def shuffled(contenders: Iterable[Key], rounds: int) -> list[Key]:
    """Return each name once per round, in an order shuffled for each round (with a fixed seed)."""
    names, shuffle = list(contenders), np.random.default_rng(0)
    return [names[index] for _ in range(rounds) for index in shuffle.permutation(len(names))]


def compare_paired(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[Timing, Timing]:
    """Time two warm functions once per round without pauses, in alternating order, and return the timing of each."""
    seconds = np.empty((2, rounds))
    for turn in range(rounds):
        for index in ((1, 0), (0, 1))[turn % 2]:
            seconds[index, turn] = timed((first, second)[index])
    return Timing(seconds[0]), Timing(seconds[1])


def warm_up(run: Callable[[], object]) -> None:
    """Run until a run is no longer clearly faster than those before it."""
    best = timed(run)
    for _ in range(MAX_WARM_UP_RUNS):
        seconds = timed(run)
        if seconds > WARM * best:
            return
        best = seconds


def timed(run: Callable[[], object]) -> float:
    """Run once and return the seconds it took."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def noise_note(timings: Mapping[str, Timing]) -> str:
    """Return a sentence that says which figures the noise of the machine makes unreliable; empty if the machine was quiet."""
    spread = max((timing.spread for timing in timings.values()), default=0.0)
    if spread <= QUIET_SPREAD:
        return ""
    fact = f"The machine was busy: the middle half of a contender's runs spans {100 * spread:.0f} % of its median."
    if spread > RELIABLE_SPREAD:
        return f"{fact} Not even the ratios are reliable; repeat the benchmark on an idle machine."
    return f"{fact} Only the ratios are reliable."
