"""Export of a checkpoint as a bundle: it is exact and reproducible, and a failure leaves nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from melrt.bundle import Artifact, Bundle
from melrt.errors import BundleError, ParityError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.vocoder import Vocoder
from melrt_export import export as export_module
from melrt_export.checkpoints import load_checkpoint
from melrt_export.export import ExportOptions, export_voice
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.reference import PyTorchReference
from melrt_export.parity import FP16_MIN_SNR_DB, FP32_MAX_ABS, Difference, verify


def test_noise_of_a_few_places_passes_and_noise_of_all_does_not() -> None:
    """Rounding changes the phase of a few frames of some voices; a wrong kernel or too little precision is everywhere."""
    signal = np.random.default_rng(0).normal(0, 0.1, (2, 100_000)).astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 0.1, signal.shape).astype(np.float32)
    fine = signal + 1e-3 * noise  # 60 dB
    few, wrong = fine.copy(), fine.copy()
    few[:, 20_000:24_000] += 0.05 * noise[:, 20_000:24_000]  # 40 dB in all
    wrong[:, 20_000:24_000] += noise[:, 20_000:24_000]  # 14 dB in all
    everywhere = signal + 1e-2 * noise  # 40 dB
    most = fine.copy()
    most[:, :60_000] += 1e-2 * noise[:, :60_000]
    audios = {"few": few, "wrong": wrong, "most": most, "everywhere": everywhere}
    between = {name: Difference.between(signal, audio) for name, audio in audios.items()}
    assert between["few"].snr_db == pytest.approx(between["everywhere"].snr_db, abs=1)
    assert {name: one.passes("fp16") for name, one in between.items()} == {"few": True, "wrong": False, "most": False, "everywhere": False}
    assert not between["few"].passes("fp32")
    broken = fine.copy()
    broken[0, 0] = np.nan
    assert not Difference.between(signal, broken).passes("fp16")


def test_same_checkpoint_gives_the_same_bytes(tiny_checkpoint: Path, tiny_bundle_path: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)  # PyTorch's rounding depends on the number of threads
    again = export_voice(tiny_checkpoint, tmp_path / "again.melrt").path
    torch.set_num_threads(threads)
    files = sorted(file.name for file in tiny_bundle_path.iterdir())
    graphs = ["edge.fp16.onnx", "edge.fp32.onnx", "interior.fp16.onnx", "interior.fp32.onnx"]
    assert files == [*graphs, "manifest.json", "reference.audio.npy", "reference.mel.npy"]
    for name in files:
        assert (again / name).read_bytes() == (tiny_bundle_path / name).read_bytes(), name


def test_model_file_states_its_voice(tiny_bundle_path: Path) -> None:
    model = onnx.load(tiny_bundle_path / "edge.fp16.onnx", load_external_data=False)
    facts = {prop.key: prop.value for prop in model.metadata_props}
    manifest = Bundle.open(tiny_bundle_path).manifest
    assert json.loads(facts["melrt.mel"]) == manifest.spec.to_dict()
    assert facts["melrt.sha256"] == manifest.provenance["sha256"]
    assert facts["melrt.precision"] == "fp16"
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_manifest_states_the_parity(tiny_bundle_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    for graph in ("edge", "interior"):
        full, half = bundle.find("onnx", graph=graph)
        assert 0 < full.quality["max_abs"] <= FP32_MAX_ABS
        assert min(half.quality["snr_db"], half.quality["half_snr_db"]) >= FP16_MIN_SNR_DB


def test_wrong_graph_fails_the_export_and_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = export_module.deploy_graph

    def wrong(config, weights, *rest):
        return right(config, {**weights, "last.bias": weights["last.bias"] + 1e-3}, *rest)

    monkeypatch.setattr(export_module, "deploy_graph", wrong)
    with pytest.raises(ParityError, match=r"edge.fp32.onnx.*2e-05.*Nothing was written"):
        export_voice(tiny_checkpoint, tmp_path / "x.melrt")
    assert not list(tmp_path.iterdir())


def test_failed_overwrite_keeps_the_old_bundle(tiny_checkpoint: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in tiny_bundle.path.iterdir()}

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export_voice(tiny_checkpoint, tiny_bundle.path, ExportOptions(overwrite=True))
    assert {file.name: file.read_bytes() for file in tiny_bundle.path.iterdir()} == before
    assert [path.name for path in tiny_bundle.path.parent.iterdir()] == ["tiny.melrt"]


def test_verify_passes_with_and_without_pytorch(tiny_bundle: Bundle, tiny_checkpoint: Path) -> None:
    for checkpoint in (None, load_checkpoint(tiny_checkpoint)):
        rows = list(verify(tiny_bundle, checkpoint))
        assert [row.file for row in rows] == ["edge.fp32.onnx", "interior.fp32.onnx", "edge.fp16.onnx", "interior.fp16.onnx"]
        assert all(row.passed for row in rows)


def test_verify_names_the_fields_that_differ(tiny_bundle: Bundle, make_voice, tmp_path: Path) -> None:
    _, other = make_voice(GeneratorConfig(in_channels=8, channels=64, bias=False), tmp_path)
    with pytest.raises(BundleError, match=r"in_channels is 8 in the checkpoint and 80 in the bundle; bias is False in") as raised:
        list(verify(tiny_bundle, other))
    assert "upsample_scales" not in str(raised.value)


def test_verify_explains_the_snr_of_int8(melrt, tiny_bundle: Bundle) -> None:
    (entry,) = tiny_bundle.find("onnx", graph="edge", precision="fp32")
    model = tiny_bundle.read(entry)
    int8 = Artifact.of("edge.int8.onnx", model, "onnx", graph="edge", precision="int8", quality={"snr_db": 12.5})
    tiny_bundle.add(int8, model)
    code, out, _ = melrt("verify", tiny_bundle.path)
    assert code == 0
    assert "synthetic probe" in out
    assert "--report" in out


def test_demo_writes_every_file_that_it_names(melrt, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("melrt_export.demo.DEMO_VOICE", tiny_checkpoint)
    code, out, err = melrt("demo", "-o", tmp_path / "demo")
    assert code == 0
    assert sorted(file.name for file in (tmp_path / "demo").iterdir()) == [
        "LJ001-0032.png", "LJ001-0032.wav", "listen.html", "lj.melrt", "mel.npy",
    ]  # fmt: skip
    assert np.load(tmp_path / "demo" / "mel.npy").shape == (80, 609)
    assert out.count(str(tmp_path / "demo")) == 7, "five files, and two of them in the next command"
    assert "step 11 of 11: comparing" in err
    (command,) = re.findall(r"`melrt (.*speech.wav)`", out)
    monkeypatch.chdir(tmp_path)
    assert melrt(*command.split())[0] == 0
    assert (tmp_path / "speech.wav").stat().st_size > 600 * 256 * 2


def test_audio_equals_that_of_melgan_neurips(shared: Path, tmp_path: Path) -> None:
    """`case.npz` holds the output of melgan-neurips's own code."""
    folder = shared / "fixtures" / "checkpoints" / "descript"
    case = np.load(folder / "case.npz")
    audio = Vocoder.load(export_voice(folder, tmp_path / "x.melrt"))(case["mel"])
    assert np.abs(case["audio"]).max() > 0.05
    assert np.abs(audio - case["audio"].reshape(-1)).max() < FP32_MAX_ABS


