"""Audio files: reading with libsndfile and soxr, and writing WAV, FLAC and Ogg/Opus files."""

from __future__ import annotations

import importlib
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
# Of samples as float32: 13 hours at 22,050 Hz. A file of silence expands more than any speech; Opus of 6 kbit/s expands 256 times.
MAX_AUDIO_BYTES = 4 << 30
FREE_AUDIO_BYTES = 64 << 20
MAX_RATIO = 1000
# A rate of 1 Hz in a header would make every sample 22,050.
LEAST_RATE, MOST_RATE = 1000, 768_000
_PIECE = 1 << 20
_READABLE = "WAV, FLAC, OGG, MP3 and the other formats of libsndfile"
# A disk with less room than this, in MiB, is named as the likely reason why a file could not be written.
_LITTLE_ROOM = 100


def audio_package(name: Literal["soundfile", "soxr"]) -> Any:
    """Return the module that reads and writes audio files, or the one that resamples.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("audio", name, "output") from error


def read_audio(path: Path, sample_rate: int) -> FloatAudio:
    """Read an audio file of any kind that libsndfile supports (WAV, FLAC, OGG, MP3, ...).

    Several channels are averaged and another rate is resampled; a warning is logged for each.

    Args:
        path: The file.
        sample_rate: Sample rate of the result in Hz.

    Returns:
        Samples, shape (N,).

    Raises:
        AudioError: The file does not exist, is a folder, is not audio, has no samples or too many, or another rate than audio has.
        MissingExtraError: soundfile or soxr is not installed.
    """
    soundfile = audio_package("soundfile")
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            mono = read_samples(file, Path(path), sample_rate)
    except (soundfile.LibsndfileError, TypeError, OSError) as error:  # libsndfile reports "System error." for most reasons
        raise AudioError(f"{path} {_why_unreadable(Path(path))}") from error
    if not len(mono):
        raise AudioError(f"{path} has no samples. Give another recording.")
    if channels > 1:
        logger.warning("%s has %d channels; using their mean", path, channels)
    if rate != sample_rate:
        logger.warning("%s has %d Hz; resampling to %d Hz", path, rate, sample_rate)
    return np.asarray(resample(mono, rate, sample_rate), np.float32)


def read_samples(file: Any, path: Path, sample_rate: int) -> FloatAudio:
    """Read an open `soundfile.SoundFile` from its position to its end, and return the mean of its channels, shape (N,).

    It is read in pieces: a damaged header may give any number of samples, and a small compressed file of silence has many.

    Args:
        file: The open file.
        path: Its path, for messages.
        sample_rate: Sample rate in Hz to which the caller will resample.

    Raises:
        AudioError: It has more samples than are read, or another rate than audio has.
    """
    if not LEAST_RATE <= file.samplerate <= MOST_RATE:
        raise AudioError(f"{path} has {file.samplerate} Hz; expected {LEAST_RATE} to {MOST_RATE} Hz. Save it with its true sample rate.")
    most = min(MAX_AUDIO_BYTES, FREE_AUDIO_BYTES + MAX_RATIO * path.stat().st_size)
    bytes_each = 4 * max(file.channels, sample_rate / file.samplerate)
    pieces, count = [np.empty(0, np.float32)], 0
    while len(piece := file.read(_PIECE // file.channels, "float32", always_2d=True)):
        pieces.append(piece.mean(axis=1) if file.channels > 1 else piece[:, 0])
        count += len(piece)
        if count * bytes_each > most:
            raise AudioError(f"{path} has more than the {most} bytes of samples that are read from it. Cut it into several files.")
    return np.concatenate(pieces)


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
    length = math.ceil(len(audio) * (new_rate / rate))
    resampled = audio_package("soxr").resample(audio, rate, new_rate, quality="HQ")[:length]
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
    soundfile = audio_package("soundfile")
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
