"""The mels of a bulk run: a folder of .npy and .npz files, or parquet with the columns `mel` and `name`, divided into blocks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import ConfigError, MelError, MissingExtraError
from melrt.files.mels import one_utterance, read_mel
from melrt.mel.spec import MelSpec

MEL_SUFFIXES = (".npy", ".npz")
PARQUET_SUFFIX = ".parquet"
# Rows of a parquet file that are in memory at a time.
ROWS_IN_MEMORY = 16
# File systems allow 255 bytes; a file that is being written has 15 more characters in its name.
MAX_NAME_BYTES = 240


@dataclass(frozen=True, slots=True)
class Utterance:
    """A mel to synthesize, or the reason why it cannot be read."""

    name: str
    """Path of the mel file below the input folder, without its suffix; or the row's `name`."""
    mel: NDArray[Any] | MelError
    """Frames, shape (M, T), not yet checked."""
    file: Path | None = None
    """File from which the mel can be read again in pieces."""


@dataclass(frozen=True, slots=True)
class FileBlock:
    """A block of mel files from a folder."""

    names: tuple[str, ...]
    """Names of the utterances."""
    paths: tuple[Path, ...]
    """Mel files, in the same order."""

    def keep(self, names: Collection[str]) -> FileBlock:
        """Return the block with only these utterances."""
        kept = [(name, path) for name, path in zip(self.names, self.paths, strict=True) if name in names]
        return FileBlock(tuple(name for name, _ in kept), tuple(path for _, path in kept))

    def utterances(self, spec: MelSpec) -> Iterator[Utterance]:
        """Read the utterances, one at a time."""
        for name, path in zip(self.names, self.paths, strict=True):
            try:
                yield Utterance(name, read_mel(path, spec), path)
            except MelError as error:
                yield Utterance(name, error)


@dataclass(frozen=True, slots=True)
class RowGroupBlock:
    """A row group of a parquet file: the smallest part that can be read without the others."""

    names: tuple[str, ...]
    """Names of the utterances."""
    path: Path
    """Parquet file."""
    group: int
    """Index of the row group."""
    rows: tuple[int, ...]
    """Row of each utterance, counted from the start of the row group."""

    def keep(self, names: Collection[str]) -> RowGroupBlock:
        """Return the block with only these utterances."""
        kept = [(name, row) for name, row in zip(self.names, self.rows, strict=True) if name in names]
        return RowGroupBlock(tuple(name for name, _ in kept), self.path, self.group, tuple(row for _, row in kept))

    def utterances(self, _: MelSpec) -> Iterator[Utterance]:
        """Read the utterances, a few rows at a time."""
        names, first = dict(zip(self.rows, self.names, strict=True)), 0
        file = open_parquet(self.path)
        shape = _tensor_shape(file.schema_arrow.field("mel"))
        for batch in file.iter_batches(ROWS_IN_MEMORY, row_groups=[self.group], columns=["mel"]):
            column = getattr(batch.column(0), "storage", batch.column(0))
            for row in range(len(column)):
                if first + row in names:
                    yield Utterance(names[first + row], _read_cell(column[row], shape))
            first += len(column)


Block = FileBlock | RowGroupBlock


def find_blocks(source: Path, block_size: int | None) -> list[Block]:
    """Find all utterances to synthesize.

    Args:
        source: Folder of mels or of parquet files, searched at any depth; or one parquet file.
        block_size: Largest number of mel files in a block; None for one block of all files. A row group is always one block.

    Returns:
        The blocks, sorted by path; rows keep their order.

    Raises:
        ConfigError: The source does not exist, has nothing to synthesize, or holds both kinds.
        MelError: Two utterances have the same name, a name is too long, or a parquet file has other columns or cannot be read.
        MissingExtraError: There is a parquet file, and pyarrow is not installed.
    """
    if not source.exists():
        raise ConfigError(f"{source} does not exist; --input must be a folder of mels ({', '.join(MEL_SUFFIXES)}), or parquet.")
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    tables = [path for path in files if path.suffix.lower() == PARQUET_SUFFIX]
    mels = [path for path in files if path.suffix.lower() in MEL_SUFFIXES and source.is_dir()]
    if tables and mels:
        raise ConfigError(f"{source} holds both mels and parquet files; move one kind to another folder.")
    if not tables and not mels:
        raise ConfigError(f"{source} holds no mel ({', '.join(MEL_SUFFIXES)}) and no parquet file; give a folder of mels, or parquet.")
    root = source if source.is_dir() else source.parent
    blocks = [block for path in tables for block in _row_groups(path, root)] if tables else _file_blocks(mels, root, block_size)
    _check_names(source, [name for block in blocks for name in block.names])
    return blocks


def _check_names(source: Path, names: list[str]) -> None:
    if not names:
        raise ConfigError(f"{source} has no row, so there is nothing to synthesize. Give a parquet file with rows.")
    longest = max((part for name in names for part in name.split("/")), key=_byte_length)
    if (length := _byte_length(longest)) > MAX_NAME_BYTES:
        raise MelError(f"{source} has the name {longest!r} of {length} bytes; at most {MAX_NAME_BYTES} are allowed. Rename it.")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise MelError(f"{source} has {count} utterances named {name!r}, and one would overwrite the other; rename them.")


def _byte_length(name: str) -> int:
    return len(name.encode(errors="surrogateescape"))


def _file_blocks(mels: list[Path], root: Path, block_size: int | None) -> list[Block]:
    names = [path.relative_to(root).with_suffix("").as_posix() for path in mels]
    step = block_size or len(mels)
    return [
        FileBlock(tuple(names[start : start + step]), tuple(path.resolve() for path in mels[start : start + step]))
        for start in range(0, len(mels), step)
    ]


def _row_groups(path: Path, root: Path) -> Iterator[Block]:
    file = open_parquet(path)
    columns = file.schema_arrow.names
    if "mel" not in columns:
        raise MelError(f"{path} has the columns {', '.join(columns)}; it needs a column `mel`, and may have a column `name`.")
    first_row, stem = 0, path.relative_to(root).with_suffix("").as_posix()
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if "name" in columns:
            cells = file.read_row_group(group, columns=["name"]).column(0).to_pylist()
            names = tuple(_checked_name(path, cell) for cell in cells)
        else:
            names = tuple(f"{stem}-{number:08}" for number in range(first_row, first_row + rows))
        first_row += rows
        if rows:
            yield RowGroupBlock(names, path.resolve(), group, tuple(range(rows)))


def _checked_name(path: Path, name: object) -> str:
    """Return a row's name, normalized, if it stays inside the output folder."""
    parts = PurePosixPath(text := str(name)).parts
    if name is None or not parts or text.startswith("/") or ".." in parts or parts[-1].startswith(".") or "\0" in text:
        raise MelError(f"{path} has the name {name!r}; a name must be a path below the output folder, without `..`, and not hidden.")
    return PurePosixPath(text).as_posix()


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
