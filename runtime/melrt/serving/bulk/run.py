"""Bulk synthesis of mels on this machine; a run that was killed can be continued by the same command.

The settings of a run are stored in the output folder as `bulk.json`, so that a run with another voice or format cannot continue in the
same folder. A run holds a lock on the folder, which the operating system releases when the process ends for any reason.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from melrt.checks import check_fields, one_of
from melrt.errors import AudioError, ConfigError, MelError, MelrtError
from melrt.files.atomic import atomic_write, is_temporary
from melrt.files.audio import audio_package
from melrt.files.locks import locked_file
from melrt.files.mels import mel_pieces
from melrt.files.output import Output
from melrt.serving.bulk.blocks import Block, Utterance, import_pyarrow
from melrt.serving.bulk.outputs import KINDS, AudioFolder, BlockWriter, Kind, OutputFolder, ParquetFolder
from melrt.serving.bulk.voices import LoadedVoices, VoiceSettings
from melrt.types import Audio, FloatAudio

RECORD = "bulk.json"
# Longer utterances are streamed in pieces of this many frames, in constant memory: three minutes at 86 frames a second.
PIECE_FRAMES = 1 << 14


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """Place, kind and format of the audio that a bulk run writes."""

    folder: Path
    """Output folder, an absolute path."""
    kind: Kind
    """Kind of file: `files` of one utterance each, or `parquet`."""
    output: Output
    """Sample rate and encoding of the audio."""

    def __post_init__(self) -> None:
        check_fields(self, {"kind": one_of(*KINDS)}, "output (--to)")
        _ = import_pyarrow() if self.kind == "parquet" else audio_package("soundfile")  # a missing package is reported before any work

    def open(self) -> OutputFolder:
        """Return the output folder, ready to be written to."""
        folder = AudioFolder if self.kind == "files" else ParquetFolder
        return folder(self.folder, self.output.encoding)

    @contextlib.contextmanager
    def lock(self, voices: VoiceSettings) -> Iterator[None]:
        """Lock the folder for one run, check that it belongs to these voices, and remove half-written files of a killed run.

        Raises:
            MelrtError: Another run holds the lock, or `bulk.json` is damaged.
            ConfigError: The folder was begun with other settings. Only voices that rows name may be added.
        """
        settings = {
            "voices": voices.fingerprints, "voices by row": voices.by_row, "kind": self.kind, "format": self.output.encoding,
            "rate": self.output.sample_rate, "precision": voices.precision, "edges": voices.edges,
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

    def _check_record(self, settings: dict[str, Any]) -> None:
        record = self.folder / RECORD
        begun = _read_record(record, settings) if record.exists() else None
        if begun is not None:
            changes = [f"{key} {begun[key]!r}, now {now!r}" for key, now in settings.items() if key != "voices" and begun[key] != now]
            changes += _changed_voices(begun["voices"], settings["voices"], by_row=settings["voices by row"])
            if changes:
                raise ConfigError(
                    f"{self.folder} was begun with {'; '.join(changes)}. One folder holds audio with one set of options; give another "
                    "--output."
                )
            settings["voices"] = begun["voices"] | settings["voices"]
        if settings != begun:
            with atomic_write(record) as temporary:
                temporary.write_text(json.dumps(settings, indent=1))

    def _remove_half_written(self) -> None:
        for path in self.folder.rglob(".*-*"):
            if is_temporary(path.name) and path.is_file():
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class UtteranceResult:
    """The result of one utterance: synthesized or failed."""

    name: str
    """Name of the utterance."""
    seconds: float = 0.0
    """Seconds of audio; 0 if it failed."""
    clipped: int = 0
    """Samples that the encoding clipped to full scale."""
    error: str = ""
    """Reason of the failure; empty if there was none."""


def _read_record(record: Path, keys: Iterable[str]) -> dict[str, Any]:
    try:
        begun = json.loads(record.read_text())
        return {key: dict(begun[key]) if key == "voices" else begun[key] for key in keys}
    except (ValueError, TypeError, KeyError) as error:
        raise MelrtError(f"{record} is damaged, or of another version of melrt ({error!r:.80}); give another --output.") from error


def _changed_voices(begun: dict[str, str], now: dict[str, str], *, by_row: bool) -> list[str]:
    """Return the differences in words. Rows may name further voices in a later run."""
    if by_row:
        begun = {name: begun.get(name, sha256) for name, sha256 in now.items()}
    if begun.keys() != now.keys():
        return [f"the voice {', '.join(begun)}, now {', '.join(now)}"]
    return [f"another bundle of the voice {name}" for name in now if begun[name] != now[name]]


def pending_blocks(blocks: Iterable[Block], output: OutputFolder) -> list[Block]:
    """Return the blocks without the utterances whose audio is already there."""
    blocks = list(blocks)
    names = {name for block in blocks for name in block.names}
    pending = names - output.finished(names)
    return [kept for block in blocks if (kept := block.keep(pending)).names]


def synthesize_blocks(voices: LoadedVoices, blocks: Iterable[Block], settings: OutputSettings) -> Iterator[UtteranceResult]:
    """Synthesize blocks and write their audio; an utterance that fails is reported in its result and does not end the run.

    Raises:
        AudioError: A file could not be written.
    """
    output, synthesis = settings.open(), _Synthesis(voices, Output(settings.output.sample_rate))
    for block in blocks:
        if (unfinished := output.unfinished(block)).names:
            with output.open(unfinished) as writer:
                yield from synthesis.run(unfinished, writer)


@dataclass(slots=True)
class _Synthesis:
    """Synthesizes blocks. Between two utterances it does not refer to a voice, so that voices can make room for others."""

    voices: LoadedVoices
    samples: Output
    """Samples for the writer, which encodes them."""
    ahead: int = 1
    """Utterances that wait in queues, so that their windows share runs."""

    def run(self, block: Block, writer: BlockWriter) -> Iterator[UtteranceResult]:
        """Synthesize the utterances of a block, and write them in their order."""
        submitted: deque[tuple[Utterance, Future[Audio] | None]] = deque()
        for utterance in block.utterances():
            # Where memory is limited, another voice may need that of the voices whose utterances wait.
            alone = self.voices.limited and submitted and submitted[-1][0].voice != utterance.voice
            while submitted and (alone or len(submitted) > self.ahead):
                yield self._finish(*submitted.popleft(), writer)
            submitted.append(self._submit(utterance))
        while submitted:
            yield self._finish(*submitted.popleft(), writer)

    def _submit(self, utterance: Utterance) -> tuple[Utterance, Future[Audio] | None]:
        """Return the utterance and its future audio; None if it cannot be synthesized, or is so long that `_finish` streams it."""
        if isinstance(utterance.mel, MelError) or utterance.mel.shape[-1] > PIECE_FRAMES:
            return utterance, None
        try:
            vocoder = self.voices[utterance.voice]
            self.ahead = 2 * vocoder.policy.workers * vocoder.policy.batch
            return utterance, vocoder.submit(utterance.mel, self.samples)
        except MelrtError as error:
            reason = str(error)
        # the error itself would refer to the voice
        return replace(utterance, mel=MelError(reason)), None

    def _finish(self, utterance: Utterance, audio: Future[Audio] | None, writer: BlockWriter) -> UtteranceResult:
        if isinstance(utterance.mel, MelError):
            return UtteranceResult(utterance.name, error=str(utterance.mel))
        spec = self.voices.spec(utterance.voice)
        try:
            pieces = [audio.result()] if audio else self._streamed(utterance, utterance.mel)
            clipped = writer.write(utterance, pieces, self.samples.sample_rate or spec.sample_rate)
        except AudioError:  # what cannot be written now cannot be written for the next utterance either
            raise
        except MelrtError as error:
            return UtteranceResult(utterance.name, error=str(error))
        return UtteranceResult(utterance.name, utterance.mel.shape[1] * spec.hop / spec.sample_rate, clipped)

    def _streamed(self, utterance: Utterance, mel: NDArray[Any]) -> Iterator[FloatAudio]:
        pieces: Iterator[NDArray[Any]] = (mel[:, start : start + PIECE_FRAMES] for start in range(0, mel.shape[1], PIECE_FRAMES))
        if utterance.file:
            pieces = mel_pieces(utterance.file, None, PIECE_FRAMES)
        return self.voices[utterance.voice].stream(pieces, output=self.samples)


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
