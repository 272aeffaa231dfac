"""In-flight batching: windows of all requests, of any length, share the backend's runs.

A request is a plan of windows over frames. A worker takes the next window of the most urgent request, adds windows of the same
shape from other requests up to the batch limit, and runs them together. A failed request does not affect the others.

A request never waits while a lane is free: batches form from what arrives while all lanes are busy. A blocking call that finds the
queue empty runs in the caller's own thread, which saves two changes of thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from melrt.backends.base import Backend
from melrt.errors import BackendError, ClosedError, OverdueError, QueueFullError
from melrt.planning.windows import Policy
from melrt.scheduling import at_exit
from melrt.scheduling.delivery import Delivery
from melrt.scheduling.limits import Limits
from melrt.scheduling.request import Job, Request
from melrt.scheduling.stats import Counters, Stats
from melrt.scheduling.waiting import WaitingWindows
from melrt.scheduling.workers import Usage, Workers

# Interval in seconds at which a task looks for room in a full queue; a window takes several times as long on a CPU.
ROOM_POLL = 0.002
# Overdue requests are looked for this many times within `Limits.timeout`.
TIMEOUT_CHECKS = 20
# Seconds that `close` waits for the end of a run. A run takes below a second on a CPU; engines of the largest profile take less.
CLOSE_TIMEOUT = 30.0


class RequestQueue:
    """The requests of one voice. Its windows run on `workers`, which it may share with the queues of other voices."""

    def __init__(self, backend: Backend, policy: Policy, limits: Limits, workers: Workers | None = None) -> None:
        """Make a queue.

        Args:
            backend: Backend that runs the windows.
            policy: Windows that the backend runs.
            limits: Limits on what may wait.
            workers: Workers of the device; None for workers of its own, which end with the queue.
        """
        self.backend = backend
        self.policy = policy
        self.limits = limits
        self.lanes = policy.workers
        """Largest number of runs at the same time."""
        self.usage = Usage()
        """Lane time that the windows have used."""
        self._shared = workers is not None
        self._workers = workers or Workers()
        self._counters = Counters()
        self._waiting = WaitingWindows()
        self._closing = False
        self._finisher: int | None = None  # identifier of the thread that closes the backend
        self.ended = False
        """True once the queue is closed, nothing runs any more and the backend is closed."""
        self._next_timeout_check = 0.0
        self._lock = self._workers.lock
        self._delivery = Delivery(backend, self._lock, self._counters, self._remove)
        self._workers.add(self)
        at_exit.queues.add(self)

    @property
    def windows_waiting(self) -> int:
        """Number of windows that wait."""
        return self._waiting.windows

    @property
    def busy(self) -> bool:
        """True if a window waits or runs."""
        with self._lock:
            return not self._idle

    @property
    def closed(self) -> bool:
        """True if requests are refused, since the queue was closed."""
        return self._closing

    @property
    def inside(self) -> bool:
        """True in a thread that runs windows now, so in a callback of the queue; waiting there for others could wait for itself."""
        return self._workers.inside

    def submit(self, request: Request, *, run_here: bool = False) -> Future[Any]:
        """Queue a request, waiting for room as the limits say. Its future ends with the result or an error, and can be cancelled.

        Args:
            request: The request.
            run_here: Run its windows in this thread if nothing else waits and a lane is free, or if this thread runs a callback of the
                queue; for a caller that waits for the result anyway.

        Raises:
            QueueFullError: There is no room, and the limits say not to wait (longer).
            ClosedError: The queue was closed.
            BackendError: This process was forked after the vocoder was loaded.
        """
        self.check_process()
        inside = self.inside
        try:
            if inside and run_here:
                return self._run_inside(request)
            jobs = self._take_lone(request) if run_here else []
            if not jobs:
                self._delivery.watch(request, self._workers)
                jobs = self._enqueue([request], run_here, inside)
            self._run_here(request, jobs)
        except BaseException as error:  # an interrupt must not leave windows or a lane behind
            lane = not inside and threading.get_ident() in self._workers.runners
            if request.waiting or lane:
                self._delivery.fail(request, error)
            if lane:
                self._workers.leave_lane()
            raise
        return request.future

    def submit_all(self, requests: Sequence[Request]) -> list[Future[Any]]:
        """Queue requests like `submit`, before a worker takes any of them: their windows fill runs from the first one on."""
        if self.inside:
            return [self.submit(request, run_here=True) for request in requests]
        self.check_process()
        try:
            for request in requests:
                self._delivery.watch(request, self._workers)
            self._enqueue(requests)
        except BaseException:
            for request in requests:
                request.future.cancel()
            raise
        return [request.future for request in requests]

    def _enqueue(self, requests: Sequence[Request], run_here: bool = False, inside: bool = False) -> list[Job]:
        """Queue requests once there is room, and return the windows of the first run of the first one if that is for this thread."""
        until = time.monotonic() if inside else self.limits.room_deadline()  # a worker that waited for room would wait for itself
        with self._lock:
            run_here = run_here and not self._workers.busy
            for request in requests:
                while not self._try_enqueue(request):
                    self._workers.changed.notify_all()  # only runs of those that are queued make room
                    self._check_room_deadline(until)
                    self._workers.room.wait(None if until is None else until - time.monotonic())
            # at once, or a worker that has just started would take it
            return self._take_own(requests[0], run_here) if requests else []

    def _take_lone(self, request: Request) -> list[Job]:
        """Take a lane for a request of one window, past the queue, if no window of any queue waits; nothing if that is not so.

        The caller waits for the request, so nobody can cancel it, and no worker has to know of it.
        """
        with self._lock:
            self._check_open()
            if len(request.windows) != 1 or not self._workers.take_lane(self):
                return []
            self._count(request)
        return [(request, request.windows[0])]

    async def submit_async(self, request: Request) -> Future[Any]:
        """Queue a request like `submit`, without blocking the event loop while it waits for room."""
        self.check_process()
        self._delivery.watch(request, self._workers)
        until = self.limits.room_deadline()
        while True:
            with self._lock:
                if self._try_enqueue(request):
                    self._workers.changed.notify_all()
                    break
                self._check_room_deadline(until)
            await asyncio.sleep(ROOM_POLL)
        return request.future

    def count_underrun(self) -> None:
        """Count that a stream's audio came after its playback had run out."""
        with self._lock:
            self._counters.underruns += 1

    def count_clipped(self, samples: int) -> None:
        """Count samples that an encoding clipped."""
        with self._lock:
            self._counters.clipped += samples

    def stats(self) -> Stats:
        """Return a snapshot of the counters."""
        self.check_process()
        with self._lock:
            return self._counters.stats(self._waiting.windows, self._waiting.requests, self.policy.batch)

    def close(self, *, drain: bool = True, timeout: float = CLOSE_TIMEOUT) -> None:
        """Refuse further requests and close the backend: after the queue is empty, or (not `drain`) with ClosedError for what waits.

        In a callback of the queue this method returns before the backend is closed.

        Args:
            drain: Complete the waiting requests.
            timeout: Longest wait in seconds for the end of any one run.

        Raises:
            BackendError: No run ended for `timeout` seconds. Every request has ended with this error, and the backend is closed if the
                run ends after all.
        """
        self.stop(drain=drain)
        if self._workers.foreign or self.inside or self._finisher == threading.get_ident():
            return  # in a forked child the lock may be held by a thread of the parent
        if not self._wait_for_runs(timeout):
            self._give_up(timeout)
        self._finish()
        with self._lock:
            while not self.ended:
                self._workers.changed.wait()
        if not self._shared:
            for thread in self._workers.threads:
                thread.join()

    def stop(self, *, drain: bool) -> None:
        """Begin to close like `close`, and return without waiting."""
        if self._workers.foreign:
            return
        with self._lock:
            self._closing = True
            dropped = [] if drain else self._waiting.all()
            self._workers.changed.notify_all()
            self._workers.room.notify_all()
        for request in dropped:
            self._delivery.fail(request, ClosedError("the vocoder was closed before this was computed."))
        self._finish()

    def check_process(self) -> None:
        """Raise BackendError in a forked child. This comes before any lock, which a thread of the parent may have held."""
        self._workers.check_process()

    def next_deadline(self) -> float:
        """Return the deadline of the most urgent window. At least one waits."""
        return self._waiting.next_deadline()

    def take(self) -> list[Job]:
        """Remove the windows of one run. The caller holds the lock."""
        return self._waiting.take(self.policy.batch)

    def run(self, jobs: list[Job]) -> None:
        """Run windows and deliver their audio. No error of a backend or callback ends the worker."""
        try:
            self._fail_overdue(jobs)
            self._delivery.run(jobs)
        except BaseException as error:  # such as SystemExit in a backend
            for request, _ in jobs:
                self._delivery.fail(request, BackendError(f"{self.backend.name} raised {type(error).__name__}: {error}"))

    def ran(self, seconds: float) -> None:
        """Count lane time, and complete a closing that waited for the end of this run."""
        with self._lock:
            self.usage.add(seconds, self._counters.window_seconds)
        self._finish()

    def _finish(self) -> None:
        """Close the backend once the queue is closed and nothing of it waits or runs."""
        if not self._closing:  # a `stop` that follows looks again, after this thread has left its lane
            return
        with self._lock:
            if self._finisher is not None or not self._idle:
                return
            self._finisher = threading.get_ident()
            self._workers.remove(self)
        try:
            self.backend.close()
        finally:
            with self._lock:
                self.ended = True
                self._workers.changed.notify_all()
            if not self._shared:
                self._workers.end()

    def _wait_for_runs(self, timeout: float) -> bool:
        """Wait until no window waits or runs, in a worker or in a caller's thread; return False if no run ends within the time."""
        begin = time.monotonic()
        with self._lock:
            while not self._idle:
                left = max(begin, self.usage.last_run) + timeout - time.monotonic()
                if left <= 0:
                    return False
                self._workers.changed.wait(left)
        return True

    def _give_up(self, timeout: float) -> None:
        """End the requests of a backend that does not return, and raise BackendError."""
        error = BackendError(
            f"{self.backend.name} on {self.backend.device} has not ended a run for {timeout:g} s, or a callback waits. Its memory is not "
            "freed. If it does not return, end this process."
        )
        with self._lock:
            requests = [*self._waiting.all(), *self._delivery.running()]
        at_exit.queues.discard(self)  # the exit would wait for the same run
        for request in requests:
            self._delivery.fail(request, error)
        raise error

    @property
    def _idle(self) -> bool:
        return not self._waiting.windows and not self._workers.runs(self)

    def _check_room_deadline(self, until: float | None) -> None:
        if until is not None and time.monotonic() >= until:
            self._counters.rejected += 1
            raise QueueFullError(
                f"{self._waiting.windows} windows are waiting, the limit is {self.limits.max_windows}; try again later, "
                "or raise Limits.max_windows."
            )

    def _try_enqueue(self, request: Request) -> bool:
        """Queue a request if there is room. The caller holds the lock, and wakes the workers."""
        self._check_open()
        if request.windows:
            if self._waiting.windows >= self.limits.max_windows:
                return False
            self._workers.start_threads()  # first, so that nothing is queued if a thread cannot start
            self._waiting.add(request)
            self._workers.update(self)
        self._count(request)
        return True

    def _count(self, request: Request) -> None:
        """Count an admitted request, and end one without windows. The caller holds the lock."""
        self._counters.requests += 1
        if not request.windows:
            request.ended = True
            request.future.set_result(request.result)

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the vocoder is closed; load it again.")

    def _run_here(self, request: Request, jobs: list[Job]) -> None:
        """Run windows of a request in this thread while no other request waits and a lane is free; the workers take the others."""
        while jobs:
            start = time.monotonic()
            self._fail_overdue(jobs)
            self._delivery.run(jobs)
            self._workers.leave_lane(time.monotonic() - start)
            with self._lock:
                jobs = self._take_own(request) if request.waiting else []

    def _run_inside(self, request: Request) -> Future[Any]:
        """Run a request within a callback: this thread has a lane, and would wait for itself."""
        self._delivery.watch(request, self._workers)
        with self._lock:
            self._check_open()
            self._count(request)
        for window in request.windows:
            self._delivery.run([(request, window)])
        return request.future

    def _take_own(self, request: Request, here: bool = True) -> list[Job]:
        """Take windows of a request for this thread if `here`, no other waits and a lane is free; the workers take the others.

        The caller holds the lock.
        """
        alone = here and request.waiting and request.waiting == self._waiting.windows and self._workers.only(self)
        jobs = self._workers.take(self) if alone and self._workers.free_lane(self) else []
        if self._waiting.windows:
            self._workers.changed.notify_all()
        return jobs

    def _fail_overdue(self, jobs: list[Job]) -> None:
        """Fail the requests of these windows, and from time to time those that wait, that arrived before `Limits.timeout`."""
        if self.limits.timeout is None:
            return
        now = time.monotonic()
        since = now - self.limits.timeout
        overdue = [request for request, _ in jobs if request.arrival < since]
        if now >= self._next_timeout_check:
            self._next_timeout_check = now + self.limits.timeout / TIMEOUT_CHECKS
            with self._lock:
                overdue += self._waiting.arrived_before(since)
        for request in overdue:
            self._delivery.fail(request, OverdueError(f"the audio was not done within {self.limits.timeout} s; the service is overloaded."))

    def _remove(self, request: Request) -> None:
        with self._lock:
            self._waiting.remove(request)
            self._workers.update(self)
            self._workers.room.notify_all()
            self._workers.changed.notify_all()
        self._finish()
