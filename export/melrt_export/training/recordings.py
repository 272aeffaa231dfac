"""The recordings of a training: found, read once to the end, measured; what cannot be used is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melrt.errors import AudioError, TrainingError
from melrt_export.training.config import DataConfig

SUFFIXES = (".wav", ".flac")
NAMED_AT_MOST = 8


@dataclass(frozen=True, slots=True)
class Recording:
    """A file that can be trained on."""

    path: Path
    rate: int
    """Hz, of the file."""
    samples: int
    """At the voice's rate."""
    peak: float
    """Largest absolute sample at the voice's rate."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file cannot be used."""

    rule: str
    """The field of `DataConfig` that says what becomes of it."""
    text: str
    """File and reason."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """All recordings of a run."""

    train: tuple[Recording, ...]
    validation: tuple[Recording, ...]
    skipped: tuple[str, ...]
    """Each file that was left out, and why."""


def find_corpus(config: DataConfig, sample_rate: int) -> Corpus:
    """Find, read and measure every recording.

    Raises:
        TrainingError: A folder or list that is not there, a file that the config refuses, or nothing left to train or validate on.
    """
    train = list_files(Path(config.train))
    if config.validation:
        validation = list_files(Path(config.validation))
    elif len(train) <= config.held_out:
        raise TrainingError(
            f"{config.train} has {len(train)} files, and held_out keeps {config.held_out} of them for validation; "
            "set a smaller held_out, or name other files as validation."
        )
    else:
        train, validation = train[: -config.held_out], train[-config.held_out :]
    usable, skipped = _measure([*train, *validation], config, sample_rate)
    corpus = Corpus(_chosen(train, usable), _chosen(validation, usable), skipped)
    for kind, source in (("train", config.train), ("validation", config.validation or config.train)):
        if not getattr(corpus, kind):
            raise TrainingError(f"{source} leaves no file to {kind} with: {_listed(skipped)}")
    return corpus


def list_files(source: Path) -> list[Path]:
    """The audio files of a folder, in alphabetical order, or those that a text file lists, relative to its folder.

    Raises:
        TrainingError: Nothing there.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    elif source.is_file() and source.suffix == ".txt":
        try:
            lines = source.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise TrainingError(f"{source} is not a list of files, text in UTF-8: {error}") from error
        files = [source.parent / line.strip() for line in lines if line.strip()]
    else:
        raise TrainingError(f"{source} is neither a folder nor a .txt file with one path a line; name one of these as data.")
    if not files:
        raise TrainingError(f"{source} has no {' or '.join(SUFFIXES)} file.")
    return files


def read_recording(path: Path, sample_rate: int, start: int = 0, samples: int = -1) -> tuple[NDArray[np.float32], int, int]:
    """Samples at the voice's rate, mixed to one channel.

    Args:
        path: The file.
        sample_rate: The voice's rate, Hz.
        start: First sample, at the voice's rate; a file of another rate is read whole, resampled (soxr, high quality) and cut.
        samples: How many; -1: to the end.

    Returns:
        The samples, shape (N,), the file's rate and its number of channels.

    Raises:
        AudioError: Not an audio file.
    """
    import librosa
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if rate == sample_rate:
                file.seek(start)
                return file.read(samples, dtype="float32", always_2d=True).mean(axis=1), rate, channels
            audio = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.LibsndfileError, TypeError, OSError) as error:
        raise AudioError(f"{path} cannot be read as audio: {error}") from error
    if len(audio):
        audio = librosa.resample(audio, orig_sr=rate, target_sr=sample_rate, res_type="soxr_hq")
    return np.asarray(audio[start : None if samples < 0 else start + samples], np.float32), rate, channels


def _measure(files: Sequence[Path], config: DataConfig, sample_rate: int) -> tuple[dict[Path, Recording], tuple[str, ...]]:
    def inspect(path: Path) -> Recording | Problem:
        return _inspect(path, config, sample_rate)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(inspect, dict.fromkeys(files)))
    problems = [result for result in results if isinstance(result, Problem)]
    if refused := [problem for problem in problems if getattr(config, problem.rule) == "refuse"]:
        rules = " and ".join(f'{rule} = "skip"' for rule in Counter(problem.rule for problem in refused))
        raise TrainingError(f"{_listed([p.text for p in refused])} Mend or remove them, or set {rules} under [data] to leave them out.")
    return {each.path: each for each in results if isinstance(each, Recording)}, tuple(problem.text for problem in problems)


def _inspect(path: Path, config: DataConfig, sample_rate: int) -> Recording | Problem:
    try:
        audio, rate, channels = read_recording(path, sample_rate)
    except AudioError as error:
        return Problem("unusable", f"{error}.")
    peak = float(np.abs(audio).max(initial=0.0))
    if rate != sample_rate and config.wrong_rate != "resample":
        return Problem("wrong_rate", f"{path} has {rate} Hz; the voice has {sample_rate} Hz.")
    if channels > 1 and config.stereo != "mix":
        return Problem("stereo", f"{path} has {channels} channels; a voice has one.")
    if len(audio) < config.segment:
        return Problem("too_short", f"{path} has {len(audio)} samples at {sample_rate} Hz; a segment has {config.segment}.")
    if not np.isfinite(peak) or peak == 0:
        return Problem("unusable", f"{path} is silent throughout." if peak == 0 else f"{path} holds samples that are not finite.")
    return Recording(path, rate, len(audio), peak)


def _chosen(files: Sequence[Path], usable: dict[Path, Recording]) -> tuple[Recording, ...]:
    return tuple(usable[path] for path in files if path in usable)


def _listed(texts: Sequence[str]) -> str:
    more = f" (and {len(texts) - NAMED_AT_MOST} more)" if len(texts) > NAMED_AT_MOST else ""
    return " ".join(texts[:NAMED_AT_MOST]) + more
