"""Reading mels from files. Other packages add kinds of files through the entry-point group `melrt.mel_readers`."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import MelError, MissingExtraError
from melrt.mel.spec import MelSpec

# A day of speech at 86 frames a second and 80 bands is 2.4 GB.
MAX_MEL_BYTES = 4 << 30


def read_mel(path: Path, spec: MelSpec) -> NDArray[Any]:
    """One utterance's frames, shape (M, T), not yet checked against the voice's convention.

    Args:
        path: .npy (mapped, not loaded); .npz with one array or one named `mel`; with the export extra also .pt, and audio for
            copy-synthesis.
        spec: The mel convention, for what has to be computed.

    Raises:
        MelError: Not such a file, or more than one utterance.
    """
    if not path.is_file():
        raise MelError(f"{path} does not exist, or is no file.")
    suffix = path.suffix.lower().lstrip(".")
    mel = _read_numpy(path) if suffix in ("npy", "npz") else _read_with_extra(suffix, path, spec)
    return one_utterance(mel, str(path))


def one_utterance(mel: NDArray[Any], where: str) -> NDArray[Any]:
    """An array (M, T) or (1, M, T) as (M, T).

    Raises:
        MelError: Another shape, or nothing in it.
    """
    if mel.ndim == 3 and len(mel) == 1:
        mel = mel[0]
    if mel.ndim != 2:
        raise MelError(f"{where} has shape {mel.shape}; expected one utterance, (bands, frames).")
    if 0 in mel.shape:
        raise MelError(f"{where}: mel is empty, shape {mel.shape}.")
    return np.asanyarray(mel)


def mel_pieces(path: Path, spec: MelSpec, frames: int) -> Iterator[NDArray[Any]]:
    """As `read_mel`, in pieces of at most this many frames; of a .npy file no more than a piece is in memory."""
    mel = read_mel(path, spec)
    total = mel.shape[1]
    mapped = isinstance(mel, np.memmap)
    if mapped:
        mel = np.empty(0)
    for start in range(0, total, frames):
        # a mapping that is dropped gives its pages back; one that is kept grows to the whole file
        yield np.array((read_mel(path, spec) if mapped else mel)[:, start : start + frames])


def _read_with_extra(suffix: str, path: Path, spec: MelSpec) -> NDArray[Any]:
    readers = entry_points(group="melrt.mel_readers")
    if suffix not in readers.names:
        known = sorted({"npy", "npz"} | readers.names)
        raise MelError(f"{path} is no mel that melrt reads; it reads {', '.join('.' + name for name in known)}.")
    reader = readers[suffix]
    try:
        return np.asarray(reader.load()(path, spec))
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"reading .{suffix}", error.name or "a package", reader.extras[0]) from error


def _read_numpy(path: Path) -> NDArray[Any]:
    try:
        if path.suffix.lower() == ".npy":
            return _bounded(np.load(path, mmap_mode="r", allow_pickle=False), path)
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MAX_MEL_BYTES:
            raise MelError(f"{path} unpacks to {unpacked} bytes; at most {MAX_MEL_BYTES} are read.")
        with np.load(path, allow_pickle=False) as arrays:
            name = "mel" if "mel" in arrays.files else arrays.files[0] if len(arrays.files) == 1 else None
            if name is None:
                raise MelError(f"{path} holds arrays {arrays.files[:8]}; expected one, or one named 'mel'.")
            return np.asarray(arrays[name])
    except MelError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the reader, for want of memory too
        raise MelError(f"{path} cannot be read as a numpy file of numbers: {error}") from error


def _bounded(mel: NDArray[Any], path: Path) -> NDArray[Any]:
    if mel.nbytes > MAX_MEL_BYTES:
        raise MelError(f"{path} holds {mel.nbytes} bytes; at most {MAX_MEL_BYTES} are read.")
    return mel
