"""Log-mel features equal librosa's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from melrt.errors import AudioError
from melrt.files.audio import read_audio
from melrt.mel.features import largest_value, mel_filters, mel_from_audio, stft
from melrt.mel.spec import MelSpec
from melrt_export.assets import RECORDING

librosa = pytest.importorskip("librosa", reason="librosa is the reference of these tests")

SPEC = MelSpec()
# Largest difference in units of log10. On the machine of the first release the results were equal bit for bit.
TOLERANCE = 1e-5
TRANSFORMS = ((1024, 256, 1024), (2048, 300, 1200), (1024, 300, 801), (2048, 256, 2048))
CHOICES = {
    "scale": ("slaney", "htk"), "norm": ("slaney", None), "power": (1.0, 2.0), "epsilon": (0.0, 1e-9), "preemphasis": (0.0, 0.97),
    "framing": ("same", "center"), "padding": ("reflect", "constant"),
}  # fmt: skip
LIMITS = ((0.0, 11025.0), (80.0, 7600.0), (1500.0, 9000.0))


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return read_audio(RECORDING, SPEC.sample_rate)


def librosa_mel(audio: np.ndarray, spec: MelSpec) -> np.ndarray:
    """Compute what `mel_from_audio` should: log10 of the magnitudes, with every step by librosa."""
    pad = (spec.n_fft - spec.hop) // 2 if spec.framing == "same" else spec.n_fft // 2
    if spec.preemphasis:
        audio = np.append(audio[:1], audio[1:] - np.float32(spec.preemphasis) * audio[:-1])
    padded = np.pad(audio, pad, mode=spec.padding)
    magnitude = np.abs(librosa.stft(padded, n_fft=spec.n_fft, hop_length=spec.hop, win_length=spec.win_length, center=False))
    if spec.epsilon:
        magnitude = np.sqrt(magnitude**2 + np.float32(spec.epsilon))
    return np.log10(np.maximum(librosa_filters(spec) @ magnitude**spec.power, spec.floor))


def librosa_filters(spec: MelSpec) -> np.ndarray:
    return librosa.filters.mel(
        sr=spec.sample_rate, n_fft=spec.n_fft, n_mels=spec.n_mels, fmin=spec.f_min, fmax=spec.f_max, htk=spec.scale == "htk", norm=spec.norm
    )


@pytest.mark.filterwarnings("ignore:Empty filters:UserWarning", "ignore:.* of the 80 mel bands:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_convention_equals_librosa(audio: np.ndarray, transform: tuple[int, int, int]) -> None:
    part = audio[20_000:26_000]
    sizes = dict(zip(("n_fft", "hop", "win_length"), transform, strict=True))
    for index, values in enumerate(itertools.product(*CHOICES.values())):
        f_min, f_max = LIMITS[index % len(LIMITS)]
        spec = MelSpec(**sizes, **dict(zip(CHOICES, values, strict=True)), f_min=f_min, f_max=f_max)
        assert np.abs(mel_filters(spec) - librosa_filters(spec)).max() < 1e-9, spec
        mel = mel_from_audio(part, spec)
        assert mel.dtype == np.float32
        assert np.abs(mel - librosa_mel(part, spec)).max() < TOLERANCE, spec
    assert mel.max() > -1, "the part of the recording is not silence"


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_transform_equals_librosa(audio: np.ndarray, transform: tuple[int, int, int]) -> None:
    n_fft, hop, win_length = transform
    expected = librosa.stft(audio, n_fft=n_fft, hop_length=hop, win_length=win_length, center=False)
    assert np.abs(stft(audio, *transform) - expected).max() < 1e-5


def test_conventions_differ_as_specified(audio: np.ndarray) -> None:
    plain = mel_from_audio(audio, SPEC)
    assert plain.shape == (80, len(audio) // 256)
    assert plain.max() > -0.5, "the recording is not silence"
    assert np.allclose(mel_from_audio(audio, MelSpec(log="ln")), plain * np.log(10), atol=1e-4)
    assert np.allclose(mel_from_audio(audio, MelSpec(log="dB")), plain * 20, atol=1e-3)
    assert np.allclose(mel_from_audio(audio, MelSpec(log="ln", gain=2.0)), plain * 2 * np.log(10), atol=1e-4)
    assert mel_from_audio(audio, MelSpec(framing="center")).shape[1] == plain.shape[1] + 1


def test_audio_shorter_than_a_frame_is_refused() -> None:
    with pytest.raises(AudioError, match="300 samples; a first frame needs 385, because 384 are mirrored"):
        mel_from_audio(np.zeros(300, np.float32), SPEC)


def test_empty_bands_cause_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"of the 80 mel bands .* stay empty .* n_fft above 256"):
        mel_filters(MelSpec(n_fft=256, win_length=256, hop=64))


@pytest.mark.parametrize("change", [{}, {"log": "dB", "preemphasis": 0.98}, {"scale": "htk", "norm": None}, {"power": 2.0, "log": "ln"}])
def test_no_audio_exceeds_the_largest_value(audio: np.ndarray, change: dict) -> None:
    spec = replace(SPEC, **change)
    square = np.sign(np.sin(2 * np.pi * 100 * np.arange(22050) / 22050)).astype(np.float32)
    alternating = np.where(np.arange(22050) % 2, 1, -1).astype(np.float32)
    for signal in (audio / np.abs(audio).max(), square, alternating, np.ones(22050, np.float32)):
        assert mel_from_audio(signal, spec).max() <= largest_value(spec)
