"""Commands of the runtime in detail: conversion of mels, output names, real-time factor, damaged bundles."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.runtime.reference import speech_mel

from melrt import Bundle, convert_mel, mel_from_audio, read_audio
from melrt.cli import commands
from melrt.errors import ConfigError
from melrt_export.assets import RECORDING


@pytest.fixture
def mel(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    """One second of speech in the convention of the tiny voice."""
    spec = Bundle.open(tiny_bundle_path).manifest.spec
    np.save(tmp_path / "mel.npy", mel_from_audio(read_audio(RECORDING, spec.sample_rate)[:22016], spec))
    return tmp_path / "mel.npy"


def samples(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


def test_synth_converts_mels_of_another_logarithm(melrt, tiny_bundle_path: Path, mel: Path, tmp_path: Path) -> None:
    spec = Bundle.open(tiny_bundle_path).manifest.spec
    melrt("synth", tiny_bundle_path, mel, "-o", tmp_path / "right.wav")
    for options, change in (
        (("--mel-log", "ln"), {"log": "ln"}),
        (("--mel-log", "ln", "--mel-gain", "2"), {"log": "ln", "gain": 2.0}),
        (("--mel-gain", "20"), {"gain": 20.0}),
    ):
        np.save(tmp_path / "other.npy", convert_mel(np.load(mel), spec, replace(spec, **change)))
        code, _, err = melrt("synth", tiny_bundle_path, tmp_path / "other.npy", *options, "-o", tmp_path / "converted.wav")
        assert code == 0, err
        assert np.abs(samples(tmp_path / "converted.wav") - samples(tmp_path / "right.wav")).max() < 1e-3
    code, _, err = melrt("synth", tiny_bundle_path, mel, "--mel-log", "log3", "-o", tmp_path / "x.wav")
    assert code == 2
    assert "one of log10, ln, log2, dB, linear" in err


def test_synth_accepts_audio_and_a_logarithm(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    for name, options in (("plain.wav", ()), ("ln.wav", ("--mel-log", "ln"))):
        assert melrt("synth", tiny_bundle_path, RECORDING, *options, "-o", tmp_path / name)[0] == 0
    assert np.abs(samples(tmp_path / "plain.wav") - samples(tmp_path / "ln.wav")).max() < 1e-3


def test_mel_normalized_needs_statistics(melrt, tiny_bundle_path: Path, mel: Path, tmp_path: Path) -> None:
    code, _, err = melrt("synth", tiny_bundle_path, mel, "--mel-normalized", "-o", tmp_path / "x.wav")
    assert code == 2
    assert "has none" in err


def test_synth_and_mel_read_the_same_audio(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.mp3", read_audio(RECORDING, 22050), 22050)
    assert melrt("mel", tiny_bundle_path, tmp_path / "x.mp3", "-o", tmp_path / "mel.npy")[0] == 0
    assert melrt("synth", tiny_bundle_path, tmp_path / "x.mp3", tmp_path / "mel.npy", "-o", tmp_path / "out")[0] == 0
    assert np.array_equal(samples(tmp_path / "out" / "x.wav"), samples(tmp_path / "out" / "mel.wav"))


def test_wrong_output_paths_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "out" / "a.wav").mkdir(parents=True)
    one, other = tmp_path / "a.wav", tmp_path / "b" / "a.wav"
    for inputs, out, message in (
        ([one], one, "a.wav would be overwritten"), ([one], tmp_path / "x.mp3", "this --format makes .wav files"),
        ([one, other], tmp_path / "x.wav", "cannot go to one file"), ([one, other], tmp_path / "x", "same name"),
        ([one], tmp_path / "out", "a.wav is a folder"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            commands._targets(inputs, out, ".wav")


def test_output_of_another_format_is_refused(melrt, tiny_bundle_path: Path, mel: Path, tmp_path: Path) -> None:
    code, _, err = melrt("synth", tiny_bundle_path, mel, "-o", tmp_path / "o.mp3")
    assert code == 2
    assert "this --format makes .wav files" in err
    assert not (tmp_path / "o.mp3").exists()
    (tmp_path / "run.1").mkdir()
    assert melrt("synth", tiny_bundle_path, mel, "-o", tmp_path / "run.1")[0] == 0
    assert (tmp_path / "run.1" / "mel.wav").is_file()


def test_synth_writes_other_rates_and_encodings(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    mel = speech_mel(Bundle.open(tiny_bundle_path), 200)
    np.save(tmp_path / "mel.npy", mel)
    for encoding, rate, suffix, subtype in (
        ("mulaw", 8000, "wav", "ULAW"),
        ("opus", 24000, "opus", "OPUS"),
        ("flac", 48000, "flac", "PCM_16"),
    ):
        options = ("--rate", rate, "--format", encoding, "-o", tmp_path / "out")
        code, out, _ = melrt("synth", tiny_bundle_path, tmp_path / "mel.npy", *options)
        assert code == 0
        file = soundfile.SoundFile(tmp_path / "out" / f"mel.{suffix}")
        assert (file.samplerate, file.subtype, file.frames) == (rate, subtype, round(200 * 256 * rate / 22050))
        assert np.abs(file.read()).max() > 0.05
        assert "2.32 s of audio in " in out
        assert re.search(r"\d+ of 111456 samples were clipped to full scale. --format float32 keeps them", out) or rate < 48000
    code, _, err = melrt("synth", tiny_bundle_path, tmp_path / "mel.npy", "--format", "opus", "-o", tmp_path / "x.opus")
    assert code == 2
    assert "Opus does not support 22050 Hz" in err
    assert not (tmp_path / "x.opus").exists()


def test_real_time_factor_excludes_reading(
    melrt, tiny_bundle_path: Path, mel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = commands.mel_pieces

    def slow(*arguments):
        time.sleep(2)
        yield from read(*arguments)

    monkeypatch.setattr(commands, "mel_pieces", slow)
    code, out, _ = melrt("synth", tiny_bundle_path, mel, "-o", tmp_path / "x.wav")
    assert code == 0
    seconds = float(re.search(r"1\.00 s of audio in ([\d.]+) s", out)[1])
    assert seconds < 2


def test_progress_is_plain_lines_without_a_terminal(melrt, tiny_bundle_path: Path, mel: Path, tmp_path: Path) -> None:
    _, out, err = melrt("synth", tiny_bundle_path, mel, RECORDING, "-o", tmp_path / "out")
    assert err.splitlines() == ["step 1 of 2: synthesizing mel.npy", f"step 2 of 2: synthesizing {RECORDING.name}"]
    assert f"Wrote 2 files to {tmp_path / 'out'}: " in out
    assert "with onnxruntime fp32 on cpu." in out


def test_info_names_every_damaged_file(melrt, tiny_bundle: Bundle) -> None:
    first, second, third = (tiny_bundle.path / entry.file for entry in tiny_bundle.manifest.artifacts[:3])
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    data = bytearray(third.read_bytes())
    data[-1] ^= 1
    third.write_bytes(data)
    code, out, err = melrt("info", tiny_bundle.path)
    assert code == 2
    assert "80 bands" in out, "the facts are shown all the same"
    for file, text in ((first, "is missing"), (second, "the manifest says"), (third, "was altered")):
        assert re.search(f"{re.escape(file.name)} .*{text}", err), err


def test_tune_says_what_it_stored(melrt, tiny_bundle: Bundle) -> None:
    code, out, err = melrt("tune", tiny_bundle.path, "--rounds", "1", "--threads", "1")
    assert code == 0
    (entry,) = Bundle.open(tiny_bundle.path).find("policy")
    assert f"Wrote the chosen windows to {tiny_bundle.path / entry.file}." in out
    assert "step 1 of 2: loading the voice" in err
