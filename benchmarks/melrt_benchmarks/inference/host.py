"""Host cost: what checking, planning, queueing and copying take, measured with a backend that computes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from melrt import Bundle, Vocoder
from melrt.planning.windows import GraphKind, Policy, Span, plan, short_windows
from melrt.scheduling.limits import Limits
from melrt.scheduling.queue import RequestQueue
from melrt.scheduling.request import HostRequest, OutputFormat
from melrt.scheduling.workers import Workers
from melrt.types import Audio, Mel

ENGINE_WINDOW = 256
CALLS = 400
CHUNK_FRAMES = 16
CHUNKS = 1000
BULK_UTTERANCES = 64
STREAMS = 2_000
STREAM_CHUNKS = 6
WAITING = (10, 1_000, 10_000)
VOICES = (2, 2_000)
VOICE_RUNS = 100


class FreeBackend:
    """Backend that computes nothing: like an engine it takes windows into its own memory and lends silence, checked elsewhere."""

    name, device, machine, precision, reason = "free", "cpu", "none", "fp32", ""

    def __init__(self, policy: Policy, hop: int) -> None:
        self.policy = policy
        self.candidates: tuple[Policy, ...] = (policy,)
        self._hop = hop
        self._silence: dict[tuple[int, int], Audio] = {}
        self._mels: dict[tuple[int, ...], list[Mel]] = {}

    def run(self, graph: GraphKind, mel: Mel) -> Audio:
        return self._audio(len(mel), mel.shape[2])

    def run_windows(self, graph: GraphKind, windows: Sequence[Mel], meanwhile: Callable[[], None], keep: Callable[[Audio], None]) -> None:
        """Copy the windows to the backend's memory, and lend silence."""
        shape = len(windows), *windows[0].shape
        free = self._mels.setdefault(shape, [])
        mel = free.pop() if free else np.empty(shape, np.float32)
        for target, window in zip(mel, windows, strict=True):
            target[...] = window
        meanwhile()
        keep(self._audio(len(windows), shape[2]))
        free.append(mel)

    def _audio(self, batch: int, frames: int) -> Audio:
        shape = batch, frames * self._hop
        if shape not in self._silence:
            self._silence[shape] = np.zeros(shape, np.float32)
        return self._silence[shape]

    def close(self) -> None:
        """Release nothing."""


@dataclass(frozen=True, slots=True)
class HostCost:
    """Host cost with one policy."""

    policy: str
    """Name of the policy."""
    call_ms: tuple[float, float]
    """Milliseconds from call to audio for 1 s, p50 and p90."""
    push_us: tuple[float, float]
    """Microseconds for a pushed chunk of 16 frames, mean and p90."""
    bulk_times_real_time: float
    """Seconds of audio per second, 64 utterances of 10 s through `Vocoder.batch`."""
    choose_us: dict[int, float]
    """Microseconds for choosing the windows of one run, by the number of requests waiting."""
    stream_us: float
    """Microseconds of processor time for a chunk of 16 frames, pushed to 2,000 open streams in turn."""
    voice_us: dict[int, float]
    """Microseconds of processor time for choosing the voice of a run, by the number of voices with windows."""


def policies(bundle: Bundle) -> dict[str, Policy]:
    """Return windows as the backends cut them: ONNX Runtime on two cores, and an engine with three execution slots."""
    short = short_windows(bundle.manifest.receptive_field, ENGINE_WINDOW)
    return {
        "cpu": Policy(frames=128, static=False, batch=1, workers=2),
        "engine": Policy(frames=ENGINE_WINDOW, static=True, batch=16, workers=3, short=short),
    }


def measure_host_cost(bundle: Bundle, on_step: Callable[[str], None] = lambda _: None) -> list[HostCost]:
    """Measure every policy with a voice's shapes; its network is not run."""
    results = []
    for name, policy in policies(bundle).items():
        on_step(f"measuring the host cost of the {name} policy")
        with Vocoder(bundle, FreeBackend(policy, bundle.manifest.spec.hop)) as vocoder:
            call, push, bulk = measure_vocoder(vocoder)
            streams = _streams(vocoder)
        choose = {waiting: _choose(bundle, policy, waiting) for waiting in WAITING}
        results.append(
            HostCost(name, call, push, bulk, choose, streams, {voices: _choose_voice(bundle, policy, voices) for voices in VOICES})
        )
    return results


