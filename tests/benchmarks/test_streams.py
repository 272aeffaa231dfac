"""Real-time streams of the benchmark: which numbers are sustained, and how the largest is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from melrt import Bundle, Vocoder
from melrt_benchmarks.inference import bench, host, streams


def test_streams_are_sustained_only_with_enough_buffer(tiny_bundle_path: Path) -> None:
    """Two streams are sustained with a long buffer; even one is not with hardly any."""
    with Vocoder.load(tiny_bundle_path) as vocoder:
        vocoder(np.zeros((80, 200)))
        for shared_queue in (True, False):
            buffered = streams.run_streams(vocoder, 2, streams.StreamLoad(buffer=30.0, seconds=1.0), shared_queue=shared_queue)
            assert buffered.sustained
            assert buffered.pushes == 2 * 5
            assert 0 < buffered.latency_ms[0] <= buffered.latency_ms[1]
            assert not streams.run_streams(vocoder, 1, streams.StreamLoad(buffer=1e-6, seconds=1.0), shared_queue=shared_queue).sustained


def test_number_of_streams_is_found(tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capacity = {True: 1500, False: 5}

    def run(vocoder: Vocoder, count: int, load: streams.StreamLoad, *, shared_queue: bool) -> streams.StreamRun:
        return streams.StreamRun(count, shared_queue, 0, 1, (1.0, 1.0), (1.0, 1.0), count <= capacity[shared_queue])

    monkeypatch.setattr(streams, "run_streams", run)
    with Vocoder.load(tiny_bundle_path) as vocoder:
        rows = streams.measure_capacity(vocoder, streams.StreamLoad())
        assert [row["streams"] for row in rows] == sorted(row["streams"] for row in rows)
        found = {row["shared_queue"]: row["streams"] for row in rows if row["sustained"]}
        assert 0.93 * 1500 < found[True] <= 1500
        assert found[False] == 5
        assert len(rows) < 20
        capacity.update({True: streams.MAX_STREAMS, False: 0})
        assert max(row["streams"] for row in streams.measure_capacity(vocoder, streams.StreamLoad())) == streams.MAX_STREAMS
        monkeypatch.setattr(vocoder.backend, "device", "cuda:0")
        capacity.update({True: 1000})
        rows = streams.measure_capacity(vocoder, streams.StreamLoad())
        assert {row["shared_queue"] for row in rows} == {True}, "on a GPU the queue makes the batches"
        assert len(rows) <= 12, "12 runs of 4 s take less than a minute"


def test_hundreds_of_streams_are_pushed_in_time(tiny_bundle_path: Path) -> None:
    """With a backend that computes nothing, the run shows that one thread can push to hundreds of streams, and an overload ends early."""
    bundle = Bundle.open(tiny_bundle_path)
    with Vocoder(bundle, host.FreeBackend(host.policies(bundle)["engine"], bundle.manifest.spec.hop)) as vocoder:
        run = streams.run_streams(vocoder, 200, streams.StreamLoad(buffer=1.0, seconds=0.6), shared_queue=True)
        assert (run.sustained, run.pushes) == (True, 600)
        for shared_queue in (True, False):
            late = streams.run_streams(vocoder, 20, streams.StreamLoad(buffer=1e-6, seconds=9.0), shared_queue=shared_queue)
            assert not late.sustained
            assert late.pushes < 0.2 * 20 * 48


def test_streams_run_the_requested_backend_and_precision(melrt, tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str]] = []

    def measured(vocoder: Vocoder, *_: object, **__: object) -> list[dict[str, object]]:
        loaded.append((vocoder.backend.name, vocoder.backend.precision))
        return []

    monkeypatch.setattr(bench, "measure_capacity", measured)
    code, out, err = melrt("bench", tiny_bundle_path, "--measure", "streams", "--backends", "onnxruntime", "--precisions", "fp16")
    assert (code, loaded) == (0, [("onnxruntime", "fp16")])
    assert "step 1 of 1: counting real-time streams" in err
    assert "contender" not in out, "nothing else is measured"
