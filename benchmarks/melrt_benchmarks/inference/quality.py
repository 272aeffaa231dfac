"""Quality of every contender on recorded speech: the log-mel error of its synthesis against the recording."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from melrt.errors import MelrtError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_distance, mel_from_audio
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio, Mel
from melrt_benchmarks.inference.contender import Contender
from melrt_benchmarks.report.results import Quality

SUFFIXES = (".wav", ".flac")


def measure_quality(
    contenders: Iterable[Contender], reference: Callable[[Mel], FloatAudio], recordings: Sequence[Path], spec: MelSpec
) -> Iterator[Quality]:
    """Synthesize whole recordings from their mels with every contender that takes any length.

    Args:
        contenders: Contenders; one that computes a new graph for each length is left out.
        reference: Turns mels (B, M, T) into the audio (B, N) that errors are compared with.
        recordings: Audio files of the voice's speech.
        spec: Mel convention of the voice.
    """
    mels = [mel_from_audio(read_audio(path, spec.sample_rate), spec) for path in recordings]

    def error(run: Callable[[Mel], FloatAudio]) -> float:
        return float(np.mean([mel_distance(mel, run(mel[None])[0], spec) for mel in mels]))

    exact = error(reference)
    for contender in contenders:
        if contender.any_length:
            own = error(contender.run)
            yield Quality(contender.name, round(own, 5), round(own / exact - 1, 5), len(mels))


def list_recordings(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and the .wav and .flac files of the given folders.

    Raises:
        MelrtError: A path does not exist, or a folder has no such file.
    """
    found: list[Path] = []
    for path in paths:
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise MelrtError(f"--speech names {path}, which is not a recording or a folder with {' or '.join(SUFFIXES)} files.")
        found += files
    return found
