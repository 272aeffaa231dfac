"""Quality metrics: the distance of a synthesis from its recording, and the level of its silence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from melrt.mel.features import mel_distance, mel_from_audio
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio, Mel
from melrt_export.quality import magnitudes, stft_distance

# A frame is silent if its loudest band is this far below the loudest of the utterance: 40 dB, in log10 of magnitude.
SILENCE_BELOW_PEAK = 2.0
# A mel cell of a recording below this level in log10 of magnitude is quiet: the noise between harmonics and in pauses.
QUIET_CELL = -3.0
# A frame at this level in log10 of magnitude, plus a hundredth for rounding, is silent whatever the other frames: digital silence.
DIGITAL_SILENCE = -4.0
_TINY = 1e-20


@dataclass(frozen=True, slots=True)
class SignalMetrics:
    """Distance of a synthesis from a reference, sample by sample and in the spectrum."""

    snr_db: float
    """Energy of the reference over energy of the difference, in dB."""
    si_snr_db: float
    """The same after the best gain, in dB (Le Roux et al. 2019, "SDR - half-baked or well done?")."""
    stft_distance: float
    """Multi-resolution STFT loss: spectral convergence plus log magnitude (Yamamoto et al. 2020)."""
    lsd_db: float
    """Log-spectral distance in dB (Gray and Markel 1976): root mean square of the level difference over frequency, mean over frames."""

    @classmethod
    def between(cls, reference: FloatAudio, output: FloatAudio) -> SignalMetrics:
        """Compare two signals of the same length, (N,)."""
        return cls(snr_db(reference, output), si_snr_db(reference, output), stft_distance(reference, output), lsd_db(reference, output))


def log_mel_error(recording: FloatAudio, audio: FloatAudio, spec: MelSpec) -> float:
    """Return the mean absolute difference of the log-mels, in the convention's logarithm.

    Args:
        recording: Samples of the reference, shape (N,).
        audio: Samples of the synthesis; frames beyond the end of the shorter signal are not compared.
        spec: Mel convention of both.
    """
    return mel_distance(mel_from_audio(recording, spec), audio, spec)


def cell_errors(mel: Mel, audio: FloatAudio, spec: MelSpec) -> tuple[NDArray[np.float64], float]:
    """Return where the log-mel error of a synthesis falls.

    Args:
        mel: Frames of the recording, (M, T).
        audio: Samples of the synthesis, (N,).
        spec: Mel convention of both.

    Returns:
        The error of each band, (M,), whose mean is the log-mel error; and the part of the log-mel error that is in quiet cells.
    """
    output = mel_from_audio(audio, spec)
    frames = min(output.shape[1], mel.shape[1])
    errors = np.abs(output[:, :frames] - mel[:, :frames])
    quiet = _log10_magnitude(mel[:, :frames], spec) < QUIET_CELL
    return errors.mean(axis=1, dtype=np.float64), float((errors * quiet).mean())


def silence_level_db(recording: FloatAudio, audio: FloatAudio, spec: MelSpec) -> float:
    """Return the median level of the synthesis where the recording is silent, in dB of full scale; NaN if it is never silent.

    Args:
        recording: Samples of the reference, shape (N,), which determine where silence is.
        audio: Samples of the synthesis, shape (N,).
        spec: Mel convention, for its frames.
    """
    levels = silence_levels(mel_from_audio(recording, spec), audio, spec)
    return float(np.median(levels)) if len(levels) else float("nan")


def silence_levels(mel: Mel, audio: FloatAudio, spec: MelSpec) -> NDArray[np.float64]:
    """Return the level in dB of full scale of every frame of the synthesis where the recording's frames (M, T) are silent.

    The median of these levels is the level of silence: their mean energy is that of the few loudest frames, at the ends of words, and
    can stay the same while all other frames become much louder.
    """
    silent = silent_frames(mel, spec)
    frames = min(len(silent), len(audio) // spec.hop)
    samples = audio[: frames * spec.hop].reshape(frames, spec.hop)[silent[:frames]].astype(np.float64)
    return np.asarray(10 * np.log10((samples**2).mean(axis=1) + _TINY), np.float64)


def silent_frames(mel: Mel, spec: MelSpec) -> NDArray[np.bool_]:
    """Return a mask (T,) of the silent frames of an utterance (M, T)."""
    loudness = _log10_magnitude(mel.max(axis=0), spec)
    return np.asarray((loudness < loudness.max() - SILENCE_BELOW_PEAK) | (loudness < DIGITAL_SILENCE + 0.01))


def _log10_magnitude(mel: Mel, spec: MelSpec) -> NDArray[np.floating]:
    """Return values of a mel in log10 of magnitude, for every convention."""
    unit = float(spec.logarithm(np.array(10.0))) / spec.power if spec.unit else 0.0
    return np.asarray(mel / unit if unit else np.log10(np.maximum(mel, 1e-10)) / spec.power)


def snr_db(reference: FloatAudio, output: FloatAudio) -> float:
    """Return the signal-to-noise ratio in dB."""
    signal = reference.astype(np.float64)
    return _ratio_db((signal**2).sum(), ((output - signal) ** 2).sum())


def si_snr_db(reference: FloatAudio, output: FloatAudio) -> float:
    """Return the scale-invariant signal-to-noise ratio in dB; the means of both signals are removed."""
    centered = reference - reference.mean(dtype=np.float64)
    estimate = output - output.mean(dtype=np.float64)
    target = (estimate @ centered) / ((centered**2).sum() + _TINY) * centered
    return _ratio_db((target**2).sum(), ((estimate - target) ** 2).sum())


def lsd_db(reference: FloatAudio, output: FloatAudio) -> float:
    """Return the log-spectral distance in dB, with windows of 1024 samples and a hop of 256."""
    wanted, actual = (np.maximum(magnitudes(audio, 1024, 256, 1024), 1e-5) for audio in (reference, output))
    return float(np.sqrt(((20 * np.log10(wanted / actual)) ** 2).mean(axis=0)).mean())


def _ratio_db(signal: float, noise: float) -> float:
    return float(10 * np.log10((signal + _TINY) / (noise + _TINY)))
