"""Files that `torch.save` wrote: a zip file with a pickle and one file for each storage, or the older stream of pickles and storages.

They are read without PyTorch: numpy views of the stored bytes, each checked against its storage.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.checkpoints.limits import MAX_WEIGHTS_BYTES, MAX_ZIP_DIRECTORY_BYTES, check_file_size
from melrt_export.checkpoints.pickles import load_pickle

# First object of the older format, torch.serialization.MAGIC_NUMBER, as it is pickled.
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
# numpy has no bfloat16: its values are the upper halves of float32 values.
_KINDS = {
    "Double": ("float64", "<f8"), "Float": ("float32", "<f4"), "Half": ("float16", "<f2"), "BFloat16": ("bfloat16", "<u2"),
    "Long": ("int64", "<i8"), "Int": ("int32", "<i4"), "Short": ("int16", "<i2"), "Char": ("int8", "i1"), "Byte": ("uint8", "u1"),
    "Bool": ("bool", "?"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Tensor of a file."""

    kind: str
    """PyTorch's name of its type."""
    stored: np.ndarray
    """View of the file's values; those of bfloat16 are their bits."""

    @property
    def is_real(self) -> bool:
        """True if the values are floating-point numbers."""
        return "float" in self.kind

    def numpy(self) -> np.ndarray:
        """Return the values as float64 if they are stored so, or else as float32. Both are views that cannot be changed."""
        if self.kind == "bfloat16":
            return (self.stored.astype(np.uint32) << 16).view(np.float32)
        return self.stored.astype(np.float64 if self.kind == "float64" else np.float32, copy=False)

    def __setstate__(self, state: object) -> None:
        """Refuse the state that a hostile pickle gives a tensor after it was checked."""
        raise CheckpointError("changes a tensor after making it.")


def read_pickle(path: Path) -> Any:
    """Return the tensors (as `StoredTensor`) and plain containers of a `torch.save` file.

    Raises:
        CheckpointError: The file is missing, truncated or too large, or reading it could execute code.
    """
    check_file_size(path, MAX_WEIGHTS_BYTES)
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                stream.seek(0)
                return _Stream(stream, path.stat().st_size).load()
        with open_zip(path) as archive:
            return _Zip(archive, path.stat().st_size).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint; it is truncated or not a checkpoint ({reason}).") from error


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file that has a bounded number of entries.

    Raises:
        CheckpointError: The directory is too large. The message does not name the file.
        zipfile.BadZipFile: The file is damaged.
    """
    with _BoundedFile(path) as stream, zipfile.ZipFile(stream) as archive:
        stream.most = None
        yield archive


class _BoundedFile(io.FileIO):
    """File whose reads are bounded until `most` is None: `zipfile` reads the directory of the archive in one."""

    most: int | None = MAX_ZIP_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> Any:
        if self.most is not None and size is not None and size > self.most:
            raise CheckpointError(f"has a zip directory of {size} bytes; at most {self.most} are read.")
        return super().read(-1 if size is None else size)


class _Tensors:
    """Functions that a `torch.save` pickle calls. A tensor lies within its storage, and needs no more bytes than the file has."""

    def __init__(self, size: int) -> None:
        self._size = self._unclaimed = size
        self._flat: dict[str, StoredTensor] = {}
        self._known: dict[str, Any] = {
            "torch._utils._rebuild_tensor": self._tensor, "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter, "torch.Size": self._plain, "torch.device": self._plain,
            "collections.Counter": self._plain, "builtins.set": self._plain, "__builtin__.set": self._plain, "_codecs.encode": self._bytes,
        }  # fmt: skip
        for name, (kind, _) in _KINDS.items():
            self._known |= dict.fromkeys((f"torch.{name}Storage", f"torch.cuda.{name}Storage", f"torch.{kind}"), name)

    def _tensor(self, flat: StoredTensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> StoredTensor:
        values, item = flat.stored, flat.stored.itemsize
        if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
            raise CheckpointError("holds a tensor whose shape and strides are not whole numbers from 0.")
        if (needed := math.prod(shape) * item) > self._size:  # an expanded tensor needs a few bytes in the file and many in memory
            raise CheckpointError(f"holds tensors of {needed} bytes; expected at most the file's {self._size} bytes.")
        last = offset + sum((number - 1) * stride for number, stride in zip(shape, strides, strict=True))
        if needed and last >= len(values):
            raise CheckpointError(f"holds a tensor that ends at value {last} of a storage of {len(values)} values.")
        begin = values[offset:] if needed else values[:0]
        view = np.lib.stride_tricks.as_strided(begin, shape, [stride * item if needed else 0 for stride in strides], writeable=False)
        return StoredTensor(flat.kind, view)

    def _parameter(self, tensor: Any, *_: Any) -> Any:
        return tensor

    def _plain(self, values: Any = (), *_: Any) -> Any:
        """Return the content of a shape, counter or set, or the name of a device: no reader needs more of them."""
        return values

    def _bytes(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1" if encoding == "latin1" else "ascii")

    def _claim(self, name: str, count: int) -> np.dtype[Any]:
        """Return the type of a storage of so many values, after a check that the file is large enough for it and those before."""
        stored = np.dtype(_KINDS[name][1])
        if type(count) is not int or not 0 <= count * stored.itemsize <= self._unclaimed:
            raise CheckpointError(f"names a storage of {count!r:.40} values, and has {self._size} bytes.")
        self._unclaimed -= count * stored.itemsize
        return stored


class _Zip(_Tensors):
    """The format since PyTorch 1.6: uncompressed files in a zip file."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        super().__init__(size)
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"unpacks to {unpacked} bytes; a PyTorch checkpoint is not compressed. Save it again with torch.save.")
        self._archive = archive
        self._folder = members[0].filename.split("/")[0]

    def load(self) -> Any:
        """Read the pickle, and each storage when it is named."""
        if f"{self._folder}/byteorder" in self._archive.NameToInfo and self._read("byteorder") != b"little":
            raise CheckpointError("was written by a big-endian machine. Save it again on another machine.")
        return load_pickle(io.BytesIO(self._read("data.pkl")), self._known, self._storage)

    def _read(self, name: str) -> bytes:
        return self._archive.read(f"{self._folder}/{name}")

    def _storage(self, identifier: Any) -> StoredTensor:
        _, name, key, _, count = identifier
        if key not in self._flat:
            kind = self._claim(name, count)
            self._flat[key] = StoredTensor(_KINDS[name][0], np.frombuffer(self._read(f"data/{key}"), kind, count))
        return self._flat[key]


