"""Measures of quality: how far a synthesis is from the recording, and how quiet its silences are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from melrt.mel.spec import MelSpec
from melrt_export.audio_features import mel_from_audio

Audio = NDArray[np.float32]
Frames = NDArray[np.float32]

# A frame whose loudest band is this far under the loudest of the utterance is silence: 40 dB in log10 of magnitude.
SILENCE_BELOW_PEAK = 2.0
# And one that is no louder than this in log10 of magnitude, with a hundredth for rounding, whatever the rest: the level of a dead line.
DEAD = -4.0
# (n_fft, hop, window) of Parallel WaveGAN (Yamamoto et al. 2020, table 1).
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
_TINY = 1e-20


@dataclass(frozen=True, slots=True)
class Measures:
    """Of a synthesis against a reference of samples."""

    snr_db: float
    """Energy of the reference over energy of the difference."""
    si_snr_db: float
    """The same after the best gain (Le Roux et al. 2019, "SDR - half-baked or well done?")."""
    stft_distance: float
    """Multi-resolution STFT loss: spectral convergence plus log magnitude (Yamamoto et al. 2020)."""
    lsd_db: float
    """Log-spectral distance (Gray and Markel 1976): root mean square over frequency of the level's difference, mean over frames."""

    @classmethod
    def between(cls, reference: Audio, output: Audio) -> Measures:
        """Compare two signals of one length, (N,)."""
        return cls(snr_db(reference, output), si_snr_db(reference, output), stft_distance(reference, output), lsd_db(reference, output))


def log_mel_error(recording: Audio, audio: Audio, spec: MelSpec) -> float:
    """Mean absolute difference of the log-mels, in the convention's logarithm.

    Args:
        recording: Samples of the reference, shape (N,).
        audio: Samples of the synthesis; what is longer than the other is not compared.
        spec: The mel convention of both.
    """
    return mel_distance(mel_from_audio(recording, spec), audio, spec)


def mel_distance(mel: Frames, audio: Audio, spec: MelSpec) -> float:
    """As `log_mel_error`, from the recording's frames (M, T)."""
    ours = mel_from_audio(audio, spec)
    frames = min(ours.shape[1], mel.shape[1])
    return float(np.abs(ours[:, :frames] - mel[:, :frames]).mean())


def silence_level_db(recording: Audio, audio: Audio, spec: MelSpec) -> float:
    """Level of the synthesis where the recording is silent, dB relative to full scale; NaN if it is never silent.

    Args:
        recording: Samples of the reference, shape (N,): says where silence is.
        audio: Samples of the synthesis, shape (N,).
        spec: The mel convention, for its frames.
    """
    energy, count = silence_energy(mel_from_audio(recording, spec), audio, spec)
    return float(10 * np.log10(energy / count + _TINY)) if count else float("nan")


def silence_energy(mel: Frames, audio: Audio, spec: MelSpec) -> tuple[float, int]:
    """Sum of squares, and number, of the samples where these frames (M, T) are silent."""
    silent = silent_frames(mel, spec)
    frames = min(len(silent), len(audio) // spec.hop)
    samples = audio[: frames * spec.hop].reshape(frames, spec.hop)[silent[:frames]].astype(np.float64)
    return float((samples**2).sum()), samples.size


def silent_frames(mel: Frames, spec: MelSpec) -> NDArray[np.bool_]:
    """Which frames (T,) of an utterance (M, T) are silence."""
    unit = float(spec.logarithm(np.array(10.0))) / spec.power if spec.unit else 0.0
    # in log10 of magnitude, whatever the convention
    loudness = mel.max(axis=0) / unit if unit else np.log10(np.maximum(mel.max(axis=0), 1e-10)) / spec.power
    return np.asarray((loudness < loudness.max() - SILENCE_BELOW_PEAK) | (loudness < DEAD + 0.01))


def snr_db(reference: Audio, output: Audio) -> float:
    """Signal to noise."""
    truth = reference.astype(np.float64)
    return _ratio_db((truth**2).sum(), ((output - truth) ** 2).sum())


def si_snr_db(reference: Audio, output: Audio) -> float:
    """Scale-invariant signal to noise, both without their means."""
    truth = reference - reference.mean(dtype=np.float64)
    made = output - output.mean(dtype=np.float64)
    target = (made @ truth) / ((truth**2).sum() + _TINY) * truth
    return _ratio_db((target**2).sum(), ((made - target) ** 2).sum())


def stft_distance(reference: Audio, output: Audio) -> float:
    """Mean over resolutions of spectral convergence and mean difference of the natural logarithms of magnitude."""
    total = 0.0
    for n_fft, hop, window in RESOLUTIONS:
        truth, made = (np.maximum(_magnitude(audio, n_fft, hop, window), 1e-7) for audio in (reference, output))
        total += float(np.linalg.norm(truth - made) / np.linalg.norm(truth) + np.abs(np.log(truth / made)).mean())
    return total / len(RESOLUTIONS)


def lsd_db(reference: Audio, output: Audio) -> float:
    """Log-spectral distance, at 1024 samples with a quarter hop."""
    truth, made = (np.maximum(_magnitude(audio, 1024, 256, 1024), 1e-5) for audio in (reference, output))
    return float(np.sqrt(((20 * np.log10(truth / made)) ** 2).mean(axis=0)).mean())


def _magnitude(audio: Audio, n_fft: int, hop: int, window: int) -> NDArray[np.floating]:
    import librosa

    return np.asarray(np.abs(librosa.stft(audio.astype(np.float32), n_fft=n_fft, hop_length=hop, win_length=window)))


def _ratio_db(signal: float, noise: float) -> float:
    return float(10 * np.log10((signal + _TINY) / (noise + _TINY)))
