"""Capacity for real-time streams: how many run at once without underruns, and how soon their audio begins."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.planning.windows import Policy, Span, plan
from melrt.scheduling.request import HostRequest, OutputFormat
from melrt.scheduling.stream import Stream, StreamPace
from melrt.types import Audio, Mel
from melrt.vocoder import Options, Vocoder
from melrt_export.parity import probe_mel

MAX_STREAMS = 4096


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """One real-time stream: an acoustic model pushes chunks of frames at the pace of playback."""

    chunk: int = 16
    """Frames in each push."""
    buffer: float = 0.2
    """Seconds of audio that playback has buffered; a chunk whose audio takes longer than this is an underrun."""
    seconds: float = 8.0
    """Length of each stream."""


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


def measure_capacity(
    voice: str, load: StreamLoad, step: int = 2, threads: int | None = None, on_step: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Raise the number of streams until underruns occur, with the shared queue and without it, interleaved.

    Returns:
        Every `StreamRun` as a dictionary for JSON. The capacity of each kind is that of its last sustained run.
    """
    runs: list[StreamRun] = []
    vocoder = Vocoder.load(voice, threads=threads, options=Options())
    vocoder(probe_mel(vocoder.spec, 200))
    sustained = {True: True, False: True}
    streams = step
    while any(sustained.values()) and streams < MAX_STREAMS:
        for shared_queue in (True, False):
            if sustained[shared_queue]:
                on_step(f"{streams} real-time streams, {'shared queue' if shared_queue else 'separate threads'}")
                runs.append(run_streams(vocoder, streams, load, shared_queue=shared_queue))
                sustained[shared_queue] = runs[-1].sustained
        streams += step
    vocoder.close()
    return [asdict(run) for run in runs]


def run_streams(vocoder: Vocoder, streams: int, load: StreamLoad, *, shared_queue: bool) -> StreamRun:
    """Run concurrent streams. Each starts at a random moment within a chunk's time, the same moments for both kinds."""
    spec = vocoder.spec
    period = load.chunk * spec.hop / spec.sample_rate
    pushes = round(load.seconds / period)
    mel = probe_mel(spec, load.chunk * pushes)
    latencies: list[list[float]] = [[] for _ in range(streams)]
    starts = time.perf_counter() + 0.2 + period * np.random.default_rng(streams).random(streams)

    def push_all(index: int) -> None:
        stream: Stream | _UnqueuedStream = vocoder.open_stream(StreamPace(first=1, growth=1)) if shared_queue else _UnqueuedStream(vocoder)
        for number in range(pushes):
            due = float(starts[index]) + number * period
            time.sleep(max(due - time.perf_counter(), 0))
            stream.push(mel[:, number * load.chunk : (number + 1) * load.chunk])
            latencies[index].append(time.perf_counter() - due)

    threads = [threading.Thread(target=push_all, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = 1000 * np.concatenate(latencies)
    first = 1000 * np.array([times[0] for times in latencies])
    underruns = int((every > 1000 * load.buffer).sum())
    return StreamRun(streams, shared_queue, underruns, len(every), _p50_p99(every), _p50_p99(first), underruns <= len(every) / 100)


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
