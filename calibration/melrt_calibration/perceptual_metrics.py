"""What models of hearing say of a synthesis: PESQ and STOI, from their own libraries (the extra `hearing`)."""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

Audio = NDArray[np.float32]
# Wideband PESQ (ITU-T P.862.2) is defined at this rate, Hz; what lies above 8 kHz is not heard by it.
PESQ_RATE = 16000


def heard(recording: Audio, audio: Audio, sample_rate: int) -> dict[str, float]:
    """The measures whose libraries are installed, by name.

    `pesq`: wideband, ITU-T P.862.2, from 1 to 4.64; `stoi`: Taal et al. 2011, from 0 to 1.

    Args:
        recording: The reference, shape (N,).
        audio: The synthesis, shape (N,), aligned with it.
        sample_rate: Of both, Hz.
    """
    found: dict[str, float] = {}
    with suppress(ImportError):
        pystoi: Any = importlib.import_module("pystoi")
        found["stoi"] = float(pystoi.stoi(recording, audio, sample_rate))
    with suppress(ImportError):
        pesq: Any = importlib.import_module("pesq")
        found["pesq"] = float(pesq.pesq(PESQ_RATE, _resampled(recording, sample_rate), _resampled(audio, sample_rate), "wb"))
    return found


def _resampled(audio: Audio, sample_rate: int) -> Audio:
    import librosa

    return np.asarray(librosa.resample(audio, orig_sr=sample_rate, target_sr=PESQ_RATE), np.float32)
