"""Mels equal the formulas of the projects that checkpoints come from."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
import torch

from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.mel.spec import MelSpec
from melrt_export.assets import RECORDING

# PyTorch's float32 transform and the projects' own rounding differ by this much in the quietest bands.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return read_audio(RECORDING, 22050)


def librosa_mel(audio: np.ndarray, f_min: float, f_max: float) -> np.ndarray:
    """Compute centered, mirrored magnitudes: the first steps of ParallelWaveGAN, TensorFlowTTS and Coqui TTS."""
    spectrum = np.abs(librosa.stft(audio, n_fft=1024, hop_length=256, win_length=1024, window="hann", pad_mode="reflect"))
    return librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=f_min, fmax=f_max) @ spectrum


def test_melgan_neurips(audio: np.ndarray) -> None:
    """`Audio2Mel.forward`, with PyTorch's STFT (mel2wav/modules.py)."""
    padded = torch.nn.functional.pad(torch.from_numpy(audio)[None], (384, 384), "reflect")
    spectrum = torch.stft(padded, 1024, 256, 1024, torch.hann_window(1024), center=False, return_complex=True).abs()
    basis = torch.from_numpy(librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0.0, fmax=None))
    expected = torch.log10(torch.clamp(basis @ spectrum, min=1e-5))[0].numpy()
    mel = mel_from_audio(audio, MelSpec())
    assert mel.shape == (80, len(audio) // 256)
    assert np.abs(mel - expected).max() < TOLERANCE
    assert mel.max() > -0.5, "the recording is not silence"


def test_parallel_wavegan_and_tensorflow_tts(audio: np.ndarray) -> None:
    """`logmelfilterbank` (bin/preprocess.py)."""
    spec = MelSpec(f_min=80.0, f_max=7600.0, floor=1e-10, framing="center")
    assert np.abs(mel_from_audio(audio, spec) - np.log10(np.maximum(1e-10, librosa_mel(audio, 80, 7600)))).max() < TOLERANCE


def test_coqui_tts(audio: np.ndarray) -> None:
    """`AudioProcessor.melspectrogram`: preemphasis by lfilter([1, -c], [1], x), and gain times the logarithm."""
    spec = MelSpec(f_max=8000.0, log="dB", floor=1e-8, framing="center", preemphasis=0.98)
    filtered = np.append(audio[:1], audio[1:] - 0.98 * audio[:-1])
    decibels = 20 * np.log10(np.maximum(1e-8, librosa_mel(filtered, 0, 8000)))
    assert np.abs(mel_from_audio(audio, spec) - decibels).max() < TOLERANCE * 20
    zeros = MelSpec(f_max=8000.0, log="ln", gain=2.0, floor=1e-8, framing="center", padding="constant")
    spectrum = np.abs(librosa.stft(audio, n_fft=1024, hop_length=256, pad_mode="constant"))
    basis = librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    assert np.abs(mel_from_audio(audio, zeros) - 2 * np.log(np.maximum(1e-8, basis @ spectrum))).max() < TOLERANCE


def test_seungwonpark(audio: np.ndarray) -> None:
    """`utils/stft.py`, from Tacotron 2: mirrored by half a transform, natural logarithm of at least 1e-5.

    In double precision: PyTorch's float32 transform is itself up to 8e-4 off in the quietest bands.
    """
    basis = torch.from_numpy(librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0, fmax=8000)).double()
    padded = torch.nn.functional.pad(torch.from_numpy(audio).double()[None], (512, 512), "reflect")
    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(padded, 1024, 256, 1024, window, center=False, return_complex=True).abs()
    expected = torch.log(torch.clamp(basis @ spectrum, min=1e-5))[0].numpy()
    mel = mel_from_audio(audio, MelSpec(f_max=8000.0, log="ln", framing="center"))
    assert mel.shape == (80, 1 + len(audio) // 256)
    assert np.abs(mel - expected).max() < TOLERANCE
