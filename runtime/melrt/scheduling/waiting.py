"""The windows that wait, ordered so that choosing the next run costs O(log n) for n waiting windows."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from melrt.planning.windows import Window
from melrt.scheduling.request import Job, Request

# Entries of removed requests, which keep their frames alive, stay in the heaps until they are this many and the majority.
MAX_STALE = 32


class _Entry(NamedTuple):
    """One waiting window. Entries compare by urgency, then by the order in which they were added."""

    deadline: float
    arrival: float
    number: int
    request: Request
    window: Window


class WaitingWindows:
    """A heap per shape of run. Not safe for use by several threads, but `remove` may interrupt another method of the same thread."""

    def __init__(self) -> None:
        self._heaps: dict[tuple[str, str, int], list[_Entry]] = {}
        self._requests: dict[Request, None] = {}
        self._numbers = itertools.count()
        self._stale = 0
        self._busy = False
        self._removed_meanwhile: list[Request] = []
        self.windows = 0
        """Windows waiting."""

    @property
    def requests(self) -> int:
        """Requests with windows waiting."""
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Add all windows of a request."""
        with self._undisturbed():
            for window in request.windows:
                entry = _Entry(request.deadline, request.arrival, next(self._numbers), request, window)
                heapq.heappush(self._heaps.setdefault((request.kind, window.graph, window.frames), []), entry)
            request.waiting = len(request.windows)
            self._requests[request] = None
            self.windows += request.waiting

    def take(self, batch: int) -> list[Job]:
        """Remove the most urgent window and up to `batch - 1` others of its shape, the most urgent first; nothing if none waits."""
        with self._undisturbed():
            jobs: list[Job] = []
            heap = self._most_urgent()
            while heap and len(jobs) < batch:
                entry = heapq.heappop(heap)
                jobs.append((entry.request, entry.window))
                entry.request.waiting -= 1
                self.windows -= 1
                if not entry.request.waiting:
                    del self._requests[entry.request]
                self._drop_stale(heap)
            return jobs

    def next_deadline(self) -> float:
        """Return the deadline of the most urgent window, or infinity if none waits."""
        with self._undisturbed():
            heap = self._most_urgent()
            return heap[0].deadline if heap else math.inf

    def remove(self, request: Request) -> None:
        """Remove the windows of a request that still wait."""
        if self._busy:  # a signal handler or a garbage collection cancels a future in the middle of another method
            self._removed_meanwhile.append(request)
            return
        if request.waiting:
            self._stale += request.waiting
            self.windows -= request.waiting
            del self._requests[request]
            request.waiting = 0
            if self._stale > max(MAX_STALE, self.windows) or not self.windows:
                for heap in self._heaps.values():
                    heap[:] = [entry for entry in heap if entry.request.waiting]
                    heapq.heapify(heap)
                self._stale = 0

    def arrived_before(self, time: float) -> list[Request]:
        """Return the requests that wait and arrived before a time."""
        return [request for request in self.all() if request.arrival < time]

    def all(self) -> list[Request]:
        """Return the requests that wait, in the order in which they were added."""
        with self._undisturbed():
            return list(self._requests)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Postpone removals that interrupt the block."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            while self._removed_meanwhile:
                self.remove(self._removed_meanwhile.pop())

    def _most_urgent(self) -> list[_Entry]:
        """Return the heap with the most urgent window; empty if none waits."""
        for heap in self._heaps.values():
            self._drop_stale(heap)
        self._heaps = {shape: heap for shape, heap in self._heaps.items() if heap}
        return min(self._heaps.values(), key=lambda heap: heap[0][:3], default=[])

    def _drop_stale(self, heap: list[_Entry]) -> None:
        while heap and not heap[0].request.waiting:
            heapq.heappop(heap)
            self._stale -= 1
