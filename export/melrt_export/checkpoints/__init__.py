"""Reading checkpoints: which project's layout a file has, and what network and mel convention it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from melrt.errors import CheckpointError
from melrt_export.checkpoints import coqui, hifigan, native, neurips, parallel_wavegan, seungwonpark, tensorflow_tts
from melrt_export.checkpoints.archives import is_archive, unpacked
from melrt_export.checkpoints.checkpoint import Checkpoint, sha256_of
from melrt_export.checkpoints.reading import PICKLES, Opened

__all__ = ["Checkpoint", "load_checkpoint"]


class Layout(Protocol):
    """A module that reads one project's checkpoints."""

    NAME: str
    FILES: str
    PATTERNS: tuple[str, ...]
    """Names that the project gives to its files, the preferred first."""

    def recognizes(self, opened: Opened) -> bool:
        """Whether this file is one of this project's, from what is in it."""
        ...

    def load(self, opened: Opened) -> Checkpoint:
        """Read it."""
        ...


_LAYOUTS: tuple[Layout, ...] = (native, neurips, seungwonpark, parallel_wavegan, coqui, tensorflow_tts, hifigan)
_SUFFIXES = (*PICKLES, ".safetensors", ".h5", ".hdf5")


def load_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Read a generator checkpoint; nothing in it is executed.

    Args:
        source: A checkpoint file, the folder that it stands in with its config, or an archive of that folder.

    Raises:
        CheckpointError: No layout fits, or more than one; the file is damaged or hostile; tensors are missing or misshapen.
    """
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a checkpoint file, or the folder that it stands in.")
    if is_archive(path):
        with unpacked(path) as folder:
            return replace(_load(folder, shown=path), source=path, sha256=sha256_of(path))
    return _load(path, shown=path)


def _load(path: Path, shown: Path) -> Checkpoint:
    """Read the one checkpoint at this path; `shown` is what the user called it."""
    opened = [Opened(file) for file in _candidates(path)]
    found = [(layout, one) for one in opened for layout in _LAYOUTS if layout.recognizes(one)]
    if not found:
        accepted = "; ".join(f"{layout.NAME}: {layout.FILES}" for layout in _LAYOUTS)
        raise CheckpointError(f"{shown} holds no checkpoint that melrt knows. It reads {accepted}.")
    if len(found) > 1:
        several = " and ".join(f"{one.file.name} ({layout.NAME})" for layout, one in found[:6])
        raise CheckpointError(f"{shown} holds more than one checkpoint: {several}. Name the file.")
    layout, one = found[0]
    return layout.load(one)


def _candidates(path: Path) -> list[Path]:
    """Files that may be the checkpoint: the one named; in a folder each project's preferred names, or else the only one with weights."""
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES else []
    named = {file for layout in _LAYOUTS for file in _preferred(path, layout)}
    if not named:
        named = {
            file
            for file in path.iterdir()
            if file.is_file() and file.suffix and file.suffix in _SUFFIXES and not file.name.startswith("stats")
        }
    return sorted(named)


def _preferred(folder: Path, layout: Layout) -> Iterator[Path]:
    for pattern in layout.PATTERNS:
        if files := [file for file in folder.glob(pattern) if file.is_file()]:
            yield from files
            return
