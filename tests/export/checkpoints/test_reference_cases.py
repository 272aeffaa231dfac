"""Checkpoints and audio that each project's own code made. tests/data/README.md says how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conftest import DATA
from tests.export.checkpoints.reference import FP32, audio_every_way

from melrt.planning.edges import Edges
from melrt_export.export import ExportOptions, export_voice
from melrt_export.parity import FP32_MAX_ABS
from melrt_export.tensorrt.build import EngineOptions, build_engine

CASES = ("coqui_melgan", "coqui_multiband", "descript", "parallel_wavegan_melgan", "parallel_wavegan_multiband", "seungwonpark")


@pytest.fixture(params=["few channels", "full size"])
def checkpoints(request: pytest.FixtureRequest) -> Path:
    """The committed cases, and the full-size ones where the developers' folder is present."""
    return DATA / "checkpoints" if request.param == "few channels" else request.getfixturevalue("shared") / "fixtures" / "checkpoints"


@pytest.mark.parametrize("name", CASES)
def test_project_and_voice_give_the_same_audio(checkpoints: Path, tmp_path: Path, name: str) -> None:
    case = np.load(checkpoints / name / "case.npz")
    bundle = export_voice(checkpoints / name, tmp_path / "x.melrt", FP32)
    manifest = bundle.manifest
    mel = case["mel"]
    if name.startswith("coqui"):  # this case's mel is normalized; the voice takes decibels
        mel = manifest.normalization.undo(mel.astype(np.float64)).astype(np.float32)
        assert manifest.edges == Edges(2, 2)
        hop = manifest.spec.hop
        expected = case["inference"].reshape(-1)[2 * hop : -2 * hop]
        outputs = audio_every_way(bundle, mel, manifest.edges)
    else:
        expected = case["audio"].reshape(-1)
        outputs = audio_every_way(bundle, mel)
    assert np.abs(expected).max() > 0.05
    for audio in outputs:
        assert np.abs(audio - expected).max() < FP32_MAX_ABS
    if "inference_int16" in case:
        assert manifest.edges == Edges(0, 10, -11.5129)
        for audio in audio_every_way(bundle, mel, manifest.edges):
            integers = np.clip(32768 * audio.astype(np.float64), -32768, 32767).astype(np.int16)
            assert np.abs(integers.astype(int) - case["inference_int16"].reshape(-1)).max() <= 1


# These two have what the others lack: clipping of the mel, and a filter bank.
@pytest.mark.parametrize("name", ["coqui_melgan", "coqui_multiband"])
def test_fp16_engine_builds(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    bundle = export_voice(DATA / "checkpoints" / name, tmp_path / "x.melrt", ExportOptions(precisions=("fp16",)))
    assert build_engine(bundle, EngineOptions(precision="fp16", graph="edge")).size > 10_000
