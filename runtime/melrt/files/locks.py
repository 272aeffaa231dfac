"""Locks against other processes that write to the same place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where the package filelock serves
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, and wait while another process has it. Nothing is left behind, except beside the folder on Windows."""
    if fcntl is None:
        from filelock import FileLock

        with FileLock(folder.with_name(f".{folder.name}.lock")):
            yield
        return
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), folder.stat()):
                yield
                return
        finally:
            os.close(handle)
        # another folder replaced it while this process waited for the old one's lock


@contextlib.contextmanager
def writing_to(folder: Path, alone: Callable[[], None]) -> Iterator[None]:
    """Share a lock of a folder with other writers, and call `alone` first if there are no others.

    On Windows, in a folder that cannot be read, and in a file system without locks, `alone` is not called.
    """
    handle = -1
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY) if fcntl else -1
    try:
        if handle >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone()
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_SH)  # waits while another process calls `alone`
        yield
    finally:
        if handle >= 0:
            os.close(handle)


@contextlib.contextmanager
def locked_file(file: Path) -> Iterator[None]:
    """Lock a file, which is made if it is absent and stays.

    Raises:
        OSError: Another process has the lock.
    """
    if fcntl is None:
        from filelock import FileLock

        with FileLock(file, timeout=0):  # its Timeout is an OSError
            yield
        return
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