class _Stream(_Tensors):
    """The format before PyTorch 1.6: pickles, then the storages in the order of the last pickle, each behind its number of values."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        super().__init__(size)
        self._stream = stream

    def load(self) -> Any:
        """Read the pickles, and then fill the storages that they name."""
        begin = self._stream.read(64).find(_MAGIC)
        if begin < 0:
            self._stream.seek(0)
            load_pickle(self._stream, self._known)  # names what a pickled model would execute
            raise CheckpointError("cannot be read as a PyTorch checkpoint; it is truncated or not a checkpoint.")
        self._stream.seek(begin + len(_MAGIC))
        _version, system = (load_pickle(self._stream, {}) for _ in range(2))
        if not system["little_endian"]:
            raise CheckpointError("was written by a big-endian machine. Save it again on another machine.")
        content = load_pickle(self._stream, self._known, self._storage)
        for key in load_pickle(self._stream, {}):
            values = self._flat[key].stored
            count = int.from_bytes(self._stream.read(8), "little")
            if count != len(values):
                raise CheckpointError(f"names a storage of {len(values)} values, and has {count} for it.")
            values[:] = np.frombuffer(self._stream.read(values.nbytes), values.dtype)
        return content

    def _storage(self, identifier: Any) -> StoredTensor:
        _, name, key, _, count, view = identifier
        if view is not None:
            raise CheckpointError("was written by a PyTorch before 0.4. Load it with PyTorch, and save it again with torch.save.")
        if key not in self._flat:
            self._flat[key] = StoredTensor(_KINDS[name][0], np.zeros(count, self._claim(name, count)))
        return self._flat[key]


def to_arrays(path: Path, state: Any) -> dict[str, np.ndarray]:
    """Convert a state dict to float32 or float64 arrays by name.

    Raises:
        CheckpointError: The state is not a dictionary of names and dense real tensors, or it is too large. The message names `path`.
    """
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds {describe(state)}; expected a state dict, a dictionary of tensors by name.")

    def is_real(value: Any) -> bool:
        return isinstance(value, StoredTensor) and value.is_real

    odd = [f"{name!r} ({describe(value)})" for name, value in state.items() if not (isinstance(name, str) and is_real(value))]
    if odd:
        raise CheckpointError(f"{path} is not a bare state dict of real tensors; it also holds {', '.join(odd[:6])}.")
    # several tensors may share a storage
    if (size := sum(value.stored.nbytes for value in state.values())) > path.stat().st_size:
        raise CheckpointError(f"{path} holds tensors of {size} bytes; expected at most the file's {path.stat().st_size} bytes.")
    return {name: value.numpy() for name, value in state.items()}


def describe(value: object) -> str:
    """Return words for the type of a value, for messages."""
    if isinstance(value, StoredTensor):
        return f"a tensor of {value.kind}"
    return "an empty dict" if value == {} else f"a {type(value).__name__}"
