"""Files and folders that appear whole or not at all."""

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
    """Give a path beside `path`, with its suffix, to write to; on success it is synced and renamed to `path`, on failure removed.

    A link stays a link: what it leads to is replaced. A device or a pipe stays one: the whole content is written into it.
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
    """Give a new folder beside `path` to fill; on success it takes the place of `path`, on failure it is removed and `path` stays.

    A link stays a link: the folder that it leads to is replaced.
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
        _take_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _remove_empty(made)
        raise
    _sync(path.parent)


def user_cache() -> Path:
    """The folder for what can be made again: `$MELRT_CACHE`, or `melrt` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("MELRT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "melrt"


def _make_parents(path: Path) -> list[Path]:
    """Make the folders that a path needs; returns those that were not there, innermost first."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # somebody else's file is in it by now
            folder.rmdir()


def _take_place(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    # A folder cannot be renamed over a full one: the old one steps aside, and back if the new one does not take its place.
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}-old")
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
