"""Interleaved timing: every contender once per round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime's thread pools spin for 20 to 50 ms after a run, on the cores that the next contender is about to need.
SETTLE = 0.06


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each counted run, in the order of the rounds."""

    seconds: NDArray[np.float64]

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def p90(self) -> float:
        """Seconds that 90 % of the runs stay under; an order statistic, not a fitted normal distribution."""
        return float(np.percentile(self.seconds, 90, method="higher"))

    def ratio_to(self, other: Timing) -> float:
        """Median of this run's time over the other's of the same round."""
        return float(np.median(self.seconds / other.seconds))


def interleave(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, Timing]:
    """Time each contender once per round, the order shuffled (by a fixed seed) and a short rest before each.

    Args:
        contenders: What to run, by name.
        rounds: Counted rounds.
        warmup: Rounds before those, not counted.
    """
    names = list(contenders)
    shuffle = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in (names[i] for i in shuffle.permutation(len(names))):
            time.sleep(SETTLE)
            start = time.perf_counter()
            contenders[name]()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(np.array(values)) for name, values in seconds.items()}
