"""The plain loop and melrt's step are the same training: the same losses, however the time is spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from melrt_benchmarks import training


def test_training_steps_against_a_plain_loop(melrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "bench-training", "--channels", 32, "--batch", 1, "--rounds", 3, "--threads", 1, "--json", tmp_path / "x.json"
    code, out, err = melrt(*arguments)
    assert code == 0, err
    assert "plain loop" in out
    rows = {row["contender"]: row for row in json.loads((tmp_path / "x.json").read_text())["results"]}
    assert rows.keys() == {training.OURS, training.PLAIN}
    assert all(row["correct"] and row["steps_per_second"] > 0 for row in rows.values())
    assert rows[training.PLAIN]["speedup"] == 1
    step = training.PlainLoop.__call__
    monkeypatch.setattr(training.PlainLoop, "__call__", lambda self, audio: step(self, 1.1 * audio))
    report = training.run_training_bench(training.TrainingBench(channels=32, batch=1, segment=2048, rounds=1))
    assert not any(row["correct"] for row in report["results"]), "another training is shown as another"
