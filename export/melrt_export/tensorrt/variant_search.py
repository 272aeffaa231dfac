"""Find the fastest engine for a graph by measurement: try its exact rewrites and several windows on this machine's GPU.

The search starts from the engine of a plain build and changes one choice at a time. Each candidate is built, its accuracy is checked,
and it is timed in pairs with the fastest engine so far, which it replaces if it is faster by more than the noise. The manifest keeps all
trials.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.engine import Engine
from melrt.backends.tensorrt.gpu_arrays import preserved_context
from melrt.backends.tensorrt.kernels import Kernels
from melrt.backends.tensorrt.slot import ExecutionSlot
from melrt.bundle import Bundle
from melrt.errors import EngineBuildError, MelrtError
from melrt.planning.windows import ReceptiveField
from melrt.system import find_gpu
from melrt.timing import compare_paired, timed
from melrt_export.graph.rewrites import CHOICES
from melrt_export.tensorrt.build import BuiltEngine, build_unsaved_engine, source_graph
from melrt_export.tensorrt.options import EngineOptions, default_frames
from melrt_export.tensorrt.polygraphy import Progress

# Windows to try, in frames: a shorter one computes more context, and a longer one does not fit the GPU's caches.
WINDOWS = (128, 256, 512)
# TensorRT-RTX compiles the kernels of a shape in the background during the first runs.
WARM_UP_SECONDS = 1.0
# Paired timings of two engines, and the length of each timing, which covers several launches.
ROUNDS = 15
SECONDS_PER_TIMING = 0.02
# A candidate must save this share of the time to replace the fastest engine: a smaller difference is noise, and the simpler graph stays.
MIN_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class VariantTrial:
    """Result for one engine of the search."""

    options: EngineOptions
    """Options that the engine was built with."""
    microseconds: float
    """Median time per kept mel frame; 0 if the engine was not timed."""
    verdict: str
    """`fastest` if it was the fastest up to then, `slower`, or `refused` with the reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        frames = self.options.frames
        return {
            **self.options.variant.to_dict(), "batch": self.options.batch[1], "frames": frames[1] if frames else 0,
            "microseconds": round(self.microseconds, 3), "verdict": self.verdict,
        }  # fmt: skip


def find_fastest_engine(
    bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None
) -> tuple[BuiltEngine, list[VariantTrial]]:
    """Find the fastest engine for a graph on this machine's GPU.

    Args:
        bundle: Bundle with the ONNX graph of the precision.
        options: Options of the first engine. Other windows are tried only for the interior graph, and only if `frames` is None.
        on_progress: Called with the name of a phase, its steps done and their number.

    Returns:
        The fastest engine, whose entry holds all trials, and the trials.

    Raises:
        EngineBuildError: This machine has no GPU, or the first engine cannot be built.
        BundleError, MissingExtraError: As `build_engine` raises them.
    """
    if not find_gpu():
        raise EngineBuildError("trying variants needs the GPU that the engines are for, and this machine has none. Build without it.")
    with preserved_context():
        return _search(bundle, options, on_progress)


def _search(bundle: Bundle, options: EngineOptions, on_progress: Progress) -> tuple[BuiltEngine, list[VariantTrial]]:
    field = bundle.manifest.receptive_field
    best = Candidate(bundle, replace(options, frames=options.frames or default_frames(options.graph, field.smallest_input)))
    best.prepare(on_progress)
    seconds = float(np.median([timed(best.run) for _ in range(ROUNDS)]))
    trials = [VariantTrial(best.options, 1e6 * seconds / best.frames_per_run, "fastest")]
    tried = {best.identity}
    for name, value in _changes(options, field):
        candidate = Candidate(bundle, _with_change(best.options, name, value))
        if candidate.identity in tried:
            continue
        tried.add(candidate.identity)
        trials.append(_try(candidate, best, on_progress))
        if trials[-1].verdict == "fastest":
            best.close()
            best = candidate
    best.close()
    entry = best.built.entry
    target = {**entry.target, "trials": [trial.to_dict() for trial in trials]}
    return replace(best.built, entry=replace(entry, target=target)), trials


def _changes(options: EngineOptions, field: ReceptiveField) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each change to try."""
    for name, values in CHOICES.items():
        yield from ((name, value) for value in values[1:])
    if options.graph == "interior" and options.frames is None:
        yield from (("frames", (window,) * 3) for window in WINDOWS if window > field.context)


def _with_change(options: EngineOptions, name: str, value: Any) -> EngineOptions:
    if name == "frames":
        return replace(options, frames=value)
    return replace(options, variant=replace(options.variant, **{name: value}))


def _try(candidate: Candidate, best: Candidate, on_progress: Progress) -> VariantTrial:
    """Prepare a candidate and time it against the fastest engine so far; a slower one is closed."""
    try:
        candidate.prepare(on_progress)
    except MelrtError as error:
        return VariantTrial(candidate.options, 0.0, f"refused: {error}")
    best_timing, timing = compare_paired(best.run, candidate.run, ROUNDS)
    ratio = timing.ratio_to(best_timing)[0] * best.frames_per_run / candidate.frames_per_run
    faster = ratio < 1 - MIN_GAIN
    if not faster:
        candidate.close()
    return VariantTrial(candidate.options, 1e6 * timing.median / candidate.frames_per_run, "fastest" if faster else "slower")


class Candidate:
    """Engine to be timed on the GPU."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.options = options
        self._bundle = bundle
        _, onnx = source_graph(bundle, options)
        self.identity = (hashlib.sha256(onnx).digest(), options.frames)
        """Key that is equal for equal engines. A rewrite may find nothing to change in a voice's graph."""

    def prepare(self, on_progress: Progress) -> None:
        """Build the engine, check its accuracy, open it, and run it until it has reached its full speed.

        Raises:
            EngineBuildError: The engine cannot be built or is inaccurate.
        """
        self.built = build_unsaved_engine(self._bundle, self.options, on_progress)
        manifest, graph = self._bundle.manifest, self.options.graph
        device, gpu = open_device(0)
        device.set_current()
        self._engine = Engine(self.built.entry, self.built.plan, manifest.spec.n_mels, gpu)
        self._slot = ExecutionSlot(device, Kernels(device), {graph: self._engine}, manifest.spec.hop, int16=False)
        batch, bands, frames = self.built.entry.target["profile"][1]
        context = manifest.receptive_field.context if graph == "interior" else 0
        self._slot.run(graph, np.random.default_rng(0).uniform(-4, 0, (batch, bands, frames)).astype(np.float32))
        self._prepared = self._slot.prepared(graph, batch, bands, frames)
        self._launches = 1
        start = time.perf_counter()
        fastest = timed(self.run)
        while time.perf_counter() - start < WARM_UP_SECONDS:
            fastest = min(fastest, timed(self.run))
        self._launches = max(1, round(SECONDS_PER_TIMING / fastest))
        self.frames_per_run: int = self._launches * batch * (frames - context)
        """Mel frames that one `run` gives audio for."""

    def run(self) -> None:
        """Launch the engine several times and wait for the GPU, without copies to and from the host."""
        for _ in range(self._launches):
            self._prepared.launch()
        self._slot.stream.sync()

    def close(self) -> None:
        """Store the compiled kernels, and free the GPU's memory."""
        self._engine.save_cache()
        self._slot.close()
