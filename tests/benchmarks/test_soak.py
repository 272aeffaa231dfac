"""The soak of many voices, in seconds: it compares audio of voices that come, go and change within a memory limit."""

from __future__ import annotations

from pathlib import Path

from melrt import Bundle, Limits, Options, Residency, Voices
from melrt_benchmarks.serving.soak import QUIET, Soak, SoakLoad


def test_voices_that_come_go_and_change_give_right_audio(tiny_bundle_path: Path, tmp_path: Path) -> None:
    soak = Soak(Bundle.open(tiny_bundle_path), tmp_path, SoakLoad(voices=8, callers=3, changes_per_second=20.0))
    residency = Residency(memory=18 << 20, pinned=(QUIET,), check_seconds=0.1)
    options = Options(limits=Limits(wait_timeout=20.0))
    with Voices(tmp_path, device="cpu", precision="fp32", backend="onnxruntime", options=options, residency=residency) as voices:
        for _ in range(10):  # a machine with much other work does little in two seconds
            result = soak.run(voices, seconds=2.0, rounds=1)
            if complete := min(result.outcomes["cancelled"], result.changes["changed"], *map(len, result.latencies.values())) > 1:
                break
    assert result.wrong == 0, result.outcomes
    assert complete, (result.outcomes, result.changes, result.latencies)
    assert result.memory <= 18 << 20
    assert result.loads > 8, "voices were unloaded and loaded again"
