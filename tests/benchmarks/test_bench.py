"""The benchmark times what it says, in turn, and shows a wrong contender as wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from melrt import Vocoder
from melrt_benchmarks import bench
from melrt_benchmarks.memory import peak_memory
from melrt_benchmarks.timing import Timing, interleave


def test_every_contender_runs_once_per_round_in_changing_order() -> None:
    order = []
    result = interleave({name: (lambda name=name: order.append(name)) for name in "abc"}, rounds=4, warmup=2)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert all(len(timing.seconds) == 4 for timing in result.values())


def test_figures_are_order_statistics() -> None:
    timing = Timing(np.arange(1.0, 11.0))
    assert (timing.median, timing.p90) == (5.5, 10.0)
    assert timing.ratio_to(Timing(2 * timing.seconds)) == 0.5
    slow = interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=3, warmup=0)["slow"]
    assert slow.median >= 0.02


def test_the_report(melrt, tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the plain export needs onnxscript")
    arguments = "bench", tiny_bundle_path, "--checkpoint", tiny_checkpoint, "--seconds", "0.5", "--rounds", "3"
    code, out, _ = melrt(*arguments, "--threads", "2", "--json", tmp_path / "x.json")
    assert code == 0
    assert "PyTorch eager" in out
    report = json.loads((tmp_path / "x.json").read_text())
    names = [row["contender"] for row in report["results"]]
    onnx = ["ONNX Runtime, plain torch.onnx.export", "ONNX Runtime, melrt's graph, whole"]
    assert names == ["PyTorch eager", *onnx, "melrt, onnxruntime fp32"]
    assert all(row["correct"] for row in report["results"])
    assert report["results"][0]["speedup"] == 1.0
    for row in report["results"]:
        assert row["real_time_factor"] == pytest.approx(1 / row["times_real_time"], rel=0.05)
        assert row["median_ms"] <= row["p90_ms"]


def test_a_wrong_contender_is_shown_as_wrong(tiny_bundle_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*_: object):
        yield "silent", lambda mel: np.zeros(mel.shape[1] * 256, np.float32)

    monkeypatch.setattr(bench, "contenders", planted)
    (row,) = bench.run_bench(tiny_bundle_path, tiny_checkpoint, [0.5], rounds=3, threads=1)["results"]
    assert not row["correct"]


def test_streams_rise_until_too_many(melrt, tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a listener who has next to nothing in hand, even one stream is too many; with plenty, few are held."""
    from melrt_benchmarks.streams import Load, measure

    with Vocoder.load(tiny_bundle_path) as vocoder:
        vocoder(np.zeros((80, 200)))
        for in_flight in (True, False):
            patient = measure(vocoder, 2, Load(buffer=30.0, seconds=1.0), in_flight=in_flight)
            assert patient.held
            assert patient.pushes == 2 * 5
            assert 0 < patient.latency_ms[0] <= patient.latency_ms[1]
            assert not measure(vocoder, 1, Load(buffer=1e-6, seconds=1.0), in_flight=in_flight).held


def test_memory_of_a_long_synthesis_stays(tiny_bundle_path: Path) -> None:
    """Two minutes in windows take hardly more than ten seconds; whole, they take several times the growth."""
    windowed = [peak_memory(tiny_bundle_path, seconds, whole=False) for seconds in (10, 120)]
    assert windowed[1] < 1.2 * windowed[0]
    assert peak_memory(tiny_bundle_path, 120, whole=True) > 1.3 * windowed[1]
