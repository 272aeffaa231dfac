"""Counters for a service to scrape."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

RECENT = 2048
RATE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. Totals count from the load on and only grow; rates are a scraper's difference of two of them."""

    queue_windows: int
    """Windows waiting now."""
    queue_requests: int
    """Requests with windows waiting now."""
    requests: int
    """Let in so far: utterances, and pushes of streams."""
    rejected: int
    """Refused because the queue was full."""
    cancelled: int
    """Ended by their caller."""
    failed: int
    """Ended by an error."""
    windows: int
    """Computed so far."""
    runs: int
    """Engine runs they took."""
    busy_seconds: float
    """Time spent in those runs, over all workers."""
    windows_per_second: float
    """Computed in the last ten seconds, per second."""
    batch_fill: float
    """Windows per run over the batch limit, mean since the load; 0 before the first run."""
    latency_seconds: tuple[float, float, float]
    """p50, p90 and p99 of the last 2048 requests, from coming in to done; 0 before the first."""
    underruns: int
    """Times that a stream's audio came after its listener had run out."""


@dataclass(slots=True)
class Counters:
    """Counts; the caller holds the lock."""

    requests: int = 0
    rejected: int = 0
    cancelled: int = 0
    failed: int = 0
    windows: int = 0
    runs: int = 0
    underruns: int = 0
    busy_seconds: float = 0.0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    lately: deque[tuple[float, int]] = field(default_factory=deque)

    def ran(self, windows: int, seconds: float) -> None:
        """One engine run."""
        self.windows += windows
        self.runs += 1
        self.busy_seconds += seconds
        self.lately.append((time.monotonic(), windows))
        self._forget()

    def _forget(self) -> None:
        while self.lately and self.lately[0][0] < time.monotonic() - RATE_SECONDS:
            self.lately.popleft()

    def stats(self, queue_windows: int, queue_requests: int, batch: int) -> Stats:
        """What stands now."""
        self._forget()
        recent = np.percentile(self.latencies, (50, 90, 99), method="higher") if self.latencies else (0.0, 0.0, 0.0)
        return Stats(
            queue_windows=queue_windows,
            queue_requests=queue_requests,
            requests=self.requests,
            rejected=self.rejected,
            cancelled=self.cancelled,
            failed=self.failed,
            windows=self.windows,
            runs=self.runs,
            busy_seconds=self.busy_seconds,
            windows_per_second=sum(windows for _, windows in self.lately) / RATE_SECONDS,
            batch_fill=self.windows / (self.runs * batch) if self.runs else 0.0,
            latency_seconds=(float(recent[0]), float(recent[1]), float(recent[2])),
            underruns=self.underruns,
        )
