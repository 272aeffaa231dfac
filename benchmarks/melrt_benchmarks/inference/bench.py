"""The inference benchmark: all contenders on the same mels, interleaved; outputs are checked before a time counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt.timing import SETTLE, Timing, interleave, noise_note, shuffled, timed
from melrt.types import FloatAudio, Mel
from melrt_benchmarks.inference.contender import BenchVoice, Contender
from melrt_benchmarks.inference.contenders import load_contenders
from melrt_benchmarks.inference.plan import BenchPlan
from melrt_benchmarks.inference.quality import list_recordings, measure_quality
from melrt_benchmarks.inference.roofline import profile
from melrt_benchmarks.inference.start_up import measure_start_up
from melrt_benchmarks.measure.environment import environment
from melrt_benchmarks.measure.gpu_meter import EventClock, Loop, loop_times, open_energy_counter
from melrt_benchmarks.report.results import Latency, Report, Skipped, StartUp, Throughput
from melrt_export.checkpoints import load_checkpoint
from melrt_export.generator.reference import PyTorchReference
from melrt_export.parity import Difference, probe_mel

# Requests of each caller when several call at once.
REQUESTS = 8
# Runs before the GPU's clock counts: a capture, and the first run after it.
WARM_UP_RUNS = 3
# Different utterances in a batch; later ones repeat them. A prime: utterances that change places by a power of two are noticed.
DISTINCT = 3


def run_bench(plan: BenchPlan, on_step: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything that the plan names.

    An interrupt (Ctrl-C) ends it early: the report has what was measured until then.

    Args:
        plan: Settings of the run.
        on_step: Called at the beginning of each step with a short text.

    Raises:
        KeyboardInterrupt: It was interrupted before the first length was measured.
        MelrtError: The voice or the checkpoint cannot be loaded, or no contender runs.
    """
    record = environment(plan.threads)
    on_step("loading the contenders")
    with contextlib.closing(_Contenders(plan)) as contenders:
        measured = Report(contenders.bundle.manifest.name, plan.command, record, plan.rounds)
        try:
            for part in _measurements(plan, contenders, on_step):
                measured = replace(measured, **part)
        except KeyboardInterrupt:
            if not measured.latencies:
                raise
            on_step("interrupted: the report has what was measured until now")
        contenders.check(measured.latencies)
    return replace(
        measured, skipped=tuple(contenders.skipped), noise=noise_note(contenders.timings),
        artifacts=tuple(
            {"file": a.file, "kind": a.kind, "precision": a.precision, "bytes": a.size} for a in contenders.bundle.manifest.artifacts
        ),
    )  # fmt: skip


def _measurements(plan: BenchPlan, contenders: _Contenders, on_step: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield fields of the report as they are measured."""
    latencies: list[Latency] = []
    throughputs: list[Throughput] = []
    recordings = list_recordings(plan.speech)
    for seconds in plan.seconds:
        for batch in plan.batches:
            on_step(f"{seconds:g} s of audio, batch {batch}")
            latencies += contenders.latencies(seconds, batch)
            yield {"latencies": tuple(latencies)}
    for callers in plan.concurrency:
        on_step(f"{callers} concurrent callers")
        throughputs += contenders.throughputs(callers)
        yield {"throughputs": tuple(throughputs)}
    if recordings:
        on_step(f"log-mel error on {len(recordings)} recordings")
        rows = measure_quality(contenders.running, contenders.reference, recordings, contenders.bundle.manifest.spec)
        yield {"qualities": tuple(rows)}
    contenders.close()
    if plan.profiled:
        on_step("profiling the operations")
        layers, ceilings = profile(contenders.bundle)
        yield {"layers": layers, "ceilings": ceilings}
    if plan.started:
        on_step("timing start-ups in fresh processes")
        yield {"start_ups": tuple(_start_ups(plan))}


def _start_ups(plan: BenchPlan) -> Iterator[StartUp]:
    for backend in plan.backends:
        for precision in plan.precisions:
            if (row := measure_start_up(plan.voice, backend, precision, plan.threads)) is not None:
                yield row


class _Contenders:
    """The loaded contenders and their measurements. One that raises an exception is dropped, and listed as skipped."""

    def __init__(self, plan: BenchPlan) -> None:
        self.plan = plan
        self.bundle = Bundle.open(plan.voice)
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
        differences = self._differences(mel)
        on_gpu = [contender for contender in self.running if contender.on_gpu]
        # Only the thread pools of contenders on the CPU need a pause. A GPU would become idle in it.
        pause = 0.0 if len(on_gpu) == len(self.running) else SETTLE
        timings = interleave(self._calls(self.running, mel), self.plan.rounds, pause=pause)
        loops = loop_times(self._calls(on_gpu, mel), self.plan.rounds, self._energy)
        events = self._device_times(on_gpu, mel)
        self.timings |= {f"{one.name} {seconds} {batch}": timings[one.name] for one in self.running}
        names = [one.name for one in self.running]
        return [
            _latency(one, (timings[one.name], timings[names[0]]), differences[one.name], (audio_seconds, batch), loops.get(one.name),
                     events.get(one.name))
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

    def _differences(self, mel: Mel) -> dict[str, Difference]:
        """Compare each contender's output with the reference, which computes equal utterances once."""
        reference = self.reference(mel[:DISTINCT])
        reference = np.concatenate([reference] * -(-len(mel) // DISTINCT))[: len(mel)]
        differences = {}
        for contender in list(self.running):
            with self._dropping(contender, mel):
                differences[contender.name] = _difference(reference, contender.run(mel))
        return differences

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
