"""The audio of a bulk run: WAV files, or parquet files with the columns `name`, `audio` and `sample_rate`.

A file appears only when it is complete, so an existing file is finished work. A WAV file holds one utterance. A parquet file holds one
block, and its name is a hash of the utterances' names.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from melrt.files.atomic import atomic_write
from melrt.files.audio import SampleFormat, to_int16, write_wav
from melrt.serving.bulk.inputs import Block, import_pyarrow, open_parquet
from melrt.types import Audio, FloatAudio

Kind = Literal["wav", "parquet"]
KINDS: tuple[Kind, ...] = ("wav", "parquet")
# Samples after which a row group is written: three minutes of audio at 22,050 Hz.
ROW_GROUP_SAMPLES = 1 << 22


class BlockWriter(Protocol):
    """Writes the audio of one block."""

    def write(self, name: str, audio: Iterable[FloatAudio]) -> None:
        """Write an utterance, whose audio comes in pieces."""


class OutputFolder(Protocol):
    """The folder of a bulk run's audio."""

    def finished(self, names: Iterable[str]) -> set[str]:
        """Return the utterances whose audio is already there."""

    def unfinished(self, block: Block) -> Block:
        """Return the part of a block that is still to be written, in case an actor died after it had written some of it."""

    def open(self, block: Block) -> AbstractContextManager[BlockWriter]:
        """Open a writer for a block; audio that is not complete at the end of the context leaves no file."""


@dataclass(frozen=True, slots=True)
class WavFolder:
    """One WAV file for each utterance."""

    folder: Path
    """Folder of the files."""
    sample_rate: int
    """Sample rate in Hz."""
    sample_format: SampleFormat
    """Format of the samples."""

    def finished(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if self._path(name).exists()}

    def unfinished(self, block: Block) -> Block:
        return block.keep(set(block.names) - self.finished(block.names))

    @contextlib.contextmanager
    def open(self, _: Block) -> Iterator[BlockWriter]:
        yield self

    def write(self, name: str, audio: Iterable[FloatAudio]) -> None:
        write_wav(self._path(name), audio, self.sample_rate, self.sample_format)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.wav"


@dataclass(frozen=True, slots=True)
class ParquetFolder:
    """One parquet file for each block."""

    folder: Path
    """Folder of the files."""
    sample_rate: int
    """Sample rate in Hz."""
    sample_format: SampleFormat
    """Format of the samples."""

    def finished(self, names: Iterable[str]) -> set[str]:
        there: set[str] = set()
        for path in self.folder.glob("part-*.parquet"):
            there.update(open_parquet(path).read(columns=["name"]).column(0).to_pylist())
        return there.intersection(names)

    def unfinished(self, block: Block) -> Block:
        return block.keep(()) if self._path(block).exists() else block

    @contextlib.contextmanager
    def open(self, block: Block) -> Iterator[BlockWriter]:
        with contextlib.suppress(_EmptyBlockError), atomic_write(self._path(block)) as temporary:
            with _ParquetWriter(temporary, self.sample_rate, self.sample_format) as writer:
                yield writer
            if not writer.utterances:
                raise _EmptyBlockError

    def _path(self, block: Block) -> Path:
        part = hashlib.sha256("\n".join(block.names).encode()).hexdigest()[:16]
        return self.folder / f"part-{part}.parquet"


class _EmptyBlockError(Exception):
    """Every utterance of a block failed, so there is not a file to write."""


class _ParquetWriter:
    """Writes one parquet file, and holds at most one row group of audio in memory."""

    def __init__(self, path: Path, sample_rate: int, sample_format: SampleFormat) -> None:
        self.utterances = 0
        self._arrow, parquet = import_pyarrow()
        self._sample_rate, self._int16 = sample_rate, sample_format == "int16"
        samples = self._arrow.list_(self._arrow.int16() if self._int16 else self._arrow.float32())
        self._schema = self._arrow.schema([("name", self._arrow.string()), ("audio", samples), ("sample_rate", self._arrow.int32())])
        self._writer: Any = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._names: list[str] = []
        self._audio: list[Audio] = []

    def write(self, name: str, audio: Iterable[FloatAudio]) -> None:
        samples = np.concatenate(list(audio))
        self._names.append(name)
        self._audio.append(to_int16(samples) if self._int16 else samples)
        self.utterances += 1
        if sum(map(len, self._audio)) >= ROW_GROUP_SAMPLES:
            self._flush()

    def _flush(self) -> None:
        if self._names:
            rates = [self._sample_rate] * len(self._names)
            audio = self._arrow.array(self._audio, self._schema.field("audio").type)
            self._writer.write_table(self._arrow.table([self._names, audio, rates], self._schema))
        self._names, self._audio = [], []

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
