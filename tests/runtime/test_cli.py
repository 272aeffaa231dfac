"""The command line as a user meets it: the whole way once, then every wrong turn, with exit code 2 and no file left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from melrt import Bundle, MelSpec
from melrt_export.assets import RECORDING
from melrt_export.parity import probe_mel


def test_from_checkpoint_to_sound(melrt, tiny_checkpoint: Path, tmp_path: Path) -> None:
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
    assert np.array_equal(a, b), "a mel from a file and the same mel from audio"
    code, out, _ = melrt("synth", voice, tmp_path / "mel.npy", "-o", tmp_path / "one.wav")
    assert code == 0
    assert soundfile.info(tmp_path / "one.wav").subtype == "PCM_16"


def test_build_adds_an_engine(melrt, tiny_bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    code, out, _ = melrt("build", tiny_bundle.path, "--precision", "fp16", "--flavor", "tensorrt_rtx", "--frames", "8,64,128")
    assert code == 0
    assert out.count("portable.engine") == 2
    edge, interior = Bundle.open(tiny_bundle.path).find("engine")
    assert edge.target["profile"] == interior.target["profile"] == [[1, 80, 8], [4, 80, 64], [16, 80, 128]]
    code, out, _ = melrt("verify", tiny_bundle.path)
    assert code == 0
    assert "runs on a GPU only" in out


def test_verify_finds_a_wrong_model(melrt, tiny_bundle: Bundle) -> None:
    """A model that is intact by its hash, but is not the voice: exit code 1."""
    import onnx

    from melrt.bundle import Artifact

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


def test_doctor_says_how_to_get_what_is_missing(melrt) -> None:
    code, out, _ = melrt("doctor")
    assert code == 0
    assert "onnxruntime" in out
    assert 'pip install "melrt[' in out


def test_help_lists_every_command(melrt) -> None:
    code, out, _ = melrt("--help")
    assert code == 0
    for command in ("demo", "export", "verify", "build", "mel", "synth", "info", "doctor", "bench"):
        assert command in out


SPEC = MelSpec()
WRONG_MELS = {
    "bands": (np.zeros((40, 9), np.float32), "40 bands; this voice takes 80"),
    "empty": (np.zeros((80, 0), np.float32), "mel is empty"),
    "nan": (np.full((80, 9), np.nan, np.float32), "every value must be finite"),
    "short": (np.zeros((80, 3), np.float32), "at least 4"),
}


@pytest.mark.parametrize("case", WRONG_MELS)
def test_wrong_mels(melrt, tiny_bundle_path: Path, tmp_path: Path, case: str) -> None:
    mel, message = WRONG_MELS[case]
    np.save(tmp_path / "mel.npy", mel)
    code, out, err = melrt("synth", tiny_bundle_path, tmp_path / "mel.npy", "-o", tmp_path / "x.wav")
    assert (code, out) == (2, "")
    assert message in err
    assert "mel.npy" in err, "the file is named"
    assert [path.name for path in tmp_path.iterdir()] == ["mel.npy"]


def test_wrong_turns(melrt, tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    voice, out = tiny_bundle.path, tmp_path / "out"
    np.save(tmp_path / "mel.npy", probe_mel(SPEC, 9))
    (tmp_path / "truncated.pt").write_bytes((tiny_checkpoint / "best_netG.pt").read_bytes()[:5000])
    torch.save(torch.nn.Linear(1, 1), tmp_path / "whole_model.pt")
    before = sorted(tmp_path.rglob("*"))
    mel = tmp_path / "mel.npy"
    turns = [
        (("export", tmp_path / "nowhere", "-o", out), "does not exist"),
        (("export", tmp_path / "truncated.pt", "-o", out), "truncated"),
        (("export", tmp_path / "whole_model.pt", "-o", out), "nothing of it was run"),
        (("export", tiny_checkpoint, "-o", out, "--precision", "fp8"), "choose from fp32, fp16"),
        (("export", tiny_checkpoint, "-o", voice), "--force"),
        (("export", tiny_checkpoint, "-o", tmp_path / "mel.npy" / "x.melrt"), "mel.npy"),
        (("synth", tmp_path / "nowhere.melrt", mel, "-o", out), "does not exist"),
        (("synth", voice, tmp_path / "nowhere.npy", "-o", out), "does not exist"),
        (("synth", voice, mel, "-o", out, "--precision", "fp8"), "precision is 'fp8'"),
        (("synth", voice, mel, "-o", out, "--device", "tpu"), "device is 'tpu'"),
        (("synth", voice, mel, "-o", out, "--format", "mp3"), "mp3"),
        (("synth", voice, mel, mel, "-o", out), "same name"),
        (("synth", voice, mel, RECORDING, "-o", tmp_path / "x.wav"), "cannot go to one file"),
        (("synth", voice, mel, "-o", tmp_path / "mel.npy" / "x.wav"), "mel.npy"),
        (("mel", voice, mel, "-o", out), "cannot be read as audio"),
        (("build", voice, "--precision", "int4"), "it is one of fp32, tf32, fp16"),
        (("build", voice, "--batch", "one"), "smallest,best,largest"),
        (("bench", voice, "--checkpoint", tiny_checkpoint, "--seconds", "x"), "1,4,10"),
        (("sing",), "No such command"),
    ]
    for arguments, message in turns:
        code, _, err = melrt(*arguments)
        assert code == 2, arguments
        assert message in err, (arguments, err)
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_a_folder_that_cannot_be_written(melrt, tiny_bundle_path: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    np.save(tmp_path / "mel.npy", probe_mel(SPEC, 9))
    if os.access(locked, os.W_OK):
        locked = Path("/proc/self")  # root writes anywhere but here
    for arguments in (
        ("synth", tiny_bundle_path, tmp_path / "mel.npy", "-o", locked / "x.wav"),
        ("export", tiny_checkpoint, "-o", locked / "x"),
    ):
        code, _, err = melrt(*arguments)
        assert code == 2
        assert "error:" in err
        assert str(locked) in err


def test_an_altered_byte_and_a_newer_schema(melrt, tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 2'))
    for command in (("info",), ("verify",)):
        code, _, err = melrt(*command, tiny_bundle.path)
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


def test_texts_of_others_are_shown_as_they_are(melrt, tiny_bundle: Bundle) -> None:
    """A manifest comes from anybody; what looks like the terminal's markup in it is text."""
    values = json.loads((tiny_bundle.path / "manifest.json").read_text())
    values["name"] = "[bold red]x[/]"
    values["provenance"]["format"] = "[link=http://x]y[/link]"
    values["architecture"]["[blink]"] = "[/nonsense]"
    values["artifacts"][0]["kind"] = "[/green]"
    (tiny_bundle.path / "manifest.json").write_text(json.dumps(values))
    code, out, err = melrt("info", tiny_bundle.path)
    assert (code, err) == (0, "")
    for text in ("[bold red]x[/]", "[link=http://x]y[/link]", "[blink] [/nonsense]", "[/green]"):
        assert text in out


