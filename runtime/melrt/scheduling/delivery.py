"""Delivery: runs batches, and ends each request exactly once with its result, an error or a cancellation."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from melrt.backends.base import Backend
from melrt.scheduling.request import Job, Request
from melrt.scheduling.stats import Counters
from melrt.scheduling.workers import Workers

logger = logging.getLogger(__name__)


class Delivery:
    """The second half of a queue: what happens to windows once they are taken. Safe for use by several threads."""

    def __init__(self, backend: Backend, lock: threading.RLock, counters: Counters, remove: Callable[[Request], None]) -> None:
        """Prepare the delivery of a queue.

        Args:
            backend: Backend that runs the windows.
            lock: Lock of the queue, which guards `Request.ended` and the counters.
            counters: Counters of the queue.
            remove: Function that removes the windows of a request from the queue.
        """
        self._backend = backend
        self._lock = lock
        self._counters = counters
        self._remove = remove
        self._running: dict[int, list[Job]] = {}

    def run(self, jobs: list[Job]) -> None:
        """Run a batch and deliver. If it fails, each window runs alone, so that only the request at fault fails."""
        jobs = self._alive(jobs)
        if not jobs:
            return
        self._running[id(jobs)] = jobs
        try:
            self._run(jobs)
        finally:
            del self._running[id(jobs)]

    def _run(self, jobs: list[Job]) -> None:
        start, failure = time.monotonic(), None
        try:
            jobs[0][0].execute(self._backend, jobs)
        except Exception as error:  # any error of a backend belongs to the request and must not end the worker
            failure = error
        if failure is None:
            with self._lock:
                self._counters.ran(len(jobs), time.monotonic() - start)
            for request, _ in jobs:
                self._finish(request)
        elif len(jobs) == 1:
            self.fail(jobs[0][0], failure)
        else:
            failure = None
            while jobs:  # emptied, since the traceback of a failed retry refers to this frame and would keep the whole batch
                self.run([jobs.pop(0)])

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error, unless it has ended, and free its windows."""
        self._remove(request)
        with self._lock:
            if not self._end(request):
                return
            self._counters.failed += 1
        _notify(request, completed=False)
        _deliver(request.future.set_exception, error)

    def running(self) -> list[Request]:
        """Return the requests whose windows run now, or whose callbacks do."""
        return [request for jobs in list(self._running.values()) for request, _ in list(jobs)]

    def watch(self, request: Request, workers: Workers) -> None:
        """Register for a cancellation before the request is queued, since workers may end it from then on."""
        # weak, or request and future would keep each other and their audio alive until a garbage collection
        reference = weakref.ref(request)

        def done(future: Future[Any]) -> None:
            if future.cancelled() and not workers.foreign:
                self._cancel(reference())

        request.future.add_done_callback(done)
        request.future.waits_for_itself = lambda: workers.inside

    def _cancel(self, request: Request | None) -> None:
        """Free the windows of a cancelled request and wake the waiters of its future; None if nothing refers to the request any more."""
        if request is not None:
            self._remove(request)
        with self._lock:
            self._counters.cancelled += 1
            if request is not None:
                self._end(request)

    def _alive(self, jobs: list[Job]) -> list[Job]:
        """Leave out the windows of requests that have ended, and end those that were cancelled."""
        for request, _ in jobs:
            if request.future.cancelled():  # nothing may refer to it when the callback of the cancellation looks for it
                with self._lock:
                    self._end(request)
        return [(request, window) for request, window in jobs if not request.ended]

    def _finish(self, request: Request) -> None:
        """Count a window as done; the last one delivers the result."""
        with self._lock:
            request.unfinished -= 1
            if request.unfinished or request.ended:
                return
        try:
            request.complete()
        except Exception as error:  # of an encoder
            self.fail(request, error)
            return
        with self._lock:
            if not self._end(request):
                return
            self._counters.latencies.append(time.monotonic() - request.arrival)
        _notify(request, completed=True)
        _deliver(request.future.set_result, request.result)

    def _end(self, request: Request) -> bool:
        """Return True for the first caller that ends this request, unless it was cancelled. The caller holds the lock."""
        if request.ended:
            return False
        request.ended = True
        if request.future.set_running_or_notify_cancel():
            return True
        _notify(request, completed=False)
        return False


def _deliver(set_outcome: Callable[[Any], None], outcome: object) -> None:
    """End a future. Its callbacks run here, and SystemExit in one of them must not end a worker."""
    try:
        set_outcome(outcome)
    except BaseException:
        if threading.current_thread() is threading.main_thread():
            raise  # an interrupt of the caller
        logger.exception("a callback of a future ended its thread's work")


def _notify(request: Request, *, completed: bool) -> None:
    if request.on_end is not None:
        request.on_end(request, completed)
