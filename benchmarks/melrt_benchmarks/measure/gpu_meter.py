"""Time and energy of the first GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from melrt.system import find_gpu
from melrt.timing import Key, Timing, shuffled, timed, warm_up

# Seconds of one round of a loop: many calls of a fast contender, and at least one of a slow one.
LOOP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Loop:
    """Calls of one contender that follow each other without a pause."""

    timing: Timing
    """Seconds of a call, by round."""
    joules: float | None
    """Energy of the whole board for one call, idle power included; None where the GPU has no counter.

    The counter moves every 20 to 100 ms, so this is good to a tenth or so in fifteen rounds.
    """


def loop_times(calls: Mapping[Key, Callable[[], object]], rounds: int, energy: Callable[[], float] | None = None) -> dict[Key, Loop]:
    """Run each call in a loop for `LOOP_SECONDS`, once per round, in a shuffled order.

    Args:
        calls: Functions that return when their result is on the host.
        rounds: Number of rounds.
        energy: Reads the energy in joules that the GPU has used.
    """
    for call in calls.values():
        warm_up(call)
    seconds: dict[Key, list[float]] = {name: [] for name in calls}
    used: dict[Key, list[float]] = {name: [] for name in calls}
    for name in shuffled(calls, rounds):
        before = energy() if energy else 0.0
        count, elapsed = 0, 0.0
        while elapsed < LOOP_SECONDS:
            elapsed += timed(calls[name])
            count += 1
        seconds[name].append(elapsed / count)
        used[name].append((energy() - before) / count if energy else 0.0)
    return {name: Loop(Timing(np.array(seconds[name])), float(np.mean(used[name])) if energy else None) for name in calls}


class EventClock:
    """Clock of the GPU: it times work that is in order with PyTorch's current stream."""

    def __init__(self) -> None:
        cuda: Any = importlib.import_module("torch.cuda")
        self._begin, self._end = (cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call: Callable[[], object]) -> float:
        """Run once, and return the seconds between two events around it: the time that the GPU waits for launches is included."""
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1000


def open_energy_counter() -> Callable[[], float] | None:
    """Return a function that reads the energy in joules that the first GPU has used; None where nothing can read it."""
    if find_gpu() is None:
        return None
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        handle = nvml.device_get_handle_by_index_v2(0)
        nvml.device_get_total_energy_consumption(handle)
    except Exception:  # no such package, no NVML, or a GPU without this counter; their exceptions have no common base
        return None
    counter: Any = nvml
    return lambda: float(counter.device_get_total_energy_consumption(handle)) / 1000
