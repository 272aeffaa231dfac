"""The inference benchmark: all contenders on the same mels, interleaved; outputs are checked before a time counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from melrt.backends.base import BACKENDS, PRECISIONS
from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.checks import check_fields, list_of, number, one_of, whole
from melrt.errors import MelrtError
from melrt.timing import Timing, interleave, noise_note, timed
from melrt.types import FloatAudio, Mel
from melrt_benchmarks.inference.contenders import BenchVoice, Contender, load_contenders
from melrt_benchmarks.inference.quality import list_recordings, measure_quality
from melrt_benchmarks.inference.roofline import profile
from melrt_benchmarks.inference.start_up import measure_start_up
from melrt_benchmarks.measure.environment import environment
from melrt_benchmarks.measure.gpu_meter import Reading, open_meter
from melrt_benchmarks.report.results import Latency, Quality, Report, Skipped, StartUp, Throughput
from melrt_export.checkpoints import load_checkpoint
from melrt_export.generator.reference import PyTorchReference
from melrt_export.parity import Difference, probe_mel

# Requests of each caller when several call at once.
REQUESTS = 8
# Limit of the number of values of each setting, far above any useful one.
MANY = 1000


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """Settings of one benchmark run."""

    voice: Path
    """The bundle."""
    checkpoint: Path | None = None
    """Checkpoint the voice was exported from; without it only melrt is measured."""
    precisions: tuple[str, ...] = ("fp32",)
    """Precisions of melrt."""
    backends: tuple[str, ...] = ("onnxruntime",)
    """Backends of melrt."""
    seconds: tuple[float, ...] = (1.0, 4.0, 10.0)
    """Lengths of audio."""
    batches: tuple[int, ...] = (1,)
    """Utterances in one call."""
    concurrency: tuple[int, ...] = ()
    """Numbers of concurrent callers; each requests utterances of the first length."""
    rounds: int = 15
    """Counted rounds; at least 3, because fewer have no spread."""
    threads: int = 1
    """CPU threads of every contender."""
    only: tuple[str, ...] = ()
    """Parts of names; a contender runs if its name contains one of them. Empty: all run."""
    speech: tuple[Path, ...] = ()
    """Recordings of the voice's speech, or folders of them, on which the log-mel error is measured; empty to leave it out."""
    profiled: bool = True
    """Time each operation of the deploy graph."""
    started: bool = True
    """Time start-ups, each in a fresh process."""
    command: str = ""
    """Command line, for the report."""

    def __post_init__(self) -> None:
        check_fields(self, {
            "precisions": list_of(one_of(*PRECISIONS), 0, MANY), "backends": list_of(one_of(*BACKENDS), 0, MANY),
            "seconds": list_of(number(0, 7200, above=True), 1, MANY), "batches": list_of(whole(1, 1024), 1, MANY),
            "concurrency": list_of(whole(1, 1024), 0, MANY), "rounds": whole(3, 1_000_000), "threads": whole(1, 4096),
        })  # fmt: skip

    @property
    def steps(self) -> int:
        """Calls of `on_step` in one run."""
        return 1 + len(self.seconds) * len(self.batches) + len(self.concurrency) + bool(self.speech) + self.profiled + self.started


def run_bench(plan: BenchPlan, on_step: Callable[[str], None] = lambda _: None) -> Report:
    """Measure everything that the plan names.

    Args:
        plan: Settings of the run.
        on_step: Called at the beginning of each step with a short text.

    Raises:
        MelrtError: The voice or the checkpoint cannot be loaded, or no contender runs.
    """
    record = environment(plan.threads)
    latencies: list[Latency] = []
    throughputs: list[Throughput] = []
    qualities: tuple[Quality, ...] = ()
    recordings = list_recordings(plan.speech)
    on_step("loading the contenders")
    with contextlib.closing(_Contenders(plan)) as contenders:
        for seconds in plan.seconds:
            for batch in plan.batches:
                on_step(f"{seconds:g} s of audio, batch {batch}")
                latencies += contenders.latencies(seconds, batch)
        for callers in plan.concurrency:
            on_step(f"{callers} concurrent callers")
            throughputs += contenders.throughputs(callers)
        if recordings:
            on_step(f"log-mel error on {len(recordings)} recordings")
            qualities = tuple(measure_quality(contenders.running, contenders.reference, recordings, contenders.bundle.manifest.spec))
    if plan.profiled:
        on_step("profiling the operations")
    layers, ceilings = profile(contenders.bundle) if plan.profiled else ((), {})
    if plan.started:
        on_step("timing start-ups in fresh processes")
    manifest = contenders.bundle.manifest
    return Report(
        voice=manifest.name, command=plan.command, environment=record, rounds=plan.rounds, latencies=tuple(latencies),
        throughputs=tuple(throughputs),
        qualities=qualities, start_ups=tuple(_start_ups(plan)) if plan.started else (), layers=layers, ceilings=ceilings,
        skipped=tuple(contenders.skipped), noise=noise_note(contenders.timings),
        artifacts=tuple({"file": a.file, "kind": a.kind, "precision": a.precision, "bytes": a.size} for a in manifest.artifacts),
    )  # fmt: skip


