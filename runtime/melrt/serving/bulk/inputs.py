"""The mels of a bulk run: a folder of .npy and .npz files, a list of them (.csv), or parquet, divided into blocks.

Lists and parquet may have the columns `name` and `voice`. Where rows choose among voices, the audio's name is `VOICE/NAME`: two voices may
synthesize one mel, and a row whose voice has changed is another utterance.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from melrt.errors import ConfigError, MelError
from melrt.serving.bulk.blocks import Block, FileBlock, RowGroupBlock, open_parquet

MEL_SUFFIXES = (".npy", ".npz")
LIST_SUFFIX, PARQUET_SUFFIX = ".csv", ".parquet"
# File systems allow 255 bytes; a file that is being written has 15 more characters in its name.
MAX_NAME_BYTES = 240
_INPUTS = f"a folder of mels ({', '.join(MEL_SUFFIXES)}), a list of them ({LIST_SUFFIX}), or parquet"


@dataclass(frozen=True, slots=True)
class RowVoices:
    """Voices among which the rows of an input may choose."""

    names: Collection[str]
    """Names of the voices."""
    chosen_by_row: bool = False
    """True if each row must name its voice; False if there is one voice, which rows may name."""

    def check_columns(self, path: Path, columns: Collection[str]) -> None:
        """Check the columns of a list or parquet file.

        Raises:
            MelError: There is no column `mel`.
            ConfigError: There is no column `voice`, and rows must choose.
        """
        if "mel" not in columns:
            raise MelError(
                f"{path} has the columns {', '.join(columns)}; it needs a column `mel`, and may have columns `name` and `voice`."
            )
        if self.chosen_by_row and "voice" not in columns:
            raise ConfigError(f"{path} has no column `voice` to choose among {self._list()}. Add it, or name one bundle, not a folder.")

    def choose(self, where: str, name: object, voice: object | None) -> tuple[str, str]:
        """Return the audio's name and the voice of a row, of which `where` says the place.

        Raises:
            MelError: The voice is unknown, or the name leaves the output folder.
        """
        if voice not in self.names:
            raise MelError(f"{where} has the voice {voice!r:.80}; it must be one of {self._list()}. Correct the column `voice`.")
        parts = PurePosixPath(text := str(name)).parts
        if name is None or not parts or text.startswith("/") or ".." in parts or parts[-1].startswith(".") or "\0" in text:
            raise MelError(
                f"{where} has the name {name!r}; a name must be a path below the output folder, without `..`, and not hidden. "
                "Correct the column `name`, or add one."
            )
        path = PurePosixPath(str(voice), text) if self.chosen_by_row else PurePosixPath(text)
        return path.as_posix(), str(voice)

    @property
    def only(self) -> str | None:
        """The voice of rows that name none; None if rows choose."""
        return None if self.chosen_by_row else next(iter(self.names))

    def _list(self) -> str:
        shown = sorted(self.names)
        return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")


def find_blocks(source: Path, block_size: int | None, voices: RowVoices) -> list[Block]:
    """Find all utterances to synthesize.

    Args:
        source: Folder of mels or of parquet files, searched at any depth; a list of mels; or one parquet file.
        block_size: Largest number of mel files in a block; None for one block of all files. A row group is always one block.
        voices: Voices among which rows choose.

    Returns:
        The blocks, sorted by path; the rows of a list are sorted by voice, and those of parquet keep their order.

    Raises:
        ConfigError: The source does not exist, has nothing to synthesize, or holds both kinds; or it does not say which voice is meant.
        MelError: Two utterances have the same name, a name is too long, a row names an unknown voice, or a list or parquet file has other
            columns or cannot be read.
        MissingExtraError: There is a parquet file, and pyarrow is not installed.
    """
    if not source.exists():
        raise ConfigError(f"{source} does not exist; --input must be {_INPUTS}.")
    if source.is_file() and source.suffix.lower() == LIST_SUFFIX:
        blocks = _file_blocks(_list_rows(source, voices), block_size)
    else:
        blocks = _folder_blocks(source, block_size, voices)
    _check_names(source, [name for block in blocks for name in block.names])
    return blocks


def _folder_blocks(source: Path, block_size: int | None, voices: RowVoices) -> list[Block]:
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    tables = [path for path in files if path.suffix.lower() == PARQUET_SUFFIX]
    mels = [path for path in files if path.suffix.lower() in MEL_SUFFIXES and source.is_dir()]
    if tables and mels:
        raise ConfigError(f"{source} holds both mels and parquet files; move one kind to another folder.")
    if not tables and not mels:
        raise ConfigError(f"{source} holds no mel ({', '.join(MEL_SUFFIXES)}) and no parquet file; give {_INPUTS}.")
    if tables:
        root = source if source.is_dir() else source.parent
        return [block for path in tables for block in _row_groups(path, root, voices)]
    if voices.only is None:
        raise ConfigError(f"{source} holds mels without the names of their voices. Name one bundle, or give a list with a column `voice`.")
    rows = [(path.relative_to(source).with_suffix("").as_posix(), voices.only, path.resolve()) for path in mels]
    return _file_blocks(rows, block_size)


def _file_blocks(rows: list[tuple[str, str, Path]], block_size: int | None) -> list[Block]:
    step = block_size or max(len(rows), 1)
    return [FileBlock(*zip(*rows[start : start + step], strict=True)) for start in range(0, len(rows), step)]


def _list_rows(source: Path, voices: RowVoices) -> list[tuple[str, str, Path]]:
    """Read a list of mels; return the name, voice and file of each, sorted by voice, so that each voice is loaded once."""
    rows = []
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            voices.check_columns(source, reader.fieldnames or ())
            for row in reader:
                where = f"{source}, line {reader.line_num},"
                mel = Path(row["mel"] or "")
                if mel.suffix.lower() not in MEL_SUFFIXES:
                    raise MelError(f"{where} has the mel {row['mel']!r}; it must be a path that ends in {' or '.join(MEL_SUFFIXES)}.")
                named = row.get("name") or mel.with_suffix("").as_posix()
                rows.append((*voices.choose(where, named, row.get("voice", voices.only)), (source.parent / mel).absolute()))
    except (csv.Error, UnicodeDecodeError) as error:
        raise MelError(f"{source} cannot be read as a list (CSV in UTF-8, with a header): {error}") from error
    return sorted(rows, key=lambda row: row[1])


def _check_names(source: Path, names: list[str]) -> None:
    if not names:
        raise ConfigError(f"{source} has no row, so there is nothing to synthesize. Give a file with rows.")
    longest = max((part for name in names for part in name.split("/")), key=_byte_length)
    if (length := _byte_length(longest)) > MAX_NAME_BYTES:
        raise MelError(f"{source} has the name {longest!r} of {length} bytes; at most {MAX_NAME_BYTES} are allowed. Rename it.")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise MelError(f"{source} has {count} utterances named {name!r}, and one would overwrite the other; rename them.")


def _byte_length(name: str) -> int:
    return len(name.encode(errors="surrogateescape"))


def _row_groups(path: Path, root: Path, voices: RowVoices) -> Iterator[Block]:
    file = open_parquet(path)
    columns = file.schema_arrow.names
    voices.check_columns(path, columns)
    first, stem = 0, path.relative_to(root).with_suffix("").as_posix()
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        names = _texts(file, group, "name") if "name" in columns else [f"{stem}-{number:08}" for number in range(first, first + count)]
        named = _texts(file, group, "voice") if "voice" in columns else [voices.only] * count
        rows = [voices.choose(f"{path}, row {first + row},", *both) for row, both in enumerate(zip(names, named, strict=True))]
        first += count
        if rows:
            row_names, row_voices = zip(*rows, strict=True)
            yield RowGroupBlock(row_names, row_voices, path.resolve(), group, tuple(range(count)))


def _texts(file: Any, group: int, column: str) -> list[Any]:
    """Read a column of texts of a row group."""
    return list(file.read_row_group(group, columns=[column]).column(0).to_pylist())
