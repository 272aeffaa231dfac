"""Mels of another convention cause one warning, which names the cause and a remedy that works."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from melrt.bundle import Bundle
from melrt.errors import ConfigError
from melrt.mel.convert import convert_mel
from melrt.mel.features import mel_from_audio
from melrt.mel.level_check import LevelCheck, Levels
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.vocoder import Vocoder


@pytest.fixture
def part(speech: np.ndarray) -> np.ndarray:
    return speech[:, 100:180]


def check_of(spec: MelSpec, normalization: Normalization | None = None) -> LevelCheck:
    return LevelCheck(spec, Levels.expected(spec, normalization), normalization)


def apply_remedy(warning: str, mel: np.ndarray, spec: MelSpec, normalization: Normalization | None) -> np.ndarray:
    """Run the Python code of a warning, as a reader would paste it."""
    (code,) = re.findall("in Python with `(.*)`", warning)
    manifest = SimpleNamespace(normalization=normalization)
    names = {"mel": mel, "vocoder": SimpleNamespace(spec=spec, bundle=SimpleNamespace(manifest=manifest))}
    exec(code, names)
    return names["mel"]


def test_speech_in_the_right_convention_is_accepted(part: np.ndarray, spec: MelSpec, trained: Normalization) -> None:
    for check in (check_of(spec), check_of(spec, trained)):
        assert check.warning(part) is None
        assert check.warning(part - 1.0) is None, "a quiet speaker"
        assert check.warning(np.full_like(part, spec.silence)) is None, "silence"


@pytest.mark.parametrize(("log", "name"), [("ln", "ln magnitudes"), ("dB", "decibels"), ("linear", "linear magnitudes")])
def test_another_logarithm_is_named_and_converted(part: np.ndarray, spec: MelSpec, trained: Normalization, log: str, name: str) -> None:
    wrong = convert_mel(part, spec, replace(spec, log=log))
    warning = check_of(spec, trained).warning(wrong)
    assert f"It looks like {name}. Convert it with `melrt synth --mel-log {log}`" in warning
    assert np.abs(apply_remedy(warning, wrong, spec, trained) - part).max() < 1e-3


def test_a_gain_is_part_of_the_remedy(part: np.ndarray, spec: MelSpec) -> None:
    loud = replace(spec, gain=20.0)
    warning = check_of(loud).warning(part)
    assert "log10 magnitudes" in warning
    assert np.abs(apply_remedy(warning, part, loud, None) - 20 * part).max() < 1e-3
    natural = replace(spec, log="ln")
    assert "log10 magnitudes" in check_of(natural).warning(part)


def test_a_mel_that_was_normalized_already_is_named(part: np.ndarray, spec: MelSpec, trained: Normalization) -> None:
    wrong = trained.apply(part.astype(np.float64)).astype(np.float32)
    warning = check_of(spec, trained).warning(wrong)
    assert "normalized already" in warning
    assert "--mel-normalized" in warning
    assert np.abs(apply_remedy(warning, wrong, spec, trained) - part).max() < 1e-3


def to_range(mel: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map decibels from -100 to 0 with a reference of 20 dB to a range, as Tacotron's and TTS's preprocessing do."""
    return np.clip(low + (high - low) * (20 * mel - 20 + 100) / 100, low, high)


@pytest.mark.parametrize("change", [{}, {"floor": 1e-5, "framing": "same", "f_min": 0.0, "f_max": 11025.0}, {"log": "ln"}])
def test_normalized_mels_are_named_without_statistics(audio: np.ndarray, speech: np.ndarray, spec: MelSpec, change: dict) -> None:
    """The demo voice has no statistics either."""
    check = check_of(replace(spec, **change))
    by_band = (speech - speech.mean(axis=1, keepdims=True)) / speech.std(axis=1, keepdims=True)
    by_voice = (speech - speech.mean()) / speech.std()
    for wrong in (by_band, by_voice, to_range(speech, -4, 4), to_range(speech, -1, 1), to_range(speech, 0, 1)):
        warnings = [check.warning(np.float32(wrong[:, start : start + 64])) for start in range(60, 500, 64)]
        named = [warning is not None and "It looks like a normalized mel." in warning for warning in warnings]
        assert np.mean(named) >= 0.8, warnings
    right = mel_from_audio(audio, replace(spec, **change))
    assert not any(check.warning(right[:, start : start + 64]) for start in range(0, 600, 64))


def test_values_above_any_audio_are_suspicious(part: np.ndarray, spec: MelSpec) -> None:
    """At this level the mean and the deviation alone are not: values in [-4, 4] resemble those of quiet speech in log10."""
    check = check_of(spec)
    wrong = to_range(part, -4, 4)
    assert Levels.expected(spec).distance(wrong) < 2.5
    assert re.search(r"largest value is [23]\.\d+; audio in \[-1, 1\] gives at most 1\.4", check.warning(wrong))
    scaled = part + math.log10(32768)
    assert "16-bit samples that were not scaled" in check.warning(scaled)


def test_a_voice_of_normalized_mels_names_plain_ones(part: np.ndarray, spec: MelSpec, trained: Normalization) -> None:
    check = LevelCheck(spec, Levels(0.0, 1.0, normalized=True), None)
    assert "not normalized" in check.warning(part)
    assert check.warning(trained.apply(part).astype(np.float32)) is None


def test_levels_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="deviation is 0"):
        Levels(1.0, 0)
    with pytest.raises(ConfigError, match="mean is 'x'"):
        Levels("x", 1.0)  # type: ignore[arg-type]


def test_each_voice_warns_once(tiny_bundle: Bundle, audio: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    spec = tiny_bundle.manifest.spec
    right = mel_from_audio(audio[: 256 * 200], spec)
    wrong = convert_mel(right, spec, replace(spec, log="ln"))
    pause = np.full((80, 50), spec.silence, np.float32)
    with caplog.at_level(logging.WARNING, "melrt"):
        with Vocoder.load(tiny_bundle) as vocoder:
            vocoder(right)
            vocoder(np.concatenate([pause, right[:, :40]], axis=1))  # more silence than speech at the beginning
            for stream in [vocoder.open_stream() for _ in range(8)]:
                stream.push(np.concatenate([pause[:, :12], right[:, :4]], axis=1))
            list(vocoder.stream(right[:, i : i + 9] for i in range(0, 200, 9)))
        assert not caplog.messages
        with Vocoder.load(tiny_bundle) as vocoder:
            list(vocoder.stream(np.concatenate([pause, wrong], axis=1)[:, i : i + 9] for i in range(0, 250, 9)))
            vocoder(wrong)
            list(vocoder.batch([wrong, wrong]))
    (message,) = caplog.messages
    assert "--mel-log ln" in message
