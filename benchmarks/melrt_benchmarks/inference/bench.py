"""The benchmark: every way to run a voice on the same mels, one interleaved run, outputs checked before a time counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.base import BACKENDS, PRECISIONS
from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt.timing import Timing, interleave, noise_note, timed
from melrt_benchmarks.inference.contenders import Bench, Contender, contenders
from melrt_benchmarks.inference.roofline import profile
from melrt_benchmarks.inference.start_up import start_up
from melrt_benchmarks.measure.environment import environment
from melrt_benchmarks.measure.gpu_meter import Reading, open_meter
from melrt_benchmarks.report.results import Latency, Report, Skipped, Throughput
from melrt_export.checkpoints import load_checkpoint
from melrt_export.parity import Difference, probe_mel, pytorch_audio

# Requests that each caller makes when several call at once.
REQUESTS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    voice: Path
    checkpoint: Path | None = None
    """What the voice was exported from; without it only melrt itself is measured."""
    precisions: tuple[str, ...] = ("fp32",)
    backends: tuple[str, ...] = ("onnxruntime",)
    seconds: tuple[float, ...] = (1.0, 4.0, 10.0)
    """Lengths of audio."""
    batches: tuple[int, ...] = (1,)
    """Utterances in one call."""
    concurrency: tuple[int, ...] = ()
    """Callers at once; each asks for utterances of the first length."""
    rounds: int = 15
    threads: int = 1
    """CPU threads of every contender."""
    only: tuple[str, ...] = ()
    """Parts of names; a contender runs if its name holds one of them. Empty: all run."""
    profiled: bool = True
    """Time each operation of the deploy graph."""
    started: bool = True
    """Time starts, each in a process of its own."""
    command: str = ""
    on_step: Callable[[str], None] = field(default=lambda _: None)

    def __post_init__(self) -> None:
        for name, known in (("precisions", PRECISIONS), ("backends", BACKENDS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise MelrtError(f"{name} names {unknown[0]!r}; known are {', '.join(known)}.")
        if self.rounds < 3:
            raise MelrtError(f"rounds is {self.rounds}; it is at least 3, or there is no spread to tell of.")
        if not all(0 < seconds <= 7200 for seconds in self.seconds) or not self.seconds:
            raise MelrtError(f"seconds is {self.seconds}; each is a length of audio above 0 and up to 7200.")
        for name in ("batches", "concurrency"):
            if not all(1 <= value <= 1024 for value in getattr(self, name)):
                raise MelrtError(f"{name} is {getattr(self, name)}; each is a number from 1 to 1024.")


def run_bench(plan: Plan) -> Report:
    """Measure.

    Raises:
        MelrtError: The voice or the checkpoint cannot be loaded, or no contender runs.
    """
    bundle = Bundle.open(plan.voice)
    source = load_checkpoint(plan.checkpoint) if plan.checkpoint else None
    record = environment(plan.threads)
    plan.on_step("loading the contenders")
    with _loaded(Bench(bundle, source, plan.threads), plan) as (running, skipped):
        timings: dict[str, Timing] = {}
        latencies = []
        for seconds in plan.seconds:
            for batch in plan.batches:
                plan.on_step(f"{seconds:g} s of audio, batch {batch}")
                rows, measured = _latencies(bundle, source, (running, skipped), (seconds, batch), plan)
                latencies += rows
                timings |= {f"{name} {seconds} {batch}": timing for name, timing in measured.items()}
        throughputs = [row for callers in plan.concurrency for row in _throughputs(bundle, running, callers, plan)]
    plan.on_step("profiling")
    layers, ceilings = profile(bundle) if plan.profiled else ((), {})
    plan.on_step("starting")
    start_ups = [start_up(plan.voice, b, p, plan.threads) for b in plan.backends for p in plan.precisions] if plan.started else []
    return Report(
        voice=bundle.manifest.name, command=plan.command, environment=record, rounds=plan.rounds, latencies=tuple(latencies),
        throughputs=tuple(throughputs), start_ups=tuple(row for row in start_ups if row), layers=layers, ceilings=ceilings,
        skipped=tuple(skipped), noise=noise_note(timings),
        artifacts=tuple({"file": a.file, "kind": a.kind, "precision": a.precision, "bytes": a.size} for a in bundle.manifest.artifacts),
    )  # fmt: skip


@contextlib.contextmanager
def _loaded(bench: Bench, plan: Plan) -> Iterator[tuple[list[Contender], list[Skipped]]]:
    running: list[Contender] = []
    skipped: list[Skipped] = []
    try:
        for one in contenders(bench, plan.precisions, plan.backends, plan.only):
            if isinstance(one, Contender):
                running.append(one)
            else:
                skipped.append(one)
        if not running:
            reasons = " · ".join(f"{one.contender}: {one.reason}" for one in skipped)
            raise MelrtError(f"no contender runs here. {reasons or 'None has a name with ' + ', '.join(plan.only)}.")
        yield running, skipped
    finally:
        for one in running:
            one.close()


def _latencies(
    bundle: Bundle, source: Any, field: tuple[list[Contender], list[Skipped]], shape: tuple[float, int], plan: Plan
) -> tuple[list[Latency], dict[str, Timing]]:
    (running, skipped), (seconds, batch) = field, shape
    spec = bundle.manifest.spec
    frames = max(round(seconds * spec.sample_rate / spec.hop), bundle.manifest.receptive_field.smallest_input)
    mel = np.stack([probe_mel(spec, frames, seed) for seed in range(batch)])
    reference = pytorch_audio(source, mel) if source else _reference(bundle, mel)
    differences = {name: _difference(reference, output) for name, output in _outputs(running, skipped, mel)}
    times = interleave({one.name: partial(one.run, mel) for one in running}, plan.rounds)
    first = times[running[0].name]
    meter = open_meter()
    audio = frames * spec.hop / spec.sample_rate
    rows = []
    for one in running:
        gpu = meter.read(partial(one.run, mel)) if meter and one.on_gpu else None
        rows.append(_row(one, times[one.name], first, differences[one.name], (audio, batch), gpu))
    return rows, times


def _outputs(running: list[Contender], skipped: list[Skipped], mel: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What each makes of these mels; another's product that fails on them is out of the race, a failure of melrt is one of the run."""
    for one in list(running):
        try:
            yield one.name, one.run(mel)
        except Exception as error:
            if one.name.startswith("melrt"):
                raise
            running.remove(one)
            one.close()
            skipped.append(Skipped(one.name, f"failed on mels of shape {mel.shape}: {(str(error).splitlines() or [repr(error)])[0][:200]}"))


