"""Audio files: reading with libsndfile and soxr, and writing WAV, FLAC and Ogg/Opus files."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from melrt.checks import all_finite
from melrt.errors import AudioError, ConfigError, MissingExtraError
from melrt.files.atomic import atomic_write
from melrt.types import FloatAudio

logger = logging.getLogger(__name__)

SampleFormat = Literal["int16", "float32"]
SAMPLE_FORMATS: tuple[SampleFormat, ...] = ("int16", "float32")
Encoding = Literal["float32", "int16", "mulaw", "alaw", "flac", "opus"]


class FileKind(NamedTuple):
    """Kind of file in which audio of one encoding is stored."""

    suffix: str
    """Suffix of the file's name."""
    container: str
    """libsndfile's name of the format."""
    subtype: str
    """libsndfile's name of the encoding."""
    compressed: bool = False
    """True if only a whole file can be decoded."""


FILE_KINDS: dict[Encoding, FileKind] = {
    "float32": FileKind(".wav", "WAV", "FLOAT"),
    "int16": FileKind(".wav", "WAV", "PCM_16"),
    "mulaw": FileKind(".wav", "WAV", "ULAW"),
    "alaw": FileKind(".wav", "WAV", "ALAW"),
    "flac": FileKind(".flac", "FLAC", "PCM_16", compressed=True),
    "opus": FileKind(".opus", "OGG", "OPUS", compressed=True),
}
ENCODINGS: tuple[Encoding, ...] = tuple(FILE_KINDS)
_READABLE = "WAV, FLAC, OGG, MP3 and the other formats of libsndfile"
# A disk with less room than this, in MiB, is named as the likely reason why a file could not be written.
_LITTLE_ROOM = 100


