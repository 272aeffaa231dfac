"""Recordings of a training: found, read once completely, and measured. Files that cannot be used are reported by name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.errors import AudioError, TrainingError
from melrt.files.audio import read_samples, resample
from melrt.types import FloatAudio
from melrt_export.training.config import DataConfig

SUFFIXES = (".wav", ".flac")
LISTS = (".txt", ".csv")
MAX_LISTED = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """A file that can be used for training."""

    path: Path
    rate: int
    """Sample rate of the file in Hz."""
    samples: int
    """Length in samples at the voice's rate."""
    peak: float
    """Largest absolute sample at the voice's rate."""

    def scale(self, peak: float) -> float:
        """Return the factor that scales the recording to a peak, or 1 for a peak of 0."""
        return peak / self.peak if peak else 1.0


@dataclass(frozen=True, slots=True)
class UnusableFile:
    """A file that cannot be used as it is."""

    setting: str
    """Field of `DataConfig` that decides its treatment."""
    reason: str
    """Sentence that names the file and the reason."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Recordings of a run."""

    train: tuple[Recording, ...]
    validation: tuple[Recording, ...]
    skipped: tuple[str, ...]
    """One sentence for each file that was left out, with the reason."""


def find_corpus(config: DataConfig, sample_rate: int) -> Corpus:
    """Find, read and measure every recording.

    Raises:
        TrainingError: A folder or list does not exist, the config refuses a file, or no file remains for training or validation.
    """
    train = list_files(Path(config.train))
    if config.validation:
        validation = list_files(Path(config.validation))
    elif len(train) <= config.held_out:
        raise TrainingError(
            f"{config.train} has {len(train)} files, and held_out is {config.held_out}, so no file remains to train on. "
            "Set a smaller held_out, or name other files as validation."
        )
    else:
        train, validation = train[: -config.held_out], train[-config.held_out :]
    usable, skipped = _measure([*train, *validation], config, sample_rate)
    corpus = Corpus(_select(train, usable), _select(validation, usable), skipped)
    for use, source, files in (
        ("training", config.train, corpus.train),
        ("validation", config.validation or config.train, corpus.validation),
    ):
        if not files:
            raise TrainingError(f"{source} has no usable file for {use}. {_join(skipped)} Add recordings or relax the limits under [data].")
    return corpus


def list_files(source: Path) -> list[Path]:
    """Return the audio files of a folder in alphabetical order, or those that a list names relative to its own folder.

    A list is a .txt or .csv file with one path per line. Text after a `|` is ignored, as in the lists of acoustic models. A name without
    suffix, as in LJ Speech's metadata.csv, means the file `wavs/NAME.wav`.

    Raises:
        TrainingError: The source does not exist, or it has no audio file.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    elif source.is_file() and source.suffix in LISTS:
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise TrainingError(f"{source} is not UTF-8 text ({error}); it must list one path per line.") from error
        names = [Path(line.partition("|")[0].strip()) for line in lines if line.strip()]
        files = [source.parent / (name if name.suffix else f"wavs/{name}.wav") for name in names]
    else:
        raise TrainingError(f"{source} is neither a folder nor a .txt or .csv file. Name a folder, or a list with one path per line.")
    if not files:
        raise TrainingError(f"{source} has no {' or '.join(SUFFIXES)} file. Name a folder or a list that has some.")
    return files


def read_recording(path: Path, sample_rate: int, start: int = 0, samples: int = -1) -> tuple[FloatAudio, int, int]:
    """Read samples at the voice's rate, mixed to one channel.

    Args:
        path: Audio file.
        sample_rate: Sample rate of the voice in Hz.
        start: First sample, at the voice's rate. A file with another rate is read whole, resampled (soxr, high quality) and cut.
        samples: Number of samples; -1 to read to the end.

    Returns:
        Samples, shape (N,), the file's sample rate in Hz, and its number of channels.

    Raises:
        AudioError: The file cannot be read as audio.
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if rate == sample_rate:
                file.seek(start)
                if samples >= 0:
                    return file.read(samples, dtype="float32", always_2d=True).mean(axis=1), rate, channels
                return read_samples(file, path, sample_rate), rate, channels
            audio = read_samples(file, path, sample_rate)
    except (soundfile.LibsndfileError, TypeError, OSError) as error:
        raise AudioError(f"{path} cannot be read as audio: {error}") from error
    if len(audio):
        audio = resample(audio, rate, sample_rate)
    return np.asarray(audio[start : None if samples < 0 else start + samples], np.float32), rate, channels


def _measure(files: Sequence[Path], config: DataConfig, sample_rate: int) -> tuple[dict[Path, Recording], tuple[str, ...]]:
    def inspect(path: Path) -> Recording | UnusableFile:
        return _inspect(path, config, sample_rate)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(inspect, dict.fromkeys(files)))
    unusable = [result for result in results if isinstance(result, UnusableFile)]
    if refused := [file for file in unusable if getattr(config, file.setting) == "refuse"]:
        settings = " and ".join(f'{setting} = "skip"' for setting in dict.fromkeys(file.setting for file in refused))
        reasons = _join([file.reason for file in refused])
        raise TrainingError(f"{reasons} Fix or remove the files, or set {settings} under [data] to leave them out.")
    return {each.path: each for each in results if isinstance(each, Recording)}, tuple(file.reason for file in unusable)


def _inspect(path: Path, config: DataConfig, sample_rate: int) -> Recording | UnusableFile:
    try:
        audio, rate, channels = read_recording(path, sample_rate)
    except AudioError as error:
        return UnusableFile("unusable", f"{error}.")
    peak = float(np.abs(audio).max(initial=0.0))
    if rate != sample_rate and config.wrong_rate != "resample":
        return UnusableFile("wrong_rate", f"{path} has a sample rate of {rate} Hz; the voice has {sample_rate} Hz.")
    if channels > 1 and config.stereo != "mix":
        return UnusableFile("stereo", f"{path} has {channels} channels; a voice has one.")
    if len(audio) < config.segment:
        return UnusableFile("too_short", f"{path} has {len(audio)} samples at {sample_rate} Hz; a segment has {config.segment}.")
    if not np.isfinite(peak) or peak == 0:
        return UnusableFile("unusable", f"{path} is silent throughout." if peak == 0 else f"{path} has samples that are not finite.")
    return Recording(path, rate, len(audio), peak)


def _select(files: Sequence[Path], usable: dict[Path, Recording]) -> tuple[Recording, ...]:
    return tuple(usable[path] for path in files if path in usable)


def _join(texts: Sequence[str]) -> str:
    more = f" (and {len(texts) - MAX_LISTED} more)" if len(texts) > MAX_LISTED else ""
    return " ".join(texts[:MAX_LISTED]) + more
