"""Reading mels from files: numpy's, PyTorch's, and audio, whose mel is computed."""

from __future__ import annotations

import contextlib
import importlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import AudioError, MelError, MissingExtraError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.mel.spec import MelSpec

# A day of speech at 86 frames per second and 80 bands takes 2.4 GB.
MAX_MEL_BYTES = 4 << 30
# Named, not imported: the runtime does not depend on the package that exports.
_TORCH_READER = "melrt_export.torch_mels"


def read_mel(path: Path, spec: MelSpec | None = None) -> NDArray[Any]:
    """Read one utterance's frames, shape (M, T), not yet checked against the voice's convention.

    Args:
        path: A .npy file (mapped into memory, not loaded); .npz or .pt with one array or one named `mel`; any other suffix is read as
            audio, whose mel is computed.
        spec: The mel convention for audio; None refuses audio.

    Raises:
        MelError: The file is none of these, or holds more than one utterance.
        MissingExtraError: A package that this kind of file needs is not installed.
    """
    if path.is_dir():
        raise MelError(f"{path} is a folder. Give its mels as {path / '*.npy'}, or synthesize the whole folder with `melrt bulk`.")
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise MelError(f"{path} {what}. Give the path of a mel ({', '.join(_READERS)}) or of a recording.")
    suffix = path.suffix.lower()
    if suffix in _READERS:
        return one_utterance(_READERS[suffix](path), str(path))
    if spec is None:
        raise MelError(f"{path} is not a mel. Mels are read from {', '.join(_READERS)} files.")
    try:
        return mel_from_audio(read_audio(path, spec.sample_rate), spec)
    except AudioError as error:
        raise MelError(f"{error} Mels are read from {', '.join(_READERS)} files.") from error


def one_utterance(mel: NDArray[Any], name: str) -> NDArray[Any]:
    """Return an array (M, T) or (1, M, T) as (M, T).

    Raises:
        MelError: Another shape, or an empty array; the text begins with `name`.
    """
    if mel.ndim == 3 and len(mel) == 1:
        mel = mel[0]
    if mel.ndim != 2:
        remedy = "Save each utterance in a file or row of its own."
        raise MelError(f"{name} has shape {mel.shape}; expected one utterance, (bands, frames). {remedy}")
    if 0 in mel.shape:
        raise MelError(f"{name}: mel is empty, shape {mel.shape}. Compute it again with `melrt mel`, or leave it out.")
    return np.asanyarray(mel)


def mel_pieces(path: Path, spec: MelSpec | None, frames: int) -> Iterator[NDArray[Any]]:
    """Read a mel like `read_mel`, in pieces of at most `frames` frames; only one piece of a .npy file is in memory at a time."""
    mel = read_mel(path, spec)
    total = mel.shape[1]
    mapped = isinstance(mel, np.memmap)
    if mapped:
        mel = np.empty(0)
    for start in range(0, total, frames):
        # A mapping that is closed returns its memory; one that is kept grows to the size of the file.
        yield np.array((read_mel(path, spec) if mapped else mel)[:, start : start + frames])


def _read_npy(path: Path) -> NDArray[Any]:
    with _numpy_errors(path):
        mel = np.load(path, mmap_mode="r", allow_pickle=False)
    if mel.nbytes > MAX_MEL_BYTES:
        raise MelError(f"{path} holds {mel.nbytes} bytes; a mel must have at most {MAX_MEL_BYTES}. Cut it into several files.")
    return np.asanyarray(mel)


def _read_npz(path: Path) -> NDArray[Any]:
    with _numpy_errors(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > MAX_MEL_BYTES:
            raise MelError(f"{path} unpacks to {unpacked} bytes; a mel must have at most {MAX_MEL_BYTES}. Cut it into several files.")
        with np.load(path, allow_pickle=False) as arrays:
            name = "mel" if "mel" in arrays.files else arrays.files[0] if len(arrays.files) == 1 else None
            if name is None:
                raise MelError(f"{path} holds arrays {arrays.files[:8]}; expected one array, or one named 'mel'. Save it with `np.save`.")
            return np.asarray(arrays[name])


def _read_torch(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(importlib.import_module(_TORCH_READER).read_torch_mel(path))
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"reading {path.suffix} files", error.name or "torch", "export") from error


@contextlib.contextmanager
def _numpy_errors(path: Path) -> Iterator[None]:
    """Turn every error of numpy's readers into a MelError: a damaged file may fail anywhere in them, also for lack of memory."""
    try:
        yield
    except MelError:
        raise
    except Exception as error:
        # numpy suggests to unpickle such a file, which could run code.
        reason = "it is another kind of file, or holds Python objects" if "pickle" in str(error) else str(error)
        remedy = "Save the array (bands, frames) with `np.save`."
        raise MelError(f"{path} cannot be read as a numpy file of numbers: {reason}. {remedy}") from error


_READERS = {".npy": _read_npy, ".npz": _read_npz, ".pt": _read_torch, ".pth": _read_torch}
