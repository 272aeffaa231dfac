"""Reading HDF5 (Keras weights, statistics): only what stands in the file itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.checkpoints.reading import MAX_WEIGHTS_BYTES, check_size

MAX_DEPTH = 16
MAX_ARRAYS = 10_000
MAX_ARRAY_BYTES = 512 << 20


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Every array of real numbers in an HDF5 file, by its path; Keras's own order of a layer's weights is kept.

    Only what stands in the file itself is read: links to other files, external and virtual storage are refused.

    Raises:
        CheckpointError: Not HDF5, damaged, too large, or reaching out of the file.
    """
    import h5py

    check_size(path, MAX_WEIGHTS_BYTES)
    try:
        with h5py.File(path, "r", locking=False) as file:
            return {name: _dataset(file, name, path) for name in _datasets(file, "", path, 0)}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as HDF5; it is truncated or something else ({str(error)[:200]}).") from error


def _datasets(group: Any, prefix: str, path: Path, depth: int) -> list[str]:
    """Paths of the arrays below a group, in the order that Keras noted if it did."""
    import h5py

    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path} nests its groups deeper than {MAX_DEPTH}.")
    notes = sorted((key for key in group.attrs if re.fullmatch(r"(layer|weight)_names\d*", key)), key=lambda key: (len(key), key))
    noted = [name.decode() if isinstance(name, bytes) else str(name) for key in notes for name in group.attrs[key]]
    found: list[str] = []
    for name in dict.fromkeys(name for name in noted or group if name in group):
        parts = name.strip("/").split("/")
        if not all(isinstance(group.get("/".join(parts[: i + 1]), getlink=True), h5py.HardLink) for i in range(len(parts))):
            raise CheckpointError(f"{path}: {prefix}{name} is a link; only what stands in the file itself is read.")
        child = group[name]
        found += [f"{prefix}{name}"] if isinstance(child, h5py.Dataset) else _datasets(child, f"{prefix}{name}/", path, depth + 1)
        if len(found) > MAX_ARRAYS:
            raise CheckpointError(f"{path} holds more than {MAX_ARRAYS} arrays.")
    return found


def _dataset(file: Any, name: str, path: Path) -> np.ndarray:
    data = file[name]
    if data.external or data.is_virtual:
        raise CheckpointError(f"{path}: {name} is stored in other files; only what stands in the file itself is read.")
    if data.dtype.kind not in "fiub" or data.nbytes > MAX_ARRAY_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {data.dtype} and {data.nbytes} bytes; expected real numbers, at most half a GB.")
    return np.asarray(data[()])
