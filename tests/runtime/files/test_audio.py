"""Audio files are read at the voice's rate as one channel."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from melrt.errors import AudioError, ConfigError, MissingExtraError
from melrt.files import audio as audio_files
from melrt.files.audio import read_audio, resample, write_wav
from melrt_export.assets import RECORDING


def test_audio_is_mixed_and_resampled_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", np.stack([tone, tone], 1), 44100)
    with caplog.at_level(logging.WARNING):
        audio = read_audio(tmp_path / "x.wav", 22050)
    assert "2 channels" in caplog.text
    assert "44100 Hz; resampling to 22050 Hz" in caplog.text
    expected = np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    assert np.abs(audio[1000:-1000] - expected[1000:-1000]).max() < 1e-3


def test_resampling_equals_librosa(noise: np.random.Generator) -> None:
    librosa = pytest.importorskip("librosa", reason="librosa is the reference of this test")
    for samples in (1, 100, 44_101):
        audio = noise.uniform(-0.5, 0.5, samples).astype(np.float32)
        for rate, new_rate in ((44100, 22050), (48000, 22050), (22050, 16000), (16000, 22050), (22050, 22050)):
            expected = librosa.resample(audio, orig_sr=rate, target_sr=new_rate, res_type="soxr_hq")
            resampled = resample(audio, rate, new_rate)
            assert resampled.dtype == np.float32
            assert resampled.shape == expected.shape
            assert np.abs(resampled - expected).max() < 1e-6, (samples, rate, new_rate)


def test_every_format_of_libsndfile_is_read(tmp_path: Path) -> None:
    audio = read_audio(RECORDING, 22050)
    for name, tolerance in (("x.flac", 1e-4), ("x.ogg", 0.1), ("x.mp3", 0.1), ("x.aiff", 1e-4)):
        soundfile.write(tmp_path / name, audio, 22050)
        read = read_audio(tmp_path / name, 22050)[: len(audio)]
        assert np.abs(read).max() > 0.5
        assert np.sqrt(((read - audio[: len(read)]) ** 2).mean()) < tolerance, name


def test_files_that_are_not_audio_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF no sound")
    (tmp_path / "x.raw").write_bytes(b"no header")
    cases = {
        "x.wav": "x.wav cannot be read as audio. WAV, FLAC, OGG, MP3 .*convert", "x.raw": "cannot be read as audio",
        "gone.wav": "gone.wav does not exist. Give the path", ".": "is a folder. Give one recording in it",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(AudioError, match=message) as refused:
            read_audio(tmp_path / name, 22050)
        assert "System error" not in str(refused.value)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 22050)
    with pytest.raises(AudioError, match="no samples"):
        read_audio(tmp_path / "empty.wav", 22050)


def test_headers_that_promise_too_much_fill_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile believes a header: numpy was told to allocate 9 TiB, or each sample would have become 22,050."""
    tone = np.sin(np.arange(30_000) / 7).astype(np.float32) / 2
    soundfile.write(tmp_path / "x.mp3", tone, 22050)
    data = (tmp_path / "x.mp3").read_bytes()
    at = data.index(b"Xing") + 8  # the number of MPEG frames
    (tmp_path / "x.mp3").write_bytes(data[:at] + b"\xff" * 4 + data[at + 4 :])
    assert 0 <= len(read_audio(tmp_path / "x.mp3", 22050)) - len(tone) < 2000
    for rate in (1, 999, 768_001):
        soundfile.write(tmp_path / "rate.wav", tone, rate)
        with pytest.raises(AudioError, match=f"has {rate} Hz; expected 1000 to 768000 Hz"):
            read_audio(tmp_path / "rate.wav", 22050)
    monkeypatch.setattr(audio_files, "FREE_AUDIO_BYTES", 0)
    monkeypatch.setattr(audio_files, "MAX_RATIO", 20)
    soundfile.write(tmp_path / "speech.flac", np.stack([tone] * 8, 1), 22050)
    assert len(read_audio(tmp_path / "speech.flac", 22050)) == len(tone)
    for channels, rate in ((1, 22050), (8, 22050), (1, 1000)):
        zeros = np.zeros((50_000, channels), np.float32)
        soundfile.write(tmp_path / "silence.flac", zeros, rate)
        with pytest.raises(AudioError, match=r"silence.flac has more than the \d+ bytes of samples"):
            read_audio(tmp_path / "silence.flac", 22050)


def test_wav_errors_name_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silence = np.zeros(9, np.float32)
    with pytest.raises(ConfigError, match="sample format is 'int24'"):
        write_wav(tmp_path / "x.wav", silence, 22050, "int24")  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"\[Errno") as refused:
        write_wav("/proc/x.wav", silence, 22050)
    assert refused.value.filename == "/proc/x.wav"
    for value in (np.nan, np.inf):
        pieces = [np.full(9, 0.5, np.float32), np.array([0.5, value], np.float32)]
        with pytest.raises(AudioError, match=r"samples that are not finite, so .*x\.wav was not written"):
            write_wav(tmp_path / "x.wav", pieces, 22050)

    def fails(*_: object) -> None:
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile.SoundFile, "write", fails)
    for total, free, end in (
        (1 << 40, 99 << 20, "the disk has 99 MiB free. Make room"),
        (1 << 40, 100 << 20, "another place"),
        (0, 0, "another place"),
    ):
        monkeypatch.setattr(audio_files.shutil, "disk_usage", lambda _, total=total, free=free: SimpleNamespace(total=total, free=free))
        with pytest.raises(AudioError, match=rf"x\.wav could not be written \(System error\.\).*{end}") as failed:
            write_wav(tmp_path / "x.wav", silence, 22050)
        assert ("MiB" in str(failed.value)) == ("MiB" in end)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"audio needs {package}.*melrt\[output\]"):
        read_audio(RECORDING, 16000)