def test_info_tells_size_and_ends(melrt, tiny_bundle: Bundle) -> None:
    values = json.loads((tiny_bundle.path / "manifest.json").read_text())
    values["edges"] = {"left": 0, "right": 10, "value": -11.5129}
    (tiny_bundle.path / "manifest.json").write_text(json.dumps(values))
    out = melrt("info", tiny_bundle.path)[1]
    assert "0.10 M parameters" in out
    assert "GFLOP per second of audio" in out
    assert "0 frames before and 10 after of -11.5129" in out


def test_a_place_that_is_taken_is_noticed_first(melrt, tiny_checkpoint: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: object) -> None:
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr("melrt_export.export.load_checkpoint", never)
    code, _, err = melrt("export", tiny_checkpoint, "-o", tiny_bundle.path)
    assert code == 2
    assert "--force" in err


def test_force_through_a_link_replaces_what_it_leads_to(melrt, tiny_checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "current.melrt"
    link.symlink_to(tiny_bundle.path)
    code, _, _ = melrt("export", tiny_checkpoint, "-o", link, "--force", "--name", "anew")
    assert code == 0
    assert link.is_symlink()
    assert Bundle.open(tiny_bundle.path).manifest.name == "anew"
    assert [file.name for file in link.parent.iterdir()] == ["current.melrt"]
