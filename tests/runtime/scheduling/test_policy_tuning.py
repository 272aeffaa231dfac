"""Tuned windows: the cheapest candidate is recorded in the bundle, and the voice uses it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.errors import BackendError, BundleError
from melrt.planning.windows import Policy
from melrt.scheduling.policy_tuning import PolicyTiming, _ranked, record, recorded_policy, tune
from melrt.vocoder import Options

POLICY = Policy(48, static=False, batch=1, workers=2)


class Priced:
    """A backend with known costs: 2 ms a run, and 20 ms a run for windows of 64 frames."""

    name, device, machine, precision = "priced", "cpu", "the test machine", "fp32"
    policy = POLICY
    candidates = tuple(replace(POLICY, frames=frames) for frames in (12, 48, 64, 512))

    def close(self) -> None:
        pass

    def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
        assert graph == "interior"
        time.sleep(0.02 if mel.shape[2] == 64 else 0.002)
        return np.zeros((len(mel), mel.shape[2] * 256), np.float32)


def test_cheapest_window_is_recorded_and_used(tiny_bundle: Bundle) -> None:
    backend, steps = Priced(), []
    assert recorded_policy(tiny_bundle, backend) is None
    timings = tune(tiny_bundle, backend, rounds=2, on_measured=lambda: steps.append(1))
    assert [timing.policy.frames for timing in timings] == [512, 48, 64], "12 frames are not longer than the context"
    assert timings[2].microseconds > 3 * timings[1].microseconds > 9 * timings[0].microseconds
    assert len(steps) == 6, "once for each counted run"
    for _ in range(2):
        entry = record(tiny_bundle, backend, timings)
    bundle = Bundle.open(tiny_bundle.path)
    assert bundle.find("policy") == [entry], "a second record replaces the first"
    assert Vocoder(bundle, backend).policy == replace(backend.policy, frames=512)
    given = replace(backend.policy, frames=100)
    assert Vocoder(bundle, backend, Options(policy=given)).policy == given
    other = Priced()
    other.machine = "another"
    assert Vocoder(bundle, other).policy == backend.policy


def test_shorter_of_two_equal_windows_is_chosen() -> None:
    timings = [PolicyTiming(replace(Priced.policy, frames=frames), cost) for frames, cost in ((48, 130.0), (96, 101.0), (128, 100.0))]
    assert _ranked(timings)[0] is timings[1]


def test_damaged_records_are_refused(tiny_bundle: Bundle) -> None:
    backend = Priced()
    timings = tune(tiny_bundle, backend, rounds=1)
    wrong = replace(timings[0], policy=replace(backend.policy, workers=60_000))
    record(tiny_bundle, backend, [wrong])
    assert recorded_policy(Bundle.open(tiny_bundle.path), backend) is None, "the backend does not offer this policy"
    values = {"chosen": {"frames": "many", "static": False, "batch": 1, "workers": 2}}
    for content in (b"{", b"[]", json.dumps(values).encode()):
        (entry,) = Bundle.open(tiny_bundle.path).find("policy")
        tiny_bundle.add(replace(type(entry).of(entry.name, content, "policy", precision="fp32"), target=entry.target), content)
        with pytest.raises(BundleError, match="is not a record of windows"):
            recorded_policy(Bundle.open(tiny_bundle.path), backend)
    narrow = Priced()
    narrow.candidates = (Policy(12, static=False, batch=1, workers=1),)
    with pytest.raises(BackendError, match=r"no window longer than this voice's context of 6 \+ 6"):
        tune(tiny_bundle, narrow)


def test_tune_command_records_a_policy(tiny_bundle: Bundle, melrt) -> None:
    code, out, _ = melrt("tune", tiny_bundle.path, "--rounds", 1, "--device", "cpu")
    assert code == 0
    assert out.count("│ chosen │") == 1
    bundle = Bundle.open(tiny_bundle.path)
    with Vocoder.load(bundle, device="cpu") as vocoder:
        assert vocoder.policy == recorded_policy(bundle, vocoder.backend)
        assert vocoder.policy in vocoder.backend.candidates
    code, out, _ = melrt("info", tiny_bundle.path)
    assert "policy.fp32.onnxruntime-cpu" in out
