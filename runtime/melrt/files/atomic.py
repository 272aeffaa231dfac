"""Atomic writing of files and folders: they appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from melrt.errors import ConfigError
from melrt.files.locks import writing_to

# Linux, fcntl.h and stdio.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_write(path: Path, *, follow: bool = True, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder and with the same suffix as `path`, for the caller to write to.

    On success the temporary file is synced and renamed to `path`; on failure it is removed. Temporary files of `path` that a killed
    process left are removed first, unless another process writes to the folder. If `path` is a device or a pipe, the whole content is
    written into it.

    Args:
        path: The file.
        follow: Replace the target of a link. Otherwise the link itself is replaced, so that nothing outside its folder is written.
        locked: The caller has locked the folder, and removes what killed processes left.

    Raises:
        OSError: The file cannot be written; the error names `path`, not the temporary path.
    """
    if follow and path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / path.name
            yield temporary
            with temporary.open("rb") as content, path.open("wb") as target:
                shutil.copyfileobj(content, target)
        return
    if path.is_dir() and (follow or not path.is_symlink()):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    given, path = path, path.resolve() if follow and path.is_symlink() else path
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    with _errors_name(given, temporary):
        made = _make_parents(path)
        with contextlib.nullcontext() if locked else writing_to(path.parent, lambda: _sweep(path, path.stem, path.suffix)):
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
    Folders that a killed process left are removed first, as by `atomic_write`.

    Raises:
        OSError: The folder cannot be written; the error names `path`, not the temporary path.
    """
    given, path = path, path.resolve() if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with _errors_name(given, temporary):
        made = _make_parents(path)
        with writing_to(path.parent, lambda: _sweep(path, path.name)):
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


def is_temporary(name: str, stem: str = "", suffix: str = "") -> bool:
    """Return whether `atomic_write` or `atomic_folder` gives this name to what is not complete; for any path if `stem` is empty."""
    return bool(re.fullmatch(rf"\.{re.escape(stem) or '.+'}-[0-9a-f]{{8}}(-old)?{re.escape(suffix) or '.*'}", name))


def _sweep(path: Path, stem: str, suffix: str = "") -> None:
    """Remove what killed processes left of a path. Where folders cannot be exchanged, one may have been killed between two renames."""
    for left in [path.with_name(name) for name in _left_in(path.parent.absolute()) if is_temporary(name, stem, suffix)]:
        if left.name.endswith("-old") and left.exists() and not path.exists():
            left.rename(path)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@functools.lru_cache(256)  # a folder of a million recordings is listed once, and not for each of them
def _left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if is_temporary(path.name)]


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Check before any work that a file can be written. The check makes one temporary file in the folder, and removes it.

    Args:
        path: The file; its folders need not exist.
        folder: Whether `path` is a folder of files to write.

    Raises:
        ConfigError: `path` is a folder, or files cannot be made in its folder; the text names `path`.
    """
    if not folder and path.is_dir():
        raise ConfigError(f"{path} is a folder. Give the name of a file, for example one in that folder.")
    if not folder and path.exists() and not path.is_file():
        return  # a device or a pipe
    real = path.resolve() if path.is_symlink() else path
    place = next(parent for parent in ((real, *real.parents) if folder else real.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = f"new files in {place} are not possible ({error.strerror})" if place.is_dir() else f"{place} is not a folder"
        raise ConfigError(f"{path} cannot be written: {reason}. Choose a folder in which you may write.") from error


def user_cache() -> Path:
    """Return the folder for files that can be made again: `$MELRT_CACHE`, or `melrt` in `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        ConfigError: This user has no home folder, and another user can write to the folder that is used instead.
    """
    if chosen := os.environ.get("MELRT_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "melrt"
    except RuntimeError:  # a user without a home folder
        temporary = Path(tempfile.gettempdir())
        return _own_folder(temporary / f"melrt-{os.getuid()}") if hasattr(os, "getuid") else temporary / "melrt"


def _own_folder(folder: Path) -> Path:
    """Make a folder where other users may write too, and return it if it is this user's alone."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{folder} is not a folder that only this user can write to. Name another place for caches with MELRT_CACHE.")
    return folder


@contextlib.contextmanager
def _errors_name(path: Path, temporary: Path) -> Iterator[None]:
    """Raise errors of the temporary path, and write errors without a path such as a full disk, as errors of `path`."""
    try:
        yield
    except OSError as error:
        named = str(error.filename or "")
        if named.startswith(str(temporary)) or named in map(str, temporary.parents) or (not named and type(error) is OSError):
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
        raise


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
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}-old")
    if _exchange(new, path):
        new.rename(aside)
    else:
        # A folder cannot be renamed over one that has files: the old one is renamed first, and renamed back if the new one fails.
        path.rename(aside)
        try:
            new.rename(path)
        except BaseException:
            aside.rename(path)
            raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that a process that is killed leaves either of them; False where this is not possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _sync(path: Path) -> None:
    """Write a file's contents, or a folder's entries, to the disk, so that they survive a power failure."""
    folder = path.is_dir()
    if os.name == "nt" and folder:
        return  # Windows does not open folders
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs no file that is open for reading
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
