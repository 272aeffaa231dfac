"""Writing audio files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from melrt.errors import AudioError, MissingExtraError
from melrt.files import whole_file

SampleFormat = Literal["int16", "float32"]
_SUBTYPES = {"int16": "PCM_16", "float32": "FLOAT"}


def to_int16(audio: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples in [-1, 1] to 16 bit, full scale 32767; what lies outside is clipped."""
    return np.asarray(np.rint(np.clip(audio, -1.0, 1.0) * 32767.0), np.int16)


def write_wav(path: str | os.PathLike[str], audio: NDArray[np.float32], sample_rate: int, sample_format: SampleFormat = "int16") -> None:
    """Write a mono WAV file; it appears whole or not at all.

    Args:
        path: The file; its folder is made if it is missing.
        audio: Samples in [-1, 1], shape (N,).
        sample_rate: Hz.
        sample_format: `int16` (clipped to full scale) or `float32` (as it is).

    Raises:
        AudioError: Not one channel of real samples, or an unknown format.
        OSError: The file cannot be written.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("writing audio", "soundfile", "cli") from error
    if audio.ndim != 1:
        raise AudioError(f"audio has shape {audio.shape}; a file takes one utterance, shape (samples,).")
    if sample_format not in _SUBTYPES:
        raise AudioError(f"sample format is {sample_format!r}; it is one of {', '.join(_SUBTYPES)}.")
    samples = to_int16(audio) if sample_format == "int16" else audio
    encoded = io.BytesIO()  # libsndfile reports a full disk as "System error."; our own write says what it is
    soundfile.write(encoded, samples, sample_rate, subtype=_SUBTYPES[sample_format], format="WAV")
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(encoded.getbuffer())