def test_trained_voice_on_recorded_speech(shared: Path, tmp_path: Path) -> None:
    """On five recordings, FP32 differs by rounding only, and FP16 is above its limit."""
    bundle = export_voice(shared / "voices" / "lj", tmp_path / "lj.melrt")
    checkpoint = load_checkpoint(shared / "voices" / "lj")
    pytorch = PyTorchReference(checkpoint.config, checkpoint.weights)
    full, half = (Vocoder.load(bundle, precision=precision) for precision in ("fp32", "fp16"))
    for number in range(28, 33):
        recording = read_audio(shared / "audio" / "ljspeech" / f"LJ001-{number:04d}.wav", full.sample_rate)
        mel = mel_from_audio(recording, full.spec)
        reference = pytorch.audio(mel[None])[0]
        assert Difference.between(reference, full(mel)).max_abs < FP32_MAX_ABS
        assert Difference.between(reference, half(mel)).snr_db > FP16_MIN_SNR_DB
        if number >= 31:  # the two that were not used in training; PyTorch's half precision is slow on a CPU
            assert Difference.between(reference, pytorch.half_audio(mel[None])[0]).snr_db > FP16_MIN_SNR_DB


def test_full_disk_during_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The kernel refuses to write more than 200 KB, which is in the middle of the first model."""
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
