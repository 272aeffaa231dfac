"""Commands of the runtime: synth, mel, info, doctor, and how wrong input ends (exit code 2, one line, no file left)."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.runtime.reference import speech_mel

from melrt import Bundle, Vocoder
from melrt.files.audio import to_int16
from melrt.planning.edges import Edges
from melrt_export.assets import RECORDING

WRONG_MELS = {
    "bands": (np.zeros((40, 9), np.float32), "40 bands; this voice takes 80"),
    "empty": (np.zeros((80, 0), np.float32), "mel is empty"),
    "nan": (np.full((80, 9), np.nan, np.float32), "every value must be finite"),
    "short": (np.zeros((80, 3), np.float32), "at least 4"),
}


def test_mel_and_synth_give_the_same_audio(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    """A recording gives the same audio as its mel from a file."""
    code, out, _ = melrt("mel", tiny_bundle_path, RECORDING, "-o", tmp_path / "mel.npy")
    assert code == 0
    assert np.load(tmp_path / "mel.npy").shape == (80, 609)
    code, out, _ = melrt("synth", tiny_bundle_path, tmp_path / "mel.npy", RECORDING, "-o", tmp_path / "out", "--format", "float32")
    assert code == 0
    assert "times real time" in out
    a, b = (soundfile.read(tmp_path / "out" / name, dtype="float32")[0] for name in ("mel.wav", "LJ001-0032.wav"))
    assert len(a) == 609 * 256
    assert np.abs(a).max() > 0.05
    assert np.array_equal(a, b)
    code, out, _ = melrt("synth", tiny_bundle_path, tmp_path / "mel.npy", "-o", tmp_path / "one.wav")
    assert code == 0
    assert soundfile.info(tmp_path / "one.wav").subtype == "PCM_16"


def test_doctor_names_the_missing_extras(melrt) -> None:
    code, out, _ = melrt("doctor")
    assert code == 0
    assert "onnxruntime" in out
    assert 'pip install "melrt[' in out


def test_help_lists_every_command(melrt) -> None:
    code, out, _ = melrt("--help")
    assert code == 0
    for command in ("demo", "export", "verify", "build", "mel", "synth", "info", "doctor", "bench"):
        assert command in out


@pytest.mark.parametrize("case", WRONG_MELS)
def test_wrong_mels_are_refused(melrt, tiny_bundle_path: Path, tmp_path: Path, case: str) -> None:
    mel, message = WRONG_MELS[case]
    np.save(tmp_path / "mel.npy", mel)
    code, out, err = melrt("synth", tiny_bundle_path, tmp_path / "mel.npy", "-o", tmp_path / "x.wav")
    assert (code, out) == (2, "")
    assert message in err
    assert "mel.npy" in err, "the message names the file"
    assert [path.name for path in tmp_path.iterdir()] == ["mel.npy"]


def test_wrong_input_is_refused_and_leaves_no_file(melrt, tiny_bundle: Bundle, tmp_path: Path) -> None:
    voice, out, mel = tiny_bundle.path, tmp_path / "out", tmp_path / "mel.npy"
    np.save(mel, speech_mel(tiny_bundle, 9))
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (("synth", tmp_path / "nowhere.melrt", mel, "-o", out), "does not exist"),
        (("synth", voice, tmp_path / "nowhere.npy", "-o", out), "does not exist"),
        (("synth", voice, mel, "-o", out, "--precision", "fp8"), "precision is 'fp8'"),
        (("synth", voice, mel, "-o", out, "--device", "tpu"), "device is 'tpu'"),
        (("synth", voice, mel, "-o", out, "--format", "mp3"), "mp3"),
        (("synth", voice, mel, mel, "-o", out), "same name"),
        (("synth", voice, mel, RECORDING, "-o", tmp_path / "x.wav"), "cannot go to one file"),
        (("synth", voice, mel, "-o", tmp_path / "mel.npy" / "x.wav"), "mel.npy"),
        (("mel", voice, mel, "-o", tmp_path / "new.npy"), "cannot be read as audio"),
        (("sing",), "No such command"),
    ]
    for arguments, message in cases:
        code, _, err = melrt(*arguments)
        assert code == 2, arguments
        assert message in err, (arguments, err)
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_synth_names_a_folder_it_cannot_write(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    np.save(tmp_path / "mel.npy", speech_mel(Bundle.open(tiny_bundle_path), 9))
    if os.access(locked, os.W_OK):
        locked = Path("/proc/self")  # root may write to every other folder
    commands = (
        (("synth", tiny_bundle_path, tmp_path / "mel.npy", "-o", locked / "x.wav"), locked / "x.wav"),
        (("mel", tiny_bundle_path, RECORDING, "-o", locked / "x.npy"), locked / "x.npy"),
        (("bulk", tiny_bundle_path, "--input", tmp_path, "-o", locked / "speech"), locked / "speech"),
    )
    for arguments, path in commands:
        code, _, err = melrt(*arguments)
        assert code == 2
        assert err.startswith(f"error: {path} cannot be written: new files in {locked} are not possible"), "found before step 1"
        assert "Choose a folder" in err


def test_mel_never_replaces_the_recording(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    recording = tmp_path / "rec.wav"
    recording.write_bytes(RECORDING.read_bytes())
    cases = {
        recording: "would be overwritten",
        tmp_path: "is a folder",
        tmp_path / "mel.wav": "such as",
        tmp_path / "mel": ".npy",
    }
    for out, message in cases.items():
        code, _, err = melrt("mel", tiny_bundle_path, recording, "-o", out)
        assert code == 2
        assert f"{out}" in err
        assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["rec.wav"]
    assert recording.read_bytes() == RECORDING.read_bytes()


def test_wrong_settings_name_a_remedy(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mel.npy", np.zeros((40, 9), np.float32))
    synth = ("synth", tiny_bundle_path, tmp_path / "mel.npy", "-o", tmp_path / "x.wav")
    for options, end in (
        (("--threads", "0"), "threads is 0; it must be a whole number from 1 to 1024; the default is one for each usable core."),
        (("--device", "tpu"), "it must be auto, cpu, cuda, or cuda:N for GPU number N. `melrt doctor` shows the devices."),
        ((), "or check the acoustic model's settings."),
    ):
        code, _, err = melrt(*synth, *options)
        assert code == 2
        assert err.endswith(f"{end}\n")


def test_newer_schema_and_altered_file_are_refused(melrt, tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 2'))
    code, _, err = melrt("info", tiny_bundle.path)
    assert code == 2
    assert "newer melrt" in err
    manifest.write_text(text)
    model = tiny_bundle.path / "edge.fp32.onnx"
    data = bytearray(model.read_bytes())
    data[1000] ^= 1
    model.write_bytes(data)
    code, _, err = melrt("info", tiny_bundle.path)
    assert code == 2
    assert "edge.fp32.onnx was altered" in err


def test_names_with_control_characters_do_not_reach_the_terminal(melrt, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A file or tensor of a stranger may be named like a command for the terminal, such as one that writes to the clipboard."""
    code, _, err = melrt("info", tmp_path / "x\x1b[31m\u202e.melrt")
    assert code == 2
    assert "x\\x1b[31m\\u202e.melrt does not exist" in err
    soundfile.write(tmp_path / "a\x1b]52;c;eA==\x07.wav", np.sin(np.arange(9000) / 7) / 2, 44100)
    log = logging.getLogger()
    handlers, log.handlers = log.handlers, []
    try:
        code, _, err = melrt("mel", tiny_bundle.path, tmp_path / "a\x1b]52;c;eA==\x07.wav", "-o", tmp_path / "mel.npy")
    finally:
        log.handlers = handlers
    assert code == 0
    assert "a\\x1b]52;c;eA==\\x07.wav has 44100 Hz; resampling" in err
    assert "\x1b]" not in err


