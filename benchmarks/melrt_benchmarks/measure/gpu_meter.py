"""Time, energy and memory by the GPU's own clock and counters. These readings have not been confirmed on a GPU yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from melrt.system import find_gpu

# The energy counter moves every 20 to 100 ms: a reading over this long is good to a few percent.
ENERGY_SECONDS = 1.0
TIMED_CALLS = 15


@dataclass(frozen=True, slots=True)
class Reading:
    """GPU time and energy of one call."""

    milliseconds: float
    """Median time between two events on a separate stream."""
    joules: float | None
    """Energy of the whole board, idle power included; None where the GPU has no counter."""


class GpuMeter:
    """Meter of the first GPU, read through its driver and NVML.

    Raises:
        ImportError: cuda-core is not installed.
    """

    def __init__(self) -> None:
        from cuda.bindings import nvml
        from cuda.core import Device, EventOptions

        device = Device(0)
        device.set_current()
        self._stream = device.create_stream()
        self._timed = EventOptions(timing_enabled=True)
        nvml.init_v2()
        self._nvml: Any = nvml
        self._handle = nvml.device_get_handle_by_index_v2(0)

    def read(self, call: Callable[[], object]) -> Reading:
        """Measure a call that returns when its result is on the host."""
        times = sorted(self._milliseconds(call) for _ in range(TIMED_CALLS))
        return Reading(times[TIMED_CALLS // 2], self._joules(call))

    def _milliseconds(self, call: Callable[[], object]) -> float:
        begin = self._stream.record(options=self._timed)
        begin.sync()
        call()
        end = self._stream.record(options=self._timed)
        end.sync()
        return float(end - begin)

    def _joules(self, call: Callable[[], object]) -> float | None:
        try:
            before = self._nvml.device_get_total_energy_consumption(self._handle)
        except self._nvml.NvmlError:
            return None
        calls, start = 0, time.perf_counter()
        while time.perf_counter() - start < ENERGY_SECONDS:
            call()
            calls += 1
        return float(self._nvml.device_get_total_energy_consumption(self._handle) - before) / 1000 / calls


def open_meter() -> GpuMeter | None:
    """Return a meter of the first GPU; None without a GPU or without the packages that read it."""
    if find_gpu() is None:
        return None
    try:
        return GpuMeter()
    except ImportError:
        return None
