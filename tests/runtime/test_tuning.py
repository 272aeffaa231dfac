"""Windows by measurement: the cheapest candidate wins, is kept in the bundle, and is what the voice then runs with."""

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
from melrt.scheduling.policy_tuning import record, recorded, tune
from melrt.vocoder import Options

POLICY = Policy(48, static=False, batch=1, workers=2)


class Priced:
    """A backend whose runs cost what the test says: 2 ms each, and 20 ms for windows of 64 frames."""

    name, device, machine, precision = "priced", "cpu", "the test's", "fp32"
    policy = POLICY
    candidates = tuple(replace(POLICY, frames=frames) for frames in (12, 48, 64, 512))

    def close(self) -> None:
        pass

    def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
        assert graph == "interior"
        time.sleep(0.02 if mel.shape[2] == 64 else 0.002)
        return np.zeros((len(mel), mel.shape[2] * 256), np.float32)


def test_the_cheapest_window_is_chosen_kept_and_used(tiny_bundle: Bundle) -> None:
    backend, steps = Priced(), []
    assert recorded(tiny_bundle, backend) is None
    trials = tune(tiny_bundle, backend, rounds=2, on_trial=lambda: steps.append(1))
    assert [trial.policy.frames for trial in trials] == [512, 48, 64], "12 frames are no more than the context"
    assert trials[2].microseconds > 3 * trials[1].microseconds > 9 * trials[0].microseconds
    assert len(steps) == 9
    for _ in range(2):
        entry = record(tiny_bundle, backend, trials)
    bundle = Bundle.open(tiny_bundle.path)
    assert bundle.find("policy") == [entry], "a second record takes the place of the first"
    assert Vocoder(bundle, backend).policy == replace(backend.policy, frames=512)
    mine = replace(backend.policy, frames=100)
    assert Vocoder(bundle, backend, Options(policy=mine)).policy == mine
    other = Priced()
    other.machine = "another"
    assert Vocoder(bundle, other).policy == backend.policy


def test_of_windows_as_good_the_shorter_wins() -> None:
    from melrt.scheduling.policy_tuning import Trial, _ranked

    trials = [Trial(replace(Priced.policy, frames=frames), cost) for frames, cost in ((48, 130.0), (96, 101.0), (128, 100.0))]
    assert _ranked(trials)[0] is trials[1]


def test_records_that_cannot_be(tiny_bundle: Bundle) -> None:
    backend = Priced()
    trials = tune(tiny_bundle, backend, rounds=1)
    wrong = replace(trials[0], policy=replace(backend.policy, workers=60_000))
    record(tiny_bundle, backend, [wrong])
    assert recorded(Bundle.open(tiny_bundle.path), backend) is None, "only what the backend itself offers"
    values = {"chosen": {"frames": "many", "static": False, "batch": 1, "workers": 2}}
    for content in (b"{", b"[]", json.dumps(values).encode()):
        (entry,) = Bundle.open(tiny_bundle.path).find("policy")
        tiny_bundle.add(replace(type(entry).of(entry.name, content, "policy", precision="fp32"), target=entry.target), content)
        with pytest.raises(BundleError, match="is no record of windows"):
            recorded(Bundle.open(tiny_bundle.path), backend)
    narrow = Priced()
    narrow.candidates = (Policy(12, static=False, batch=1, workers=1),)
    with pytest.raises(BackendError, match=r"no window longer than this voice's context of 6 \+ 6"):
        tune(tiny_bundle, narrow)


def test_the_command(tiny_bundle: Bundle, melrt) -> None:
    code, out, _ = melrt("tune", tiny_bundle.path, "--rounds", 1, "--device", "cpu")
    assert code == 0
    assert out.count("chosen") == 1
    bundle = Bundle.open(tiny_bundle.path)
    with Vocoder.load(bundle, device="cpu") as vocoder:
        assert vocoder.policy == recorded(bundle, vocoder.backend)
        assert vocoder.policy in vocoder.backend.candidates
    code, out, _ = melrt("info", tiny_bundle.path)
    assert "policy.fp32.onnxruntime-cpu" in out
