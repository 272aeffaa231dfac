"""Bulk synthesis: mels by the thousand become audio, and a run that was killed goes on where it was.

What a run was asked for stands beside its files in `bulk.json`, so that no other voice or format goes on in the same folder, and whoever
runs holds a lock on it, which ends with the process however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.bundle import Bundle
from melrt.errors import BackendError, MelError, MelrtError
from melrt.files.atomic import atomic_write
from melrt.files.mels import mel_pieces
from melrt.files.wav import SampleFormat
from melrt.serving.bulk.inputs import Block, Utterance
from melrt.serving.bulk.outputs import Kind, Output, ParquetFiles, Sink, WavFiles
from melrt.vocoder import Vocoder

RECORD = "bulk.json"
# Longer utterances are spoken as streams of such pieces, in constant memory: three minutes at 86 frames a second.
PIECE = 1 << 14
# A file that a killed run left half-written (`melrt.files.atomic.atomic_write`).
_HALF_WRITTEN = re.compile(r"\..+-[0-9a-f]{8}\.(wav|parquet|json)")


@dataclass(frozen=True, slots=True)
class Target:
    """What a bulk run writes, and where."""

    folder: Path
    """Absolute."""
    kind: Kind
    """WAV or parquet files."""
    sample_format: SampleFormat
    """Of the samples."""

    def output(self, sample_rate: int) -> Output:
        """The folder, to fill."""
        files = WavFiles if self.kind == "wav" else ParquetFiles
        return files(self.folder, sample_rate, self.sample_format)

    @contextlib.contextmanager
    def claim(self, bundle: Bundle, precision: str) -> Iterator[None]:
        """Hold the folder for one run, and clear away what a killed one left half-written.

        Raises:
            MelrtError: Another run holds it, or it was begun with another voice, precision, kind or format.
        """
        voice = "".join(sorted(artifact.sha256 for artifact in bundle.manifest.artifacts if artifact.kind == "onnx"))
        asked = {
            "voice": bundle.manifest.name, "sha256": hashlib.sha256(voice.encode()).hexdigest(), "kind": self.kind,
            "format": self.sample_format, "precision": precision,
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{RECORD}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MelrtError(f"another melrt bulk is writing to {self.folder}; wait for it, or give another --output.") from error
            self._check_record(asked)
            self._clear()
            yield

    def _check_record(self, asked: dict[str, str]) -> None:
        record = self.folder / RECORD
        if not record.exists():
            with atomic_write(record) as temporary:
                temporary.write_text(json.dumps(asked, indent=1))
            return
        try:
            begun = json.loads(record.read_text())
            begun = begun if isinstance(begun, dict) else {}
        except ValueError as error:
            raise MelrtError(f"{record} is not JSON ({error}); give another --output.") from error
        if begun != asked:
            differs = [f"{key} {begun.get(key)!r}, now {asked[key]!r}" for key in asked if begun.get(key) != asked[key]]
            raise MelrtError(f"{self.folder} was begun with {'; '.join(differs)}; one folder holds one kind. Give another --output.")

    def _clear(self) -> None:
        for path in self.folder.rglob(".*-*"):
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an utterance."""

    name: str
    """Its name."""
    frames: int
    """Mel frames spoken; 0 if it failed."""
    error: str
    """Why it could not be spoken; empty if it was."""


def pending_blocks(blocks: Iterable[Block], output: Output) -> list[Block]:
    """What is not there yet."""
    blocks = list(blocks)
    names = {name for block in blocks for name in block.names}
    left = names - output.done(names)
    return [kept for block in blocks if (kept := block.keep(left)).names]


def speak(vocoder: Vocoder, blocks: Iterable[Block], output: Output) -> Iterator[Outcome]:
    """Speak blocks and write their audio; a bad utterance is an outcome, not an end.

    Raises:
        AudioError: A file could not be written, which is no utterance's fault.
    """
    for block in blocks:
        if (rest := output.rest(block)).names:
            with output.open(rest) as sink:
                yield from _speak(vocoder, rest, sink)


def _speak(vocoder: Vocoder, block: Block, sink: Sink) -> Iterator[Outcome]:
    """Several utterances are in work at once: their windows share runs. They are written in their order."""
    ahead = 2 * vocoder.policy.workers * vocoder.policy.batch
    working: deque[tuple[Utterance, Future[Any] | None]] = deque()
    for utterance in block.utterances(vocoder.spec):
        working.append(_begin(vocoder, utterance))
        if len(working) > ahead:
            yield _finish(vocoder, *working.popleft(), sink)
    while working:
        yield _finish(vocoder, *working.popleft(), sink)


def _begin(vocoder: Vocoder, utterance: Utterance) -> tuple[Utterance, Future[Any] | None]:
    """The audio to come; None if it is bad, or so long that it is streamed when its turn comes."""
    if isinstance(utterance.mel, MelError) or utterance.mel.shape[-1] > PIECE:
        return utterance, None
    try:
        return utterance, vocoder.submit(utterance.mel)
    except MelError as error:
        return Utterance(utterance.name, error), None


def _finish(vocoder: Vocoder, utterance: Utterance, audio: Future[Any] | None, sink: Sink) -> Outcome:
    if isinstance(utterance.mel, MelError):
        return Outcome(utterance.name, 0, str(utterance.mel))
    try:
        pieces = [audio.result()] if audio else _streamed(vocoder, utterance, utterance.mel)
        sink.write(utterance.name, pieces)
    except (MelError, BackendError) as error:
        return Outcome(utterance.name, 0, str(error))
    return Outcome(utterance.name, utterance.mel.shape[1], "")


def _streamed(vocoder: Vocoder, utterance: Utterance, mel: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    if utterance.file:
        return vocoder.stream(mel_pieces(utterance.file, vocoder.spec, PIECE))
    return vocoder.stream(mel[:, start : start + PIECE] for start in range(0, mel.shape[1], PIECE))


def write_failures(folder: Path, failed: Iterable[Outcome]) -> Path | None:
    """List what could not be spoken in `failed.json`, which a later run replaces; None if there is nothing to list."""
    path = folder / "failed.json"
    listed = [{"name": one.name, "error": one.error} for one in failed]
    if not listed:
        path.unlink(missing_ok=True)
        return None
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(listed, indent=1))
    return path
