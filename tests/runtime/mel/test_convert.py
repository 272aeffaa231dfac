"""Conversion between mel conventions: exact, or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from melrt.errors import MelError
from melrt.mel.convert import convert_mel
from melrt.mel.features import mel_from_audio
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec


@pytest.mark.parametrize("change", [
    {"log": "ln"}, {"log": "dB"}, {"log": "log2"}, {"gain": 20.0}, {"log": "linear"}, {"floor": 1e-5},
    {"log": "ln", "floor": 1e-3, "gain": 3.0},
])  # fmt: skip
def test_a_converted_mel_equals_the_audio_s(audio: np.ndarray, speech: np.ndarray, spec: MelSpec, change: dict) -> None:
    other = replace(spec, **change)
    expected = mel_from_audio(audio, other)
    converted = convert_mel(speech, spec, other)
    assert converted.dtype == np.float32
    assert np.abs(converted - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    if "floor" not in change:
        assert np.abs(convert_mel(expected, other, spec) - speech).max() < 2e-4


def test_normalized_mels_convert_both_ways(speech: np.ndarray, spec: MelSpec, trained: Normalization) -> None:
    normalized = replace(spec, normalization=trained)
    there = convert_mel(speech[None], spec, normalized)
    assert abs(float(there.mean())) < 1e-3
    assert abs(float(there.std()) - 1) < 1e-3
    assert np.abs(convert_mel(there, normalized, spec)[0] - speech).max() < 1e-5
    assert MelSpec.from_dict(normalized.to_dict()) == normalized


def test_inexact_conversions_are_refused(speech: np.ndarray, spec: MelSpec, trained: Normalization) -> None:
    with pytest.raises(MelError, match=r"f_max 7600.0 for 8000.0.*melrt mel"):
        convert_mel(speech, spec, replace(spec, f_max=8000.0))
    with pytest.raises(MelError, match=r"power 1.0 for 2.0, preemphasis 0.0 for 0.97"):
        convert_mel(speech, spec, replace(spec, power=2.0, preemphasis=0.97))
    shallow = replace(spec, floor=1e-3)
    cut = convert_mel(speech, spec, shallow)
    with pytest.raises(MelError, match=r"values are at the smallest magnitude of their convention, 0.001.*continues to 1e-10"):
        convert_mel(cut, shallow, spec)
    above = np.maximum(cut, shallow.silence + 0.1)
    assert np.array_equal(convert_mel(above, shallow, spec), above), "nothing is at the limit, so nothing is lost"
    clipped = replace(spec, normalization=replace(trained, clip=(-4.0, -1.0)))
    with pytest.raises(MelError, match="smallest magnitude of their convention, 0.0001"):
        convert_mel(convert_mel(speech, spec, clipped), clipped, spec)
    with pytest.raises(MelError, match="largest magnitude of their convention, 0.1"):
        convert_mel(convert_mel(np.maximum(speech, -3.9), spec, clipped), clipped, spec)
    with pytest.raises(MelError, match="40 bands"):
        convert_mel(speech[:40], spec, spec)
