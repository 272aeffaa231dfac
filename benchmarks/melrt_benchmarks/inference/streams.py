"""How many real-time streams a machine holds: listeners who must never wait, and how soon they hear something."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.planning.windows import Policy, Span, plan
from melrt.scheduling.request import OutputFormat, Request
from melrt.scheduling.stream import Stream, StreamPace
from melrt.vocoder import Options, Vocoder
from melrt_export.parity import probe_mel

Frames = NDArray[np.float32]
Push = Callable[[Frames], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Load:
    """A listener: an acoustic model gives frames in real time, and audio may come so much later and no more."""

    chunk: int = 16
    """Frames that come at once."""
    buffer: float = 0.2
    """Seconds of audio that a listener has in hand: a chunk's audio that comes later than this after the chunk is an underrun."""
    seconds: float = 8.0
    """How long each listener listens."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What so many streams met."""

    streams: int
    in_flight: bool
    """Through the shared queue; else every stream's thread runs its own windows."""
    underruns: int
    pushes: int
    latency_ms: tuple[float, float]
    """From a chunk to its audio, p50 and p99."""
    first_audio_ms: tuple[float, float]
    """From a stream's first chunk to its first audio, p50 and p99."""
    held: bool
    """No more than one push in a hundred came too late."""


class _Alone:
    """A stream without the queue: the caller's own thread runs the window of each push."""

    def __init__(self, vocoder: Vocoder) -> None:
        self.vocoder = vocoder
        self.frames = np.empty((vocoder.spec.n_mels, 0), np.float32)
        self.done = 0

    def push(self, frames: Frames) -> NDArray[np.float32]:
        self.frames = np.concatenate([self.frames, frames], axis=1)
        field, policy = self.vocoder.field, Policy(self.vocoder.policy.frames, static=False, batch=1, workers=1)
        received = self.frames.shape[1]
        span = Span(self.done, received - field.right, received, ended=False)
        windows = list(plan(span, field, policy))
        request = Request(self.frames, 0, windows, OutputFormat(self.vocoder.spec.hop), deadline=0.0)
        for window in windows:
            request.keep(window, self.vocoder.backend.run(window.graph, np.ascontiguousarray(request.cut(window)[None]))[0])
        self.done = span.stop
        return request.audio


def measure(vocoder: Vocoder, streams: int, load: Load, *, in_flight: bool) -> Outcome:
    """Let so many listeners listen at once, each starting at a random moment of a chunk's time (the same ones for every kind)."""
    spec = vocoder.spec
    period = load.chunk * spec.hop / spec.sample_rate
    pushes = round(load.seconds / period)
    mel = probe_mel(spec, load.chunk * pushes)
    latencies: list[list[float]] = [[] for _ in range(streams)]
    starts = time.perf_counter() + 0.2 + period * np.random.default_rng(streams).random(streams)

    def listen(index: int) -> None:
        opened: Stream | _Alone = vocoder.open_stream(StreamPace(first=1, growth=1)) if in_flight else _Alone(vocoder)
        for turn in range(pushes):
            due = float(starts[index]) + turn * period
            time.sleep(max(due - time.perf_counter(), 0))
            opened.push(mel[:, turn * load.chunk : (turn + 1) * load.chunk])
            latencies[index].append(time.perf_counter() - due)

    threads = [threading.Thread(target=listen, args=(index,)) for index in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    late = 1000 * np.concatenate(latencies)
    first = 1000 * np.array([one[0] for one in latencies])
    underruns = int((late > 1000 * load.buffer).sum())
    return Outcome(streams, in_flight, underruns, len(late), _p50_p99(late), _p50_p99(first), underruns <= len(late) / 100)


def _p50_p99(values: NDArray[np.float64]) -> tuple[float, float]:
    return round(float(np.median(values)), 1), round(float(np.percentile(values, 99, method="higher")), 1)


def most_streams(
    voice: str, load: Load, step: int = 2, threads: int | None = None, on_step: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Raise the number of streams until it is too many, with the queue and without in turn.

    Returns:
        Every outcome, ready for JSON; the most streams that held are those of the last row with `held` of each kind.
    """
    outcomes: list[Outcome] = []
    vocoder = Vocoder.load(voice, threads=threads, options=Options())
    vocoder(probe_mel(vocoder.spec, 200))
    alive = {True: True, False: True}
    streams = step
    while any(alive.values()) and streams < 4096:
        for in_flight in (True, False):
            if alive[in_flight]:
                on_step(f"{streams} streams, {'in flight' if in_flight else 'each alone'}")
                outcomes.append(measure(vocoder, streams, load, in_flight=in_flight))
                alive[in_flight] = outcomes[-1].held
        streams += step
    vocoder.close()
    return [asdict(outcome) for outcome in outcomes]
