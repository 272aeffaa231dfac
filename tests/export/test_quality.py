"""Quality of a synthesis: comb, level, and the error that selects the best weights of a training."""

from __future__ import annotations

import numpy as np
import pytest

from melrt import MelSpec
from melrt.files.audio import read_audio
from melrt_export.assets import RECORDING
from melrt_export.quality import SpeechQuality, comb_db, perceptual_metrics

RATE, HOP = 22050, 256


def repeating(seconds: int = 4) -> np.ndarray:
    """Return noise that repeats with every frame, as the output of a vocoder with a bad comb."""
    frame = np.random.default_rng(0).standard_normal(HOP)
    return np.tile(0.1 * frame, seconds * RATE // HOP).astype(np.float32)


def test_comb_is_high_for_a_signal_that_repeats_with_every_frame() -> None:
    noise = (0.1 * np.random.default_rng(1).standard_normal(4 * RATE)).astype(np.float32)
    assert abs(comb_db(noise, RATE, HOP)) < 0.5
    # Both signals have the same power. All of the repeating one is in 1 of 16 bins at each multiple, and the window spreads it over the
    # bins beside: the bin itself has 16 / 1.5 times the power of a bin of noise, where 1.5 bins is the noise bandwidth of a Hann window.
    tones = repeating()
    mixed = tones + noise[: len(tones)]
    assert comb_db(mixed, RATE, HOP) == pytest.approx(10 * np.log10(1 + 16 / 1.5), abs=1)
    assert comb_db(tones, RATE, HOP) > 60
    assert -1 < comb_db(read_audio(RECORDING, RATE), RATE, HOP) < 3


def test_quality_finds_each_defect_alone() -> None:
    spec, audio = MelSpec(), read_audio(RECORDING, RATE)
    same, quiet = SpeechQuality.between(audio, audio, spec), SpeechQuality.between(audio, 0.5 * audio, spec)
    assert (same.log_mel, same.comb_db, same.level_db, same.error) == (0, 0, 0, 0)
    assert quiet.level_db == pytest.approx(-6.02, abs=0.01)
    assert quiet.comb_db == pytest.approx(0, abs=1e-3)
    assert quiet.log_mel == pytest.approx(0.3, abs=0.02), "half the amplitude in log10, except where the floor cuts"
    assert quiet.log_mel_db == pytest.approx(20 * quiet.log_mel, rel=1e-3)
    ringing = audio + 0.3 * np.resize(repeating(), len(audio))
    combed = SpeechQuality.between(audio, ringing.astype(np.float32), spec)
    assert combed.comb_db > 3
    assert combed.error == pytest.approx(combed.log_mel_db + combed.comb_db / 4 + abs(combed.level_db) / 2)
    assert combed.stft > same.stft == 0


def test_perceptual_metrics_without_speech_are_not_a_number() -> None:
    noise = (0.1 * np.random.default_rng(0).standard_normal(2000)).astype(np.float32)
    metrics = perceptual_metrics(noise, noise, RATE)
    assert metrics
    assert all(np.isnan(value) for value in metrics.values())
