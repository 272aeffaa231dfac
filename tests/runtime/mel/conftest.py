"""A recording and its mel."""

from __future__ import annotations

import numpy as np
import pytest

from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt_export.assets import RECORDING


@pytest.fixture(scope="session")
def spec() -> MelSpec:
    return MelSpec(f_min=80.0, f_max=7600.0, floor=1e-10, framing="center")


@pytest.fixture(scope="session")
def audio(spec: MelSpec) -> np.ndarray:
    return read_audio(RECORDING, spec.sample_rate)


@pytest.fixture(scope="session")
def speech(audio: np.ndarray, spec: MelSpec) -> np.ndarray:
    return mel_from_audio(audio, spec)


@pytest.fixture(scope="session")
def trained(speech: np.ndarray) -> Normalization:
    """The statistics of the recording, as a training would use them."""
    return Normalization(tuple(speech.mean(axis=1).tolist()), tuple(speech.std(axis=1).tolist()))
