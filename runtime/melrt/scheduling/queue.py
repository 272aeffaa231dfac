"""In-flight batching: windows of all requests, of any length, share the backend's runs.

A request is a plan of windows over frames. A worker takes the next window of the most urgent request, adds windows of the same
shape from other requests up to the batch limit, and runs them together. A failed request does not affect the others.

A request never waits while a lane is free: batches form from what arrives while all lanes are busy. A blocking call that finds the
queue empty runs in the caller's own thread, which saves two changes of thread.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from melrt.backends.base import Backend
from melrt.errors import BackendError, ClosedError, OverdueError, QueueFullError
from melrt.planning.windows import Policy
from melrt.scheduling.delivery import Delivery
from melrt.scheduling.limits import Limits
from melrt.scheduling.request import Job, Request
from melrt.scheduling.stats import Counters, Stats
from melrt.scheduling.waiting import WaitingWindows

logger = logging.getLogger(__name__)

# Interval in seconds at which a task looks for room in a full queue; a window takes several times as long on a CPU.
ROOM_POLL = 0.002
# Overdue requests are looked for this many times within `Limits.timeout`.
TIMEOUT_CHECKS = 20
# Seconds that `close` waits for the end of a run. A run takes below a second on a CPU; engines of the largest profile take less.
CLOSE_TIMEOUT = 30.0


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
        self._close_later: Callable[[], None] | None = None
        self._next_timeout_check = 0.0
        # `with self._lock` is one step for an interrupt, `with self._changed` would not be
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # for workers, and for `close`
        self._room = threading.Condition(self._lock)  # for callers
        self._threads: list[threading.Thread] = []
        self._delivery = Delivery(backend, self._lock, self._counters, self._remove)
        _at_exit.add(self)

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
        self._watch_cancellation(request)
        inside = self.inside
        if inside and run_here:
            self._run_inside(request)
            return request.future
        # a worker that waited for room, in the callback of a future, would wait for itself
        until = time.monotonic() if inside else self._room_deadline()
        try:
            with self._lock:
                run_here = run_here and not self._waiting.windows
                while not self._try_enqueue(request, notify=not run_here):
                    self._check_room_deadline(until)
                    self._room.wait(None if until is None else until - time.monotonic())
                # at once, or a worker that has just started would take it
                jobs = self._take_own(request) if run_here else []
            self._run_here(request, jobs)
        except BaseException as error:  # an interrupt must not leave windows or a lane behind
            lane = not inside and threading.get_ident() in self._runners
            if request.waiting or lane:
                self._delivery.fail(request, error)
            if lane:
                self._leave_lane()
            raise
        return request.future

    async def submit_async(self, request: Request) -> Future[Any]:
        """Queue a request like `submit`, without blocking the event loop while it waits for room."""
        self.check_process()
        self._watch_cancellation(request)
        until = self._room_deadline()
        while True:
            with self._lock:
                if self._try_enqueue(request):
                    break
                self._check_room_deadline(until)
            await asyncio.sleep(ROOM_POLL)
        return request.future

    @property
    def inside(self) -> bool:
        """True in a thread that runs windows now, so in a callback of the queue; waiting there for others could wait for itself."""
        return threading.get_ident() in self._runners or threading.current_thread() in self._threads

    def count_underrun(self) -> None:
        """Count that a stream's audio came after its playback had run out."""
        with self._lock:
            self._counters.underruns += 1

    def stats(self) -> Stats:
        """Return a snapshot of the counters."""
        self.check_process()
        with self._lock:
            return self._counters.stats(self._waiting.windows, self._waiting.requests, self.policy.batch)

    def close(self, *, drain: bool = True, then: Callable[[], None] = lambda: None, timeout: float = CLOSE_TIMEOUT) -> None:
        """Refuse further requests and end the workers: after the queue is empty, or (not `drain`) with ClosedError for what waits.

        Args:
            drain: Complete the waiting requests.
            then: Called once nothing runs any more. In a callback of the queue, this method returns before that.
            timeout: Longest wait in seconds for the end of any one run.

        Raises:
            BackendError: No run ended for `timeout` seconds. Every request has ended with this error, and `then` is called if the run
                ends after all.
        """
        threads = self.stop(drain=drain)
        if self._pid != os.getpid():
            return  # the lock may have been held during the fork
        if self.inside:
            with self._lock:
                self._close_later = then
            return
        if not self._wait_for_runs(timeout):
            self._give_up(then, timeout)
        for thread in threads:
            thread.join()
        then()

    def _wait_for_runs(self, timeout: float) -> bool:
        """Wait until no window waits or runs, in a worker or in a caller's thread; return False if no run ends within the time."""
        with self._lock:
            while self._runners or self._waiting.windows:
                if not self._changed.wait(timeout):
                    return False
        return True

    def _give_up(self, then: Callable[[], None], timeout: float) -> None:
        """End the requests of a backend that does not return, and raise BackendError."""
        error = BackendError(
            f"{self.backend.name} on {self.backend.device} has not ended a run for {timeout:g} s, or a callback waits. Its memory is not "
            "freed. If it does not return, end this process."
        )
        with self._lock:
            self._close_later = then
            requests = [*self._waiting.all(), *self._delivery.running()]
        _at_exit.discard(self)  # the exit would wait for the same run
        for request in requests:
            self._delivery.fail(request, error)
        raise error

    def stop(self, *, drain: bool) -> list[threading.Thread]:
        """Begin to close, and return the workers without waiting for them."""
        if self._pid != os.getpid():
            return []  # the workers, and perhaps a held lock, belong to the parent process
        with self._lock:
            self._closing = True
            dropped = [] if drain else self._waiting.all()
            self._changed.notify_all()
            self._room.notify_all()
        for request in dropped:
            self._delivery.fail(request, ClosedError("the vocoder was closed before this was computed."))
        return self._threads

    def check_process(self) -> None:
        """Raise BackendError in a forked child. This comes before any lock, which a thread of the parent may have held."""
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
        self._check_open()
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

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("the vocoder is closed; load it again.")

    def _watch_cancellation(self, request: Request) -> None:
        """Register for a cancellation before the request is queued, since workers may end it from then on."""
        # weak, or request and future would keep each other and their audio alive until a garbage collection
        reference = weakref.ref(request)

        def done(future: Future[Any]) -> None:
            if future.cancelled() and self._pid == os.getpid():
                self._delivery.cancel(reference())

        request.future.add_done_callback(done)
        request.future.waits_for_itself = lambda: self.inside

    def _start_threads(self) -> None:
        while len(self._threads) < self.policy.workers:
            thread = threading.Thread(target=self._work, name=f"melrt-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        while self._work_once():
            pass  # between two runs a worker refers to no request, whose frames and audio it would keep alive
        self._finish_closing()

    def _work_once(self) -> bool:
        with self._lock:
            while not self._waiting.windows or len(self._runners) >= self.policy.workers:
                if self._closing and not self._waiting.windows:
                    return False
                self._changed.wait()
            jobs = self._take()
            overdue = self._overdue(jobs)
        try:
            self._fail_overdue(overdue)
            self._delivery.run(jobs)
        except BaseException as error:  # such as SystemExit in a backend: it must not end the worker
            for request, _ in jobs:
                self._delivery.fail(request, BackendError(f"{self.backend.name} raised {type(error).__name__}: {error}"))
        finally:
            jobs.clear()
            self._leave_lane()
        return True

    def _run_here(self, request: Request, jobs: list[Job]) -> None:
        """Run windows of a request in this thread while no other request waits and a lane is free; the workers take what is left."""
        while jobs:
            self._fail_overdue(self._overdue(jobs))
            self._delivery.run(jobs)
            self._leave_lane()
            jobs = self._take_own(request)

    def _run_inside(self, request: Request) -> None:
        """Run a request within a callback: this thread has a lane, and would wait for itself."""
        with self._lock:
            self._check_open()
            self._counters.requests += 1
        for window in request.windows:
            self._delivery.run([(request, window)])
        if not request.windows:
            request.future.set_result(request.result)

    def _take_own(self, request: Request) -> list[Job]:
        with self._lock:
            alone = request.waiting and request.waiting == self._waiting.windows
            jobs = self._take() if alone and len(self._runners) < self.policy.workers else []
            if request.waiting:
                self._changed.notify_all()
            return jobs

    def _take(self) -> list[Job]:
        """Take a lane, and the windows of one run. The caller holds the lock."""
        self._runners.append(threading.get_ident())
        jobs = self._waiting.take(self.policy.batch)
        self._room.notify_all()
        return jobs

    def _leave_lane(self) -> None:
        with self._lock:
            if threading.get_ident() in self._runners:
                self._runners.remove(threading.get_ident())
                if self._waiting.windows or self._closing:
                    self._changed.notify_all()
        if self._close_later is not None:
            self._finish_closing()

    def _finish_closing(self) -> None:
        """Call what `close` was given inside a callback, once nothing runs any more and no other worker is left."""
        with self._lock:
            others = [thread for thread in self._threads if thread.is_alive() and thread is not threading.current_thread()]
            if self._runners or self._waiting.windows or others or self._close_later is None:
                return
            then, self._close_later = self._close_later, None
        then()

    def _overdue(self, jobs: list[Job]) -> list[Request]:
        """Return the requests of these windows, and from time to time those that wait, that arrived before `Limits.timeout`."""
        if self.limits.timeout is None:
            return []
        now = time.monotonic()
        since = now - self.limits.timeout
        overdue = [request for request, _ in jobs if request.arrival < since]
        if now >= self._next_timeout_check:
            self._next_timeout_check = now + self.limits.timeout / TIMEOUT_CHECKS
            with self._lock:
                overdue += self._waiting.arrived_before(since)
        return overdue

    def _fail_overdue(self, requests: list[Request]) -> None:
        late = f"the audio was not done within {self.limits.timeout} s; the service is overloaded."
        for request in requests:
            self._delivery.fail(request, OverdueError(late))

    def _remove(self, request: Request) -> None:
        with self._lock:
            self._waiting.remove(request)
            self._room.notify_all()
            self._changed.notify_all()


_at_exit: weakref.WeakSet[RequestQueue] = weakref.WeakSet()


def _close_all() -> None:
    """End every worker's run before the interpreter exits: a worker that is killed inside an engine's run aborts the process."""
    for queue in list(_at_exit):
        try:
            queue.close(drain=False)
        except BackendError as error:
            logger.warning("%s", error)


atexit.register(_close_all)
