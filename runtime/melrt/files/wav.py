"""Writing audio files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from melrt.errors import AudioError, MissingExtraError
from melrt.files.atomic import atomic_write

SampleFormat = Literal["int16", "float32"]
SAMPLE_FORMATS: tuple[SampleFormat, ...] = ("int16", "float32")
# What a device that converts to 16 bit gives for a sample that is not a number: no number gives it.
NO_NUMBER = -32768
_SUBTYPES = {"int16": "PCM_16", "float32": "FLOAT"}


def to_int16(audio: NDArray[np.float32]) -> NDArray[np.int16]:
    """Samples in [-1, 1] to 16 bit, full scale 32767; what lies outside is clipped."""
    return np.asarray(np.rint(np.clip(audio, -1.0, 1.0) * 32767.0), np.int16)


def write_wav(
    path: str | os.PathLike[str],
    audio: NDArray[np.float32] | Iterable[NDArray[np.float32]],
    sample_rate: int,
    sample_format: SampleFormat = "int16",
) -> None:
    """Write a mono WAV file; it appears whole or not at all.

    Args:
        path: The file; its folder is made if it is missing.
        audio: Samples in [-1, 1], shape (N,), or pieces of them: written as they come, none is kept.
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
    if sample_format not in _SUBTYPES:
        raise AudioError(f"sample format is {sample_format!r}; it is one of {', '.join(_SUBTYPES)}.")
    path = Path(path)
    with atomic_write(path) as temporary:
        try:
            with soundfile.SoundFile(temporary, "x", sample_rate, 1, _SUBTYPES[sample_format], format="WAV") as file:
                for piece in [audio] if isinstance(audio, np.ndarray) else audio:
                    if piece.ndim != 1:
                        raise AudioError(f"audio has shape {piece.shape}; a file takes one utterance, shape (samples,).")
                    file.write(to_int16(piece) if sample_format == "int16" else piece)
        except soundfile.LibsndfileError as error:  # "System error." is all that libsndfile says of a full or locked disk
            room = shutil.disk_usage(path.parent).free >> 20
            raise AudioError(f"{path} could not be written ({error}): {room} MiB are free there.") from error
