"""Capacity for real-time streams: how many run at once without underruns, and how soon their audio begins."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.planning.windows import Policy, Span, plan
from melrt.scheduling.request import HostRequest, OutputFormat
from melrt.scheduling.stream import StreamPace
from melrt.types import Audio, Mel
from melrt.vocoder import Vocoder
from melrt_export.parity import probe_mel

MAX_STREAMS = 4096
# Factor between the numbers of streams while all are sustained.
GROWTH = 4
# One push in so many may be late.
LATE_SHARE = 100
# Seconds after which a chunk is tried again whose stream is late.
RETRY = 0.001


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """One real-time stream: an acoustic model pushes chunks of frames at the pace of playback."""

    chunk: int = 16
    """Frames in each push."""
    buffer: float = 0.2
    """Seconds of audio that playback has buffered; a chunk whose audio takes longer than this is an underrun."""
    seconds: float = 8.0
    """Length of each stream."""
    step: int = 2
    """Number of streams to begin with, and the least difference of two numbers."""


# A GPU runs hundreds of streams, so that this time has enough pushes.
GPU_STREAMS = StreamLoad(seconds=3.0, step=32)


@dataclass(frozen=True, slots=True)
class StreamRun:
    """Result of a number of concurrent streams."""

    streams: int
    """Concurrent streams."""
    shared_queue: bool
    """True if the streams share the vocoder's queue; False if the thread of each stream runs its own windows."""
    underruns: int
    """Pushes whose audio came too late."""
    pushes: int
    """Pushes of all streams."""
    latency_ms: tuple[float, float]
    """Time from a chunk to its audio, p50 and p99."""
    first_audio_ms: tuple[float, float]
    """Time from a stream's first chunk to its first audio, p50 and p99."""
    sustained: bool
    """True if at most one push in a hundred was late."""


