"""The demo's comparison: Griffin-Lim, and the page with players, spectrograms and measures."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from melrt import MelSpec
from melrt.files.audio import read_audio, to_int16
from melrt.mel.features import mel_from_audio
from melrt_export.assets import RECORDING
from melrt_export.demo_page import Sound, write_page
from melrt_export.griffin_lim import griffin_lim
from melrt_export.quality import SpeechQuality

SPEC = MelSpec()


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return read_audio(RECORDING, SPEC.sample_rate)[22050 : 22050 + 120 * SPEC.hop]


def test_griffin_lim_reconstructs_speech(speech: np.ndarray) -> None:
    """With one estimate the phases are nearly random; sixty are consistent with their magnitudes, without tones at the frame rate."""
    mel = mel_from_audio(speech, SPEC)
    rough, fine = (SpeechQuality.between(speech, griffin_lim(mel, SPEC, n), SPEC) for n in (1, 60))
    assert len(griffin_lim(mel, SPEC, 1)) == len(speech)
    assert fine.log_mel < 0.06
    assert fine.log_mel < 0.7 * rough.log_mel
    assert abs(fine.level_db) < 1
    assert fine.comb_db < 2


def test_page_holds_every_sound_with_its_measures(speech: np.ndarray, tmp_path: Path) -> None:
    sounds = [Sound("recording", "As it is.", speech), Sound("half <as> loud", "With a factor.", 0.5 * speech)]
    write_page(tmp_path / "listen.html", "A & B", ["First sentence."], sounds, SPEC)
    page = (tmp_path / "listen.html").read_text()
    players = re.findall(r'src="data:audio/wav;base64,([^"]+)"', page)
    for player, sound in zip(players, sounds, strict=True):
        audio, rate = soundfile.read(io.BytesIO(base64.b64decode(player)), dtype="int16")
        assert rate == SPEC.sample_rate
        assert np.array_equal(audio, to_int16(sound.audio))
    pictures = [imread(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert [picture.std() > 0.1 for picture in pictures] == [True, True]
    assert pictures[1].mean() < pictures[0].mean(), "the color scale is the same, so half the amplitude is darker"
    assert "<td>half &lt;as&gt; loud</td><td>-0.0 dB</td><td>-6.0 dB</td>" in page or "<td>+0.0 dB</td><td>-6.0 dB</td>" in page
    assert "<title>A &amp; B</title>" in page
