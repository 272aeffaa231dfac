"""Latency of a quiet voice beside flooded ones: the workers' order in simulated time, which does not depend on the machine."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import pytest

from melrt.scheduling.workers import Usage, Workers

LANES = 2
RUN_SECONDS = 0.02
# Requests of each flooded voice that wait.
WAITING = 64
SECONDS = 100.0
DEADLINE = 1.0


class Voice:
    """A queue whose windows take 0.8 to 1.2 times as long as the mean."""

    lanes = LANES

    def __init__(self, noise: np.random.Generator) -> None:
        self.usage = Usage()
        self.windows: list[tuple[float, int, Callable[[], None]]] = []
        self._noise, self._number = noise, 0

    @property
    def windows_waiting(self) -> int:
        return len(self.windows)

    def add(self, deadline: float, done: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self.windows, (deadline, self._number, done))

    def next_deadline(self) -> float:
        return self.windows[0][0]

    def take(self) -> list:
        return [(heapq.heappop(self.windows)[2], RUN_SECONDS * self._noise.uniform(0.8, 1.2))]

    def ran(self, seconds: float) -> None:
        self.usage.add(seconds, RUN_SECONDS)


class Simulation:
    """Voices on the workers of one device, whose clock jumps from event to event."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.workers, self.now, self._lane = Workers(), 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._free, self._number = list(range(LANES)), 0
        self._noise = np.random.default_rng(0)
        monkeypatch.setattr("melrt.scheduling.workers.threading.get_ident", lambda: self._lane)

    def voice(self) -> Voice:
        voice = Voice(self._noise)
        self.workers.add(voice)
        return voice

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (self.now + seconds, self._number, event))

    def request(self, voice: Voice, windows: int, done: Callable[[], None]) -> None:
        """Queue a request, and call `done` after its last window."""
        left = [windows]

        def end() -> None:
            left[0] -= 1
            if not left[0]:
                done()

        for _ in range(windows):
            voice.add(self.now + DEADLINE, end)
        self.workers.update(voice)
        self._fill_lanes()

    def run(self, seconds: float) -> None:
        with self.workers.lock:
            while self._events and self.now < seconds:
                self.now, _, event = heapq.heappop(self._events)
                event()

    def _fill_lanes(self) -> None:
        while self._free and (voice := self.workers._next()) is not None:
            lane = self._lane = self._free.pop()
            ((done, seconds),) = self.workers.take(voice)
            self.after(seconds, lambda lane=lane, done=done, seconds=seconds: self._end(lane, done, seconds))  # type: ignore[misc]

    def _end(self, lane: int, done: Callable[[], None], seconds: float) -> None:
        self._lane = lane
        self._free.append(lane)
        self.workers.leave_lane(seconds)
        done()
        self._fill_lanes()


def p99(monkeypatch: pytest.MonkeyPatch, windows: int, interval: float, floods: int) -> float:
    """Return the 99th percentile of a quiet voice's latency beside flooded voices."""
    simulation, latencies = Simulation(monkeypatch), []
    quiet = simulation.voice()

    def ask() -> None:
        start = simulation.now

        def done() -> None:
            latencies.append(simulation.now - start)
            simulation.after(interval, ask)

        simulation.request(quiet, windows, done)

    def flood(voice: Voice) -> None:
        simulation.request(voice, 1, lambda: flood(voice))

    for voice in [simulation.voice() for _ in range(floods)]:
        for _ in range(WAITING):
            simulation.after(0.0, lambda voice=voice: flood(voice))  # type: ignore[misc]
    simulation.after(1.0, ask)
    simulation.run(SECONDS)
    return float(np.percentile(latencies, 99))


@pytest.mark.parametrize("floods", [1, 2, 20])
@pytest.mark.parametrize("windows", [1, 5])
def test_p99_of_a_quiet_voice_is_within_twice_its_unloaded_value(monkeypatch: pytest.MonkeyPatch, windows: int, floods: int) -> None:
    """The voice takes half of its fair share; the other voices are flooded."""
    interval = 2 * windows * RUN_SECONDS * (floods + 1) / LANES
    assert p99(monkeypatch, windows, interval, floods) < 2 * p99(monkeypatch, windows, interval, floods=0)
