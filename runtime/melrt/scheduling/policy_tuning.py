"""Windows by measurement: which length and batch make a frame cheapest on this machine, kept in the bundle.

A backend's own policy was measured on one machine. `tune` tries its candidates here, `record` keeps the result in the bundle, and
whoever loads the voice on such a machine again runs with it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from melrt.backends.base import Backend
from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError, BundleError
from melrt.planning.windows import Policy, ReceptiveField

# Frames a trial computes per worker: some hundred milliseconds on a CPU, so that starting threads costs nothing.
TRIAL_FRAMES = 1024
# Trials this close to the cheapest are as good within a shared machine's noise: then the smaller run wins, for its latency.
AS_GOOD = 1.02


@dataclass(frozen=True, slots=True)
class Trial:
    """A policy, measured."""

    policy: Policy
    microseconds: float
    """Per kept mel frame, all workers together, median of the rounds."""


def tune(bundle: Bundle, backend: Backend, rounds: int = 7, on_trial: Callable[[], None] = lambda: None) -> tuple[Trial, ...]:
    """Measure each of the backend's candidates on this machine, interleaved; the chosen one comes first, the rest by length.

    Args:
        bundle: The voice.
        backend: With its models loaded; nothing else should use it meanwhile.
        rounds: Counted rounds over all candidates; one more warms up.
        on_trial: Called after each single measurement, `(rounds + 1) * len(backend.candidates)` times.

    Raises:
        BackendError: No candidate is longer than this voice's context.
    """
    manifest = bundle.manifest
    field = manifest.receptive_field
    candidates = [policy for policy in backend.candidates if policy.frames > max(field.context, field.edge)]
    if not candidates:
        raise BackendError(f"{backend.name} has no window longer than this voice's context of {field.left} + {field.right} frames.")
    seconds: dict[Policy, list[float]] = {policy: [] for policy in candidates}
    shuffle = np.random.default_rng(0)
    for turn in range(rounds + 1):
        for index in shuffle.permutation(len(candidates)):
            cost = _seconds_per_frame(backend, candidates[index], field, manifest.spec.n_mels)
            if turn:
                seconds[candidates[index]].append(cost)
            on_trial()
    return _ranked([Trial(policy, 1e6 * float(np.median(costs))) for policy, costs in seconds.items()])


def record(bundle: Bundle, backend: Backend, trials: Sequence[Trial]) -> Artifact:
    """Keep what was measured in the bundle, in place of an earlier record for such a machine."""
    facts = _facts(backend)
    data = (json.dumps({"chosen": asdict(trials[0].policy), "trials": [asdict(trial) for trial in trials]}, indent=1) + "\n").encode()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    name = f"policy.{backend.precision}.{backend.name}-{backend.device}-{key}.json"
    return bundle.add(Artifact.of(name, data, "policy", precision=backend.precision, target=facts), data)


def recorded(bundle: Bundle, backend: Backend) -> Policy | None:
    """What was recorded for this backend on such a machine; None if nothing was, or what the backend no longer offers.

    Raises:
        BundleError: The record is damaged.
    """
    entry = next((a for a in bundle.find("policy", precision=backend.precision) if dict(a.target) == _facts(backend)), None)
    if entry is None:
        return None
    try:
        policy = Policy(**json.loads(bundle.read(entry))["chosen"])
    except (ValueError, TypeError, KeyError, RecursionError, BackendError) as error:
        raise BundleError(f"{bundle.path / entry.file} is no record of windows: {error}") from error
    return policy if policy in backend.candidates else None


def _seconds_per_frame(backend: Backend, policy: Policy, field: ReceptiveField, bands: int) -> float:
    kept = (policy.frames - field.left - field.right) * policy.batch
    runs = -(-TRIAL_FRAMES // kept)
    mel = np.random.default_rng(0).uniform(-4, 0, (policy.batch, bands, policy.frames)).astype(np.float32)

    def work(_: int) -> None:
        for _ in range(runs):
            backend.run("interior", mel)

    with ThreadPoolExecutor(policy.workers) as pool:
        start = time.perf_counter()
        list(pool.map(work, range(policy.workers)))
        return (time.perf_counter() - start) / (runs * kept * policy.workers)


def _ranked(trials: list[Trial]) -> tuple[Trial, ...]:
    cheapest = min(trial.microseconds for trial in trials)
    good = [trial for trial in trials if trial.microseconds <= AS_GOOD * cheapest]
    chosen = min(good, key=lambda trial: (trial.policy.frames * trial.policy.batch, trial.microseconds))
    return chosen, *(trial for trial in trials if trial is not chosen)


def _facts(backend: Backend) -> dict[str, Any]:
    return {"backend": backend.name, "device": backend.device, "machine": backend.machine, "workers": backend.policy.workers}
