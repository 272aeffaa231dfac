"""In-flight batching: windows of all requests, of any length, share the backend's runs.

A request is a plan of windows over frames. Workers take the next window of the most urgent request, add windows of the same
shape from the other requests up to the batch limit, and run them together. One request's failure touches no other.
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

import numpy as np

from melrt.backends.base import Backend
from melrt.errors import BackendError, ClosedError, OverdueError, QueueFullError
from melrt.files.wav import NO_NUMBER
from melrt.planning.windows import Policy, Window
from melrt.scheduling.limits import Limits
from melrt.scheduling.request import Audio, Request
from melrt.scheduling.stats import Counters, Stats

Job = tuple[Request, Window]

# How often a task looks for room in a full queue, seconds; a window takes several times as long on a CPU.
ROOM_POLL = 0.002


class RequestQueue:
    """The queue and its workers. The threads start with the first request, and belong to the process that loaded the voice."""

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

    def submit(self, request: Request) -> Future[Audio]:
        """Queue a request, waiting for room as the limits say; its future ends with the audio or an error, and can be cancelled.

        Raises:
            QueueFullError: No room, and the limits say not to wait (longer).
            ClosedError: After `close`.
            BackendError: In a process forked after the vocoder was loaded.
        """
        self._check_process()
        self._watch(request)
        # a worker that waited for room, in a callback of a future, would wait for itself
        until = time.monotonic() if threading.current_thread() in self._threads else self._patience_for_room()
        with self._changed:
            while not self._let_in(request):
                self._check_patience(until)
                self._changed.wait(None if until is None else until - time.monotonic())
        return request.future

    async def submit_async(self, request: Request) -> Future[Audio]:
        """As `submit`; it is the task that waits for room, not the event loop."""
        self._check_process()
        self._watch(request)
        until = self._patience_for_room()
        while True:
            with self._changed:
                if self._let_in(request):
                    break
                self._check_patience(until)
            await asyncio.sleep(ROOM_POLL)
        return request.future

    def count_underrun(self) -> None:
        """A stream's listener ran out of audio."""
        with self._changed:
            self._counters.underruns += 1

    def stats(self) -> Stats:
        """What a service scrapes."""
        self._check_process()
        with self._changed:
            return self._counters.stats(self._waiting_windows, len(self._requests), self.policy.batch)

    def close(self, *, drain: bool = True) -> None:
        """Let no more in, and end the workers: after the queue is done, or (not `drain`) with ClosedError for what waits."""
        for thread in self.stop(drain=drain):
            if thread is not threading.current_thread():
                thread.join()

    def stop(self, *, drain: bool) -> list[threading.Thread]:
        """As `close`, without waiting for the workers, which are returned."""
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

    def _patience_for_room(self) -> float | None:
        """Until when a caller waits; None: for ever."""
        if not self.limits.wait:
            return time.monotonic()
        return None if self.limits.wait_timeout is None else time.monotonic() + self.limits.wait_timeout

    def _check_patience(self, until: float | None) -> None:
        if until is not None and time.monotonic() >= until:
            self._counters.rejected += 1
            raise QueueFullError(
                f"{self._waiting_windows} windows are waiting, the limit is {self.limits.max_windows}; "
                "try again later, or raise Limits.max_windows."
            )

    def _let_in(self, request: Request) -> bool:
        """Queue a request if there is room. Holds the lock."""
        if self._closing:
            raise ClosedError("the vocoder is closed; load it again.")
        if request.waiting:
            if self._waiting_windows >= self.limits.max_windows:
                return False
            self._start_threads()  # first: where no thread starts, nothing is queued
            self._requests.append(request)
            self._waiting_windows += len(request.waiting)
            self._changed.notify_all()
        else:
            request.ended = True
            request.future.set_result(request.audio)
        self._counters.requests += 1
        return True

    def _watch(self, request: Request) -> None:
        """Hear of a cancellation; before the request is queued, since from then on workers may end it."""
        # weak, or request and future would hold each other, and their audio, until a garbage collection
        reference = weakref.ref(request)
        request.future.add_done_callback(lambda future: self._forget(reference()) if future.cancelled() else None)

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
                late = self._late()
                jobs = [] if late else self._take()
            for request in late:
                self._fail(request, OverdueError(f"the audio was not done within {self.limits.timeout} s; the service is overloaded."))
            self._run(jobs)

    def _late(self) -> list[Request]:
        """Requests whose time is over; nobody waits for them any more. Holds the lock."""
        if self.limits.timeout is None:
            return []
        since = time.monotonic() - self.limits.timeout
        return [request for request in self._requests if request.arrival < since]

    def _take(self) -> list[Job]:
        """Windows for one run: the most urgent, and mates of its shape from any request. Holds the lock."""
        window = min(self._requests, key=_urgency).waiting[0]
        if self.policy.batch > 1:
            self._hold(window)
        jobs: list[Job] = []
        for request in sorted(self._requests, key=_urgency):
            mates = islice((other for other in request.waiting if _mates(other, window)), self.policy.batch - len(jobs))
            for mate in list(mates):
                request.waiting.remove(mate)
                jobs.append((request, mate))
            if not request.waiting:
                self._requests.remove(request)
            if len(jobs) == self.policy.batch:
                break
        self._waiting_windows -= len(jobs)
        self._changed.notify_all()
        return jobs

    def _hold(self, window: Window) -> None:
        """Wait a little for more windows of this shape. Holds the lock, except while it waits: other workers may take some."""
        until = time.monotonic() + self.limits.max_batch_delay
        while not self._closing and (left := until - time.monotonic()) > 0:
            mates = sum(_mates(other, window) for request in self._requests for other in request.waiting)
            if mates >= self.policy.batch or not mates:
                return
            self._changed.wait(left)

    def _run(self, jobs: list[Job]) -> None:
        """Run a batch and deliver. If it fails, each window runs alone, so that only the guilty request fails."""
        jobs = [(request, window) for request, window in jobs if not request.ended and not request.future.cancelled()]
        if not jobs:
            return
        start = time.monotonic()
        try:
            frames = np.stack([request.cut(window) for request, window in jobs])
            audio = self.backend.run(jobs[0][1].graph, frames)
            self._check_audio(audio, (len(jobs), frames.shape[2] * jobs[0][0].hop))
        except Exception as error:  # whatever a backend raises belongs to the request, and must not end the worker
            if len(jobs) == 1:
                self._fail(jobs[0][0], error)
            else:
                for job in jobs:
                    self._run([job])
            return
        with self._changed:
            self._counters.ran(len(jobs), time.monotonic() - start)
        for (request, window), samples in zip(jobs, audio, strict=True):
            request.keep(window, samples)
            self._finish(request)

    def _check_audio(self, audio: Audio, expected: tuple[int, int]) -> None:
        if audio.shape != expected:
            raise BackendError(
                f"{self.backend.name} gave audio of shape {audio.shape} where {expected} was due; is this model the voice's?"
            )
        if (audio == NO_NUMBER).any() if audio.dtype == np.int16 else not np.isfinite(audio).all():
            raise BackendError(f"{self.backend.name} gave samples that are not finite; is {self.backend.precision} enough for this voice?")

    def _finish(self, request: Request) -> None:
        """Count a window as done; the last one delivers."""
        with self._changed:
            request.unfinished -= 1
            if request.unfinished or not self._end(request):
                return
            self._counters.latencies.append(time.monotonic() - request.arrival)
        self._tell(request, completed=True)
        request.future.set_result(request.audio)

    def _fail(self, request: Request, error: Exception) -> None:
        self._remove(request)
        with self._changed:
            if not self._end(request):
                return
            self._counters.failed += 1
        self._tell(request, completed=False)
        request.future.set_exception(error)

    def _end(self, request: Request) -> bool:
        """Whether the caller is the one that ends this request: the first that asks, unless it was cancelled. Holds the lock."""
        if request.ended:
            return False
        request.ended = True
        return request.future.set_running_or_notify_cancel()

    def _forget(self, request: Request | None) -> None:
        """A cancelled request frees its windows, and those who wait for its future hear of it."""
        if request is not None:
            self._remove(request)
            self._tell(request, completed=False)
        with self._changed:
            self._counters.cancelled += 1
            if request is not None:
                self._end(request)

    def _tell(self, request: Request, *, completed: bool) -> None:
        if request.on_end is not None:
            request.on_end(request, completed)

    def _remove(self, request: Request) -> None:
        with self._changed:
            if request in self._requests:
                self._requests.remove(request)
                self._waiting_windows -= len(request.waiting)
                request.waiting.clear()
                self._changed.notify_all()


def _urgency(request: Request) -> tuple[float, float]:
    return request.deadline, request.arrival


def _mates(one: Window, other: Window) -> bool:
    return one.graph == other.graph and one.frames == other.frames


_at_exit: weakref.WeakSet[RequestQueue] = weakref.WeakSet()


def _close_all() -> None:
    """A worker that is killed inside an engine's run aborts the process: each ends its run first."""
    for inflight in list(_at_exit):
        inflight.close(drain=False)


atexit.register(_close_all)
