"""Measures of quality: how far a synthesis is from the recording, and how quiet its silences are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from melrt.mel import MelSpec
from melrt_export.mels import mel_from_audio

# A frame whose loudest band is this far under the loudest of the utterance is silence: 40 dB in log10 of magnitude.
SILENCE_BELOW_PEAK = 2.0


def log_mel_error(recording: NDArray[np.float32], audio: NDArray[np.float32], spec: MelSpec) -> float:
    """Mean absolute difference of the log-mels, in the convention's logarithm.

    Args:
        recording: Samples of the reference, shape (N,).
        audio: Samples of the synthesis; what is longer than the other is not compared.
        spec: The mel convention of both.
    """
    ours, theirs = mel_from_audio(audio, spec), mel_from_audio(recording, spec)
    frames = min(ours.shape[1], theirs.shape[1])
    return float(np.abs(ours[:, :frames] - theirs[:, :frames]).mean())


def silence_level_db(recording: NDArray[np.float32], audio: NDArray[np.float32], spec: MelSpec) -> float:
    """Level of the synthesis where the recording is silent, dB relative to full scale; NaN if it is never silent.

    Args:
        recording: Samples of the reference, shape (N,): says where silence is.
        audio: Samples of the synthesis, shape (N,).
        spec: The mel convention, for its frames.
    """
    mel = mel_from_audio(recording, spec)
    loudness = mel.max(axis=0) / (spec.logarithm(np.array(10.0)) / spec.power)  # in log10 of magnitude, whatever the convention
    silent = loudness < loudness.max() - SILENCE_BELOW_PEAK
    frames = min(len(silent), len(audio) // spec.hop)
    samples = audio[: frames * spec.hop].reshape(frames, spec.hop)[silent[:frames]].astype(np.float64)
    return float(10 * np.log10((samples**2).mean() + 1e-20)) if samples.size else float("nan")
