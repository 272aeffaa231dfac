"""Archives in which checkpoints are published: tar (compressed or not) and zip, unpacked into a temporary folder."""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from melrt.errors import CheckpointError
from melrt_export.checkpoints.reading import MAX_WEIGHTS_BYTES

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
# Files, folders and links together.
MAX_MEMBERS = 1000
MAX_RATIO = 20
FREE_BYTES = 64 << 20


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
            for count, (member, stream) in enumerate(_members(path)):
                if count >= MAX_MEMBERS:
                    raise CheckpointError(f"{path} holds more than {MAX_MEMBERS} files. Unpack it, and give the checkpoint's path.")
                target = folder / PurePosixPath(member.replace("\\", "/")).name
                if target.exists():
                    raise CheckpointError(f"{path} holds two files named {target.name}. Unpack it, and give the checkpoint's path.")
                remaining -= _copy(stream, target, remaining, path)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive can fail anywhere in the reader
            raise CheckpointError(f"{path} cannot be read as an archive: {str(error)[:200]}") from error
        yield folder


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                regular = (entry.external_attr >> 28) in (0, 8)  # the upper half is the Unix mode; 8 is a regular file
                if regular and not entry.is_dir():
                    with archive.open(entry) as stream:
                        yield entry.filename, stream
        return
    with tarfile.open(path) as archive:
        for count, member in enumerate(archive):
            if count >= MAX_MEMBERS:
                raise CheckpointError(f"{path} holds more than {MAX_MEMBERS} entries. Unpack it, and give the checkpoint's path.")
            if member.isreg() and (content := archive.extractfile(member)) is not None:
                yield member.name, content


def _copy(stream: IO[bytes], target: Path, limit: int, path: Path) -> int:
    """Copy one file and return its size. The written bytes are counted, because an archive's header may state fewer."""
    written = 0
    with target.open("xb") as file:
        while piece := stream.read(1 << 20):
            written += len(piece)
            if written > limit or shutil.disk_usage(target.parent).free < len(piece):
                raise CheckpointError(f"{path} unpacks to more than {limit} bytes, or to more than the disk has space for.")
            file.write(piece)
    return written