def _difference(reference: NDArray[np.float32], output: NDArray[np.float32]) -> Difference:
    """An output of another shape is as wrong as can be."""
    if output.shape != reference.shape:
        return Difference(float("inf"), float("-inf"))
    return Difference.between(reference, output)


def _row(one: Contender, timing: Timing, first: Timing, difference: Difference, shape: tuple[float, int], gpu: Reading | None) -> Latency:
    seconds, batch = shape
    audio = seconds * batch
    ratio = first.ratio_to(timing)
    return Latency(
        contender=one.name, seconds=round(seconds, 3), batch=batch, milliseconds=tuple(round(1000 * float(s), 3) for s in timing.seconds),
        p50_ms=round(1000 * timing.median, 3), p90_ms=_ms(timing, 90), p95_ms=_ms(timing, 95), p99_ms=_ms(timing, 99),
        worst_ms=_ms(timing, 100), real_time_factor=round(timing.median / audio, 6), times_real_time=round(audio / timing.median, 2),
        speedup=(round(ratio[0], 3), round(ratio[1], 3), round(ratio[2], 3)), device_ms=round(gpu.milliseconds, 3) if gpu else None,
        joules=gpu.joules if gpu else None, max_abs=difference.max_abs,
        snr_db=round(difference.snr_db, 1), correct=difference.passes(one.precision),
    )  # fmt: skip


def _ms(timing: Timing, percent: float) -> float:
    return round(1000 * timing.percentile(percent), 3)


def _reference(bundle: Bundle, mel: NDArray[np.float32]) -> NDArray[np.float32]:
    edge = bundle.find("onnx", graph="edge", precision="fp32")
    if not edge:
        raise MelrtError(f"{bundle.path} has no fp32 graph to hold outputs against; give --checkpoint.")
    return OnnxModel(bundle.read(edge[0])).run(mel)


def _throughputs(bundle: Bundle, running: list[Contender], callers: int, plan: Plan) -> Iterator[Throughput]:
    """So many callers at once, each with its own utterance of the first length, asking again as soon as it has its audio."""
    spec = bundle.manifest.spec
    frames = max(round(plan.seconds[0] * spec.sample_rate / spec.hop), bundle.manifest.receptive_field.smallest_input)
    mels = [probe_mel(spec, frames, seed)[None] for seed in range(callers)]
    audio = frames * spec.hop / spec.sample_rate
    for one in running:
        plan.on_step(f"{callers} callers, {one.name}")
        one.run(mels[0])
        with ThreadPoolExecutor(callers) as pool:
            start = time.perf_counter()
            took = list(pool.map(partial(_ask, one), mels))
            whole = time.perf_counter() - start
        timing = Timing(np.concatenate(took))
        requests = callers * REQUESTS
        speed = round(requests * audio / whole, 2)
        yield Throughput(one.name, callers, round(audio, 3), requests, speed, round(1000 * timing.median, 3), _ms(timing, 99))


def _ask(one: Contender, mel: NDArray[np.float32]) -> list[float]:
    return [timed(partial(one.run, mel)) for _ in range(REQUESTS)]
