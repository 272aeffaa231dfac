"""Mels from files: computed from audio with librosa, or read from PyTorch's own format."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melrt.errors import AudioError, MelError
from melrt.mel.spec import MelSpec

logger = logging.getLogger(__name__)


def mel_from_audio(audio: NDArray[np.float32], spec: MelSpec) -> NDArray[np.float32]:
    """Log-mel frames of a signal, as the voice's project computes them.

    Args:
        audio: Samples in [-1, 1] at the convention's rate, shape (N,).
        spec: The mel convention.

    Returns:
        Shape (M, T), T = N // hop for `same` framing, N // hop + 1 for `center`.

    Raises:
        AudioError: Too short for one frame.
    """
    import librosa

    pad = (spec.n_fft - spec.hop) // 2 if spec.framing == "same" else spec.n_fft // 2
    if len(audio) <= pad or len(audio) < spec.hop:
        raise AudioError(f"audio has {len(audio)} samples; a first frame needs {max(pad + 1, spec.hop)} ({pad} are reflected).")
    signal = audio.astype(np.float32)
    if spec.preemphasis:
        signal = np.append(signal[:1], signal[1:] - np.float32(spec.preemphasis) * signal[:-1])
    padded = np.pad(signal, pad, mode=spec.padding)
    spectrum = librosa.stft(padded, n_fft=spec.n_fft, hop_length=spec.hop, win_length=spec.win_length, window=spec.window, center=False)
    magnitude = np.abs(spectrum)
    if spec.epsilon:
        magnitude = np.sqrt(magnitude**2 + np.float32(spec.epsilon))
    mel = spec.logarithm(mel_filters(spec) @ magnitude**spec.power)
    return np.asarray(spec.normalization.apply(mel.astype(np.float64)) if spec.normalization else mel, np.float32)


def mel_filters(spec: MelSpec) -> NDArray[np.float32]:
    """The convention's filter bank, shape (M, n_fft // 2 + 1)."""
    import librosa

    filters = librosa.filters.mel(
        sr=spec.sample_rate, n_fft=spec.n_fft, n_mels=spec.n_mels, fmin=spec.f_min, fmax=spec.f_max, htk=spec.scale == "htk", norm=spec.norm
    )
    return np.asarray(filters, np.float32)


def read_audio(path: Path, sample_rate: int) -> NDArray[np.float32]:
    """A file's samples, mixed to one channel and resampled (soxr, high quality) if need be; a warning says so.

    Raises:
        AudioError: Not an audio file, or an empty one.
    """
    import librosa
    import soundfile

    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise AudioError(f"{path} cannot be read as audio: {error}") from error
    if not len(audio):
        raise AudioError(f"{path} has no samples.")
    if audio.shape[1] > 1:
        logger.warning("%s has %d channels; taking their mean", path, audio.shape[1])
    mono = audio.mean(axis=1)
    if rate != sample_rate:
        logger.warning("%s has %d Hz; resampling to %d Hz", path, rate, sample_rate)
        mono = librosa.resample(mono, orig_sr=rate, target_sr=sample_rate, res_type="soxr_hq")
    return np.asarray(mono, np.float32)


def mel_from_audio_file(path: Path, spec: MelSpec) -> NDArray[np.float32]:
    """Log-mel frames of an audio file; for the entry point `melrt.mel_readers`."""
    return mel_from_audio(read_audio(path, spec.sample_rate), spec)


def mel_from_torch_file(path: Path, spec: MelSpec) -> NDArray[np.float32]:
    """A mel saved by `torch.save`: a tensor, or a dict with one tensor or one named `mel`; for the entry point `melrt.mel_readers`."""
    import torch

    from melrt_export.checkpoints.reading import read_pickle

    value = read_pickle(path)
    if isinstance(value, dict):
        value = value.get("mel", next(iter(value.values())) if len(value) == 1 else None)
    if not isinstance(value, torch.Tensor):
        raise MelError(f"{path} holds no mel; expected a tensor, or a dict with one tensor or one named 'mel'.")
    return np.asarray(value.detach().float().numpy())
