"""The inference benchmark: everything that a plan names, and a report of what was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from melrt.bundle import Bundle
from melrt.timing import noise_note
from melrt.vocoder import Vocoder
from melrt_benchmarks.inference.memory import measure_memory
from melrt_benchmarks.inference.plan import BenchPlan
from melrt_benchmarks.inference.quality import list_recordings, measure_quality
from melrt_benchmarks.inference.roofline import profile
from melrt_benchmarks.inference.rounds import Contenders
from melrt_benchmarks.inference.start_up import measure_start_up
from melrt_benchmarks.inference.streams import GPU_STREAMS, StreamLoad, measure_capacity
from melrt_benchmarks.measure.environment import environment
from melrt_benchmarks.report.results import Latency, Report, StartUp, Throughput

OnStep = Callable[[str], None]


def run_bench(plan: BenchPlan, on_step: OnStep = lambda _: None, on_detail: OnStep = lambda _: None) -> Report:
    """Measure everything that the plan names.

    An interrupt (Ctrl-C) ends it early: the report has what was measured until then.

    Args:
        plan: Settings of the run.
        on_step: Called at the beginning of each of the plan's steps with a short text.
        on_detail: Called with a longer text as such a step proceeds.

    Raises:
        KeyboardInterrupt: It was interrupted before anything was measured.
        MelrtError: The voice or the checkpoint cannot be loaded, or no contender runs.
    """
    bundle = Bundle.open(plan.voice)
    artifacts = tuple({"file": a.file, "kind": a.kind, "precision": a.precision, "bytes": a.size} for a in bundle.manifest.artifacts)
    empty = measured = Report(bundle.manifest.name, plan.command, environment(plan.threads), plan.rounds, artifacts=artifacts)
    try:
        for part in _measurements(plan, bundle, on_step, on_detail):
            measured = replace(measured, **part)
    except KeyboardInterrupt:
        if measured is empty:
            raise
        on_detail("interrupted: the report has what was measured until now")
    return measured


def _measurements(plan: BenchPlan, bundle: Bundle, on_step: OnStep, on_detail: OnStep) -> Iterator[dict[str, Any]]:
    """Yield fields of the report as they are measured."""
    if "time" in plan.measure:
        on_step("loading the contenders")
        with contextlib.closing(Contenders(plan, bundle, on_detail)) as contenders:
            for part in _times(plan, contenders, on_step):
                yield {**part, "skipped": tuple(contenders.skipped), "noise": noise_note(contenders.timings)}
    if "profile" in plan.measure:
        on_step("profiling the operations")
        layers, ceilings = profile(bundle)
        yield {"layers": layers, "ceilings": ceilings}
    if "start-up" in plan.measure:
        on_step("timing start-ups in fresh processes")
        yield {"start_ups": tuple(_start_ups(plan))}
    if "memory" in plan.measure:
        on_step("measuring memory")
        yield {"memory": measure_memory(plan.voice, on_detail)}
    if "streams" in plan.measure:
        on_step("counting real-time streams")
        yield {"streams": _streams(plan, on_detail)}


def _times(plan: BenchPlan, contenders: Contenders, on_step: OnStep) -> Iterator[dict[str, Any]]:
    """Yield what the contenders are timed and compared in."""
    latencies: list[Latency] = []
    throughputs: list[Throughput] = []
    recordings = list_recordings(plan.speech)
    for seconds in plan.seconds:
        for batch in plan.batches:
            on_step(f"{seconds:g} s of audio, batch {batch}")
            latencies += contenders.latencies(seconds, batch)
            contenders.check(latencies)
            yield {"latencies": tuple(latencies)}
    for callers in plan.concurrency:
        on_step(f"{callers} concurrent callers")
        throughputs += contenders.throughputs(callers)
        yield {"throughputs": tuple(throughputs)}
    if recordings:
        on_step(f"log-mel error on {len(recordings)} recordings")
        yield {"qualities": tuple(measure_quality(contenders.running, contenders.reference, recordings, contenders.bundle.manifest.spec))}


def _start_ups(plan: BenchPlan) -> Iterator[StartUp]:
    for backend in plan.backends:
        for precision in plan.precisions:
            if (row := measure_start_up(plan.voice, backend, precision, plan.threads)) is not None:
                yield row


def _streams(plan: BenchPlan, on_detail: OnStep) -> tuple[dict[str, Any], ...]:
    with Vocoder.load(plan.voice, backend=plan.backends[0], precision=plan.precisions[0], threads=plan.threads) as vocoder:
        load = StreamLoad() if vocoder.backend.device == "cpu" else GPU_STREAMS
        return tuple(measure_capacity(vocoder, load, on_step=on_detail))
