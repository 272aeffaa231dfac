"""Safe reading of HDF5 files (Keras weights, statistics): only data inside the file itself is read."""

from __future__ import annotations

import itertools
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.checkpoints.limits import MAX_WEIGHTS_BYTES, check_file_size

MAX_DEPTH = 16
# Groups and arrays together. A group that several names lead to counts each time.
MAX_NODES = 10_000
# Keras stores its weights uncompressed. A small file must not describe large arrays by fill values or by compression.
MAX_RATIO = 10
FREE_BYTES = 16 << 20


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Return every array of real numbers in an HDF5 file by its path, in the order in which Keras saved them.

    Links to other files, external storage and virtual storage are refused.

    Raises:
        CheckpointError: The file is not HDF5, is damaged or too large, or refers to data outside itself.
    """
    import h5py

    check_file_size(path, MAX_WEIGHTS_BYTES)
    try:
        with h5py.File(path, "r", locking=False) as file:
            remaining = FREE_BYTES + MAX_RATIO * path.stat().st_size
            arrays = {}
            for name in _dataset_paths(file, "", path, 0, itertools.count(1)):
                arrays[name] = _read_dataset(file, name, path, remaining)
                remaining -= arrays[name].nbytes
            return arrays
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as HDF5; it is truncated or not HDF5 ({str(error)[:200]}).") from error


def _dataset_paths(group: Any, prefix: str, path: Path, depth: int, nodes: Iterator[int]) -> list[str]:
    """List the paths of the arrays below a group, in the order that Keras stored in its attributes if there is one."""
    import h5py

    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path} nests its groups deeper than the {MAX_DEPTH} levels that are read.")
    if len(group) > MAX_NODES or len(group.attrs) > MAX_NODES:
        raise CheckpointError(f"{path} holds more than the {MAX_NODES} groups, arrays and attributes that are read.")
    keys = sorted((key for key in group.attrs if re.fullmatch(r"(layer|weight)_names\d*", key)), key=lambda key: (len(key), key))
    ordered = [name for key in keys for name in _names(group, key, path)]
    found: list[str] = []
    for name in dict.fromkeys(name for name in ordered or group if name in group):
        if next(nodes) > MAX_NODES:
            raise CheckpointError(f"{path} holds more than the {MAX_NODES} groups and arrays that are read.")
        parts = name.strip("/").split("/")
        if not all(isinstance(group.get("/".join(parts[: i + 1]), getlink=True), h5py.HardLink) for i in range(len(parts))):
            raise CheckpointError(f"{path}: {prefix}{name} is a link; only data inside the file itself is read.")
        child = group[name]
        if isinstance(child, h5py.Dataset):
            found.append(f"{prefix}{name}")
        else:
            found += _dataset_paths(child, f"{prefix}{name}/", path, depth + 1, nodes)
    return found


def _names(group: Any, key: str, path: Path) -> list[str]:
    attribute = group.attrs.get_id(key)
    count, longest = math.prod(attribute.shape), attribute.dtype.itemsize
    if attribute.dtype.kind == "O":  # texts of variable length; a file can store one and name it many times
        longest = _largest_heap(path)
    if attribute.dtype.kind not in "SO" or count > MAX_NODES or count * longest > FREE_BYTES:
        raise CheckpointError(f"{path}: {key} is not a list of at most {MAX_NODES} names in at most {FREE_BYTES} bytes.")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in np.ravel(group.attrs[key]).tolist()]


def _largest_heap(path: Path) -> int:
    """Return the size of the largest global heap in bytes: no text of variable length is longer (HDF5 file format, III.E)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        largest, at = 0, data.find(b"GCOL\x01")
        while at >= 0:
            largest = max(largest, int.from_bytes(data[at + 8 : at + 16], "little"))
            at = data.find(b"GCOL\x01", at + 1)
    return largest


def _read_dataset(file: Any, name: str, path: Path, most: int) -> np.ndarray:
    data = file[name]
    if data.external or data.is_virtual:
        raise CheckpointError(f"{path}: {name} is stored in other files; only data inside the file itself is read.")
    if data.dtype.kind not in "fiub" or data.nbytes > most:
        raise CheckpointError(
            f"{path}: {name} has dtype {data.dtype} and {data.nbytes} bytes; expected real numbers, at most {most} bytes."
        )
    if data.id.get_create_plist().get_nfilters():  # zlib inflates a piece to any size, whatever size the piece has
        raise CheckpointError(f"{path}: {name} is compressed. Save it without compression, as Keras does.")
    chunk = math.prod(data.chunks or ()) * data.dtype.itemsize
    if chunk > most or (data.chunks and -(-data.nbytes // max(chunk, 1)) > MAX_NODES):
        raise CheckpointError(f"{path}: {name} has pieces of {chunk} bytes; expected at most {MAX_NODES} pieces of at most {most} bytes.")
    return np.asarray(data[()])
