"""`melrt bench-training`: melrt and the plain loop compute the same losses, and a difference is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from melrt_benchmarks.training import bench


def test_bench_training_compares_losses_with_a_plain_loop(melrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "bench-training", "--channels", 32, "--batch", 1, "--rounds", 3, "--threads", 1, "--json", tmp_path / "x.json"
    code, out, err = melrt(*arguments)
    assert code == 0, err
    assert "plain loop" in out
    rows = {row["contender"]: row for row in json.loads((tmp_path / "x.json").read_text())["results"]}
    assert rows.keys() == {bench.OURS, bench.PLAIN}
    assert all(row["correct"] and row["steps_per_second"] > 0 for row in rows.values())
    assert rows[bench.PLAIN]["speedup"] == 1
    step = bench.PlainLoop.__call__
    monkeypatch.setattr(bench.PlainLoop, "__call__", lambda self, audio: step(self, 1.1 * audio))
    report = bench.run_training_bench(bench.TrainingBench(channels=32, batch=1, segment=2048, rounds=1))
    assert not any(row["correct"] for row in report["results"]), "a different training is reported as different"
