"""The measures measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from melrt import MelSpec, Vocoder
from melrt_calibration.metrics import log_mel_error, lsd_db, si_snr_db, silence_level_db, snr_db, stft_distance
from melrt_calibration.perceptual_metrics import heard
from melrt_export.assets import RECORDING
from melrt_export.audio_features import mel_from_audio, read_audio
from melrt_export.export import export_voice

SPEC = MelSpec()


def test_log_mel_error_of_a_known_change() -> None:
    audio = read_audio(RECORDING, SPEC.sample_rate)
    assert log_mel_error(audio, audio, SPEC) == 0
    loud = MelSpec(floor=1e-12)
    assert log_mel_error(audio, audio * 10, loud) == pytest.approx(1.0, abs=0.01), "ten times as loud is 1 in log10"


def test_silence_level_of_known_noise() -> None:
    noise = np.random.default_rng(0).standard_normal(22050 * 2).astype(np.float32)
    recording = np.where(np.arange(len(noise)) < 22050, 0.1, 1e-5).astype(np.float32) * noise
    assert silence_level_db(recording, recording + 1e-3 * noise, SPEC) == pytest.approx(-60, abs=1.5)
    assert np.isnan(silence_level_db(0.1 * noise, noise, SPEC)), "never silent"


def test_measures_of_known_noise() -> None:
    """Noise 30 dB under speech; a changed gain is noise to SNR and none to SI-SNR; +6 dB everywhere is 6 dB of log-spectral distance."""
    audio = read_audio(RECORDING, SPEC.sample_rate)
    noise = np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
    noise *= np.float32(10 ** (-30 / 20) * np.sqrt((audio**2).mean() / (noise**2).mean()))
    assert snr_db(audio, audio + noise) == pytest.approx(30, abs=0.1)
    assert si_snr_db(audio, 0.5 * (audio + noise)) == pytest.approx(30, abs=0.1)
    assert snr_db(audio, 0.5 * audio) == pytest.approx(6.02, abs=0.01)
    loud = audio + 10 * noise  # no frame at the floor, where a gain would be cut off
    assert lsd_db(loud, 2 * loud) == pytest.approx(6.02, abs=0.05)
    assert stft_distance(loud, 2 * loud) == pytest.approx(1 + np.log(2), abs=0.01), "spectral convergence 1 and a factor of 2"
    assert stft_distance(audio, audio) == 0


@pytest.mark.parametrize(("name", "best", "worst"), [("stoi", 1.0, 0.9), ("pesq", 4.64, 2.0)])
def test_models_of_hearing_hear_noise(name: str, best: float, worst: float) -> None:
    pytest.importorskip({"stoi": "pystoi"}.get(name, name))
    audio = read_audio(RECORDING, SPEC.sample_rate)
    noise = np.float32(0.1 * audio.std()) * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
    clean, little, much = (
        heard(audio, audio + gain * noise, SPEC.sample_rate)[name] for gain in (np.float32(0), np.float32(1), np.float32(10))
    )
    assert clean == pytest.approx(best, abs=0.02)
    assert clean > little > much
    assert much < worst


def test_error_of_the_real_voice(shared: Path, tmp_path: Path) -> None:
    """The voice's own README: 0.156 on LJ001-0025 to 0032 by its trainer's measure, which takes the ends of a recording otherwise."""
    vocoder = Vocoder.load(export_voice(shared / "voices" / "lj", tmp_path / "lj.melrt"))
    errors = []
    for number in range(25, 33):
        recording = read_audio(shared / "audio" / "ljspeech" / f"LJ001-{number:04d}.wav", SPEC.sample_rate)
        recording *= 0.95 / np.abs(recording).max()  # as in its training
        errors.append(log_mel_error(recording, vocoder(mel_from_audio(recording, SPEC)), SPEC))
    assert np.mean(errors) == pytest.approx(0.156, abs=0.006)
