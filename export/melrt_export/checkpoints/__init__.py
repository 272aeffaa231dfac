"""Reading checkpoints: which project's layout a file has, and what network and mel convention it holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from melrt.errors import CheckpointError
from melrt_export.checkpoints import native, neurips
from melrt_export.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint", "load_checkpoint"]


class Layout(Protocol):
    """A module that reads one project's checkpoints."""

    NAME: str
    FILES: str

    def find(self, path: Path) -> Path | None:
        """The checkpoint file at this path, or None."""
        ...

    def load(self, file: Path) -> Checkpoint:
        """Read that file."""
        ...


_LAYOUTS: tuple[Layout, ...] = (native, neurips)


def load_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Read a generator checkpoint; nothing in it is executed.

    Args:
        source: A checkpoint file, or the folder that it stands in with its config.

    Raises:
        CheckpointError: No layout fits, or more than one; the file is damaged or hostile; tensors are missing or misshapen.
    """
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a checkpoint file, or the folder that it stands in.")
    found = [(layout, file) for layout in _LAYOUTS if (file := layout.find(path)) is not None]
    if not found:
        accepted = "; ".join(f"{layout.NAME}: {layout.FILES}" for layout in _LAYOUTS)
        raise CheckpointError(f"{path} holds no checkpoint that melrt knows. It reads {accepted}.")
    if len(found) > 1:
        both = " and ".join(f"{file.name} ({layout.NAME})" for layout, file in found)
        raise CheckpointError(f"{path} holds more than one checkpoint: {both}. Name the file.")
    layout, file = found[0]
    return layout.load(file)
