"""Mels equal the source project's own formula."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch

from melrt.errors import AudioError, MelError, MissingExtraError
from melrt.files.mels import read_mel
from melrt.mel.spec import MelSpec
from melrt_export.assets import RECORDING
from melrt_export.audio_features import mel_from_audio, mel_from_torch_file, read_audio

SPEC = MelSpec()


def test_the_formula_of_melgan_neurips() -> None:
    """`Audio2Mel.forward`, in PyTorch's own STFT (mel2wav/modules.py)."""
    audio = read_audio(RECORDING, SPEC.sample_rate)
    padded = torch.nn.functional.pad(torch.from_numpy(audio)[None], (384, 384), "reflect")
    spectrum = torch.stft(padded, 1024, 256, 1024, torch.hann_window(1024), center=False, return_complex=True).abs()
    basis = torch.from_numpy(librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0.0, fmax=None))
    expected = torch.log10(torch.clamp(basis @ spectrum, min=1e-5))[0].numpy()
    mel = mel_from_audio(audio, SPEC)
    assert mel.shape == (80, len(audio) // 256)
    assert np.abs(mel - expected).max() < 1e-4
    assert mel.max() > -0.5, "a recording has sound in it"


def librosa_mel(audio: np.ndarray, f_min: float, f_max: float) -> np.ndarray:
    """Centerd, mirrored, magnitude: what ParallelWaveGAN, TensorFlowTTS and Coqui TTS begin with."""
    spectrum = np.abs(librosa.stft(audio, n_fft=1024, hop_length=256, win_length=1024, window="hann", pad_mode="reflect"))
    return librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=f_min, fmax=f_max) @ spectrum


def test_the_formulas_of_the_other_projects() -> None:
    audio = read_audio(RECORDING, 22050)
    # ParallelWaveGAN, TensorFlowTTS: logmelfilterbank (bin/preprocess.py)
    wavegan = MelSpec(f_min=80.0, f_max=7600.0, floor=1e-10, framing="center")
    assert np.abs(mel_from_audio(audio, wavegan) - np.log10(np.maximum(1e-10, librosa_mel(audio, 80, 7600)))).max() < 1e-4
    # Coqui TTS: AudioProcessor.melspectrogram, preemphasis by lfilter([1, -c], [1], x) and gain times the logarithm
    coqui = MelSpec(f_max=8000.0, log="dB", floor=1e-8, framing="center", preemphasis=0.98)
    filtered = np.append(audio[:1], audio[1:] - 0.98 * audio[:-1])
    decibels = 20 * np.log10(np.maximum(1e-8, librosa_mel(filtered, 0, 8000)))
    assert np.abs(mel_from_audio(audio, coqui) - decibels).max() < 1e-4 * 20
    silent = librosa.stft(audio, n_fft=1024, hop_length=256, pad_mode="constant")
    zeros = MelSpec(f_max=8000.0, log="ln", gain=2.0, floor=1e-8, framing="center", padding="constant")
    basis = librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    assert np.abs(mel_from_audio(audio, zeros) - 2 * np.log(np.maximum(1e-8, basis @ np.abs(silent)))).max() < 1e-4
    # seungwonpark (utils/stft.py, Tacotron 2's): mirrored by half a transform, natural logarithm of at least 1e-5. In double precision:
    # PyTorch's float32 transform is itself up to 8e-4 off in the quietest bands.
    padded = torch.nn.functional.pad(torch.from_numpy(audio).double()[None], (512, 512), "reflect")
    spectrum = torch.stft(padded, 1024, 256, 1024, torch.hann_window(1024, dtype=torch.float64), center=False, return_complex=True).abs()
    expected = torch.log(torch.clamp(torch.from_numpy(basis).double() @ spectrum, min=1e-5))[0].numpy()
    mel = mel_from_audio(audio, MelSpec(f_max=8000.0, log="ln", framing="center"))
    assert mel.shape == (80, 1 + len(audio) // 256)
    assert np.abs(mel - expected).max() < 1e-4


def test_conventions_differ_as_they_say() -> None:
    audio = read_audio(RECORDING, SPEC.sample_rate)
    plain = mel_from_audio(audio, SPEC)
    assert np.allclose(mel_from_audio(audio, MelSpec(log="ln")), plain * np.log(10), atol=1e-4)
    assert np.allclose(mel_from_audio(audio, MelSpec(log="dB")), plain * 20, atol=1e-3)
    assert mel_from_audio(audio, MelSpec(framing="center")).shape[1] == plain.shape[1] + 1
    assert SPEC.silence == -5.0


def test_audio_is_mixed_and_resampled_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", np.stack([tone, tone], 1), 44100)
    with caplog.at_level(logging.WARNING):
        audio = read_audio(tmp_path / "x.wav", 22050)
    assert "2 channels" in caplog.text
    assert "44100 Hz; resampling to 22050 Hz" in caplog.text
    expected = np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    assert np.abs(audio[1000:-1000] - expected[1000:-1000]).max() < 1e-3


def test_audio_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(AudioError, match="cannot be read as audio"):
        read_audio(tmp_path / "x.wav", 22050)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 22050)
    with pytest.raises(AudioError, match="no samples"):
        read_audio(tmp_path / "empty.wav", 22050)
    with pytest.raises(AudioError, match="385 are needed|needs 385"):
        mel_from_audio(np.zeros(300, np.float32), SPEC)


def test_mels_from_files(tmp_path: Path) -> None:
    mel = np.random.default_rng(0).standard_normal((80, 9)).astype(np.float32)
    np.save(tmp_path / "a.npy", mel)
    np.savez(tmp_path / "b.npz", mel=mel, other=mel[:1])
    torch.save(torch.from_numpy(mel)[None], tmp_path / "c.pt")
    torch.save({"mel": torch.from_numpy(mel)}, tmp_path / "d.pt")
    for name in ("a.npy", "b.npz", "c.pt", "d.pt"):
        assert np.array_equal(read_mel(tmp_path / name, SPEC), mel), name


def test_mel_files_that_cannot_be_read(tmp_path: Path) -> None:
    np.save(tmp_path / "code.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    np.save(tmp_path / "batch.npy", np.zeros((2, 80, 9)))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "mel.txt").write_text("1 2 3")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    cases = {
        "code.npy": "cannot be read", "two.npz": "expected one, or one named 'mel'", "batch.npy": "one utterance",
        "broken.npz": "cannot be read", "mel.txt": r"it reads \.flac, \.npy", "nowhere.npy": "does not exist", "other.pt": "holds no mel",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(MelError, match=message):
            read_mel(tmp_path / name, SPEC)
    with pytest.raises(MelError, match="holds no mel"):
        mel_from_torch_file(tmp_path / "other.pt", SPEC)


def test_a_missing_package_names_the_extra_of_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(MissingExtraError, match=r"reading .wav needs librosa.*melrt\[export\]"):
        read_mel(RECORDING, SPEC)
