"""Quality metrics on signals with known differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from melrt import MelSpec, Vocoder
from melrt.files.audio import read_audio
from melrt.mel.features import mel_distance, mel_from_audio
from melrt_calibration.metrics import cell_errors, log_mel_error, lsd_db, si_snr_db, silence_level_db, snr_db
from melrt_export.assets import RECORDING
from melrt_export.export import export_voice
from melrt_export.quality import perceptual_metrics, stft_distance

SPEC = MelSpec()


def test_log_mel_error_of_a_known_change() -> None:
    audio = read_audio(RECORDING, SPEC.sample_rate)
    assert log_mel_error(audio, audio, SPEC) == 0
    loud = MelSpec(floor=1e-12)
    assert log_mel_error(audio, audio * 10, loud) == pytest.approx(1.0, abs=0.01), "a gain of 10 is 1 in log10"


def test_where_an_error_falls() -> None:
    """A tone changes the low bands only, and noise in a pause changes quiet cells only."""
    noise = np.random.default_rng(0).standard_normal(22050 * 2).astype(np.float32)
    first = np.arange(len(noise)) < 22050
    recording = np.where(first, 0.1, 1e-5).astype(np.float32) * noise
    tone = np.sin(2 * np.pi * 200 * np.arange(len(noise)) / 22050).astype(np.float32)
    mel = mel_from_audio(recording, SPEC)
    bands, quiet = cell_errors(mel, recording + np.where(first, 0.0, 1e-4).astype(np.float32) * noise, SPEC)
    assert bands.mean() == pytest.approx(mel_distance(mel, recording + np.where(first, 0.0, 1e-4).astype(np.float32) * noise, SPEC))
    assert quiet > 0.95 * bands.mean() > 0.1
    bands, quiet = cell_errors(mel, recording + np.where(first, 0.5, 0.0).astype(np.float32) * tone, SPEC)
    assert bands[:10].sum() > 0.9 * bands.sum()
    assert quiet < 0.1 * bands.mean()


def test_silence_level_of_known_noise() -> None:
    noise = np.random.default_rng(0).standard_normal(22050 * 2).astype(np.float32)
    recording = np.where(np.arange(len(noise)) < 22050, 0.1, 1e-5).astype(np.float32) * noise
    assert silence_level_db(recording, recording + 1e-3 * noise, SPEC) == pytest.approx(-60, abs=1.5)
    assert np.isnan(silence_level_db(0.1 * noise, noise, SPEC)), "a recording without silence has no silence level"


def test_a_few_loud_frames_do_not_hide_silence_that_became_louder() -> None:
    noise = np.random.default_rng(0).standard_normal(22050 * 2).astype(np.float32)
    recording = np.where(np.arange(len(noise)) < 22050, 0.1, 1e-5).astype(np.float32) * noise
    click = np.where(np.arange(len(noise)) >= 2 * 22050 - 1000, np.float32(0.05), np.float32(0)) * noise
    quiet, louder = (silence_level_db(recording, recording + click + np.float32(gain) * noise, SPEC) for gain in (1e-4, 2.5e-4))
    assert louder - quiet == pytest.approx(20 * np.log10(2.5), abs=0.5)


def test_signal_metrics_of_known_noise() -> None:
    """Noise is 30 dB below speech. A changed gain lowers SNR but not SI-SNR, and +6 dB everywhere is a log-spectral distance of 6 dB."""
    audio = read_audio(RECORDING, SPEC.sample_rate)
    noise = np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
    noise *= np.float32(10 ** (-30 / 20) * np.sqrt((audio**2).mean() / (noise**2).mean()))
    assert snr_db(audio, audio + noise) == pytest.approx(30, abs=0.1)
    assert si_snr_db(audio, 0.5 * (audio + noise)) == pytest.approx(30, abs=0.1)
    assert snr_db(audio, 0.5 * audio) == pytest.approx(6.02, abs=0.01)
    loud = audio + 10 * noise  # loud enough that no frame is at the floor, which would hide the gain
    assert lsd_db(loud, 2 * loud) == pytest.approx(6.02, abs=0.05)
    assert stft_distance(loud, 2 * loud) == pytest.approx(1 + np.log(2), abs=0.01), "spectral convergence 1 and a factor of 2"
    assert stft_distance(audio, audio) == 0


@pytest.mark.parametrize(("name", "best", "worst"), [("stoi", 1.0, 0.9), ("pesq", 4.64, 2.0)])
def test_perceptual_metrics_fall_with_noise(name: str, best: float, worst: float) -> None:
    pytest.importorskip({"stoi": "pystoi"}.get(name, name))
    audio = read_audio(RECORDING, SPEC.sample_rate)
    noise = np.float32(0.1 * audio.std()) * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
    clean, little, much = (
        perceptual_metrics(audio, audio + gain * noise, SPEC.sample_rate)[name] for gain in (np.float32(0), np.float32(1), np.float32(10))
    )
    assert clean == pytest.approx(best, abs=0.02)
    assert clean > little > much
    assert much < worst


def test_log_mel_error_of_the_shared_voice(shared: Path, tmp_path: Path) -> None:
    """Its README states 0.156 on LJ001-0025 to 0032, measured by its trainer, which treats the ends of a recording differently."""
    vocoder = Vocoder.load(export_voice(shared / "voices" / "lj", tmp_path / "lj.melrt"))
    errors = []
    for number in range(25, 33):
        recording = read_audio(shared / "audio" / "ljspeech" / f"LJ001-{number:04d}.wav", SPEC.sample_rate)
        recording *= 0.95 / np.abs(recording).max()  # as in the voice's training
        errors.append(log_mel_error(recording, vocoder(mel_from_audio(recording, SPEC)), SPEC))
    assert np.mean(errors) == pytest.approx(0.156, abs=0.006)
