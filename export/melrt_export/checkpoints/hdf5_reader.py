"""Program that reads one HDF5 file within limits, and writes its arrays to its standard output. `hdf5.py` runs it.

Usage: python hdf5_reader.py FILE SECONDS

It imports nothing of melrt, because it starts for every file. Only data inside the file itself is read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import mmap
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MAX_DEPTH = 16
# Groups and arrays together. A group that several names lead to counts each time.
MAX_NODES = 10_000
# Keras stores its weights uncompressed. A small file must not describe large arrays by fill values or by compression.
MAX_RATIO = 10
FREE_BYTES = 16 << 20
# For the work of libhdf5, beside the arrays and a copy of them.
WORK_BYTES = 128 << 20


class RefusedError(ValueError):
    """The file is not read. The message begins with a verb."""


def memory(path: Path) -> int:
    """Return the memory in bytes that reading a file may take."""
    return WORK_BYTES + 2 * _budget(path)


def _budget(path: Path) -> int:
    return FREE_BYTES + MAX_RATIO * path.stat().st_size


def _read(path: Path) -> dict[str, np.ndarray]:
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        remaining = _budget(path)
        arrays = {}
        for name in _dataset_paths(file, "", path, 0, itertools.count(1)):
            arrays[name] = _read_dataset(file, name, remaining)
            remaining -= arrays[name].nbytes
        return arrays


def _dataset_paths(group: Any, prefix: str, path: Path, depth: int, nodes: Iterator[int]) -> list[str]:
    """List the paths of the arrays below a group, in the order that Keras stored in its attributes if there is one."""
    import h5py

    if depth > MAX_DEPTH:
        raise RefusedError(f"nests its groups deeper than the {MAX_DEPTH} levels that are read.")
    if len(group) > MAX_NODES or len(group.attrs) > MAX_NODES:
        raise RefusedError(f"holds more than the {MAX_NODES} groups, arrays and attributes that are read.")
    keys = sorted((key for key in group.attrs if re.fullmatch(r"(layer|weight)_names\d*", key)), key=lambda key: (len(key), key))
    ordered = [name for key in keys for name in _names(group, key, path)]
    found: list[str] = []
    for name in dict.fromkeys(name for name in ordered or group if name in group):
        if next(nodes) > MAX_NODES:
            raise RefusedError(f"holds more than the {MAX_NODES} groups and arrays that are read.")
        parts = name.strip("/").split("/")
        if not all(isinstance(group.get("/".join(parts[: i + 1]), getlink=True), h5py.HardLink) for i in range(len(parts))):
            raise RefusedError(f"holds {prefix}{name}, a link; only data inside the file itself is read.")
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
        raise RefusedError(f"has a {key} that is not a list of at most {MAX_NODES} names in at most {FREE_BYTES} bytes.")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in np.ravel(group.attrs[key]).tolist()]


def _largest_heap(path: Path) -> int:
    """Return the size of the largest global heap in bytes: no text of variable length is longer (HDF5 file format, III.E)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        largest, at = 0, data.find(b"GCOL\x01")
        while at >= 0:
            largest = max(largest, int.from_bytes(data[at + 8 : at + 16], "little"))
            at = data.find(b"GCOL\x01", at + 1)
    return largest


def _read_dataset(file: Any, name: str, most: int) -> np.ndarray:
    data = file[name]
    if data.external or data.is_virtual:
        raise RefusedError(f"stores {name} in other files; only data inside the file itself is read.")
    if data.dtype.kind not in "fiub" or data.nbytes > most:
        raise RefusedError(f"holds {name} of dtype {data.dtype} in {data.nbytes} bytes; expected real numbers in at most {most} bytes.")
    if data.id.get_create_plist().get_nfilters():  # zlib inflates a piece to any size, whatever size the piece has
        raise RefusedError(f"compresses {name}. Save it without compression, as Keras does.")
    chunk = math.prod(data.chunks or ()) * data.dtype.itemsize
    if chunk > most or (data.chunks and -(-data.nbytes // max(chunk, 1)) > MAX_NODES):
        raise RefusedError(f"cuts {name} into pieces of {chunk} bytes; expected at most {MAX_NODES} pieces of at most {most} bytes.")
    return np.asarray(data[()])


def _limit(seconds: float, path: Path) -> None:
    """End this process when it takes more processor time; refuse it more memory, larger files, and a dump of its memory."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows limits neither, macOS no memory
        import resource

        signal.setitimer(signal.ITIMER_PROF, seconds)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (memory(path), memory(path)))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory(path), used + memory(path)))


def main() -> None:
    """Read the file that the first argument names, and write a line of JSON and the arrays."""
    import h5py  # noqa: F401  # takes memory that does not count

    path = Path(sys.argv[1])
    _limit(float(sys.argv[2]), path)
    try:
        arrays = _read(path)
        head: dict[str, Any] = {"names": list(arrays)}
    except RefusedError as error:
        arrays, head = {}, {"refused": str(error)}
    except Exception as error:  # a damaged file can fail anywhere in the reader
        arrays, head = {}, {"refused": f"cannot be read as HDF5; it is truncated or not HDF5 ({str(error)[:200]})."}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n")
    for array in arrays.values():
        np.lib.format.write_array(sys.stdout.buffer, array, allow_pickle=False)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
