"""Bulk synthesis of mels on this machine; a run that was killed can be continued by the same command.

The settings of a run are stored in the output folder as `bulk.json`, so that a run with another voice or format cannot continue in the
same folder. A run holds a lock on the folder, which the operating system releases when the process ends for any reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from numpy.typing import NDArray

from melrt.bundle import Bundle
from melrt.checks import check_fields, one_of
from melrt.errors import BackendError, ConfigError, MelError, MelrtError
from melrt.files.atomic import atomic_write, is_temporary
from melrt.files.audio import SAMPLE_FORMATS, SampleFormat
from melrt.files.locks import locked_file
from melrt.files.mels import mel_pieces
from melrt.planning.edges import Ends
from melrt.serving.bulk.inputs import Block, Utterance, import_pyarrow
from melrt.serving.bulk.outputs import KINDS, BlockWriter, Kind, OutputFolder, ParquetFolder, WavFolder
from melrt.types import Audio, FloatAudio
from melrt.vocoder import Vocoder

RECORD = "bulk.json"
# Longer utterances are streamed in pieces of this many frames, in constant memory: three minutes at 86 frames a second.
PIECE_FRAMES = 1 << 14


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """Place, kind and format of the audio that a bulk run writes."""

    folder: Path
    """Output folder, an absolute path."""
    kind: Kind
    """Kind of file: `wav` or `parquet`."""
    sample_format: SampleFormat
    """Format of the samples."""
    edges: Ends = "voice"
    """Ends of an utterance."""

    def __post_init__(self) -> None:
        rules = {"kind": one_of(*KINDS), "sample_format": one_of(*SAMPLE_FORMATS), "edges": one_of(*get_args(Ends))}
        check_fields(self, rules, "output (--to, --format, --edges)")
        if self.kind == "parquet":
            import_pyarrow()  # a missing package is reported before the voice is loaded

    def open(self, sample_rate: int) -> OutputFolder:
        """Return the output folder, ready to be written to."""
        folder = WavFolder if self.kind == "wav" else ParquetFolder
        return folder(self.folder, sample_rate, self.sample_format)

    @contextlib.contextmanager
    def lock(self, bundle: Bundle, precision: str) -> Iterator[None]:
        """Lock the folder for one run, check that it belongs to this voice, and remove half-written files of a killed run.

        Raises:
            MelrtError: Another run holds the lock, or `bulk.json` is damaged.
            ConfigError: The folder was begun with another voice, precision, kind, format or ends.
        """
        voice = "".join(sorted(artifact.sha256 for artifact in bundle.manifest.artifacts if artifact.kind == "onnx"))
        settings = {
            "voice": bundle.manifest.name, "sha256": hashlib.sha256(voice.encode()).hexdigest(), "kind": self.kind,
            "format": self.sample_format, "precision": precision, "edges": self.edges,
        }  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked_file(self.folder / f".{RECORD}.lock"))
            except OSError as error:
                raise MelrtError(f"another melrt bulk is writing to {self.folder}; wait for it, or give another --output.") from error
            self._check_record(settings)
            self._remove_half_written()
            yield

    def _check_record(self, settings: dict[str, str]) -> None:
        record = self.folder / RECORD
        if not record.exists():
            with atomic_write(record) as temporary:
                temporary.write_text(json.dumps(settings, indent=1))
            return
        try:
            begun = json.loads(record.read_text())
            begun = begun if isinstance(begun, dict) else {}
        except ValueError as error:
            raise MelrtError(f"{record} is not JSON ({error}); give another --output.") from error
        if begun != settings:
            changes = [f"{key} {begun.get(key)!r}, now {settings[key]!r}" for key in settings if begun.get(key) != settings[key]]
            raise ConfigError(
                f"{self.folder} was begun with {'; '.join(changes)}. One folder holds the audio of one voice, precision, kind, format and "
                "ends; give another --output."
            )

    def _remove_half_written(self) -> None:
        for path in self.folder.rglob(".*-*"):
            if is_temporary(path.name) and path.is_file():
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class UtteranceResult:
    """The result of one utterance: synthesized or failed."""

    name: str
    """Name of the utterance."""
    frames: int
    """Mel frames synthesized; 0 if it failed."""
    error: str
    """Reason of the failure; empty if there was none."""


def pending_blocks(blocks: Iterable[Block], output: OutputFolder) -> list[Block]:
    """Return the blocks without the utterances whose audio is already there."""
    blocks = list(blocks)
    names = {name for block in blocks for name in block.names}
    pending = names - output.finished(names)
    return [kept for block in blocks if (kept := block.keep(pending)).names]


def synthesize_blocks(vocoder: Vocoder, blocks: Iterable[Block], output: OutputFolder) -> Iterator[UtteranceResult]:
    """Synthesize blocks and write their audio; an utterance that fails is reported in its result and does not end the run.

    Raises:
        AudioError: A file could not be written.
    """
    for block in blocks:
        if (unfinished := output.unfinished(block)).names:
            with output.open(unfinished) as writer:
                yield from _synthesize_block(vocoder, unfinished, writer)


def _synthesize_block(vocoder: Vocoder, block: Block, writer: BlockWriter) -> Iterator[UtteranceResult]:
    """Keep several utterances in the vocoder's queue, so that their windows share runs, and write them in their order."""
    ahead = 2 * vocoder.policy.workers * vocoder.policy.batch
    submitted: deque[tuple[Utterance, Future[Audio] | None]] = deque()
    for utterance in block.utterances(vocoder.spec):
        submitted.append(_submit(vocoder, utterance))
        if len(submitted) > ahead:
            yield _finish(vocoder, *submitted.popleft(), writer)
    while submitted:
        yield _finish(vocoder, *submitted.popleft(), writer)


def _submit(vocoder: Vocoder, utterance: Utterance) -> tuple[Utterance, Future[Audio] | None]:
    """Return the utterance and its future audio; None if its mel is unusable, or so long that `_finish` streams it."""
    if isinstance(utterance.mel, MelError) or utterance.mel.shape[-1] > PIECE_FRAMES:
        return utterance, None
    try:
        return utterance, vocoder.submit(utterance.mel)
    except MelError as error:
        return Utterance(utterance.name, error), None


def _finish(vocoder: Vocoder, utterance: Utterance, audio: Future[Audio] | None, writer: BlockWriter) -> UtteranceResult:
    if isinstance(utterance.mel, MelError):
        return UtteranceResult(utterance.name, 0, str(utterance.mel))
    try:
        pieces = [audio.result()] if audio else _streamed(vocoder, utterance, utterance.mel)
        writer.write(utterance.name, pieces)
    except (MelError, BackendError) as error:
        return UtteranceResult(utterance.name, 0, str(error))
    return UtteranceResult(utterance.name, utterance.mel.shape[1], "")


def _streamed(vocoder: Vocoder, utterance: Utterance, mel: NDArray[Any]) -> Iterator[FloatAudio]:
    if utterance.file:
        return vocoder.stream(mel_pieces(utterance.file, vocoder.spec, PIECE_FRAMES))
    return vocoder.stream(mel[:, start : start + PIECE_FRAMES] for start in range(0, mel.shape[1], PIECE_FRAMES))


def write_failures(folder: Path, failed: Iterable[UtteranceResult]) -> Path | None:
    """Write the utterances that failed to `failed.json`, in place of an earlier list; remove it and return None if none failed."""
    path = folder / "failed.json"
    entries = [{"name": result.name, "error": result.error} for result in failed]
    if not entries:
        path.unlink(missing_ok=True)
        return None
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1))
    return path
