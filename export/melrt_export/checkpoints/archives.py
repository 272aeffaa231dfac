"""Archives in which checkpoints are published: tar (compressed or not) and zip, unpacked into a temporary folder."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from melrt.errors import CheckpointError
from melrt_export.checkpoints.limits import MAX_WEIGHTS_BYTES
from melrt_export.checkpoints.torch_files import open_zip

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
# Files, folders and links together.
MAX_MEMBERS = 1000
MAX_RATIO = 20
FREE_BYTES = 64 << 20
# Names, comments and maps of holes in front of a file in a tar archive, which `tarfile` reads into memory.
MAX_TAR_HEADERS_BYTES = 1 << 20
_OPENERS: dict[bytes, Callable[[Path], IO[bytes]]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # type: ignore[dict-item]


def is_archive(path: Path) -> bool:
    """Return whether the name is that of an archive. Projects give the name `.pth.tar` to a pickle, which is not one."""
    name = path.name.lower()
    return path.is_file() and name.endswith(SUFFIXES) and ".pth" not in name and ".pt." not in name


@contextlib.contextmanager
def unpack_archive(path: Path) -> Iterator[Path]:
    """Unpack an archive into a temporary folder, each file under its base name; the folder is removed at the end.

    Links, devices and folders are skipped, and nothing is written outside the temporary folder.

    Raises:
        CheckpointError: The archive is damaged, unpacks to too much, or holds two files of one name.
    """
    with tempfile.TemporaryDirectory(prefix="melrt-") as name:
        folder = Path(name) / (path.name.split(".")[0] or "checkpoint")
        folder.mkdir()
        # Weights hardly shrink when they are compressed.
        remaining = min(MAX_WEIGHTS_BYTES, FREE_BYTES + MAX_RATIO * path.stat().st_size)
        try:
            for count, (member, stream) in enumerate(_members(path, remaining)):
                if count >= MAX_MEMBERS:
                    raise CheckpointError(f"holds more than {MAX_MEMBERS} files. Unpack it, and give the checkpoint's path.")
                target = folder / PurePosixPath(member.replace("\\", "/")).name
                if target.exists():
                    raise CheckpointError(f"holds two files named {target.name}. Unpack it, and give the checkpoint's path.")
                remaining -= _copy(stream, target, remaining, path)
        except CheckpointError as error:
            raise CheckpointError(f"{path} {error}") from error
        except Exception as error:  # a damaged archive can fail anywhere in the reader
            raise CheckpointError(f"{path} cannot be read as an archive: {str(error)[:200]}") from error
        yield folder


def _members(path: Path, most: int) -> Iterator[tuple[str, IO[bytes]]]:
    if path.name.lower().endswith(".zip"):
        with open_zip(path) as archive:
            for entry in archive.infolist():
                regular = (entry.external_attr >> 28) in (0, 8)  # the upper half is the Unix mode; 8 is a regular file
                if regular and not entry.is_dir():
                    with archive.open(entry) as stream:
                        yield entry.filename, stream
        return
    with path.open("rb") as file:
        opener = _OPENERS.get(file.read(2), _open_plain)
    with opener(path) as file:
        yield from _tar_members(_Unpacked(file, most))


def _tar_members(unpacked: _Unpacked) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=cast(Any, unpacked), mode="r|") as archive:
        for count, member in enumerate(archive):
            if count >= MAX_MEMBERS:
                raise CheckpointError(f"holds more than {MAX_MEMBERS} entries. Unpack it, and give the checkpoint's path.")
            unpacked.allow(member.size)
            if member.isreg() and (content := archive.extractfile(member)) is not None:
                yield member.name, content


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


class _Unpacked:
    """Content of a tar archive, of which no more is read than a file, the headers of the next, and the whole archive may have."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self._stream, self._total, self._done = stream, most + MAX_TAR_HEADERS_BYTES, 0
        self.allow(0)

    def allow(self, size: int) -> None:
        """Allow to read a file of this size, and what follows it before the next."""
        self._most = min(self._total, self._done + size + MAX_TAR_HEADERS_BYTES)

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        data = self._stream.read(size)
        self._done += len(data)
        if self._done > self._most:
            raise CheckpointError(f"unpacks to more than {self._most} bytes, or its headers to more than {MAX_TAR_HEADERS_BYTES}.")
        return data


def _copy(stream: IO[bytes], target: Path, limit: int, path: Path) -> int:
    """Copy one file and return its size. The written bytes are counted, because an archive's header may state fewer."""
    written = 0
    with target.open("xb") as file:
        while piece := stream.read(1 << 20):
            written += len(piece)
            if written > limit or shutil.disk_usage(target.parent).free < len(piece):
                raise CheckpointError(f"unpacks to more than {limit} bytes, or to more than the disk has space for.")
            file.write(piece)
    return written
