"""In-flight batching: windows of all requests, of any length, share the backend's runs.

A request is a plan of windows over frames. A worker takes the next window of the most urgent request, adds windows of the same
shape from other requests up to the batch limit, and runs them together. A failed request does not affect the others.

A request never waits while a lane is free: batches form from what arrives while all lanes are busy. A blocking call that finds the
queue empty runs in the caller's own thread, which saves two changes of thread.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from concurrent.futures import Future
from typing import Any

from melrt.backends.base import Backend
from melrt.errors import BackendError, ClosedError, OverdueError, QueueFullError
from melrt.planning.windows import Policy
from melrt.scheduling.limits import Limits
from melrt.scheduling.request import Job, Request
from melrt.scheduling.stats import Counters, Stats
from melrt.scheduling.waiting import WaitingWindows

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
        self._waiting = WaitingWindows()
        self._runners: list[int] = []  # identifiers of the threads that use a lane; there are `policy.workers` lanes
        self._closing = False
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # for workers, and for `close`
        self._room = threading.Condition(lock)  # for callers
        self._threads: list[threading.Thread] = []
        _at_exit.add(self)

    def submit(self, request: Request, *, run_here: bool = False) -> Future[Any]:
        """Queue a request, waiting for room as the limits say. Its future ends with the result or an error, and can be cancelled.

        Args:
            request: The request.
            run_here: Run its windows in this thread if nothing else waits and a lane is free; for a caller that waits for it anyway.

        Raises:
            QueueFullError: There is no room, and the limits say not to wait (longer).
            ClosedError: The queue was closed.
            BackendError: This process was forked after the vocoder was loaded.
        """
        self._check_process()
        self._watch_cancellation(request)
        inside = threading.get_ident() in self._runners or threading.current_thread() in self._threads
        # a worker that waited for room, in the callback of a future, would wait for itself
        until = time.monotonic() if inside else self._room_deadline()
        with self._changed:
            run_here = run_here and not inside and not self._waiting.windows
            while not self._try_enqueue(request, notify=not run_here):
                self._check_room_deadline(until)
                self._room.wait(None if until is None else until - time.monotonic())
        if run_here:
            self._run_here(request)
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
            return self._counters.stats(self._waiting.windows, self._waiting.requests, self.policy.batch)

    def close(self, *, drain: bool = True) -> None:
        """Refuse further requests and end the workers: after the queue is empty, or (not `drain`) with ClosedError for what waits."""
        for thread in self.stop(drain=drain):
            if thread is not threading.current_thread():
                thread.join()
        if self._pid != os.getpid():
            return  # the lock may have been held during the fork
        with self._changed:
            while any(runner != threading.get_ident() for runner in self._runners):  # callers that run their own windows
                self._changed.wait()

    def stop(self, *, drain: bool) -> list[threading.Thread]:
        """Begin to close, and return the workers without waiting for them."""
        if self._pid != os.getpid():
            return []  # the workers, and perhaps a held lock, belong to the parent process
        with self._changed:
            self._closing = True
            dropped = [] if drain else self._waiting.all()
            self._changed.notify_all()
            self._room.notify_all()
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
                f"{self._waiting.windows} windows are waiting, the limit is {self.limits.max_windows}; "
                "try again later, or raise Limits.max_windows."
            )

    def _try_enqueue(self, request: Request, *, notify: bool = True) -> bool:
        """Queue a request if there is room, and wake the workers if `notify`. The caller holds the lock."""
        if self._closing:
            raise ClosedError("the vocoder is closed; load it again.")
        if request.windows:
            if self._waiting.windows >= self.limits.max_windows:
                return False
            self._start_threads()  # first, so that nothing is queued if a thread cannot start
            self._waiting.add(request)
            if notify:
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
        while self._work_once():
            pass  # between two runs a worker refers to no request, whose frames and audio it would keep alive

    def _work_once(self) -> bool:
        with self._changed:
            while not self._waiting.windows or len(self._runners) >= self.policy.workers:
                if self._closing and not self._waiting.windows:
                    return False
                self._changed.wait()
            overdue = self._overdue()
            jobs = [] if overdue else self._take()
        for request in overdue:
            self._fail(request, OverdueError(f"the audio was not done within {self.limits.timeout} s; the service is overloaded."))
        self._run(jobs)
        self._leave_lane()
        return True

    def _run_here(self, request: Request) -> None:
        """Run windows of a request in this thread while no other request waits and a lane is free; the workers take what is left."""
        try:
            while jobs := self._take_own(request):
                self._run(jobs)
                self._leave_lane()
        except BaseException as error:  # an interrupt: the windows that this thread took would never be done
            self._leave_lane()
            self._fail(request, error)
            raise

    def _take_own(self, request: Request) -> list[Job]:
        with self._changed:
            alone = request.waiting and request.waiting == self._waiting.windows
            jobs = self._take() if alone and len(self._runners) < self.policy.workers and not self._overdue() else []
            if request.waiting:
                self._changed.notify_all()
            return jobs

    def _take(self) -> list[Job]:
        """Take the windows of one run, and a lane for it. The caller holds the lock."""
        jobs = self._waiting.take(self.policy.batch)
        self._runners.append(threading.get_ident())
        self._room.notify_all()
        return jobs

    def _leave_lane(self) -> None:
        with self._changed:
            if threading.get_ident() in self._runners:
                self._runners.remove(threading.get_ident())
                if self._waiting.windows or self._closing:
                    self._changed.notify_all()

    def _overdue(self) -> list[Request]:
        """Return the requests that have waited longer than `Limits.timeout`. The caller holds the lock."""
        return [] if self.limits.timeout is None else self._waiting.overdue(time.monotonic() - self.limits.timeout)

    def _run(self, jobs: list[Job]) -> None:
        """Run a batch and deliver. If it fails, each window runs alone, so that only the request at fault fails."""
        for request, _ in jobs:
            if request.future.cancelled():  # dropped here, so the callback of the cancellation may find it gone
                with self._changed:
                    self._end(request)
        jobs = [(request, window) for request, window in jobs if not request.ended]
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

    def _fail(self, request: Request, error: BaseException) -> None:
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
            self._waiting.remove(request)
            self._room.notify_all()
            self._changed.notify_all()


_at_exit: weakref.WeakSet[RequestQueue] = weakref.WeakSet()


def _close_all() -> None:
    """End every worker's run before the interpreter exits: a worker that is killed inside an engine's run aborts the process."""
    for queue in list(_at_exit):
        queue.close(drain=False)


atexit.register(_close_all)
