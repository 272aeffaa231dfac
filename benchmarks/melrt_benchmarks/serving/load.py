"""A voice under load: clients that wait for their audio, and a stream of requests that does not care."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import MelrtError, QueueFullError

Mel = NDArray[np.float32]
Submit = Callable[[Mel], Future[Any]]
"""Hands a mel to a voice, and gives its audio's future; QueueFullError, now or in the future, is a refusal."""

SHORTEST, LONGEST = 40, 400
"""Mel frames of an utterance: half a second to more than four."""
# Longest that a driver waits for the last answers, seconds.
PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """What a voice did under a load."""

    seconds: float
    """From the first request to the last answer."""
    spoken: int
    """Requests answered with audio."""
    refused: int
    """Requests turned away."""
    p50: float
    """Median of the spoken ones, seconds from asking to audio."""
    p99: float
    """As `p50`, of one in a hundred."""

    @property
    def rate(self) -> float:
        """Requests spoken per second."""
        return self.spoken / self.seconds


def mixed(probe: Mel, count: int = 256) -> list[Mel]:
    """Mels (M, T) of mixed lengths, the same in each call; evenly between `SHORTEST` and `LONGEST`."""
    noise = np.random.default_rng(0)
    speech = np.tile(probe, (1, -(-2 * LONGEST // probe.shape[1])))
    starts, lengths = noise.integers(0, LONGEST, count), noise.integers(SHORTEST, LONGEST + 1, count)
    return [np.ascontiguousarray(speech[:, start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def closed(submit: Submit, mels: Sequence[Mel], clients: int, seconds: float) -> Load:
    """Clients that each ask again when they have their audio."""
    supply = itertools.cycle(mels)
    until = time.perf_counter() + seconds

    def ask(_: int) -> list[float]:
        times = []
        while (start := time.perf_counter()) < until:
            submit(next(supply)).result(PATIENCE)
            times.append(time.perf_counter() - start)
        return times

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [one for times in pool.map(ask, range(clients)) for one in times]
    return _load(times, 0, time.perf_counter() - start)


def offered(submit: Submit, mels: Sequence[Mel], rate: float, seconds: float) -> Load:
    """Requests at a steady rate, whatever becomes of them.

    Raises:
        MelrtError: A request that was neither spoken nor refused.
    """
    answers = _Answers()
    begin = time.perf_counter()
    for number, mel in zip(range(int(rate * seconds)), itertools.cycle(mels), strict=False):
        time.sleep(max(begin + number / rate - time.perf_counter(), 0))
        answers.follow(submit, mel)
    answers.wait()
    return _load(answers.times, answers.refused, time.perf_counter() - begin)


class _Answers:
    """Times and refusals of requests that nobody waits for one by one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.refused = 0
        self._errors: list[BaseException] = []
        self._open = 0
        self._changed = threading.Condition()

    def follow(self, submit: Submit, mel: Mel) -> None:
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
        with self._changed:
            if not self._changed.wait_for(lambda: self._open == 0, PATIENCE):
                raise MelrtError(f"{self._open} requests had no answer {PATIENCE} s after the last was sent.")
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


def _load(times: Sequence[float], refused: int, seconds: float) -> Load:
    if not times:
        raise MelrtError(f"nothing was spoken in {seconds:.1f} s ({refused} refused).")
    p50, p99 = np.percentile(times, (50, 99), method="higher")
    return Load(seconds, len(times), refused, float(p50), float(p99))
