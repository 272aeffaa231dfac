"""What a bulk run is to speak: a folder of mels (.npy, .npz), or parquet with columns `mel` and `name`; in blocks, the units of work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import MelError, MissingExtraError
from melrt.files.mels import one_utterance, read_mel
from melrt.mel.spec import MelSpec

SUFFIXES = (".npy", ".npz")
PARQUET = ".parquet"
# Rows of a parquet file that are in memory at a time.
ROWS = 16
# Bytes. File systems take 255; a file in the making has 15 beside its name.
LONGEST_NAME = 240


@dataclass(frozen=True, slots=True)
class Utterance:
    """One mel to speak, or why it cannot be read."""

    name: str
    """Its file's, below the input folder, without suffix; or what its row's `name` says."""
    mel: NDArray[Any] | MelError
    """Frames, (M, T), not yet checked."""
    file: Path | None = None
    """Where it can be read again, piece by piece."""


@dataclass(frozen=True, slots=True)
class Files:
    """A block of a folder: mel files."""

    names: tuple[str, ...]
    """Of the utterances."""
    paths: tuple[Path, ...]
    """Of the files, in the same order."""

    def keep(self, names: Collection[str]) -> Files:
        """The block without the utterances that are not among these."""
        kept = [(name, path) for name, path in zip(self.names, self.paths, strict=True) if name in names]
        return Files(tuple(name for name, _ in kept), tuple(path for _, path in kept))

    def utterances(self, spec: MelSpec) -> Iterator[Utterance]:
        """Each, read when it is asked for."""
        for name, path in zip(self.names, self.paths, strict=True):
            try:
                yield Utterance(name, read_mel(path, spec), path)
            except MelError as error:
                yield Utterance(name, error)


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A block of a parquet file: one of its row groups, which is the least that can be read of one without the rest."""

    names: tuple[str, ...]
    """Of the utterances."""
    path: Path
    """The parquet file."""
    group: int
    """Which of its row groups."""
    rows: tuple[int, ...]
    """Those of the utterances, counted from the row group's first."""

    def keep(self, names: Collection[str]) -> RowGroup:
        """The block without the utterances that are not among these."""
        kept = [(name, row) for name, row in zip(self.names, self.rows, strict=True) if name in names]
        return RowGroup(tuple(name for name, _ in kept), self.path, self.group, tuple(row for _, row in kept))

    def utterances(self, _: MelSpec) -> Iterator[Utterance]:
        """Each, read a few rows at a time."""
        names, first = dict(zip(self.rows, self.names, strict=True)), 0
        file = open_parquet(self.path)
        shape = _tensor_shape(file.schema_arrow.field("mel"))
        for batch in file.iter_batches(ROWS, row_groups=[self.group], columns=["mel"]):
            column = getattr(batch.column(0), "storage", batch.column(0))
            for row in range(len(column)):
                if first + row in names:
                    yield Utterance(names[first + row], _frames(column[row], shape))
            first += len(column)


Block = Files | RowGroup


def find_blocks(source: Path, most: int | None) -> list[Block]:
    """All that is to be spoken, by name or in the order of its rows.

    Args:
        source: A folder of mels, or of parquet files, at any depth; or one parquet file.
        most: Files in a block; None: one block takes all. A row group is a block whatever it holds.

    Raises:
        MelError: No such folder, nothing in it, both kinds in it, two utterances of one name, or a name too long for a file.
    """
    if not source.exists():
        raise MelError(f"{source} does not exist; --input is a folder of mels ({', '.join(SUFFIXES)}), or parquet.")
    found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    tables = [path for path in found if path.suffix.lower() == PARQUET]
    mels = [path for path in found if path.suffix.lower() in SUFFIXES and source.is_dir()]
    if bool(tables) == bool(mels):
        what = "both mels and parquet; a run takes one kind" if tables else f"no mel ({', '.join(SUFFIXES)}), and no parquet"
        raise MelError(f"{source} holds {what}.")
    root = source if source.is_dir() else source.parent
    blocks = [block for path in tables for block in _row_groups(path, root)] if tables else _files(mels, root, most)
    names = Counter(name for block in blocks for name in block.names)
    if not names:
        raise MelError(f"{source} has no row, so there is nothing to speak.")
    longest = max((part for name in names for part in name.split("/")), key=_bytes)
    if _bytes(longest) > LONGEST_NAME:
        raise MelError(f"{source} has the name {longest!r}, {_bytes(longest)} bytes; at most {LONGEST_NAME} make a file's name. Rename it.")
    name, times = names.most_common(1)[0]
    if times > 1:
        raise MelError(f"{source} has {times} utterances named {name!r}, and one would take the other's place; rename them.")
    return blocks


def _bytes(name: str) -> int:
    return len(name.encode(errors="surrogateescape"))


def _files(mels: list[Path], root: Path, most: int | None) -> list[Block]:
    names = [path.relative_to(root).with_suffix("").as_posix() for path in mels]
    step = most or len(mels)
    return [
        Files(tuple(names[start : start + step]), tuple(path.resolve() for path in mels[start : start + step]))
        for start in range(0, len(mels), step)
    ]


def _row_groups(path: Path, root: Path) -> Iterator[Block]:
    file = open_parquet(path)
    columns = file.schema_arrow.names
    if "mel" not in columns:
        raise MelError(f"{path} has the columns {', '.join(columns)}; its mels are in one named `mel`, their names in `name`.")
    row, stem = 0, path.relative_to(root).with_suffix("").as_posix()
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if "name" in columns:
            given = file.read_row_group(group, columns=["name"]).column(0).to_pylist()
            names = tuple(_checked(path, name) for name in given)
        else:
            names = tuple(f"{stem}-{number:08}" for number in range(row, row + rows))
        row += rows
        if rows:
            yield RowGroup(names, path.resolve(), group, tuple(range(rows)))


def _checked(path: Path, name: object) -> str:
    """A name that stays in the output folder."""
    parts = PurePosixPath(text := str(name)).parts
    if name is None or not parts or text.startswith("/") or ".." in parts or parts[-1].startswith(".") or "\0" in text:
        raise MelError(f"{path} has the name {name!r}; a name is a path below the output folder, without `..` and not hidden.")
    return PurePosixPath(text).as_posix()


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile` that is read page by page.

    Raises:
        MelError: It is not parquet.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("parquet", error.name or "pyarrow", "parquet") from error
    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise MelError(f"{path} cannot be read as parquet: {error}") from error


def _tensor_shape(field: Any) -> tuple[int, ...] | None:
    """The shape that a tensor column's type gives to each of its flat rows (Ray's, Arrow's), known to Arrow here or not; None for lists."""
    if hasattr(field.type, "shape"):
        return tuple(field.type.shape)
    try:
        described = json.loads((field.metadata or {}).get(b"ARROW:extension:metadata", "null"))
        return tuple(int(size) for size in (described["shape"] if isinstance(described, dict) else described))
    except (ValueError, TypeError, KeyError):
        return None


def _frames(cell: Any, shape: tuple[int, ...] | None) -> NDArray[Any] | MelError:
    """A row's mel: lists of a band's frames; or flat, with its column's shape or its own."""
    if not cell.is_valid:
        return MelError("the row has no mel.")
    try:
        if hasattr(cell, "keys"):  # tensors of differing shapes, as Ray and Arrow store them
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
