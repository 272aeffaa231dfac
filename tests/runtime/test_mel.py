"""Mel conventions: what converts exactly, what cannot, and how a wrong one is told."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from melrt.bundle import Bundle, Manifest
from melrt.errors import BundleError, MelError
from melrt.mel.level_check import LevelCheck, Levels
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.vocoder import Vocoder
from melrt_export.assets import RECORDING
from melrt_export.audio_features import mel_from_audio, read_audio

SPEC = MelSpec(f_min=80.0, f_max=7600.0, floor=1e-10, framing="center")


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return read_audio(RECORDING, SPEC.sample_rate)


@pytest.fixture(scope="module")
def speech(audio: np.ndarray) -> np.ndarray:
    return mel_from_audio(audio, SPEC)


@pytest.fixture(scope="module")
def trained(speech: np.ndarray) -> Normalization:
    return Normalization(tuple(speech.mean(axis=1).tolist()), tuple(speech.std(axis=1).tolist()))


@pytest.mark.parametrize("change", [
    {"log": "ln"}, {"log": "dB"}, {"log": "log2"}, {"gain": 20.0}, {"log": "linear"}, {"floor": 1e-5},
    {"log": "ln", "floor": 1e-3, "gain": 3.0},
])  # fmt: skip
def test_a_converted_mel_is_the_one_that_the_audio_gives(audio: np.ndarray, speech: np.ndarray, change: dict) -> None:
    other = replace(SPEC, **change)
    expected = mel_from_audio(audio, other)
    converted = other.convert(speech, SPEC)
    assert converted.dtype == np.float32
    assert np.abs(converted - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    if "floor" not in change:
        assert np.abs(SPEC.convert(expected, other) - speech).max() < 2e-4


def test_normalized_mels_convert_both_ways(speech: np.ndarray, trained: Normalization) -> None:
    normalized = replace(SPEC, normalization=trained)
    there = normalized.convert(speech[None], SPEC)
    assert abs(float(there.mean())) < 1e-3
    assert abs(float(there.std()) - 1) < 1e-3
    assert np.abs(SPEC.convert(there, normalized)[0] - speech).max() < 1e-5
    assert MelSpec.from_dict(normalized.to_dict()) == normalized


def test_what_cannot_be_exact_is_refused(speech: np.ndarray, trained: Normalization) -> None:
    with pytest.raises(MelError, match=r"f_max 7600.0 for 8000.0.*melrt mel"):
        replace(SPEC, f_max=8000.0).convert(speech, SPEC)
    with pytest.raises(MelError, match=r"power 1.0 for 2.0, preemphasis 0.0 for 0.97"):
        replace(SPEC, power=2.0, preemphasis=0.97).convert(speech, SPEC)
    shallow = replace(SPEC, floor=1e-3)
    cut = shallow.convert(speech, SPEC)
    with pytest.raises(MelError, match=r"values stand at their convention's smallest magnitude, 0.001.*goes on to 1e-10"):
        SPEC.convert(cut, shallow)
    above = np.maximum(cut, shallow.silence + 0.1)
    assert np.array_equal(SPEC.convert(above, shallow), above), "nothing at the limit, nothing lost"
    clipped = replace(SPEC, normalization=replace(trained, clip=(-4.0, -1.0)))
    with pytest.raises(MelError, match="smallest magnitude, 0.0001"):
        SPEC.convert(clipped.convert(speech, SPEC), clipped)
    with pytest.raises(MelError, match="largest magnitude, 0.1"):
        SPEC.convert(clipped.convert(np.maximum(speech, -3.9), SPEC), clipped)
    with pytest.raises(MelError, match="40 bands"):
        SPEC.convert(speech[:40], SPEC)


def test_each_mistake_is_named_with_what_mends_it(speech: np.ndarray, trained: Normalization) -> None:
    check = LevelCheck(SPEC, Levels.of(SPEC, trained), trained)
    part = speech[:, 100:180]
    assert check.judge(part) is None
    assert check.judge(part - 1.0) is None, "a quiet speaker"
    assert check.judge(np.full_like(part, SPEC.silence)) is None, "silence"
    for log, name in (("ln", "ln magnitudes"), ("dB", "decibels"), ("linear", "linear magnitudes")):
        source = replace(SPEC, log=log)
        warning = check.judge(source.convert(part, SPEC))
        assert f'It looks like {name}. Mend it with spec.convert(mel, replace(spec, log="{log}"))' in warning
    twice = check.judge(trained.apply(part.astype(np.float64)).astype(np.float32))
    assert "normalized already" in twice
    assert "normalization=bundle.manifest.normalization" in twice
    natural = replace(SPEC, log="ln")
    assert "log10 magnitudes" in LevelCheck(natural, Levels.of(natural), None).judge(part)
    unknown = LevelCheck(SPEC, Levels(0.0, 1.0, normalized=True), None)
    assert "not normalized" in unknown.judge(part)
    assert unknown.judge(trained.apply(part).astype(np.float32)) is None


def test_one_warning_for_each_voice_streamed_or_whole(tiny_bundle: Bundle, audio: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    spec = tiny_bundle.manifest.spec
    right = mel_from_audio(audio[: 256 * 200], spec)
    wrong = replace(spec, log="ln").convert(right, spec)
    pause = np.full((80, 50), spec.silence, np.float32)
    with caplog.at_level(logging.WARNING, "melrt"):
        with Vocoder.load(tiny_bundle) as vocoder:
            vocoder(right)
            vocoder(np.concatenate([pause, right[:, :40]], axis=1))  # begins with more silence than speech
            for stream in [vocoder.open_stream() for _ in range(8)]:
                stream.push(np.concatenate([pause[:, :12], right[:, :4]], axis=1))
            list(vocoder.stream(right[:, i : i + 9] for i in range(0, 200, 9)))
        assert not caplog.messages
        with Vocoder.load(tiny_bundle) as vocoder:
            list(vocoder.stream(np.concatenate([pause, wrong], axis=1)[:, i : i + 9] for i in range(0, 250, 9)))
            vocoder(wrong)
            list(vocoder.batch([wrong, wrong]))
    (message,) = caplog.messages
    assert 'convert(mel, replace(spec, log="ln"))' in message


def test_bundles_of_before_are_read(tiny_bundle: Bundle) -> None:
    """A manifest without the fields that came later, as the first versions wrote it."""
    values = json.loads((tiny_bundle.path / "manifest.json").read_text())
    for name in ("levels", "normalization", "parameters", "flop_per_second"):
        values.pop(name)
    for name in ("gain", "padding", "preemphasis", "normalization"):
        values["spec"].pop(name)
    manifest = Manifest.loads(json.dumps(values).encode())
    assert manifest.spec == tiny_bundle.manifest.spec
    assert manifest.levels is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(levels={"mean": 1, "deviation": 0}), "deviation of 0"),
        (lambda m: m.update(levels={"mean": "x", "deviation": 1}), "mean of 'x'"),
        (lambda m: m.update(normalization={"mean": [1.0], "scale": [-1.0]}), "scale of -1"),
        (lambda m: m.update(normalization={"mean": [1.0]}), "object with mean, scale"),
        (lambda m: m.update(normalization={"mean": [1.0], "scale": [1.0], "clip": [2, 1]}), "lower first"),
        (lambda m: m.update(parameters=-1), "parameters is -1"),
        (lambda m: m["spec"].update(gain=0.0), "gain is 0.0"),
        (lambda m: m["spec"].update(preemphasis=1.5), "preemphasis is 1.5"),
        (lambda m: m["spec"].update(normalization={"mean": [1.0], "scale": [1.0]}), "1 bands for a mel of 80"),
        (lambda m: m["spec"].update(floor=10**400), "floor"),
    ],
)
def test_impossible_values_in_a_manifest(tiny_bundle: Bundle, change, message: str) -> None:
    values = json.loads((tiny_bundle.path / "manifest.json").read_text())
    change(values)
    with pytest.raises(BundleError, match=message):
        Manifest.loads(json.dumps(values).encode())
