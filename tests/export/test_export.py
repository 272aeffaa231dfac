"""From a checkpoint to a bundle: right, reproducible, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from melrt.bundle import Bundle
from melrt.errors import ParityError
from melrt.vocoder import Vocoder
from melrt_export import export as export_module
from melrt_export.audio_features import mel_from_audio, read_audio
from melrt_export.checkpoints import load_checkpoint
from melrt_export.export import ExportOptions, export_voice
from melrt_export.parity import FP16_MIN_SNR_DB, FP32_MAX_ABS, Difference, pytorch_audio, verify


def test_same_checkpoint_gives_the_same_bytes(tiny_checkpoint: Path, tiny_bundle_path: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)  # of whoever exports: rounding depends on it
    again = export_voice(tiny_checkpoint, tmp_path / "again.melrt").path
    torch.set_num_threads(threads)
    files = sorted(file.name for file in tiny_bundle_path.iterdir())
    graphs = ["edge.fp16.onnx", "edge.fp32.onnx", "interior.fp16.onnx", "interior.fp32.onnx"]
    assert files == [*graphs, "manifest.json", "reference.audio.npy", "reference.mel.npy"]
    for name in files:
        assert (again / name).read_bytes() == (tiny_bundle_path / name).read_bytes(), name


def test_a_lone_model_file_knows_its_voice(tiny_bundle_path: Path) -> None:
    model = onnx.load(tiny_bundle_path / "edge.fp16.onnx", load_external_data=False)
    facts = {prop.key: prop.value for prop in model.metadata_props}
    manifest = Bundle.open(tiny_bundle_path).manifest
    assert json.loads(facts["melrt.mel"]) == manifest.spec.to_dict()
    assert facts["melrt.sha256"] == manifest.provenance["sha256"]
    assert facts["melrt.precision"] == "fp16"
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_parity_is_in_the_manifest(tiny_bundle_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    for graph in ("edge", "interior"):
        full, half = bundle.find("onnx", graph=graph)
        assert 0 < full.quality["max_abs"] <= FP32_MAX_ABS
        assert min(half.quality["snr_db"], half.quality["half_snr_db"]) >= FP16_MIN_SNR_DB


def test_a_wrong_graph_fails_the_export_and_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = export_module.deploy_graph

    def wrong(config, weights, *rest):
        return right(config, {**weights, "last.bias": weights["last.bias"] + 1e-3}, *rest)

    monkeypatch.setattr(export_module, "deploy_graph", wrong)
    with pytest.raises(ParityError, match=r"edge.fp32.onnx.*2e-05.*Nothing was written"):
        export_voice(tiny_checkpoint, tmp_path / "x.melrt")
    assert not list(tmp_path.iterdir())


def test_a_failed_overwrite_keeps_the_old_bundle(tiny_checkpoint: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in tiny_bundle.path.iterdir()}

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export_voice(tiny_checkpoint, tiny_bundle.path, ExportOptions(overwrite=True))
    assert {file.name: file.read_bytes() for file in tiny_bundle.path.iterdir()} == before
    assert [path.name for path in tiny_bundle.path.parent.iterdir()] == ["tiny.melrt"]


def test_verify_measures_against_pytorch(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    for checkpoint in (None, load_checkpoint(tiny_checkpoint)):
        rows = list(verify(tiny_bundle, checkpoint))
        assert [row.file for row in rows] == ["edge.fp32.onnx", "interior.fp32.onnx", "edge.fp16.onnx", "interior.fp16.onnx"]
        assert all(row.passed for row in rows)


def test_the_project_s_own_audio(shared: Path, tmp_path: Path) -> None:
    """`case.npz` holds what melgan-neurips's own code gave."""
    folder = shared / "fixtures" / "checkpoints" / "descript"
    case = np.load(folder / "case.npz")
    audio = Vocoder.load(export_voice(folder, tmp_path / "x.melrt"))(case["mel"])
    assert np.abs(case["audio"]).max() > 0.05
    assert np.abs(audio - case["audio"].reshape(-1)).max() < FP32_MAX_ABS


def test_real_voice_on_real_speech(shared: Path, tmp_path: Path) -> None:
    """A trained checkpoint and five recordings: FP32 to rounding, FP16 over its limit on each utterance."""
    bundle = export_voice(shared / "voices" / "lj", tmp_path / "lj.melrt")
    checkpoint = load_checkpoint(shared / "voices" / "lj")
    full, half = (Vocoder.load(bundle, precision=precision) for precision in ("fp32", "fp16"))
    for number in range(28, 33):
        recording = read_audio(shared / "audio" / "ljspeech" / f"LJ001-{number:04d}.wav", full.sample_rate)
        mel = mel_from_audio(recording, full.spec)
        reference = pytorch_audio(checkpoint, mel[None])[0]
        assert Difference.between(reference, full(mel)).max_abs < FP32_MAX_ABS
        assert Difference.between(reference, half(mel)).snr_db > FP16_MIN_SNR_DB
        if number >= 31:  # the two that its training never saw; PyTorch's half precision is slow on a CPU
            assert Difference.between(reference, pytorch_audio(checkpoint, mel[None], half=True)[0]).snr_db > FP16_MIN_SNR_DB


def test_disk_full_during_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The kernel refuses to write past 200 KB, in the middle of the first model."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from melrt.cli.main import main; import melrt_export.export, torch, onnx, onnxruntime;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        f"sys.argv = ['melrt', 'export', {str(tiny_checkpoint)!r}, '-o', {str(tmp_path / 'x.melrt')!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())
