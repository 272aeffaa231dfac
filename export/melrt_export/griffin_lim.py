"""Griffin-Lim: speech from a mel without a trained network, to compare voices with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from melrt.mel.features import hann, mel_filters, stft
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio, Mel

ITERATIONS = 60
# Momentum of the fast algorithm, as in librosa (Perraudin et al. 2013, equation 12).
_MOMENTUM = 0.99
# Updates of the magnitudes; with 30 and 300 the log-mel error of LJ001-0032 is the same to two digits.
_UPDATES = 100
_TINY = 1e-10


def griffin_lim(mel: Mel, spec: MelSpec, iterations: int = ITERATIONS) -> FloatAudio:
    """Synthesize speech from log-mel frames by estimating magnitudes and phases (Griffin and Lim 1984).

    Args:
        mel: Log-mel frames, shape (M, T).
        spec: Convention of the mel, with a logarithm and the framing `same`.
        iterations: Number of estimates of the phase.

    Returns:
        Samples, shape (T·hop,), float32.
    """
    magnitude = _magnitudes(mel, spec)
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape)).astype(np.complex64)
    before = np.zeros_like(phase)
    for _ in range(iterations):
        spectrum = stft(_overlap_add(magnitude * phase, spec), spec.n_fft, spec.hop, spec.win_length)
        phase = spectrum - _MOMENTUM / (1 + _MOMENTUM) * before
        phase /= np.abs(phase) + _TINY
        before = spectrum
    edge = (spec.n_fft - spec.hop) // 2
    return _overlap_add(magnitude * phase, spec)[edge : edge + mel.shape[1] * spec.hop]


def _magnitudes(mel: Mel, spec: MelSpec) -> NDArray[np.float32]:
    """Return magnitudes (n_fft // 2 + 1, T), none negative, whose mel is the given one, by the updates of Lee and Seung (2001)."""
    bands, filters = np.exp(mel / spec.unit), mel_filters(spec)
    estimate = filters.T @ bands + _TINY
    for _ in range(_UPDATES):
        estimate *= (filters.T @ bands) / (filters.T @ (filters @ estimate) + _TINY)
    return np.asarray(estimate ** (1 / spec.power), np.float32)


def _overlap_add(spectrum: NDArray[np.complex64], spec: MelSpec) -> FloatAudio:
    """Return the signal whose transform is nearest to a spectrum, with (n_fft - hop) / 2 samples of padding at both ends."""
    window = hann(spec.n_fft, spec.win_length)
    frames = np.fft.irfft(spectrum.T, spec.n_fft) * window
    signal = np.zeros((len(frames) - 1) * spec.hop + spec.n_fft)
    weight = np.full_like(signal, _TINY)
    for i, frame in enumerate(frames):
        here = slice(i * spec.hop, i * spec.hop + spec.n_fft)
        signal[here] += frame
        weight[here] += window**2
    return np.asarray(signal / weight, np.float32)
