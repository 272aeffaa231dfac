"""Request load on a voice: closed loop (clients that wait for their audio) and open loop (requests at a steady rate)."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from melrt.errors import MelrtError, QueueFullError
from melrt.types import Audio, Mel

Submit = Callable[[Mel], Future[Audio]]
"""Submits a mel to a voice and returns the future of its audio. `QueueFullError`, raised or in the future, is a refusal."""

SHORTEST, LONGEST = 40, 400
"""Mel frames of an utterance: half a second to more than four."""
ANSWER_TIMEOUT = 60.0
"""Longest wait for the last answers, in seconds."""


@dataclass(frozen=True, slots=True)
class RequestRun:
    """Result of a request load on one voice."""

    seconds: float
    """Time from the first request to the last answer."""
    completed: int
    """Requests answered with audio."""
    refused: int
    """Requests refused because the queue was full."""
    p50: float
    """Median time from a completed request to its audio, in seconds."""
    p99: float
    """99th percentile of the same time, in seconds."""

    @property
    def rate(self) -> float:
        """Completed requests per second."""
        return self.completed / self.seconds


def mixed_lengths(probe: Mel, count: int = 256) -> list[Mel]:
    """Return mels (M, T) whose lengths are spread evenly from `SHORTEST` to `LONGEST`; the same ones in each call."""
    noise = np.random.default_rng(0)
    speech = np.tile(probe, (1, -(-2 * LONGEST // probe.shape[1])))
    starts, lengths = noise.integers(0, LONGEST, count), noise.integers(SHORTEST, LONGEST + 1, count)
    return [np.ascontiguousarray(speech[:, start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def run_closed_loop(submit: Submit, mels: Sequence[Mel], clients: int, seconds: float) -> RequestRun:
    """Run clients that each send their next request when they have their audio."""
    supply = itertools.cycle(mels)
    until = time.perf_counter() + seconds

    def client(_: int) -> list[float]:
        times = []
        while (start := time.perf_counter()) < until:
            submit(next(supply)).result(ANSWER_TIMEOUT)
            times.append(time.perf_counter() - start)
        return times

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = list(itertools.chain.from_iterable(pool.map(client, range(clients))))
    return _result(times, 0, time.perf_counter() - start)


def run_open_loop(submit: Submit, mels: Sequence[Mel], rate: float, seconds: float) -> RequestRun:
    """Send requests at a steady rate without waiting for answers.

    Raises:
        MelrtError: A request was neither completed nor refused.
    """
    answers = _Answers()
    begin = time.perf_counter()
    for number, mel in zip(range(int(rate * seconds)), itertools.cycle(mels), strict=False):
        time.sleep(max(begin + number / rate - time.perf_counter(), 0))
        answers.follow(submit, mel)
    answers.wait()
    return _result(answers.times, answers.refused, time.perf_counter() - begin)


class _Answers:
    """Times and refusals of the requests of an open loop."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.refused = 0
        self._errors: list[BaseException] = []
        self._open = 0
        self._changed = threading.Condition()

    def follow(self, submit: Submit, mel: Mel) -> None:
        """Submit a request and record its answer when it comes."""
        start = time.perf_counter()
        with self._changed:
            self._open += 1
        try:
            future = submit(mel)
        except QueueFullError as error:
            self._end(error, start)
        else:
            future.add_done_callback(lambda done: self._end(done.exception(), start))

    def wait(self) -> None:
        """Wait for every answer."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._open == 0, ANSWER_TIMEOUT):
                raise MelrtError(f"{self._open} requests had no answer {ANSWER_TIMEOUT} s after the last one was sent.")
        if self._errors:
            raise MelrtError(f"{len(self._errors)} requests failed, the first with: {self._errors[0]}")

    def _end(self, error: BaseException | None, start: float) -> None:
        with self._changed:
            self._open -= 1
            if error is None:
                self.times.append(time.perf_counter() - start)
            elif isinstance(error, QueueFullError):
                self.refused += 1
            else:
                self._errors.append(error)
            self._changed.notify_all()


def _result(times: Sequence[float], refused: int, seconds: float) -> RequestRun:
    if not times:
        raise MelrtError(f"no request was completed in {seconds:.1f} s ({refused} were refused).")
    p50, p99 = np.percentile(times, (50, 99), method="higher")
    return RequestRun(seconds, len(times), refused, float(p50), float(p99))
