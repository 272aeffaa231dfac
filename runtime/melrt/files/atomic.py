"""Atomic writing of files and folders: they appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder and with the same suffix as `path`, for the caller to write to.

    On success the temporary file is synced and renamed to `path`; on failure it is removed. If `path` is a link, its target is replaced.
    If it is a device or a pipe, the whole content is written into it.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            with temporary.open("rb") as content, path.open("wb") as target:
                shutil.copyfileobj(content, target)
        return
    path = path.resolve() if path.is_symlink() else path
    made = _make_parents(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        _remove_empty(made)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder in the same folder as `path`, for the caller to fill.

    On success it replaces `path`; on failure it is removed and `path` stays unchanged. If `path` is a link, its target is replaced.
    """
    path = path.resolve() if path.is_symlink() else path
    made = _make_parents(path)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise
    _sync(path.parent)


def user_cache() -> Path:
    """Return the folder for files that can be made again: `$MELRT_CACHE`, or `melrt` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("MELRT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "melrt"


def _make_parents(path: Path) -> list[Path]:
    """Make the folders that a path needs, and return the new ones, innermost first."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # another process has put a file into it
            folder.rmdir()


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    # A folder cannot be renamed over one that has files: the old one is renamed first, and renamed back if the new one fails.
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}-old")
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Write a file's contents, or a folder's entries, to the disk, so that they survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