def measure_vocoder(vocoder: Vocoder) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Return a vocoder's `call_ms`, `push_us` and `bulk_times_real_time`, as in `HostCost`."""
    calls, pushes, bulk = _calls(vocoder), _pushes(vocoder), _bulk(vocoder)
    return _pair(1e3 * calls, np.median), _pair(1e6 * pushes, np.mean), bulk


def _mel(vocoder: Vocoder, seconds: float) -> Mel:
    spec = vocoder.spec
    shape = spec.n_mels, round(seconds * spec.sample_rate / spec.hop)
    return np.random.default_rng(0).uniform(spec.silence, spec.silence + 3, shape).astype(np.float32)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _pair(values: np.ndarray, middle: Callable[[np.ndarray], float]) -> tuple[float, float]:
    return round(float(middle(values)), 4), round(float(np.percentile(values, 90)), 4)


def _calls(vocoder: Vocoder) -> np.ndarray:
    mel = _mel(vocoder, 1.0)
    return np.array([_timed(lambda: vocoder(mel)) for _ in range(CALLS + 50)][50:])


def _pushes(vocoder: Vocoder) -> np.ndarray:
    chunk = _mel(vocoder, 1.0)[:, :CHUNK_FRAMES]
    with vocoder.open_stream() as stream:
        return np.array([_timed(lambda: stream.push(chunk)) for _ in range(CHUNKS)])


def _streams(vocoder: Vocoder) -> float:
    """Push to all streams from one thread. The processor time of the process does not depend on what else this machine runs."""
    chunk = _mel(vocoder, 1.0)[:, :CHUNK_FRAMES]
    streams = [vocoder.open_stream() for _ in range(STREAMS)]

    def push_to_all() -> float:
        start = time.process_time()
        for future in [stream.submit(chunk) for stream in streams]:
            future.result()
        return time.process_time() - start

    seconds = [push_to_all() for _ in range(STREAM_CHUNKS)]
    for stream in streams:
        stream.close()
    return round(1e6 * float(np.median(seconds[1:])) / STREAMS, 1)


def _bulk(vocoder: Vocoder) -> float:
    mels = [_mel(vocoder, 10.0)] * BULK_UTTERANCES
    seconds = min(_timed(lambda: [None for _ in vocoder.batch(mels)]) for _ in range(3))
    return round(10.0 * BULK_UTTERANCES / seconds, 1)


def _choose(bundle: Bundle, policy: Policy, waiting: int) -> float:
    """Time the choice alone: a queue whose requests wait, and no worker."""
    queue = _waiting_queue(bundle, policy, Workers(), waiting)
    count = min(50, waiting // policy.batch or 1)
    seconds = np.median([_timed(queue.take) for _ in range(count)])
    return round(1e6 * float(seconds), 1)


def _choose_voice(bundle: Bundle, policy: Policy, voices: int) -> float:
    """Time the choice of a voice and the end of its run, without the choice of its windows: voices whose requests wait, and no worker."""
    workers, seconds = Workers(), []
    alone = replace(policy, batch=1)
    for _ in range(voices):
        _waiting_queue(bundle, alone, workers, max(2, 2 * VOICE_RUNS // voices))
    for _ in range(VOICE_RUNS):
        with workers.lock:
            start = time.thread_time()
            queue = workers._next()
            chosen = time.thread_time() - start
            assert queue is not None
            workers.take(queue)
        start = time.thread_time()
        workers.leave_lane(0.01)
        seconds.append(chosen + time.thread_time() - start)
    return round(1e6 * float(np.median(seconds)), 1)


def _waiting_queue(bundle: Bundle, policy: Policy, workers: Workers, waiting: int) -> RequestQueue:
    """Return a queue in which so many requests of one second wait, on workers that do not run."""
    spec, field = bundle.manifest.spec, bundle.manifest.receptive_field
    workers.start_threads = lambda: None  # type: ignore[method-assign]
    queue = RequestQueue(FreeBackend(policy, spec.hop), policy, Limits(max_windows=1 << 30), workers)
    mel = np.zeros((spec.n_mels, 86), np.float32)
    windows = list(plan(Span(0, 86, 86, ended=True), field, policy))
    for index in range(waiting):
        queue.submit(HostRequest(mel, 0, windows, OutputFormat(spec.hop), deadline=float(index % 97)))
    return queue