def read_audio(path: Path, sample_rate: int) -> FloatAudio:
    """Read an audio file of any kind that libsndfile supports (WAV, FLAC, OGG, MP3, ...).

    Several channels are averaged and another rate is resampled; a warning is logged for each.

    Args:
        path: The file.
        sample_rate: Sample rate of the result in Hz.

    Returns:
        Samples, shape (N,).

    Raises:
        AudioError: The file does not exist, is a folder, is not audio, or has no samples.
        MissingExtraError: soundfile or soxr is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("reading audio", "soundfile", "cli") from error
    try:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:  # libsndfile reports "System error." for most reasons
        raise AudioError(f"{path} {_why_unreadable(Path(path))}") from error
    if not len(audio):
        raise AudioError(f"{path} has no samples. Give another recording.")
    if audio.shape[1] > 1:
        logger.warning("%s has %d channels; using their mean", path, audio.shape[1])
    mono = audio.mean(axis=1)
    if rate != sample_rate:
        logger.warning("%s has %d Hz; resampling to %d Hz", path, rate, sample_rate)
    return np.asarray(resample(mono, rate, sample_rate), np.float32)


def _why_unreadable(path: Path) -> str:
    if path.is_dir():
        return f"is a folder. Give one recording in it; {_READABLE} are read."
    if not path.exists():
        return f"does not exist. Give the path of a recording; {_READABLE} are read."
    if not os.access(path, os.R_OK):
        return "cannot be opened: permission denied. Change its permissions, or give another recording."
    return f"cannot be read as audio. {_READABLE} are read; convert the file to one of them."


def resample(audio: FloatAudio, rate: int, new_rate: int) -> FloatAudio:
    """Resample a signal with soxr in high quality.

    Args:
        audio: Shape (N,).
        rate: Its sample rate in Hz.
        new_rate: Sample rate of the result in Hz.

    Returns:
        Shape (ceil(N * new_rate / rate),); `audio` itself if the rates are equal.

    Raises:
        MissingExtraError: soxr is not installed.
    """
    if rate == new_rate:
        return audio
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError("resampling audio", "soxr", "cli") from error
    length = math.ceil(len(audio) * (new_rate / rate))
    resampled = soxr.resample(audio, rate, new_rate, quality="HQ")[:length]
    return np.pad(resampled, (0, length - len(resampled)))


def to_int16(audio: FloatAudio) -> NDArray[np.int16]:
    """Convert samples in [-1, 1] to 16 bit with full scale 32767; larger samples are clipped."""
    return np.asarray(np.rint(np.clip(audio, -1.0, 1.0) * 32767.0), np.int16)


def clipped(audio: FloatAudio) -> int:
    """Return the number of samples outside [-1, 1], which every encoding but float32 clips."""
    if not audio.size or (audio.max() <= 1.0 and audio.min() >= -1.0):
        return 0
    return int(np.count_nonzero(np.abs(audio) > 1.0))


def write_samples(file: Any, audio: FloatAudio, encoding: Encoding) -> None:
    """Write float samples to an open `soundfile.SoundFile` whose subtype is that of the encoding; samples outside [-1, 1] are clipped."""
    if encoding in ("float32", "opus"):
        file.write(audio if encoding == "float32" else np.clip(audio, -1.0, 1.0))
    else:
        file.write(to_int16(audio))


def write_wav(
    path: str | os.PathLike[str], audio: FloatAudio | Iterable[FloatAudio], sample_rate: int, sample_format: SampleFormat = "int16"
) -> None:
    """Write a mono WAV file atomically: a failure leaves no file, and a file that existed before stays as it was.

    Args:
        path: The file; its folder is created if it is missing.
        audio: Samples in [-1, 1], shape (N,), or an iterable of such pieces; each piece is written as it arrives, and none is kept.
        sample_rate: Sample rate in Hz.
        sample_format: `int16` (clipped to full scale) or `float32` (unchanged).

    Raises:
        AudioError: Not one channel of samples, a sample that is not finite, or a file that libsndfile could not write.
        ConfigError: `sample_format` is neither of the two.
        MissingExtraError: soundfile is not installed.
        OSError: The file cannot be written.
    """
    if sample_format not in SAMPLE_FORMATS:
        raise ConfigError(f"sample format is {sample_format!r}; it must be one of {', '.join(SAMPLE_FORMATS)}.")
    write_audio(path, audio, sample_rate, sample_format)


def write_audio(path: str | os.PathLike[str], audio: FloatAudio | Iterable[FloatAudio], sample_rate: int, encoding: Encoding) -> int:
    """Write a mono file of any encoding like `write_wav`, in the container of `FILE_KINDS`.

    Returns:
        Number of samples that were clipped.
    """
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("writing audio", "soundfile", "output") from error
    path, kind, count = Path(path), FILE_KINDS[encoding], 0
    with atomic_write(path) as temporary:
        temporary.touch(exist_ok=False)  # a folder that cannot be written to fails here, with the reason that libsndfile does not give
        try:
            with soundfile.SoundFile(temporary, "w", sample_rate, 1, kind.subtype, format=kind.container) as file:
                for piece in [audio] if isinstance(audio, np.ndarray) else audio:
                    if piece.ndim != 1:
                        raise AudioError(f"audio has shape {piece.shape}; a file takes one utterance, shape (samples,).")
                    if not all_finite(piece):
                        raise AudioError(f"audio has samples that are not finite, so {path} was not written. Check what computed them.")
                    count += 0 if encoding == "float32" else clipped(piece)
                    write_samples(file, piece, encoding)
        except soundfile.LibsndfileError as error:  # a full disk is reported as "System error." only
            raise AudioError(f"{path} could not be written ({error.error_string}){_disk_note(path.parent)}") from error
    return count


def _disk_note(folder: Path) -> str:
    """Return the end of a sentence: the disk's free space and what to do, where the space explains a failed write."""
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free >> 20 < _LITTLE_ROOM:  # /proc and the like have a size of 0
        return f": the disk has {usage.free >> 20} MiB free. Make room, or choose another disk."
    return ". Choose another place for it."
