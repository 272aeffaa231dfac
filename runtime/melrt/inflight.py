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
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.audio import NO_NUMBER, SampleFormat, to_int16
from melrt.backends import Backend
from melrt.counters import Counters, Stats
from melrt.errors import BackendError, ClosedError, MelError, OverdueError, QueueFullError
from melrt.windows import Policy, Window

Frames = NDArray[np.float32]
Audio = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a service lets in, and how long it holds windows back."""

    max_windows: int = 4096
    """Windows waiting, of all requests; while they are as many, a further request is refused or waits."""
    wait: bool = True
    """A caller waits for room in the queue; else it gets QueueFullError at once."""
    wait_timeout: float | None = None
    """Longest wait for room, seconds; then QueueFullError."""
    hold: float = 0.002
    """Longest that a run is held back to fill its batch, seconds."""
    patience: float = 1.0
    """A request without a deadline of its own is due this long after it came, seconds."""
    max_frames: int | None = None
    """Longest utterance, whole or as a stream, mel frames; a longer one is refused with MelError."""
    max_streams: int | None = None
    """Streams open at once; a further one is refused with QueueFullError."""
    timeout: float | None = None
    """Longest from coming in to done, seconds; then OverdueError, and the request's windows are freed."""

    def __post_init__(self) -> None:
        if self.max_windows < 1 or self.hold < 0 or self.patience < 0:
            raise BackendError(f"{self}: max_windows is at least 1, hold and patience at least 0 seconds.")
        if any(limit is not None and limit <= 0 for limit in (self.max_frames, self.max_streams, self.timeout)):
            raise BackendError(f"{self}: max_frames, max_streams and timeout are above 0, or None for no limit.")

    def check_frames(self, frames: int) -> None:
        """Raise MelError for an utterance of more frames than are let in."""
        if self.max_frames is not None and frames > self.max_frames:
            raise MelError(f"mel has {frames} frames; at most {self.max_frames} are taken here. Cut the text into shorter utterances.")


@dataclass(frozen=True, slots=True)
class Sound:
    """What a mel frame becomes."""

    hop: int
    """Samples of audio per frame."""
    sample_format: SampleFormat = "float32"
    """`float32`, or `int16` with full scale 32767."""


class Request:
    """Some windows over some frames, and the audio that they become; `future` ends with it."""

    def __init__(self, frames: Frames, first_frame: int, windows: Iterable[Window], sound: Sound, deadline: float) -> None:
        """Prepare a request.

        Args:
            frames: (M, n) float32; not copied, and read until the future is done.
            first_frame: Index of its first frame in the utterance.
            windows: In order and without a gap, from `plan`.
            sound: What becomes of a frame.
            deadline: When it is due, on `time.monotonic`'s clock.
        """
        self.frames = frames
        self.first_frame = first_frame
        self.waiting = deque(windows)
        self.unfinished = len(self.waiting)
        self.ended = False
        """Result, error or cancellation is decided; guarded by the queue's lock."""
        self.keep_start = self.waiting[0].keep_start if self.waiting else 0
        kept = self.waiting[-1].keep_stop - self.keep_start if self.waiting else 0
        self.hop = sound.hop
        self.audio: Audio = np.empty(kept * sound.hop, sound.sample_format)
        self.deadline = deadline
        self.arrival = time.monotonic()
        self.future: Future[Audio] = Future()
        self.on_end: Callable[[Request, bool], None] | None = None
        """Called once, with whether the audio is complete, before those who wait for the future hear of it; not if there are no windows."""

    def cut(self, window: Window) -> Frames:
        """The window's frames."""
        return self.frames[:, window.start - self.first_frame : window.stop - self.first_frame]

    def keep(self, window: Window, audio: Audio) -> None:
        """Put the kept part of a window's audio in its place."""
        source = slice((window.keep_start - window.start) * self.hop, (window.keep_stop - window.start) * self.hop)
        target = slice((window.keep_start - self.keep_start) * self.hop, (window.keep_stop - self.keep_start) * self.hop)
        kept = audio[source]
        self.audio[target] = to_int16(kept) if self.audio.dtype == np.int16 and kept.dtype != np.int16 else kept


Job = tuple[Request, Window]

# How often a task looks for room in a full queue, seconds; a window takes several times as long on a CPU.
ROOM_POLL = 0.002


class InFlight:
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
        until = time.monotonic() + self.limits.hold
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


_at_exit: weakref.WeakSet[InFlight] = weakref.WeakSet()


def _close_all() -> None:
    """A worker that is killed inside an engine's run aborts the process: each ends its run first."""
    for inflight in list(_at_exit):
        inflight.close(drain=False)


atexit.register(_close_all)
