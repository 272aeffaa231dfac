"""Log-mel features from audio, in numpy only; float32 results equal librosa 0.11's bit for bit."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from melrt.errors import AudioError
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio, Mel

# Frames transformed at a time: their float64 copies take 4 MB at n_fft 1024, whatever the length of the audio.
BLOCK_FRAMES = 512


def mel_from_audio(audio: FloatAudio, spec: MelSpec) -> Mel:
    """Compute log-mel frames of a signal as the voice's project does.

    Args:
        audio: Samples in [-1, 1] at the convention's rate, shape (N,).
        spec: The mel convention.

    Returns:
        Shape (M, T), T = N // hop for `same` framing, N // hop + 1 for `center`.

    Raises:
        AudioError: Too short for one frame.
    """
    pad = (spec.n_fft - spec.hop) // 2 if spec.framing == "same" else spec.n_fft // 2
    if len(audio) <= pad or len(audio) < spec.hop:
        raise AudioError(
            f"audio has {len(audio)} samples; a first frame needs {max(pad + 1, spec.hop)}, because {pad} are mirrored at each end. "
            "Give a longer recording."
        )
    signal = audio.astype(np.float32)
    if spec.preemphasis:
        signal = np.append(signal[:1], signal[1:] - np.float32(spec.preemphasis) * signal[:-1])
    magnitude = np.abs(stft(np.pad(signal, pad, mode=spec.padding), spec.n_fft, spec.hop, spec.win_length))
    if spec.epsilon:
        magnitude = np.sqrt(magnitude**2 + np.float32(spec.epsilon))
    mel = spec.logarithm(mel_filters(spec) @ magnitude**spec.power)
    return np.asarray(spec.normalization.apply(mel.astype(np.float64)) if spec.normalization else mel, np.float32)


def mel_distance(mel: Mel, audio: FloatAudio, spec: MelSpec) -> float:
    """Return the log-mel error of audio (N,): its mean absolute difference from frames (M, T), in the convention's logarithm."""
    output = mel_from_audio(audio, spec)
    frames = min(output.shape[1], mel.shape[1])
    return float(np.abs(output[:, :frames] - mel[:, :frames]).mean())


def stft(signal: FloatAudio, n_fft: int, hop: int, win_length: int) -> NDArray[np.complex64]:
    """Compute the short-time Fourier transform of a signal; frame t begins at sample t * hop, nothing is padded.

    Args:
        signal: At least n_fft samples, shape (N,).
        n_fft: Length of the transform in samples.
        hop: Samples between frames.
        win_length: Length of the periodic Hann window, in the middle of each frame.

    Returns:
        Shape (n_fft // 2 + 1, (N - n_fft) // hop + 1).
    """
    frames = np.lib.stride_tricks.sliding_window_view(signal, n_fft)[::hop]
    window = hann(n_fft, win_length)
    spectrum = np.empty((len(frames), n_fft // 2 + 1), np.complex64)
    for start in range(0, len(frames), BLOCK_FRAMES):
        block = slice(start, start + BLOCK_FRAMES)
        spectrum[block] = np.fft.rfft(frames[block] * window)
    return spectrum.T


def hann(n_fft: int, win_length: int) -> NDArray[np.float64]:
    """Build the periodic Hann window with zeros at both sides, shape (n_fft,)."""
    left = (n_fft - win_length) // 2
    window = 0.5 + 0.5 * np.cos(np.linspace(-np.pi, np.pi, win_length + 1)[:-1])
    return np.pad(window, (left, n_fft - win_length - left))


def mel_filters(spec: MelSpec) -> NDArray[np.float32]:
    """Build the convention's bank of triangular filters, shape (M, n_fft // 2 + 1)."""
    filters = _filters(spec)
    if empty := int((filters.max(axis=1) == 0).sum()):
        warnings.warn(
            f"{empty} of the {spec.n_mels} mel bands are narrower than a step of the transform and stay empty ({spec.describe()}). "
            f"Use fewer bands or an n_fft above {spec.n_fft}.",
            stacklevel=2,
        )
    return filters


def largest_value(spec: MelSpec) -> float:
    """Return a bound of the plain log-mels of audio in [-1, 1]: every step of the transform at the sum of the window."""
    step = (1 + spec.preemphasis) * hann(spec.n_fft, spec.win_length).sum()
    return float(spec.logarithm(_filters(spec).sum(axis=1).max() * step**spec.power))


def _filters(spec: MelSpec) -> NDArray[np.float32]:
    limits = _hz_to_mel(np.array([spec.f_min, spec.f_max]), spec.scale)
    corners = _mel_to_hz(np.linspace(limits[0], limits[1], spec.n_mels + 2), spec.scale)
    width = np.diff(corners)[:, None]
    distance = corners[:, None] - np.fft.rfftfreq(spec.n_fft, 1 / spec.sample_rate)
    rising, falling = -distance[:-2] / width[:-1], distance[2:] / width[1:]
    filters = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    if spec.norm == "slaney":
        filters *= (2 / (corners[2:] - corners[:-2]))[:, None]
    return filters


# Slaney's Auditory Toolbox: linear up to 1000 Hz, 3 mel per 200 Hz; logarithmic above, a factor of 6.4 in 27 mel.
_LINEAR_STEP = 200 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _LINEAR_STEP
_LOG_STEP = np.log(6.4) / 27


def _hz_to_mel(hz: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    if scale == "htk":
        return np.asarray(2595.0 * np.log10(1.0 + hz / 700.0))
    log = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) / _LOG_STEP
    return np.where(hz >= _BREAK_HZ, log, hz / _LINEAR_STEP)


def _mel_to_hz(mel: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    if scale == "htk":
        return np.asarray(700.0 * (10.0 ** (mel / 2595.0) - 1.0))
    log = _BREAK_HZ * np.exp(_LOG_STEP * (np.maximum(mel, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mel >= _BREAK_MEL, log, mel * _LINEAR_STEP)
