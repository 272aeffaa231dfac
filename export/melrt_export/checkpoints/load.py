"""Load a checkpoint: find its file, recognize the project that wrote it, and read network and mel convention."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from melrt.errors import CheckpointError, ConfigError, MelrtError
from melrt_export.checkpoints import coqui, hifigan, native, neurips, parallel_wavegan, seungwonpark, tensorflow_tts, training_run
from melrt_export.checkpoints.archives import is_archive, unpack_archive
from melrt_export.checkpoints.checkpoint import Checkpoint, sha256_of
from melrt_export.checkpoints.reading import PICKLE_SUFFIXES, CheckpointFile
from melrt_export.generator.receptive_field import receptive_field

# The widest published network sees 60 frames. Export and verification compute several times the context at once.
MAX_CONTEXT = 1000


class ProjectReader(Protocol):
    """Module that reads the checkpoints of one project."""

    NAME: str
    """Name of the project."""
    FILES: str
    """Files that make up a checkpoint, for error messages."""
    PATTERNS: tuple[str, ...]
    """Names that the project gives to its weight files, the preferred name first."""

    def recognizes(self, file: CheckpointFile) -> bool:
        """Return whether the project wrote this file, from its content."""
        ...

    def load(self, file: CheckpointFile) -> Checkpoint:
        """Read the checkpoint."""
        ...


_READERS: tuple[ProjectReader, ...] = (native, training_run, neurips, seungwonpark, parallel_wavegan, coqui, tensorflow_tts, hifigan)
_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".h5", ".hdf5")


def load_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Read a generator checkpoint without executing anything in it.

    Args:
        source: A checkpoint file, the folder that holds it and its config, or an archive of that folder.

    Raises:
        CheckpointError: No project or several projects match, a file is damaged or unsafe, or a tensor is missing or has a wrong shape.
    """
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a checkpoint file, or the folder that contains it.")
    try:
        if is_archive(path):
            with unpack_archive(path) as folder:
                return replace(_load(folder, shown=path), source=path, sha256=sha256_of(path))
        return _load(path, shown=path)
    except MelrtError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in its project's reader
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _load(path: Path, shown: Path) -> Checkpoint:
    """Read the only checkpoint at `path`; error messages call it `shown`, the path that the user gave."""
    files = [CheckpointFile(file) for file in _candidates(path)]
    matches = [(reader, file) for file in files for reader in _READERS if reader.recognizes(file)]
    if not matches:
        accepted = "; ".join(f"{reader.NAME}: {reader.FILES}" for reader in _READERS)
        raise CheckpointError(f"{shown} does not contain a checkpoint of a project that melrt supports. Supported are {accepted}.")
    if len(matches) > 1:
        several = " and ".join(f"{file.path.name} ({reader.NAME})" for reader, file in matches[:6])
        raise CheckpointError(f"{shown} holds more than one checkpoint: {several}. Give the path of the file to export.")
    reader, file = matches[0]
    checkpoint = reader.load(file)
    try:
        context = receptive_field(checkpoint.config).context
    except ConfigError as error:
        raise CheckpointError(f"{shown}: {error}") from error
    if context > MAX_CONTEXT:
        raise CheckpointError(f"{shown}: the network sees {context} frames around each frame; at most {MAX_CONTEXT} are supported.")
    return checkpoint


def _candidates(path: Path) -> list[Path]:
    """List the files that may be the checkpoint.

    In a folder these are each project's preferred names, or else every file whose suffix is one of weights.
    """
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
    named = {file for reader in _READERS for file in _preferred(path, reader)}
    if not named:
        named = {
            file
            for file in path.iterdir()
            if file.is_file() and file.suffix and file.suffix in _SUFFIXES and not file.name.startswith("stats")
        }
    return sorted(named)


def _preferred(folder: Path, reader: ProjectReader) -> Iterator[Path]:
    for pattern in reader.PATTERNS:
        if files := [file for file in folder.glob(pattern) if file.is_file()]:
            yield from files
            return
