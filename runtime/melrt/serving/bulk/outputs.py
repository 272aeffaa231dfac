"""Where a bulk run's audio goes: WAV files, or parquet files with columns `name`, `audio` and `sample_rate`; each appears whole.

What is there is done. A WAV file is an utterance; a parquet file is a block, named after the utterances in it.
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
from numpy.typing import NDArray

from melrt.files.atomic import atomic_write
from melrt.files.wav import SampleFormat, to_int16, write_wav
from melrt.serving.bulk.inputs import Block, open_parquet

Kind = Literal["wav", "parquet"]
KINDS: tuple[Kind, ...] = ("wav", "parquet")
# A row group of what is written holds so many samples, or a little more: three minutes.
SAMPLES = 1 << 22


class Sink(Protocol):
    """Takes the audio of one block."""

    def write(self, name: str, audio: Iterable[NDArray[np.float32]]) -> None:
        """Take an utterance's pieces of audio."""


class Output(Protocol):
    """A folder that is filled."""

    def done(self, names: Iterable[str]) -> set[str]:
        """Which of these utterances are there."""

    def rest(self, block: Block) -> Block:
        """What of a block was not written since its run began: by an actor that died over it."""

    def open(self, block: Block) -> AbstractContextManager[Sink]:
        """Begin a block; what is not written by the end of the context is as if it had never been begun."""


@dataclass(frozen=True, slots=True)
class WavFiles:
    """One WAV file for each utterance."""

    folder: Path
    """Where."""
    sample_rate: int
    """Hz."""
    sample_format: SampleFormat
    """Of the samples."""

    def done(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if self._path(name).exists()}

    def rest(self, block: Block) -> Block:
        return block.keep(set(block.names) - self.done(block.names))

    @contextlib.contextmanager
    def open(self, _: Block) -> Iterator[Sink]:
        yield self

    def write(self, name: str, audio: Iterable[NDArray[np.float32]]) -> None:
        write_wav(self._path(name), audio, self.sample_rate, self.sample_format)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.wav"


@dataclass(frozen=True, slots=True)
class ParquetFiles:
    """One parquet file for each block."""

    folder: Path
    """Where."""
    sample_rate: int
    """Hz."""
    sample_format: SampleFormat
    """Of the samples."""

    def done(self, names: Iterable[str]) -> set[str]:
        there: set[str] = set()
        for path in self.folder.glob("part-*.parquet"):
            there.update(open_parquet(path).read(columns=["name"]).column(0).to_pylist())
        return there.intersection(names)

    def rest(self, block: Block) -> Block:
        return block.keep(()) if self._path(block).exists() else block

    @contextlib.contextmanager
    def open(self, block: Block) -> Iterator[Sink]:
        with contextlib.suppress(_NothingError), atomic_write(self._path(block)) as temporary:
            with _Part(temporary, self.sample_rate, self.sample_format) as sink:
                yield sink
            if not sink.utterances:
                raise _NothingError

    def _path(self, block: Block) -> Path:
        part = hashlib.sha256("\n".join(block.names).encode()).hexdigest()[:16]
        return self.folder / f"part-{part}.parquet"


class _NothingError(Exception):
    """Every utterance of a block failed: there is no file to write."""


class _Part:
    """A parquet file in the making; few minutes of audio are in memory."""

    def __init__(self, path: Path, sample_rate: int, sample_format: SampleFormat) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.utterances = 0
        self._arrow, self._sample_rate, self._int16 = pa, sample_rate, sample_format == "int16"
        samples = pa.list_(pa.int16() if self._int16 else pa.float32())
        self._schema = pa.schema([("name", pa.string()), ("audio", samples), ("sample_rate", pa.int32())])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._names: list[str] = []
        self._audio: list[NDArray[Any]] = []

    def write(self, name: str, audio: Iterable[NDArray[np.float32]]) -> None:
        samples = np.concatenate(list(audio))
        self._names.append(name)
        self._audio.append(to_int16(samples) if self._int16 else samples)
        self.utterances += 1
        if sum(map(len, self._audio)) >= SAMPLES:
            self._flush()

    def _flush(self) -> None:
        if self._names:
            rates = [self._sample_rate] * len(self._names)
            audio = self._arrow.array(self._audio, self._schema.field("audio").type)
            self._writer.write_table(self._arrow.table([self._names, audio, rates], self._schema))
        self._names, self._audio = [], []

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()
