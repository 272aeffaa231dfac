"""The graph by measurement: which of its exact rewrites, and which window, makes the fastest engine on the GPU at hand.

From the engine that would be built without it, one thing is changed at a time: the engine is built, spoken to, and timed turn and turn
about with the fastest so far; it takes its place if it is faster by more than the noise. What was found is kept in the manifest.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.engine import Engine
from melrt.backends.tensorrt.slot import ExecutionSlot
from melrt.bundle import Artifact, Bundle
from melrt.errors import EngineBuildError, MelrtError
from melrt.planning.windows import ReceptiveField
from melrt.system import find_gpu
from melrt_export.graph.rewrites import CHOICES
from melrt_export.tensorrt.build import BuiltEngine, build_unsaved_engine, network
from melrt_export.tensorrt.options import ENGINE_WINDOW, EngineOptions, default_frames
from melrt_export.tensorrt.polygraphy import Progress

# Windows that are tried: shorter ones compute more context, longer ones leave the caches.
WINDOWS = (128, 256, 512)
# TensorRT-RTX compiles kernels for a shape in the background while the first runs go on.
WARM_UP_SECONDS = 1.0
# Timings of a trial, each of several launches, turn and turn about with the fastest engine so far.
ROUNDS = 15
SECONDS_PER_TIMING = 0.02
# An engine must gain this much to take the fastest one's place: less is noise, and the simpler graph stays.
LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Trial:
    """One engine that was tried."""

    options: EngineOptions
    """What it was built with."""
    microseconds: float
    """Per kept mel frame, median; 0 if it was not timed."""
    verdict: str
    """`fastest` when it was tried, `slower`, or why it was refused."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        frames = self.options.frames
        return {
            **self.options.variant.to_dict(), "batch": self.options.batch[1], "frames": frames[1] if frames else 0,
            "microseconds": round(self.microseconds, 3), "verdict": self.verdict,
        }  # fmt: skip


def build_engines(
    bundle: Bundle, wanted: Iterable[EngineOptions], on_progress: Progress = lambda *_: None, *, tune: bool = False
) -> Iterator[tuple[Artifact, list[Trial]]]:
    """Build several engines into a bundle, or tune them: the window of an interior one, found or set, is what an edge one takes after it.

    Args and errors: as `tune_engine`, or `build_engine`.
    """
    window = ENGINE_WINDOW
    for options in wanted:
        if options.frames is None and options.graph == "edge":
            options = replace(options, frames=default_frames("edge", bundle.manifest.receptive_field.smallest_input, window))
        draft, trials = tune_engine(bundle, options, on_progress) if tune else (build_unsaved_engine(bundle, options, on_progress), [])
        if options.graph == "interior":
            window = draft.entry.target["profile"][1][2]
        yield draft.keep(bundle), trials


def tune_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> tuple[BuiltEngine, list[Trial]]:
    """Find the fastest engine for a graph on this machine's GPU.

    Args:
        bundle: With the ONNX graph of the precision.
        options: Where to begin. The window is varied only if `frames` is None and the graph is `interior`.
        on_progress: As for `build_engine`.

    Returns:
        The fastest engine, with all trials in its entry, and these trials.

    Raises:
        EngineBuildError: There is no GPU, or the first engine cannot be built.
        BundleError, MissingExtraError: As `build_engine`.
    """
    if not find_gpu():
        raise EngineBuildError("--tune times engines on the GPU that they are for, and there is none here; build without it.")
    best = _Contestant(
        bundle, replace(options, frames=options.frames or default_frames(options.graph, bundle.manifest.receptive_field.smallest_input))
    )
    best.prepare(on_progress)
    trials = [Trial(best.options, statistics.median(best.cost() for _ in range(ROUNDS)), "fastest")]
    tried = {best.network}
    for name, value in _changes(options, bundle.manifest.receptive_field):
        rival = _Contestant(bundle, _changed(best.options, name, value))
        if rival.network in tried:
            continue
        tried.add(rival.network)
        try:
            rival.prepare(on_progress)
        except MelrtError as error:
            trials.append(Trial(rival.options, 0.0, f"refused: {error}"))
            continue
        trial = _duel(best, rival)
        trials.append(trial)
        best, loser = (rival, best) if trial.verdict == "fastest" else (best, rival)
        loser.close()
    best.close()
    entry = best.draft.entry
    target = {**entry.target, "tuned": [trial.to_dict() for trial in trials]}
    return replace(best.draft, entry=replace(entry, target=target)), trials


def _changes(options: EngineOptions, field: ReceptiveField) -> Iterator[tuple[str, Any]]:
    """What is tried instead, one after the other."""
    for name, values in CHOICES.items():
        yield from ((name, value) for value in values[1:])
    if options.graph == "interior" and options.frames is None:
        yield from (("frames", (window,) * 3) for window in WINDOWS if window > field.context)


def _changed(options: EngineOptions, name: str, value: Any) -> EngineOptions:
    if name == "frames":
        return replace(options, frames=value)
    return replace(options, variant=replace(options.variant, **{name: value}))


def _duel(best: _Contestant, rival: _Contestant) -> Trial:
    costs = [(best.cost(), rival.cost()) if turn % 2 else (rival.cost(), best.cost())[::-1] for turn in range(ROUNDS)]
    ratio = statistics.median(mine / theirs for theirs, mine in costs)
    return Trial(rival.options, statistics.median(mine for _, mine in costs), "fastest" if ratio < 1 - LEAST_GAIN else "slower")


class _Contestant:
    """An engine on the GPU, to be timed."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        self.options = options
        self._bundle = bundle
        _, onnx = network(bundle, options)
        self.network = (hashlib.sha256(onnx).digest(), options.frames)
        """What tells it from others: a rewrite may find nothing to change in a voice."""

    def prepare(self, on_progress: Progress) -> None:
        """Build, hear and open the engine, and run it until it is at its speed.

        Raises:
            EngineBuildError: It cannot be built, or says something else than PyTorch.
        """
        self.draft = build_unsaved_engine(self._bundle, self.options, on_progress)
        manifest, graph = self._bundle.manifest, self.options.graph
        device, gpu = open_device(0)
        self._engine = Engine(self.draft.entry, self.draft.plan, manifest.spec.n_mels, gpu)
        self._lane = ExecutionSlot(device, {graph: self._engine}, manifest.spec.hop, int16=False)
        batch, bands, frames = self.draft.entry.target["profile"][1]
        context = manifest.receptive_field.context if graph == "interior" else 0
        self._kept: int = batch * (frames - context)
        self._lane.run(graph, np.random.default_rng(0).uniform(-4, 0, (batch, bands, frames)).astype(np.float32))
        self._ready = self._lane.ready(graph, batch, bands, frames)
        self._launches = 1
        start = time.perf_counter()
        once = self.cost() * self._kept / 1e6
        while time.perf_counter() - start < WARM_UP_SECONDS:
            once = min(once, self.cost() * self._kept / 1e6)
        self._launches = max(1, round(SECONDS_PER_TIMING / once))

    def cost(self) -> float:
        """Microseconds per kept mel frame, without the copies to and from the host."""
        start = time.perf_counter()
        for _ in range(self._launches):
            self._ready.launch()
        self._lane.stream.sync()
        return 1e6 * (time.perf_counter() - start) / (self._launches * self._kept)

    def close(self) -> None:
        self._engine.save_cache()
        self._lane.close()
