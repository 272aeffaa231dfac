"""Quality of a synthesis on one recording: spectra, the comb, the level, and perceptual models. Training and demo report it."""

from __future__ import annotations

import importlib
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.files.audio import resample
from melrt.mel.features import mel_distance, mel_from_audio, stft
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio

RESOLUTIONS = {512: (50, 240), 1024: (120, 600), 2048: (240, 1200), 4096: (480, 4096)}
"""Hop and window length in samples for each FFT size.

512 to 2048 are ParallelWaveGAN's values (Yamamoto et al. 2020, table 1). The window of 4096 samples is long enough (93 ms without its
flanks) to separate the harmonics of a voice from multiples of the frame rate.
"""
PARALLEL_WAVEGAN = (1024, 2048, 512)
"""ParallelWaveGAN's FFT sizes."""
# Sample rate of wideband PESQ (ITU-T P.862.2) in Hz; the model ignores everything above 8 kHz.
PESQ_RATE = 16000
COMB_LIMITS = (1000.0, 4000.0)
"""Lowest and highest frequency in Hz of the spectrum in which `comb_db` compares powers."""
# The window spans this many hops, so every sixteenth bin lies exactly on a multiple of the frame rate.
_HOPS = 16
# Bins that are at least this far from a multiple belong to the spectrum between: the main lobe of a Hann window has two bins on each side.
_DISTANCE = 4
_TINY = 1e-20


@dataclass(frozen=True, slots=True)
class SpeechQuality:
    """Distance of a synthesis from its recording."""

    log_mel: float
    """Mean absolute difference of the log-mels, in the convention's logarithm."""
    log_mel_db: float
    """The same with magnitudes in dB, which is comparable between conventions."""
    stft: float
    """Multi-resolution STFT distance with FFT sizes from 512 to 4096; see `stft_distance`."""
    comb_db: float
    """Comb of the synthesis above the comb of the recording, in dB; see `comb_db`."""
    level_db: float
    """Level of the synthesis above the level of the recording, in dB."""
    pesq: float
    """Wideband PESQ, ITU-T P.862.2, from 1 to 4.64; NaN without the package `pesq` or without speech."""
    stoi: float
    """STOI (Taal et al. 2011), from 0 to 1; NaN without the package `pystoi` or without speech."""

    @property
    def error(self) -> float:
        """Number that selects the best weights of a training, in dB: log-mel difference + comb / 4 + level difference / 2.

        The log-mel difference alone rises when adversarial training begins, although comb and level improve. The perceptual models are
        not part of it, so that it does not depend on the installed packages.
        """
        return self.log_mel_db + max(self.comb_db, 0.0) / 4 + abs(self.level_db) / 2

    @classmethod
    def between(cls, recording: FloatAudio, audio: FloatAudio, spec: MelSpec) -> SpeechQuality:
        """Compare a synthesis (N,) with its recording (N,)."""
        decibels = replace(spec, log="dB", gain=1.0, power=1.0)
        log_mel, log_mel_db = (mel_distance(mel_from_audio(recording, one), audio, one) for one in (spec, decibels))
        comb = comb_db(audio, spec.sample_rate, spec.hop) - comb_db(recording, spec.sample_rate, spec.hop)
        level = 10 * np.log10((np.square(audio).mean() + _TINY) / (np.square(recording).mean() + _TINY))
        perceptual = {"pesq": np.nan, "stoi": np.nan} | perceptual_metrics(recording, audio, spec.sample_rate)
        return cls(log_mel, log_mel_db, stft_distance(recording, audio, tuple(RESOLUTIONS)), comb, float(level), **perceptual)

    def values(self) -> dict[str, float]:
        """Return the fields that have a value by name, and the error."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if np.isfinite(value)} | {"error": self.error}


def comb_db(audio: FloatAudio, sample_rate: int, hop: int) -> float:
    """Return how far the multiples of the frame rate, sample_rate / hop, rise above the spectrum between them, from 1 to 4 kHz.

    A recording has about 0 to 2 dB. An output that repeats with each frame has a line spectrum, and so a large value.

    Args:
        audio: Samples, shape (N,).
        sample_rate: Sample rate in Hz.
        hop: Samples of each frame.

    Returns:
        Mean power at the multiples over mean power between them, in dB, from the mean spectrum of the whole signal.
    """
    size = _HOPS * hop
    padded = np.pad(np.asarray(audio, np.float32), (0, max(size - len(audio), 0)))
    power = (np.abs(stft(padded, size, size // 4, size)) ** 2).mean(axis=1)
    bins = np.arange(len(power))
    inside = (bins * sample_rate / size >= COMB_LIMITS[0]) & (bins * sample_rate / size <= COMB_LIMITS[1])
    distance = np.minimum(bins % _HOPS, -bins % _HOPS)
    at, between = power[inside & (distance == 0)].mean(), power[inside & (distance >= _DISTANCE)].mean()
    return float(10 * np.log10((at + _TINY) / (between + _TINY)))


def stft_distance(reference: FloatAudio, output: FloatAudio, sizes: tuple[int, ...] = PARALLEL_WAVEGAN) -> float:
    """Return the sum of spectral convergence and mean difference of natural log magnitudes, averaged over the FFT sizes."""
    total = 0.0
    for size in sizes:
        wanted, actual = (np.maximum(magnitudes(audio, size, *RESOLUTIONS[size]), 1e-7) for audio in (reference, output))
        total += float(np.linalg.norm(wanted - actual) / np.linalg.norm(wanted) + np.abs(np.log(wanted / actual)).mean())
    return total / len(sizes)


def magnitudes(audio: FloatAudio, n_fft: int, hop: int, window: int) -> NDArray[np.floating]:
    """Return the magnitude spectrum of a signal that is padded with half a window of zeros, shape (n_fft // 2 + 1, T)."""
    return np.abs(stft(np.pad(audio.astype(np.float32), n_fft // 2), n_fft, hop, window))


def perceptual_metrics(recording: FloatAudio, audio: FloatAudio, sample_rate: int) -> dict[str, float]:
    """Return the perceptual metrics whose libraries are installed (the extra `perceptual`), by name.

    `pesq` is wideband PESQ, ITU-T P.862.2, from 1 to 4.64; `stoi` is Taal et al. 2011, from 0 to 1. A metric that finds no speech in
    the signals is NaN.

    Args:
        recording: Samples of the reference, shape (N,).
        audio: Samples of the synthesis, shape (N,), aligned with the reference.
        sample_rate: Sample rate of both in Hz.
    """
    found: dict[str, float] = {}
    with suppress(ImportError):
        pystoi: Any = importlib.import_module("pystoi")
        found["stoi"] = np.nan
        with suppress(RuntimeWarning), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # pystoi warns about less than 30 frames of speech, and returns 1e-5
            found["stoi"] = float(pystoi.stoi(recording, audio, sample_rate))
    with suppress(ImportError):
        pesq: Any = importlib.import_module("pesq")
        found["pesq"] = np.nan
        wideband = (resample(one, sample_rate, PESQ_RATE).astype(np.float32) for one in (recording, audio))
        with suppress(pesq.NoUtterancesError, pesq.BufferTooShortError):
            found["pesq"] = float(pesq.pesq(PESQ_RATE, *wideband, "wb"))
    return found
