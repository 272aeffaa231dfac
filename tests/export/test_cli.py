"""Commands that need the exporter: export, verify, build, bench, and how wrong input ends (exit code 2, one line, no file left)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch

from melrt import Bundle
from melrt.bundle import Artifact
from melrt_export.assets import RECORDING


def test_commands_from_checkpoint_to_audio(melrt, tiny_checkpoint: Path, tmp_path: Path) -> None:
    voice = tmp_path / "tiny.melrt"
    code, out, _ = melrt("export", tiny_checkpoint, "-o", voice)
    assert code == 0
    assert "edge.fp16.onnx" in out
    code, out, _ = melrt("verify", voice, "--checkpoint", tiny_checkpoint)
    assert code == 0
    assert out.count("pass") == 4
    code, out, _ = melrt("info", voice)
    assert code == 0
    assert "6 frames before, 6 after (70 ms look-ahead)" in out
    assert "80 bands, 0-11025 Hz, log10" in out

    code, out, _ = melrt("mel", voice, RECORDING, "-o", tmp_path / "mel.npy")
    assert code == 0
    assert np.load(tmp_path / "mel.npy").shape == (80, 609)
    code, out, _ = melrt("synth", voice, tmp_path / "mel.npy", RECORDING, "-o", tmp_path / "out", "--format", "float32")
    assert code == 0
    assert "times real time" in out
    a, b = (soundfile.read(tmp_path / "out" / name, dtype="float32")[0] for name in ("mel.wav", "LJ001-0032.wav"))
    assert len(a) == 609 * 256
    assert np.abs(a).max() > 0.05
    assert np.array_equal(a, b), "the recording and its mel give the same audio"
    code, out, _ = melrt("synth", voice, tmp_path / "mel.npy", "-o", tmp_path / "one.wav")
    assert code == 0
    assert soundfile.info(tmp_path / "one.wav").subtype == "PCM_16"


def test_build_adds_engines(melrt, tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    code, out, _ = melrt("build", tiny_bundle.path, "--precision", "fp16", "--flavor", "tensorrt_rtx", "--frames", "8,64,128")
    assert code == 0
    assert out.count("portable.engine") == 2
    edge, interior = Bundle.open(tiny_bundle.path).find("engine")
    assert edge.target["profile"] == interior.target["profile"] == [[1, 80, 8], [4, 80, 64], [16, 80, 128]]
    code, out, _ = melrt("verify", tiny_bundle.path)
    assert code == 0
    assert "runs on a GPU only" in out


def test_verify_ends_with_1_for_a_wrong_model(melrt, tiny_bundle: Bundle) -> None:
    """The model has the hash of the manifest, but other weights than the voice."""
    file = tiny_bundle.path / "edge.fp32.onnx"
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.name == "last.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(1e-3), tensor.name))
    data = model.SerializeToString()
    tiny_bundle.add(Artifact.of("edge.fp32.onnx", data, "onnx", graph="edge", precision="fp32"), data)
    code, out, _ = melrt("verify", tiny_bundle.path)
    assert code == 1
    assert "FAIL" in out


def test_wrong_input_is_refused_and_leaves_no_file(melrt, tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    voice, out = tiny_bundle.path, tmp_path / "out"
    (tmp_path / "mel.npy").touch()
    (tmp_path / "truncated.pt").write_bytes((tiny_checkpoint / "best_netG.pt").read_bytes()[:5000])
    torch.save(torch.nn.Linear(1, 1), tmp_path / "whole_model.pt")
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (("export", tmp_path / "nowhere", "-o", out), "does not exist"),
        (("export", tmp_path / "truncated.pt", "-o", out), "truncated"),
        (("export", tmp_path / "whole_model.pt", "-o", out), "executed nothing"),
        (("export", tiny_checkpoint, "-o", out, "--precision", "fp8"), "choose from fp32, fp16"),
        (("export", tiny_checkpoint, "-o", voice), "--force"),
        (("export", tiny_checkpoint, "-o", tmp_path / "mel.npy" / "x.melrt"), "mel.npy"),
        (("build", voice, "--precision", "int4"), "it must be one of fp32, tf32, fp16"),
        (("build", voice, "--batch", "one"), "smallest,best,largest"),
        (("bench", voice, "--checkpoint", tiny_checkpoint, "--seconds", "x"), "1,4,10"),
    ]
    for arguments, message in cases:
        code, _, err = melrt(*arguments)
        assert code == 2, arguments
        assert message in err, (arguments, err)
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_export_names_a_folder_it_cannot_write(melrt, tiny_checkpoint: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        locked = Path("/proc/self")  # root may write to every other folder
    code, _, err = melrt("export", tiny_checkpoint, "-o", locked / "x")
    assert code == 2
    assert "error:" in err
    assert str(locked) in err


def test_verify_refuses_newer_schema_and_altered_file(melrt, tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 2'))
    code, _, err = melrt("verify", tiny_bundle.path)
    assert code == 2
    assert "newer melrt" in err
    manifest.write_text(text)
    model = tiny_bundle.path / "edge.fp32.onnx"
    data = bytearray(model.read_bytes())
    data[1000] ^= 1
    model.write_bytes(data)
    code, _, err = melrt("verify", tiny_bundle.path)
    assert code == 2
    assert "edge.fp32.onnx was altered" in err


def test_existing_output_is_refused_before_work(melrt, tiny_checkpoint: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> None:
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr("melrt_export.export.load_checkpoint", never)
    code, _, err = melrt("export", tiny_checkpoint, "-o", tiny_bundle.path)
    assert code == 2
    assert "--force" in err


def test_force_through_a_link_replaces_its_target(melrt, tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "current.melrt"
    link.symlink_to(tiny_bundle.path)
    code, _, _ = melrt("export", tiny_checkpoint, "-o", link, "--force", "--name", "other")
    assert code == 0
    assert link.is_symlink()
    assert Bundle.open(tiny_bundle.path).manifest.name == "other"
    assert [file.name for file in link.parent.iterdir()] == ["current.melrt"]
