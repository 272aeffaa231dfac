"""The benchmark: melrt against PyTorch and a plain export, same mels, one interleaved run, outputs checked first."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from melrt.machine import cpu_name
from melrt.vocoder import Vocoder
from melrt_benchmarks.contenders import contenders
from melrt_benchmarks.timing import interleave
from melrt_export.checkpoints import load_checkpoint
from melrt_export.parity import FP32_MAX_ABS, probe_mel, pytorch_audio

SCHEMA = 1
WARMUP = 2


@dataclass(frozen=True, slots=True)
class Result:
    """One contender at one length."""

    contender: str
    seconds: float
    """Of audio."""
    median_ms: float
    p90_ms: float
    real_time_factor: float
    """Median compute time over audio time."""
    times_real_time: float
    """Its inverse."""
    speedup: float
    """Median over the rounds of PyTorch eager's time over this one's, in the same round."""
    max_abs: float
    """Largest difference of a sample from PyTorch eager's."""
    correct: bool
    """Whether that is within the limit."""


def run_bench(
    voice: Path, checkpoint: Path, lengths: list[float], rounds: int, threads: int, on_step: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure; see `docs/benchmarks.md` for the fields of what it returns, ready for JSON."""
    source = load_checkpoint(checkpoint)
    vocoder = Vocoder.load(voice, threads=threads)
    on_step("exporting the plain graph")
    runs = list(contenders(source, vocoder, threads))
    spec = vocoder.spec
    results = []
    for seconds in lengths:
        frames = round(seconds * spec.sample_rate / spec.hop)
        on_step(f"{seconds:g} s of audio")
        mel = probe_mel(spec, frames)
        reference = pytorch_audio(source, mel[None])[0]
        errors = {name: float(np.abs(run(mel) - reference).max()) for name, run in runs}
        times = interleave({name: partial(run, mel) for name, run in runs}, rounds, WARMUP)
        audio = frames * spec.hop / spec.sample_rate
        baseline = times[runs[0][0]]
        for name, timing in times.items():
            results.append(Result(
                contender=name, seconds=round(audio, 3), median_ms=round(1000 * timing.median, 2), p90_ms=round(1000 * timing.p90, 2),
                real_time_factor=round(timing.median / audio, 5), times_real_time=round(audio / timing.median, 2),
                speedup=round(baseline.ratio_to(timing), 3), max_abs=errors[name], correct=errors[name] <= FP32_MAX_ABS,
            ))  # fmt: skip
    return {"schema": SCHEMA, "voice": vocoder.bundle.manifest.name, "rounds": rounds, "warmup": WARMUP,
            "environment": environment(threads), "results": [asdict(result) for result in results]}  # fmt: skip


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("melrt", "numpy", "torch", "onnxruntime", "onnx")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "threads": threads, "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(), "versions": {name: metadata.version(name) for name in packages},
    }  # fmt: skip
