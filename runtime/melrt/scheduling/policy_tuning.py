"""Windows chosen by measurement: which length and batch make a frame cheapest on this machine, stored in the bundle.

A backend's default policy was measured on one machine. `tune` times the backend's candidates on this one, `record` stores the result
in the bundle, and every vocoder that loads the voice on such a machine uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from melrt.backends.base import Backend
from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError, BundleError
from melrt.planning.windows import Policy, ReceptiveField
from melrt.timing import interleave

# Frames that each worker computes per measurement: some hundred milliseconds on a CPU, so that starting threads costs nothing.
MEASURED_FRAMES = 1024
# Policies this close to the cheapest are equal within a shared machine's noise: the smaller run is chosen, for its latency.
EQUAL = 1.02


@dataclass(frozen=True, slots=True)
class PolicyTiming:
    """A policy and its measured cost."""

    policy: Policy
    """Windows that were measured."""
    microseconds: float
    """Microseconds per kept mel frame, all workers together, median of the rounds."""


def tune(bundle: Bundle, backend: Backend, rounds: int = 7, on_measured: Callable[[], None] = lambda: None) -> tuple[PolicyTiming, ...]:
    """Measure each of the backend's candidates on this machine, interleaved.

    Args:
        bundle: The voice.
        backend: The backend with its models loaded; nothing else should use it meanwhile.
        rounds: Counted rounds over all candidates, after each candidate has warmed up.
        on_measured: Called after each counted measurement, `rounds * len(backend.candidates)` times at most.

    Returns:
        The chosen policy first, then the others by length.

    Raises:
        BackendError: No candidate is longer than this voice's context.
    """
    field = bundle.manifest.receptive_field
    candidates = [policy for policy in backend.candidates if policy.frames > max(field.context, field.edge)]
    if not candidates:
        raise BackendError(f"{backend.name} has no window longer than this voice's context of {field.left} + {field.right} frames.")
    spec = bundle.manifest.spec
    timings = interleave({policy: _measurement(backend, policy, spec.n_mels) for policy in candidates}, rounds, on_measured)
    return _ranked([PolicyTiming(policy, 1e6 * timing.median / _frames(policy, field)) for policy, timing in timings.items()])


def record(bundle: Bundle, backend: Backend, timings: Sequence[PolicyTiming]) -> Artifact:
    """Store the measurement in the bundle, replacing an earlier record for such a machine."""
    facts = _facts(backend)
    values = {"chosen": asdict(timings[0].policy), "measured": [asdict(timing) for timing in timings]}
    data = (json.dumps(values, indent=1) + "\n").encode()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    name = f"policy.{backend.precision}.{backend.name}-{backend.device}-{key}.json"
    return bundle.add(Artifact.of(name, data, "policy", precision=backend.precision, target=facts), data)


def recorded_policy(bundle: Bundle, backend: Backend) -> Policy | None:
    """Return the policy recorded for this backend on such a machine; None without a record, or if the backend no longer offers it.

    Raises:
        BundleError: The record is damaged.
    """
    entry = next((a for a in bundle.find("policy", precision=backend.precision) if dict(a.target) == _facts(backend)), None)
    if entry is None:
        return None
    try:
        policy = Policy(**json.loads(bundle.read(entry))["chosen"])
    except BundleError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(f"{bundle.path / entry.file} is not a record of windows: {error}") from error
    return policy if policy in backend.candidates else None


def _measurement(backend: Backend, policy: Policy, bands: int) -> Callable[[], object]:
    """Make the function that one measurement times: every worker runs its share of windows at the same time."""
    mel = np.random.default_rng(0).uniform(-4, 0, (policy.batch, bands, policy.frames)).astype(np.float32)

    def work(_: int) -> None:
        for _ in range(_runs(policy)):
            backend.run("interior", mel)

    def measure() -> None:
        with ThreadPoolExecutor(policy.workers) as pool:
            list(pool.map(work, range(policy.workers)))

    return measure


def _runs(policy: Policy) -> int:
    return -(-MEASURED_FRAMES // (policy.frames * policy.batch))


def _frames(policy: Policy, field: ReceptiveField) -> int:
    """Return the frames that one measurement keeps, over all workers."""
    return _runs(policy) * (policy.frames - field.context) * policy.batch * policy.workers


def _ranked(timings: list[PolicyTiming]) -> tuple[PolicyTiming, ...]:
    cheapest = min(timing.microseconds for timing in timings)
    good = [timing for timing in timings if timing.microseconds <= EQUAL * cheapest]
    chosen = min(good, key=lambda timing: (timing.policy.frames * timing.policy.batch, timing.microseconds))
    return chosen, *(timing for timing in timings if timing is not chosen)


def _facts(backend: Backend) -> dict[str, Any]:
    return {"backend": backend.name, "device": backend.device, "machine": backend.machine, "workers": backend.policy.workers}