def test_info_does_not_interpret_markup(melrt, tiny_bundle: Bundle) -> None:
    """Texts of a manifest may look like markup of the terminal library. They are shown as they are."""
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


def test_info_shows_convention_size_and_ends(melrt, tiny_bundle: Bundle) -> None:
    values = json.loads((tiny_bundle.path / "manifest.json").read_text())
    values["edges"] = {"left": 0, "right": 10, "value": -11.5129}
    (tiny_bundle.path / "manifest.json").write_text(json.dumps(values))
    out = melrt("info", tiny_bundle.path)[1]
    assert "6 frames before, 6 after (70 ms look-ahead)" in out
    assert "80 bands, 0-11025 Hz, log10" in out
    assert "0.01 M parameters" in out
    assert "GFLOP per second of audio" in out
    assert "0 frames before and 10 after of -11.5129" in out


def test_synth_adds_the_frames_of_the_project(melrt, tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Synthesis and bulk synthesis add them by default; `--edges model` gives PyTorch's forward."""
    values = json.loads((tiny_bundle.path / "manifest.json").read_text())
    values["edges"] = {"left": 0, "right": 10, "value": -5.0}
    (tiny_bundle.path / "manifest.json").write_text(json.dumps(values))
    (tmp_path / "mels").mkdir()
    mel = -2 + np.random.default_rng(0).standard_normal((80, 20)).astype(np.float32)
    np.save(tmp_path / "mels" / "x.npy", mel)
    with Vocoder.load(tiny_bundle.path, device="cpu") as vocoder:
        extended = vocoder(Edges(0, 10, -5.0).extend(mel))[: 20 * 256]
        expected = {"voice": extended, "model": vocoder(mel)}
    assert np.abs(expected["voice"] - expected["model"]).max() > 1e-3
    for edges, options in (("voice", ()), ("model", ("--edges", "model"))):
        assert melrt("synth", tiny_bundle.path, tmp_path / "mels" / "x.npy", "-o", tmp_path / "x.wav", *options)[0] == 0
        assert melrt("bulk", tiny_bundle.path, "--input", tmp_path / "mels", "--output", tmp_path / edges, *options)[0] == 0
        for file in (tmp_path / "x.wav", tmp_path / edges / "x.wav"):
            assert np.array_equal(soundfile.read(file, dtype="int16")[0], to_int16(expected[edges])), (edges, file.parent.name)
    code, _, err = melrt("synth", tiny_bundle.path, tmp_path / "mels" / "x.npy", "-o", tmp_path / "x.wav", "--edges", "none")
    assert (code, "edges is 'none'; it must be voice" in err) == (2, True)