def _start_ups(plan: BenchPlan) -> Iterator[StartUp]:
    for backend in plan.backends:
        for precision in plan.precisions:
            if (row := measure_start_up(plan.voice, backend, precision, plan.threads)) is not None:
                yield row


class _Contenders:
    """The loaded contenders and their measurements."""

    def __init__(self, plan: BenchPlan) -> None:
        self.plan = plan
        self.bundle = Bundle.open(plan.voice)
        self.checkpoint = load_checkpoint(plan.checkpoint) if plan.checkpoint else None
        self.pytorch = PyTorchReference(self.checkpoint.config, self.checkpoint.weights) if self.checkpoint else None
        self.running: list[Contender] = []
        self.skipped: list[Skipped] = []
        self.timings: dict[str, Timing] = {}
        """Timings of every contender and shape, for the note on noise."""
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
        if not self.running:
            reasons = " ".join(f"{skipped.contender}: {skipped.reason}" for skipped in self.skipped)
            raise MelrtError(f"no contender runs here. {reasons or 'None has a name that contains ' + ' or '.join(self.plan.only) + '.'}")

    def close(self) -> None:
        """Close every contender."""
        for contender in self.running:
            contender.close()

    def latencies(self, seconds: float, batch: int) -> list[Latency]:
        """Check and time every contender at one length and batch; the first one is the baseline."""
        frames, audio_seconds = self._length(seconds)
        mel = np.stack([probe_mel(self.bundle.manifest.spec, frames, seed) for seed in range(batch)])
        differences = self._differences(mel)
        timings = interleave({contender.name: partial(contender.run, mel) for contender in self.running}, self.plan.rounds)
        self.timings |= {f"{name} {seconds} {batch}": timing for name, timing in timings.items()}
        baseline = timings[self.running[0].name]
        meter = open_meter()
        rows = []
        for contender in self.running:
            reading = meter.read(partial(contender.run, mel)) if meter and contender.on_gpu else None
            name = contender.name
            rows.append(_latency(contender, timings[name], baseline, differences[name], (audio_seconds, batch), reading))
        return rows

    def _length(self, seconds: float) -> tuple[int, float]:
        """Frames and exact seconds of the mel next to a length of audio."""
        spec = self.bundle.manifest.spec
        frames = max(round(seconds * spec.sample_rate / spec.hop), self.bundle.manifest.receptive_field.smallest_input)
        return frames, frames * spec.hop / spec.sample_rate

    def _differences(self, mel: Mel) -> dict[str, Difference]:
        """Compare each contender's output with the reference.

        A third-party contender that fails on these mels is dropped and listed as skipped; a failure of melrt ends the run.
        """
        reference = self.reference(mel)
        differences = {}
        for contender in list(self.running):
            try:
                differences[contender.name] = _difference(reference, contender.run(mel))
            except Exception as error:
                if contender.name.startswith("melrt"):
                    raise
                self.running.remove(contender)
                contender.close()
                message = (str(error).splitlines() or [repr(error)])[0][:200]
                self.skipped.append(Skipped(contender.name, f"failed on mels of shape {mel.shape}: {message}"))
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
        for contender in self.running:
            contender.run(mels[0])
            with ThreadPoolExecutor(callers) as pool:
                start = time.perf_counter()
                times = list(pool.map(partial(_request_times, contender), mels))
                elapsed = time.perf_counter() - start
            timing = Timing(np.concatenate(times))
            requests = callers * REQUESTS
            speed = round(requests * audio_seconds / elapsed, 2)
            yield Throughput(
                contender.name, callers, round(audio_seconds, 3), requests, speed, round(1000 * timing.median, 3), _ms(timing, 99)
            )


def _request_times(contender: Contender, mel: Mel) -> list[float]:
    return [timed(partial(contender.run, mel)) for _ in range(REQUESTS)]


def _difference(reference: FloatAudio, output: FloatAudio) -> Difference:
    """Compare two outputs; one of another shape differs infinitely."""
    if output.shape != reference.shape:
        return Difference(float("inf"), float("-inf"))
    return Difference.between(reference, output)


def _latency(
    contender: Contender, timing: Timing, baseline: Timing, difference: Difference, shape: tuple[float, int], reading: Reading | None
) -> Latency:
    seconds, batch = shape
    audio_seconds = seconds * batch
    ratio = baseline.ratio_to(timing)
    return Latency(
        contender=contender.name, seconds=round(seconds, 3), batch=batch,
        milliseconds=tuple(round(1000 * float(s), 3) for s in timing.seconds),
        p50_ms=round(1000 * timing.median, 3), p90_ms=_ms(timing, 90), p95_ms=_ms(timing, 95), p99_ms=_ms(timing, 99),
        worst_ms=_ms(timing, 100), real_time_factor=round(timing.median / audio_seconds, 6),
        times_real_time=round(audio_seconds / timing.median, 2), speedup=(round(ratio[0], 3), round(ratio[1], 3), round(ratio[2], 3)),
        device_ms=round(reading.milliseconds, 3) if reading else None, joules=reading.joules if reading else None,
        max_abs=difference.max_abs, snr_db=round(difference.snr_db, 1), correct=difference.passes(contender.precision),
    )  # fmt: skip


def _ms(timing: Timing, percent: float) -> float:
    return round(1000 * timing.percentile(percent), 3)
