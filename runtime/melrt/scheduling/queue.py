"""In-flight batching: windows of all requests, of any length, share the backend's runs.

A request is a plan of windows over frames. A worker takes the next window of the most urgent request, adds windows of the same
shape from other requests up to the batch limit, and runs them together. A failed request does not affect the others.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from concurrent.futures import Future
from itertools import islice
from typing import Any

from melrt.backends.base import Backend
from melrt.errors import BackendError, ClosedError, OverdueError, QueueFullError
from melrt.planning.windows import Policy
from melrt.scheduling.limits import Limits
from melrt.scheduling.request import Job, Request
from melrt.scheduling.stats import Counters, Stats

# Interval in seconds at which a task looks for room in a full queue; a window takes several times as long on a CPU.
ROOM_POLL = 0.002


class RequestQueue:
    """The queue and its workers. The threads start with the first request and belong to the process that loaded the voice."""

    def __init__(self, backend: Backend, policy: Policy, limits: Limits) -> None:
        self.backend = backend
        self.policy = policy
        self.limits = limits
        self._counters = Counters()
        self._pid = os.getpid()
        self._requests: list[Request] = []  # those with windows waiting
        self._waiting_windows = 0
        self._closing = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        _at_exit.add(self)

    def submit(self, request: Request) -> Future[Any]:
        """Queue a request, waiting for room as the limits say. Its future ends with the result or an error, and can be cancelled.

        Raises:
            QueueFullError: There is no room, and the limits say not to wait (longer).
            ClosedError: The queue was closed.
            BackendError: This process was forked after the vocoder was loaded.
        """
        self._check_process()
        self._watch_cancellation(request)
        # a worker that waited for room, in the callback of a future, would wait for itself
        until = time.monotonic() if threading.current_thread() in self._threads else self._room_deadline()
        with self._changed:
            while not self._try_enqueue(request):
                self._check_room_deadline(until)
                self._changed.wait(None if until is None else until - time.monotonic())
        return request.future

    async def submit_async(self, request: Request) -> Future[Any]:
        """Queue a request like `submit`, without blocking the event loop while it waits for room."""
        self._check_process()
        self._watch_cancellation(request)
        until = self._room_deadline()
        while True:
            with self._changed:
                if self._try_enqueue(request):
                    break
                self._check_room_deadline(until)
            await asyncio.sleep(ROOM_POLL)
        return request.future

    def count_underrun(self) -> None:
        """Count that a stream's audio came after its playback had run out."""
        with self._changed:
            self._counters.underruns += 1

    def stats(self) -> Stats:
        """Return a snapshot of the counters."""
        self._check_process()
        with self._changed:
            return self._counters.stats(self._waiting_windows, len(self._requests), self.policy.batch)

    def close(self, *, drain: bool = True) -> None:
        """Refuse further requests and end the workers: after the queue is empty, or (not `drain`) with ClosedError for what waits."""
        for thread in self.stop(drain=drain):
            if thread is not threading.current_thread():
                thread.join()

    def stop(self, *, drain: bool) -> list[threading.Thread]:
        """Begin to close, and return the workers without waiting for them."""
        if self._pid != os.getpid():
            return []  # the workers, and perhaps a held lock, belong to the parent process
        with self._changed:
            self._closing = True
            dropped = [] if drain else list(self._requests)
            self._changed.notify_all()
        for request in dropped:
            self._fail(request, ClosedError("the vocoder was closed before this was computed."))
        return self._threads

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise BackendError(f"this vocoder was loaded in process {self._pid}; its threads did not survive the fork. Load one here.")

    def _room_deadline(self) -> float | None:
        """Return the time until which a caller waits for room; None for no limit."""
        if not self.limits.wait:
            return time.monotonic()
        return None if self.limits.wait_timeout is None else time.monotonic() + self.limits.wait_timeout

    def _check_room_deadline(self, until: float | None) -> None:
        if until is not None and time.monotonic() >= until:
            self._counters.rejected += 1
            raise QueueFullError(
                f"{self._waiting_windows} windows are waiting, the limit is {self.limits.max_windows}; "
                "try again later, or raise Limits.max_windows."
            )

    def _try_enqueue(self, request: Request) -> bool:
        """Queue a request if there is room. The caller holds the lock."""
        if self._closing:
            raise ClosedError("the vocoder is closed; load it again.")
        if request.waiting:
            if self._waiting_windows >= self.limits.max_windows:
                return False
            self._start_threads()  # first, so that nothing is queued if a thread cannot start
            self._requests.append(request)
            self._waiting_windows += len(request.waiting)
            self._changed.notify_all()
        else:
            request.ended = True
            request.future.set_result(request.result)
        self._counters.requests += 1
        return True

    def _watch_cancellation(self, request: Request) -> None:
        """Register for a cancellation before the request is queued, since workers may end it from then on."""
        # weak, or request and future would keep each other and their audio alive until a garbage collection
        reference = weakref.ref(request)
        request.future.add_done_callback(lambda future: self._on_cancel(reference()) if future.cancelled() else None)

    def _start_threads(self) -> None:
        while len(self._threads) < self.policy.workers:
            thread = threading.Thread(target=self._work, name=f"melrt-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._requests:
                    if self._closing:
                        return
                    self._changed.wait()
                overdue = self._overdue()
                jobs = [] if overdue else self._take()
            for request in overdue:
                self._fail(request, OverdueError(f"the audio was not done within {self.limits.timeout} s; the service is overloaded."))
            self._run(jobs)

    def _overdue(self) -> list[Request]:
        """Return the requests that have waited longer than `Limits.timeout`. The caller holds the lock."""
        if self.limits.timeout is None:
            return []
        since = time.monotonic() - self.limits.timeout
        return [request for request in self._requests if request.arrival < since]

    def _take(self) -> list[Job]:
        """Take the windows of one run: the most urgent one, and others of its shape from any request. The caller holds the lock."""
        first = min(self._requests, key=lambda request: request.urgency)
        job = first, first.waiting[0]
        if self.policy.batch > 1:
            self._await_batch(job)
        jobs: list[Job] = []
        for request in sorted(self._requests, key=lambda request: request.urgency):
            matching = (window for window in request.waiting if _same_shape((request, window), job))
            for window in list(islice(matching, self.policy.batch - len(jobs))):
                request.waiting.remove(window)
                jobs.append((request, window))
            if not request.waiting:
                self._requests.remove(request)
            if len(jobs) == self.policy.batch:
                break
        self._waiting_windows -= len(jobs)
        self._changed.notify_all()
        return jobs

    def _await_batch(self, job: Job) -> None:
        """Wait up to `Limits.max_batch_delay` for more windows of this shape. The caller holds the lock; waiting releases it."""
        until = time.monotonic() + self.limits.max_batch_delay
        while not self._closing and (left := until - time.monotonic()) > 0:
            matching = sum(_same_shape((request, window), job) for request in self._requests for window in request.waiting)
            if matching >= self.policy.batch or not matching:
                return
            self._changed.wait(left)

    def _run(self, jobs: list[Job]) -> None:
        """Run a batch and deliver. If it fails, each window runs alone, so that only the request at fault fails."""
        jobs = [(request, window) for request, window in jobs if not request.ended and not request.future.cancelled()]
        if not jobs:
            return
        start = time.monotonic()
        try:
            jobs[0][0].execute(self.backend, jobs)
        except Exception as error:  # any error of a backend belongs to the request and must not end the worker
            if len(jobs) == 1:
                self._fail(jobs[0][0], error)
            else:
                for job in jobs:
                    self._run([job])
            return
        with self._changed:
            self._counters.ran(len(jobs), time.monotonic() - start)
        for request, _ in jobs:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        """Count a window as done; the last one delivers the result."""
        with self._changed:
            request.unfinished -= 1
            if request.unfinished or not self._end(request):
                return
            self._counters.latencies.append(time.monotonic() - request.arrival)
        self._notify(request, completed=True)
        request.future.set_result(request.result)

    def _fail(self, request: Request, error: Exception) -> None:
        self._remove(request)
        with self._changed:
            if not self._end(request):
                return
            self._counters.failed += 1
        self._notify(request, completed=False)
        request.future.set_exception(error)

    def _end(self, request: Request) -> bool:
        """Return True for the first caller that ends this request, unless it was cancelled. The caller holds the lock."""
        if request.ended:
            return False
        request.ended = True
        return request.future.set_running_or_notify_cancel()

    def _on_cancel(self, request: Request | None) -> None:
        """Free the windows of a cancelled request and wake the waiters of its future."""
        if request is not None:
            self._remove(request)
            self._notify(request, completed=False)
        with self._changed:
            self._counters.cancelled += 1
            if request is not None:
                self._end(request)

    def _notify(self, request: Request, *, completed: bool) -> None:
        if request.on_end is not None:
            request.on_end(request, completed)

    def _remove(self, request: Request) -> None:
        with self._changed:
            if request in self._requests:
                self._requests.remove(request)
                self._waiting_windows -= len(request.waiting)
                request.waiting.clear()
                self._changed.notify_all()


def _same_shape(one: Job, other: Job) -> bool:
    (one_request, one_window), (other_request, other_window) = one, other
    return (one_request.kind, one_window.graph, one_window.frames) == (other_request.kind, other_window.graph, other_window.frames)


_at_exit: weakref.WeakSet[RequestQueue] = weakref.WeakSet()


def _close_all() -> None:
    """End every worker's run before the interpreter exits: a worker that is killed inside an engine's run aborts the process."""
    for queue in list(_at_exit):
        queue.close(drain=False)


atexit.register(_close_all)
