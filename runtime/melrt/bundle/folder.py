"""The voice bundle: a folder that is complete in itself and is verified before anything in it is used.

`manifest.json` lists every other file with its size and SHA-256. A file is read whole and compared with its entry, and only then
handed on, so that an engine receives exactly the bytes that were verified.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from melrt.bundle.graph_check import check_graph
from melrt.bundle.manifest import MANIFEST, Artifact, Manifest
from melrt.errors import BundleError
from melrt.files.atomic import atomic_folder, atomic_write, is_temporary
from melrt.files.locks import locked_folder
from melrt.types import FloatAudio, Mel

# Published voices have manifests below 20 KB.
MAX_MANIFEST_BYTES = 1 << 20
PROBE_MEL = "reference.mel.npy"
PROBE_AUDIO = "reference.audio.npy"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk. Reading it never executes anything."""

    path: Path
    """The folder."""
    manifest: Manifest
    """The voice's facts and files."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle's manifest. Its other files are verified when they are read.

        Raises:
            BundleError: The folder is not a bundle, its manifest is damaged, or its schema is newer than this melrt.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            what = f"has no {MANIFEST}, so it is not a bundle" if path.exists() else "does not exist"
            raise BundleError(f"{path} {what}. `melrt export CHECKPOINT -o VOICE.melrt` makes a bundle.")
        try:
            return cls(path, Manifest.loads(_read_bounded(file, MAX_MANIFEST_BYTES)))
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], manifest: Manifest, files: Iterable[tuple[Artifact, bytes]], *, overwrite: bool = False
    ) -> Bundle:
        """Write a bundle. It appears whole or not at all.

        Raises:
            BundleError: `path` exists and `overwrite` is false, or `path` is something other than a bundle.
        """
        path = Path(path)
        cls.check_place(path, overwrite=overwrite)
        contents = list(files)
        manifest = replace(manifest, artifacts=tuple(entry for entry, _ in contents))
        with atomic_folder(path) as folder:
            for entry, data in contents:
                (folder / entry.file).write_bytes(data)
            (folder / MANIFEST).write_bytes(manifest.dumps())
        return cls(path, manifest)

    @staticmethod
    def check_place(path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Raise BundleError if `path` exists, unless it is a bundle that may be replaced."""
        path = Path(path)
        is_bundle = (path / MANIFEST).is_file()
        if os.path.lexists(path) and not (overwrite and is_bundle):
            remedy = "Give another name, or --force to replace it." if is_bundle else "It is not a bundle: give another name."
            raise BundleError(f"{path} exists. {remedy}")

    def add(self, entry: Artifact, data: bytes, *, made_from: Artifact | None = None) -> Artifact:
        """Add one file; see `add_all`."""
        return self.add_all([(entry, data)], made_from=() if made_from is None else (made_from,))[0]

    def add_all(self, files: Sequence[tuple[Artifact, bytes]], *, made_from: Sequence[Artifact] = ()) -> list[Artifact]:
        """Add files, or replace files of the same name. The manifest changes in one step for all; until then the old files remain.

        Args:
            files: Entry and content of each file.
            made_from: Files of this bundle that the new ones were made from. They must be unchanged.

        Returns:
            The entries that the manifest now has. A replacement has another file name than the file that it replaced.

        Raises:
            BundleError: The bundle was meanwhile replaced by one with other content.
        """
        with locked_folder(self.path):
            current = Bundle.open(self.path).manifest  # another process may have added to it since
            _remove_unlisted(self.path, current)
            if any(source not in current.artifacts for source in made_from):
                raise BundleError(f"{self.path} was exported again while {files[0][0].file} was made from it; repeat the command.")
            names = {entry.name for entry, _ in files}
            old = [a for a in current.artifacts if a.name in names]
            taken = {a.file for a in old}
            contents = [(_with_free_name(entry, taken), data) for entry, data in files]
            added = [entry for entry, _ in contents]
            self._write(replace(current, artifacts=(*(a for a in current.artifacts if a not in old), *added)), contents)
            for gone in taken - {entry.file for entry in added}:
                (self.path / gone).unlink(missing_ok=True)
        return added

    def _write(self, manifest: Manifest, files: Sequence[tuple[Artifact, bytes]]) -> None:
        """Write the new files, then the manifest that lists them; after a failure remove the files that it does not list."""
        try:
            for entry, data in files:
                with atomic_write(self.path / entry.file, follow=False, locked=True) as temporary:
                    temporary.write_bytes(data)
            with atomic_write(self.path / MANIFEST, follow=False, locked=True) as temporary:
                temporary.write_bytes(manifest.dumps())
        except BaseException:
            listed = Bundle.open(self.path).manifest.artifacts  # the new ones, if only the folder's sync failed
            for entry, _ in files:
                if entry not in listed:
                    (self.path / entry.file).unlink(missing_ok=True)
            raise

    def read(self, entry: Artifact) -> bytes:
        """Read a file after comparing its size and hash with the manifest.

        Raises:
            BundleError: The file is missing, truncated or altered, or an ONNX graph that melrt's exporter does not write.
        """
        file = self.path / entry.file
        remedy = "Copy the bundle again, or export it again."
        if not file.is_file():
            raise BundleError(f"{file} is missing, but the manifest lists it. {remedy}")
        size = file.stat().st_size
        if size != entry.size:
            raise BundleError(f"{file} has {size} bytes; the manifest says {entry.size}. {remedy}")
        data = _read_bounded(file, entry.size)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{file} was altered: its SHA-256 differs from the manifest's. {remedy}")
        if entry.kind == "onnx":
            try:
                check_graph(data, self.manifest.spec.n_mels, self.manifest.spec.hop)
            except BundleError as error:
                raise BundleError(f"{file}: {error}. Export the voice again.") from error
        return data

    def find(self, kind: str, *, graph: str = "", precision: str = "") -> list[Artifact]:
        """Return the files of a kind in the manifest's order; an empty argument matches all."""
        return [a for a in self.manifest.artifacts
                if a.kind == kind and graph in ("", a.graph) and precision in ("", a.precision)]  # fmt: skip

    def probe(self) -> tuple[Mel, FloatAudio]:
        """Read the probe mel (B, M, T) and PyTorch's output for it (B, N), so that a voice can be verified without PyTorch.

        Raises:
            BundleError: They are missing, altered, or do not fit this voice.
        """
        mel, audio = self._array(PROBE_MEL), self._array(PROBE_AUDIO)
        bands, hop = self.manifest.spec.n_mels, self.manifest.spec.hop
        if mel.ndim != 3 or mel.shape[1] != bands or audio.shape != (mel.shape[0], mel.shape[2] * hop) or not mel.size:
            raise BundleError(
                f"{self.path} has a probe mel of shape {mel.shape} and audio of shape {audio.shape}; "
                f"this voice needs (B, {bands}, T) and (B, T * {hop}). Export it again."
            )
        return mel, audio

    def _array(self, name: str) -> Mel:
        entry = next((a for a in self.find("reference") if a.file == name), None)
        if entry is None:
            raise BundleError(f"{self.path} has no {name}. Export it again.")
        try:
            values: Any = np.load(BytesIO(self.read(entry)), allow_pickle=False)
            return np.asarray(values, np.float32)
        except BundleError:
            raise
        except Exception as error:  # a damaged file can fail anywhere in numpy's reader
            raise BundleError(f"{self.path / name} is not a numpy array: {error}") from error