def measure_capacity(vocoder: Vocoder, load: StreamLoad, on_step: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Multiply the number of streams until underruns occur, then halve the step.

    On a CPU the streams run with the shared queue and without it, interleaved; on a GPU only with it, because it makes the batches.

    Returns:
        Every `StreamRun` as a dictionary for JSON, by number of streams. The capacity of each kind is the largest sustained number.
    """
    runs: list[StreamRun] = []
    vocoder(probe_mel(vocoder.spec, 200))
    kinds = (True, False) if vocoder.backend.device == "cpu" else (True,)
    bounds = dict.fromkeys(kinds, (0, MAX_STREAMS + 1))  # sustained, and not sustained
    while wanted := {kind: count for kind, bound in bounds.items() if (count := _next_count(*bound, load.step))}:
        for shared_queue, streams in wanted.items():
            on_step(f"{streams} real-time streams, {'shared queue' if shared_queue else 'separate threads'}")
            runs.append(run_streams(vocoder, streams, load, shared_queue=shared_queue))
            low, high = bounds[shared_queue]
            bounds[shared_queue] = (streams, high) if runs[-1].sustained else (low, streams)
    return [asdict(run) for run in sorted(runs, key=lambda run: run.streams)]


def _next_count(low: int, high: int, step: int) -> int:
    """Return the number of streams to try between one that was sustained and one that was not; 0 if they are within a step or 6 %."""
    if high > MAX_STREAMS:
        return min(GROWTH * low or step, MAX_STREAMS) if low < MAX_STREAMS else 0
    return (low + high) // 2 if high - low > max(step, low // 16) else 0


class _Record:
    """Latencies of each stream's pushes."""

    def __init__(self, streams: int, pushes: int, buffer: float) -> None:
        self.latencies: list[list[float]] = [[] for _ in range(streams)]
        self._buffer, self._allowed, self._late = buffer, streams * pushes / LATE_SHARE, 0

    def add(self, index: int, due: float) -> None:
        """Add the latency of a push that was due at this time and is done now."""
        seconds = time.perf_counter() - due
        self.latencies[index].append(seconds)
        self._late += seconds > self._buffer

    @property
    def overloaded(self) -> bool:
        """True if so many pushes were late that the number of streams is not sustained whatever follows."""
        return self._late > self._allowed


def run_streams(vocoder: Vocoder, streams: int, load: StreamLoad, *, shared_queue: bool) -> StreamRun:
    """Run concurrent streams. Each starts at a random moment within a chunk's time, the same moments for both kinds.

    A run ends early once so many pushes were late that the result is known.
    """
    spec = vocoder.spec
    period = load.chunk * spec.hop / spec.sample_rate
    pushes = round(load.seconds / period)
    mel = probe_mel(spec, load.chunk * pushes)
    starts = time.perf_counter() + 0.2 + period * np.random.default_rng(streams).random(streams)
    chunks = [mel[:, number * load.chunk : (number + 1) * load.chunk] for number in range(pushes)]
    record = _Record(streams, pushes, load.buffer)
    run = _run_shared if shared_queue else _run_unqueued
    run(vocoder, chunks, starts, period, record)
    every = 1000 * np.concatenate(record.latencies)
    first = 1000 * np.array([times[0] for times in record.latencies if times])
    underruns = int((every > 1000 * load.buffer).sum())
    sustained = underruns <= streams * pushes / LATE_SHARE
    return StreamRun(streams, shared_queue, underruns, len(every), _p50_p99(every), _p50_p99(first), sustained)


def _run_shared(vocoder: Vocoder, chunks: list[Mel], starts: NDArray[np.float64], period: float, record: _Record) -> None:
    """Push to all streams from one thread, as an event loop would."""
    opened = [vocoder.open_stream(StreamPace(first=1, growth=1)) for _ in starts]
    waiting: list[Future[Audio] | None] = [None for _ in starts]
    events = [(float(start), float(start), index, 0) for index, start in enumerate(starts)]  # time, time due, stream, chunk
    heapq.heapify(events)
    while events and not record.overloaded:
        _, due, index, number = events[0]
        time.sleep(max(events[0][0] - time.perf_counter(), 0))
        before = waiting[index]
        if before is not None and not before.done():
            heapq.heapreplace(events, (time.perf_counter() + RETRY, due, index, number))
            continue
        future = waiting[index] = opened[index].submit(chunks[number])
        future.add_done_callback(lambda _, index=index, due=due: record.add(index, due))  # type: ignore[misc]
        if number + 1 < len(chunks):
            heapq.heapreplace(events, (due + period, due + period, index, number + 1))
        else:
            heapq.heappop(events)
    for last in waiting:
        if last is not None:
            last.result()


def _run_unqueued(vocoder: Vocoder, chunks: list[Mel], starts: NDArray[np.float64], period: float, record: _Record) -> None:
    """Give each stream a thread, which runs its windows."""

    def push_all(index: int) -> None:
        stream = _UnqueuedStream(vocoder)
        for number, chunk in enumerate(chunks):
            due = float(starts[index]) + number * period
            time.sleep(max(due - time.perf_counter(), 0))
            if record.overloaded:
                return
            stream.push(chunk)
            record.add(index, due)

    threads = [threading.Thread(target=push_all, args=(index,)) for index in range(len(starts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _UnqueuedStream:
    """A stream without the queue: the caller's thread runs the windows of each push."""

    def __init__(self, vocoder: Vocoder) -> None:
        self._vocoder = vocoder
        self._frames = np.empty((vocoder.spec.n_mels, 0), np.float32)
        self._done = 0

    def push(self, frames: Mel) -> Audio:
        self._frames = np.concatenate([self._frames, frames], axis=1)
        field, policy = self._vocoder.field, Policy(self._vocoder.policy.frames, static=False, batch=1, workers=1)
        received = self._frames.shape[1]
        span = Span(self._done, received - field.right, received, ended=False)
        windows = list(plan(span, field, policy))
        request = HostRequest(self._frames, 0, windows, OutputFormat(self._vocoder.spec.hop), deadline=0.0)
        for window in windows:
            HostRequest.execute(self._vocoder.backend, [(request, window)])
        self._done = span.stop
        return request.result


def _p50_p99(values: NDArray[np.float64]) -> tuple[float, float]:
    return round(float(np.median(values)), 1), round(float(np.percentile(values, 99, method="higher")), 1)
