"""The audio of a bulk run: audio files, or parquet files with the columns `name`, `voice`, `audio`, `sample_rate` and `encoding`.

A file appears only when it is complete, so an existing file is finished work. An audio file holds one utterance. A parquet file holds one
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
from melrt.files.audio import FILE_KINDS, SAMPLE_FORMATS, Encoding, write_audio
from melrt.files.output import Encoder, Output
from melrt.serving.bulk.blocks import Block, Utterance, import_pyarrow, open_parquet
from melrt.types import FloatAudio

Kind = Literal["files", "parquet"]
KINDS: tuple[Kind, ...] = ("files", "parquet")
# Samples after which a row group is written: three minutes of audio at 22,050 Hz.
ROW_GROUP_SAMPLES = 1 << 22


class BlockWriter(Protocol):
    """Writes the audio of one block."""

    def write(self, utterance: Utterance, audio: Iterable[FloatAudio], sample_rate: int) -> int:
        """Write the audio of an utterance, which comes in pieces, and return the number of samples that were clipped."""


class OutputFolder(Protocol):
    """The folder of a bulk run's audio."""

    def finished(self, names: Iterable[str]) -> set[str]:
        """Return the utterances whose audio is already there."""

    def unfinished(self, block: Block) -> Block:
        """Return the part of a block that is still to be written, in case an actor died after it had written some of it."""

    def open(self, block: Block) -> AbstractContextManager[BlockWriter]:
        """Open a writer for a block; audio that is not complete at the end of the context leaves no file."""


@dataclass(frozen=True, slots=True)
class AudioFolder:
    """One audio file for each utterance."""

    folder: Path
    """Folder of the files."""
    encoding: Encoding
    """Encoding of the audio."""

    def finished(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if self._path(name).exists()}

    def unfinished(self, block: Block) -> Block:
        return block.keep(set(block.names) - self.finished(block.names))

    @contextlib.contextmanager
    def open(self, _: Block) -> Iterator[BlockWriter]:
        yield self

    def write(self, utterance: Utterance, audio: Iterable[FloatAudio], sample_rate: int) -> int:
        return write_audio(self._path(utterance.name), audio, sample_rate, self.encoding)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{FILE_KINDS[self.encoding].suffix}"


@dataclass(frozen=True, slots=True)
class ParquetFolder:
    """One parquet file for each block."""

    folder: Path
    """Folder of the files."""
    encoding: Encoding
    """Encoding of the audio."""

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
            with _ParquetWriter(temporary, self.encoding) as writer:
                yield writer
            if not writer.started:
                raise _EmptyBlockError

    def _path(self, block: Block) -> Path:
        part = hashlib.sha256("\n".join(block.names).encode()).hexdigest()[:16]
        return self.folder / f"part-{part}.parquet"


class _EmptyBlockError(Exception):
    """Every utterance of a block failed, so there is not a file to write."""


class _ParquetWriter:
    """Writes one parquet file, and holds at most one row group of audio in memory."""

    def __init__(self, path: Path, encoding: Encoding) -> None:
        self.started = False
        self._encoding = encoding
        self._arrow, parquet = import_pyarrow()
        text, audio = self._arrow.string(), self._arrow.binary()
        if encoding in SAMPLE_FORMATS:
            audio = self._arrow.list_(self._arrow.int16() if encoding == "int16" else self._arrow.float32())
        columns = {"name": text, "voice": text, "audio": audio, "sample_rate": self._arrow.int32(), "encoding": text}
        self._schema = self._arrow.schema(list(columns.items()))
        self._writer: Any = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    def write(self, utterance: Utterance, audio: Iterable[FloatAudio], sample_rate: int) -> int:
        clipped: list[int] = []
        samples = Encoder(Output(encoding=self._encoding), sample_rate, clipped.append)(np.concatenate(list(audio)))
        cell = samples if self._encoding in SAMPLE_FORMATS else samples.tobytes()
        values = (utterance.name, utterance.voice, cell, sample_rate, self._encoding)
        self._rows.append(dict(zip(self._schema.names, values, strict=True)))
        self.started, self._size = True, self._size + len(cell)
        if self._size >= ROW_GROUP_SAMPLES:
            self._flush()
        return sum(clipped)

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows, self._size = [], 0

    def __enter__(self) -> _ParquetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