def _remove_unlisted(path: Path, manifest: Manifest) -> None:
    """Remove the files that a killed process wrote before the manifest listed them, by melrt's names for them; others may be the user's."""
    listed = {entry.file for entry in manifest.artifacts}
    for file in list(path.iterdir()):
        if file.is_file() and file.name not in listed and (is_temporary(file.name) or re.search(r"\+[0-9a-f]{8}\.\w+$", file.name)):
            file.unlink(missing_ok=True)


def _with_free_name(entry: Artifact, taken: set[str]) -> Artifact:
    """Return the entry under a file name that is not taken."""
    if entry.file not in taken:
        return entry
    stem, _, suffix = entry.name.rpartition(".")
    return replace(entry, file=f"{stem}+{entry.sha256[:8]}.{suffix}")


def _read_bounded(file: Path, limit: int) -> bytes:
    """Read a file. A link is followed, as in the caches of model hubs: the manifest's hash says whether the content is the right one."""
    try:
        # a pipe must not block before the check that it is not a file
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as stream:  # noqa: PTH123  # a handle has no path
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BundleError(f"{file} is not a regular file. Copy the bundle again, or export it again.")
            data = stream.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror or error}. Copy the bundle again, or export it again.") from error
    if len(data) > limit:
        raise BundleError(f"{file} is larger than {limit} bytes.")
    return data
