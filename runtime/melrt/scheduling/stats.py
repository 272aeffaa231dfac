"""Counters for a service's monitoring."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

RECENT = 2048
RATE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of the counters. Totals count from the load on and only grow; a scraper takes rates from two of them."""

    queue_windows: int
    """Windows waiting now."""
    queue_requests: int
    """Requests with windows waiting now."""
    requests: int
    """Requests admitted so far: utterances, and pushes of streams."""
    rejected: int
    """Requests refused because the queue was full."""
    cancelled: int
    """Requests cancelled by their callers."""
    failed: int
    """Requests ended by an error."""
    windows: int
    """Windows computed so far."""
    runs: int
    """Engine runs that computed them."""
    busy_seconds: float
    """Time spent in those runs, over all workers."""
    windows_per_second: float
    """Windows per second over the last ten seconds."""
    batch_fill: float
    """Mean windows per run over the batch limit, since the load; 0 before the first run."""
    latency_seconds: tuple[float, float, float]
    """p50, p90 and p99 from arrival to completion over the last 2048 requests; 0 before the first."""
    underruns: int
    """Number of times that a stream's audio came after its playback had run out."""
    clipped: int
    """Samples clipped to full scale by an encoding other than float32; not counted where a GPU converts to int16."""


@dataclass(slots=True)
class Counters:
    """Counters of one queue. The caller holds the queue's lock."""

    requests: int = 0
    rejected: int = 0
    cancelled: int = 0
    failed: int = 0
    windows: int = 0
    runs: int = 0
    underruns: int = 0
    clipped: int = 0
    busy_seconds: float = 0.0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    recent_runs: deque[tuple[float, int]] = field(default_factory=deque)

    def ran(self, windows: int, seconds: float) -> None:
        """Count one engine run."""
        self.windows += windows
        self.runs += 1
        self.busy_seconds += seconds
        self.recent_runs.append((time.monotonic(), windows))
        self._drop_old_runs()

    @property
    def window_seconds(self) -> float:
        """Mean time of a window in seconds; 0 before the first."""
        return self.busy_seconds / self.windows if self.windows else 0.0

    def _drop_old_runs(self) -> None:
        while self.recent_runs and self.recent_runs[0][0] < time.monotonic() - RATE_SECONDS:
            self.recent_runs.popleft()

    def stats(self, queue_windows: int, queue_requests: int, batch: int) -> Stats:
        """Return a snapshot."""
        self._drop_old_runs()
        recent = np.percentile(self.latencies, (50, 90, 99), method="higher") if self.latencies else (0.0, 0.0, 0.0)
        names = ("requests", "rejected", "cancelled", "failed", "windows", "runs", "underruns", "clipped")
        totals = {name: getattr(self, name) for name in names}
        return Stats(
            **totals,
            queue_windows=queue_windows,
            queue_requests=queue_requests,
            busy_seconds=self.busy_seconds,
            windows_per_second=sum(windows for _, windows in self.recent_runs) / RATE_SECONDS,
            batch_fill=self.windows / (self.runs * batch) if self.runs else 0.0,
            latency_seconds=(float(recent[0]), float(recent[1]), float(recent[2])),
        )
