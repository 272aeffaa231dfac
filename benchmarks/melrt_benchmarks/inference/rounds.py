"""Measure contenders side by side: every output is compared with the reference first, and the runs are interleaved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt.timing import SETTLE, Timing, interleave, shuffled, timed
from melrt.types import FloatAudio, Mel
from melrt_benchmarks.inference.contender import BenchVoice, Contender
from melrt_benchmarks.inference.contenders import load_contenders
from melrt_benchmarks.inference.plan import BenchPlan
from melrt_benchmarks.measure.gpu_meter import EventClock, Loop, loop_times, open_energy_counter
from melrt_benchmarks.report.results import Latency, Skipped, Throughput
from melrt_export.checkpoints import load_checkpoint
from melrt_export.generator.reference import PyTorchReference
from melrt_export.parity import Difference, probe_mel

# Requests of each caller when several call at once.
REQUESTS = 8
# Runs before the GPU's clock counts: a capture, and the first run after it.
WARM_UP_RUNS = 3
# Different utterances in a batch; later ones repeat them. A prime: utterances that change places by a power of two are noticed.
DISTINCT = 3


class Contenders:
    """The loaded contenders and their measurements. One that raises an exception is dropped, and listed as skipped."""

    def __init__(self, plan: BenchPlan, bundle: Bundle, on_detail: Callable[[str], None]) -> None:
        self.plan, self.bundle, self._on_detail = plan, bundle, on_detail
        self.checkpoint = load_checkpoint(plan.checkpoint) if plan.checkpoint else None
        self.pytorch = PyTorchReference(self.checkpoint.config, self.checkpoint.weights) if self.checkpoint else None
        self.running: list[Contender] = []
        self.skipped: list[Skipped] = []
        self.timings: dict[str, Timing] = {}
        """Timings of every contender and shape, for the note on noise."""
        self._energy = open_energy_counter()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        voice = BenchVoice(self.bundle, self.checkpoint, self.plan.threads)
        for contender in load_contenders(voice, self.plan.precisions, self.plan.backends, self.plan.only):
            if isinstance(contender, Contender):
                self.running.append(contender)
            else:
                self.skipped.append(contender)
        self.check(self.running)

    def check(self, results: Sequence[object]) -> None:
        """Raise MelrtError with the reasons if no contender is running, or none has a result."""
        if not results:
            reasons = " ".join(f"{skipped.contender}: {skipped.reason}" for skipped in self.skipped)
            fact = "every contender failed" if any(skipped.failed for skipped in self.skipped) else "no contender runs here"
            raise MelrtError(f"{fact}. {reasons or 'None has a name that contains ' + ' or '.join(self.plan.only) + '.'}")

    def close(self) -> None:
        """Close every contender."""
        while self.running:
            self.running.pop().close()

    def latencies(self, seconds: float, batch: int) -> list[Latency]:
        """Check and time every contender at one length and batch; the first one is the baseline."""
        frames, audio_seconds = self._length(seconds)
        mel = np.stack([probe_mel(self.bundle.manifest.spec, frames, seed % DISTINCT) for seed in range(batch)])
        first, differences = self._first_calls(mel, f"{seconds:g} s of audio, batch {batch}")
        on_gpu = [contender for contender in self.running if contender.on_gpu]
        # Only the thread pools of contenders on the CPU need a pause. A GPU would become idle in it.
        pause = 0.0 if len(on_gpu) == len(self.running) else SETTLE
        timings = interleave(self._calls(self.running, mel), self.plan.rounds, pause=pause)
        loops = loop_times(self._calls(on_gpu, mel), self.plan.rounds, self._energy)
        events = self._device_times(on_gpu, mel)
        self.timings |= {f"{one.name} {seconds} {batch}": timings[one.name] for one in self.running}
        names = [one.name for one in self.running]
        return [
            replace(
                _latency(one, (timings[one.name], timings[names[0]]), differences[one.name], (audio_seconds, batch), loops.get(one.name),
                         events.get(one.name)),
                first_ms=round(1000 * first[one.name], 3),
            )
            for one in self.running
        ]  # fmt: skip

    def _calls(self, contenders: Iterable[Contender], mel: Mel) -> dict[str, Callable[[], object]]:
        return {contender.name: self._guarded(contender, mel, partial(contender.run, mel)) for contender in contenders}

    def _device_times(self, contenders: Iterable[Contender], mel: Mel) -> dict[str, Timing]:
        """Time the contenders that take mels in GPU memory, by the GPU's clock. One that fails there keeps its other times."""
        clock: EventClock | None = None
        calls: dict[str, Callable[[], object]] = {}
        samples: dict[str, list[float]] = {}
        for contender in contenders:
            if contender.on_device and contender in self.running:
                with self._noting(f"{contender.name}, arrays on the GPU", mel):
                    clock = clock or EventClock()
                    call = contender.on_device(mel)
                    for _ in range(WARM_UP_RUNS):
                        clock.seconds(call)
                    calls[contender.name] = call
        for name in shuffled(calls, self.plan.rounds):
            if clock and name in calls:
                call = calls.pop(name)
                with self._noting(f"{name}, arrays on the GPU", mel):
                    samples.setdefault(name, []).append(clock.seconds(call))
                    calls[name] = call
        return {name: Timing(np.array(samples[name])) for name in calls}

    def _guarded(self, contender: Contender, mel: Mel, call: Callable[[], object]) -> Callable[[], object]:
        """Return the call, which does nothing any more once the contender has been dropped."""

        def guarded() -> None:
            if contender in self.running:
                with self._dropping(contender, mel):
                    call()

        return guarded

    @contextlib.contextmanager
    def _dropping(self, contender: Contender, mel: Mel) -> Iterator[None]:
        """Drop the contender if the block raises an exception."""
        passed = False
        with self._noting(contender.name, mel):
            yield
            passed = True
        if not passed:
            self.running.remove(contender)
            with contextlib.suppress(Exception):
                contender.close()

    @contextlib.contextmanager
    def _noting(self, name: str, mel: Mel) -> Iterator[None]:
        """List this name as failed if the block raises an exception: those of other libraries have no common base."""
        try:
            yield
        except Exception as error:
            self.skipped.append(Skipped.failure(name, f"on mels of shape {mel.shape}", error))

    def _length(self, seconds: float) -> tuple[int, float]:
        """Frames and exact seconds of the mel next to a length of audio."""
        spec = self.bundle.manifest.spec
        frames = max(round(seconds * spec.sample_rate / spec.hop), self.bundle.manifest.receptive_field.smallest_input)
        return frames, frames * spec.hop / spec.sample_rate

    def _first_calls(self, mel: Mel, shape: str) -> tuple[dict[str, float], dict[str, Difference]]:
        """Time each contender's first call, and compare its output with the reference, which computes equal utterances once."""
        reference = self.reference(mel[:DISTINCT])
        reference = np.concatenate([reference] * -(-len(mel) // DISTINCT))[: len(mel)]
        first, differences = {}, {}
        for contender in list(self.running):
            self._on_detail(f"{shape}: {contender.name}")
            with self._dropping(contender, mel):
                start = time.perf_counter()
                audio = contender.run(mel)
                first[contender.name] = time.perf_counter() - start
                differences[contender.name] = _difference(reference, audio)
        return first, differences

    def reference(self, mel: Mel) -> FloatAudio:
        """Return the audio that outputs are compared with, from PyTorch or from the FP32 graph."""
        if self.pytorch:
            return self.pytorch.audio(mel)
        edge = self.bundle.find("onnx", graph="edge", precision="fp32")
        if not edge:
            raise MelrtError(f"{self.bundle.path} has no fp32 graph to compare outputs with; give --checkpoint.")
        return OnnxModel(self.bundle.read(edge[0])).run(mel)

    def throughputs(self, callers: int) -> Iterator[Throughput]:
        """Time concurrent callers, each with its own utterance of the first length; a caller sends its next request after each audio."""
        frames, audio_seconds = self._length(self.plan.seconds[0])
        mels = [probe_mel(self.bundle.manifest.spec, frames, seed)[None] for seed in range(callers)]
        for contender in list(self.running):
            elapsed = 0.0
            with self._dropping(contender, mels[0]), ThreadPoolExecutor(callers) as pool:
                contender.run(mels[0])
                start = time.perf_counter()
                times = list(pool.map(partial(_request_times, contender), mels))
                elapsed = time.perf_counter() - start
            if not elapsed:
                continue
            timing = Timing(np.concatenate(times))
            requests = callers * REQUESTS
            speed = round(requests * audio_seconds / elapsed, 2)
            yield Throughput(contender.name, callers, round(audio_seconds, 3), requests, speed, _ms(timing), _ms(timing, 99))


def _request_times(contender: Contender, mel: Mel) -> list[float]:
    return [timed(partial(contender.run, mel)) for _ in range(REQUESTS)]


def _difference(reference: FloatAudio, output: FloatAudio) -> Difference:
    """Compare two outputs; one of another shape differs infinitely."""
    if output.shape != reference.shape:
        return Difference(float("inf"), float("-inf"))
    return Difference.between(reference, output)


def _latency(
    contender: Contender,
    timings: tuple[Timing, Timing],
    difference: Difference,
    shape: tuple[float, int],
    loop: Loop | None,
    events: Timing | None,
) -> Latency:
    seconds, batch = shape
    timing, baseline = timings
    audio_seconds = seconds * batch
    ratio = baseline.ratio_to(timing)
    return Latency(
        contender=contender.name, seconds=round(seconds, 3), batch=batch,
        milliseconds=tuple(round(1000 * float(s), 3) for s in timing.seconds),
        p50_ms=_ms(timing), p90_ms=_ms(timing, 90), p95_ms=_ms(timing, 95), p99_ms=_ms(timing, 99),
        worst_ms=_ms(timing, 100), real_time_factor=round(timing.median / audio_seconds, 6),
        times_real_time=round(audio_seconds / timing.median, 2), speedup=(round(ratio[0], 3), round(ratio[1], 3), round(ratio[2], 3)),
        device_ms=_ms(events) if events else None, device_p90_ms=_ms(events, 90) if events else None,
        loop_ms=_ms(loop.timing) if loop else None, loop_p90_ms=_ms(loop.timing, 90) if loop else None,
        joules=loop.joules if loop else None,
        max_abs=difference.max_abs, snr_db=round(difference.snr_db, 1), correct=difference.passes(contender.precision),
    )  # fmt: skip


def _ms(timing: Timing, percent: float | None = None) -> float:
    """Return a percentile in milliseconds, or the median."""
    return round(1000 * (timing.median if percent is None else timing.percentile(percent)), 3)
