"""Blocks of utterances: parts of a bulk run whose mels are read one after another, from files or from a row group of a parquet file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import MelError, MissingExtraError
from melrt.files.mels import one_utterance, read_mel

# Rows of a parquet file that are in memory at a time.
ROWS_IN_MEMORY = 16


@dataclass(frozen=True, slots=True)
class Utterance:
    """A mel to synthesize, or the reason why it cannot be read."""

    name: str
    """Name of its audio, a path without suffix."""
    voice: str
    """Name of its voice."""
    mel: NDArray[Any] | MelError
    """Frames, shape (M, T), not yet checked."""
    file: Path | None = None
    """File from which the mel can be read again in pieces."""


@dataclass(frozen=True, slots=True)
class FileBlock:
    """A block of mel files."""

    names: tuple[str, ...]
    """Names of the utterances."""
    row_voices: tuple[str, ...]
    """Name of each utterance's voice."""
    paths: tuple[Path, ...]
    """Mel file of each utterance."""

    def keep(self, names: Collection[str]) -> FileBlock:
        """Return the block with only these utterances."""
        return replace(self, **_kept(self, names, "names", "row_voices", "paths"))

    def utterances(self) -> Iterator[Utterance]:
        """Read the utterances, one at a time."""
        for name, voice, path in zip(self.names, self.row_voices, self.paths, strict=True):
            try:
                yield Utterance(name, voice, read_mel(path), path)
            except MelError as error:
                yield Utterance(name, voice, error)
            except OSError as error:  # of a list: a name that is too long, or a folder that may not be entered
                yield Utterance(name, voice, MelError(f"{path!s:.200} cannot be read: {error.strerror}."))


@dataclass(frozen=True, slots=True)
class RowGroupBlock:
    """A row group of a parquet file: the smallest part that can be read without the others."""

    names: tuple[str, ...]
    """Names of the utterances."""
    row_voices: tuple[str, ...]
    """Name of each utterance's voice."""
    path: Path
    """Parquet file."""
    group: int
    """Index of the row group."""
    rows: tuple[int, ...]
    """Row of each utterance, counted from the start of the row group."""

    def keep(self, names: Collection[str]) -> RowGroupBlock:
        """Return the block with only these utterances."""
        return replace(self, **_kept(self, names, "names", "row_voices", "rows"))

    def utterances(self) -> Iterator[Utterance]:
        """Read the utterances, a few rows at a time."""
        wanted, first = {row: (name, voice) for name, row, voice in zip(self.names, self.rows, self.row_voices, strict=True)}, 0
        file = open_parquet(self.path)
        shape = _tensor_shape(file.schema_arrow.field("mel"))
        for batch in file.iter_batches(ROWS_IN_MEMORY, row_groups=[self.group], columns=["mel"]):
            column = getattr(batch.column(0), "storage", batch.column(0))
            for row in range(len(column)):
                if first + row in wanted:
                    yield Utterance(*wanted[first + row], _read_cell(column[row], shape))
            first += len(column)


Block = FileBlock | RowGroupBlock


def _kept(block: Block, names: Collection[str], *columns: str) -> dict[str, Any]:
    """Return columns of a block with only these utterances."""
    kept = [name in names for name in block.names]
    return {column: tuple(compress(getattr(block, column), kept)) for column in columns}


def import_pyarrow() -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("parquet", error.name or "pyarrow", "parquet") from error
    return pyarrow, pyarrow.parquet


def open_parquet(path: Path) -> Any:
    """Open a parquet file as a `pyarrow.parquet.ParquetFile` that is read page by page.

    Raises:
        MelError: The file is not parquet.
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = import_pyarrow()
    try:
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (arrow.ArrowInvalid, OSError) as error:
        raise MelError(f"{path} cannot be read as parquet: {error}") from error


def _tensor_shape(field: Any) -> tuple[int, ...] | None:
    """Return the shape of each row of a tensor column, or None for lists and for tensors of differing shapes.

    Arrow knows its own tensor type. Ray's type is only registered where Ray is imported, so its metadata are read here.
    """
    if hasattr(field.type, "shape"):
        return tuple(field.type.shape)
    try:
        described = json.loads((field.metadata or {}).get(b"ARROW:extension:metadata", "null"))
        return tuple(int(size) for size in (described["shape"] if isinstance(described, dict) else described))
    except (ValueError, TypeError, KeyError):
        return None


def _read_cell(cell: Any, shape: tuple[int, ...] | None) -> NDArray[Any] | MelError:
    """Read a row's mel, which is a list of bands, or flat data with a shape from the column's type or from the cell itself."""
    if not cell.is_valid:
        return MelError("the row has no mel.")
    try:
        if hasattr(cell, "keys"):  # Ray stores tensors of differing shapes as structs
            mel = _numbers(cell["data"]).reshape([int(size) for size in cell["shape"].as_py()])
        elif shape is not None:
            mel = _numbers(cell).reshape(shape)
        else:
            mel = np.stack([_numbers(band) for band in cell])
        return one_utterance(mel, "the row's mel")
    except MelError as error:
        return error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return MelError(f"the row's mel cannot be read as (bands, frames): {error}")


def _numbers(cell: Any) -> NDArray[Any]:
    return np.asarray(cell.values.to_numpy(zero_copy_only=False))
