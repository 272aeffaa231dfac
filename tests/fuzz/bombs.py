"""Small checkpoint files that would fill the memory, take minutes or crash: each is refused quickly.

Usage: python tests/fuzz/bombs.py [PART OF A NAME ...]

Prints the size, time and memory of each. A process of its own reads it: the memory is what it needs more than before.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from melrt.errors import MelrtError
from melrt_export.checkpoints import load_checkpoint
from melrt_export.checkpoints.hdf5 import read_hdf5
from melrt_export.checkpoints.reading import read_json, read_npy, read_npy_dict, read_safetensors, read_yaml
from melrt_export.checkpoints.torch_files import read_pickle

MAX_SECONDS = 2.0
MAX_MEBIBYTES = 300
_TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQK\x00%s%s\x89}tR"
)
_LONG = "[" * 30_000


def _torch_zip(pickled: bytes, storage: bytes = bytes(64), **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"data.pkl": b"\x80\x02" + pickled + b".", "data/0": storage, **entries}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def _zip(names: int, method: int = zipfile.ZIP_STORED, data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for i in range(names):
            archive.writestr(f"archive/data/{i}", data)
    return buffer.getvalue()


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def _tensor(count: int, shape: int, stride: int) -> bytes:
    return _TENSOR % (_integer(count), _integer(shape) + b"\x85", _integer(stride) + b"\x85")


def _legacy(pickled: bytes, keys: bytes = b"\x80\x02].") -> bytes:
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    return magic + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + b"\x80\x02" + pickled + b"." + keys


def _npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


def _statistics(pickled: bytes) -> bytes:
    return _npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }", b"\x80\x02" + pickled + b".")


def _safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def _deflated(head: bytes, zeros: int, bits: int) -> bytes:
    """Return some bytes and mebibytes of zeros, deflated: one block is repeated. The end and the checksum are missing."""
    packer = zlib.compressobj(9, wbits=bits)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + block * zeros


def _deflated_zip(zeros: int) -> bytes:
    """Return a zip file with one file of this many mebibytes."""
    data, name = _deflated(b"", zeros, -15), b"archive/data.pkl"
    sizes = struct.pack("<HIIIHH", 0, 0, len(data), zeros << 20, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<HHHH", 20, 0, 8, 0) + sizes + name + data
    entry = b"PK\x01\x02" + struct.pack("<HHHHH", 20, 20, 0, 8, 0) + sizes + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    return local + entry + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)


def _entry(name: str, mebibytes: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = mebibytes << 20, kind
    return entry.tobuf()


def _hdf5(make: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path, "w", libver="latest") as file:
            make(file)

    return write


def _links(file: h5py.File) -> None:
    for level in range(11):
        group = file.create_group(f"g{level}")
        for name in range(10):
            if level:
                group[f"n{name}"] = file[f"g{level - 1}"]


def _inflated_chunk(file: h5py.File) -> None:
    data = file.create_dataset("k", (1000,), "f4", chunks=(1000,), compression="gzip")
    data.id.write_direct_chunk((0,), _deflated(b"", 2048, 15))


def _repeated_text(file: h5py.File) -> None:
    file.create_dataset("a", data=1.0)
    file.attrs.create("weight_names", ["x" * 60_000] + ["y"] * 8_000, dtype=h5py.string_dtype())


def _point_to_the_first(path: Path) -> None:
    """Write an attribute of 8,001 texts, and let each of them point to the longest."""
    _hdf5(_repeated_text)(path)
    data = path.read_bytes()
    at = data.index(struct.pack("<I", 60_000))
    path.write_bytes(data[:at] + data[at : at + 16] * 8_001 + data[at + 16 * 8_001 :])


def _native(folder: Path, **generator: Any) -> None:
    from melrt_export.assets import DEMO_VOICE

    values = json.loads((Path(DEMO_VOICE) / "config.json").read_text())
    values["generator"] |= generator
    (folder / "config.json").write_text(json.dumps(values))


Reader = Callable[[Path], Any]
_YAML_ALIASES = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)


def _training_state(path: Path) -> None:
    """Write the header of a training state with 700,000 tensors of no bytes."""
    tensors = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(700_000))
    path.write_bytes(_safetensors(b'{"__metadata__":{"melrt":"{}"},%s}' % tensors))


# Name, file name, content or function that writes it, and reader.
BOMBS: list[tuple[str, str, bytes | str | Callable[[Path], Any], Reader]] = [
    ("20 M operations", "a.pt", lambda p: p.write_bytes(_torch_zip(b"](" + b"N" * 20_000_000 + b"e")), read_pickle),
    ("0.5 M lists", "a.pt", lambda p: p.write_bytes(_torch_zip(b"](" + b"]" * 499_000 + b"e")), load_checkpoint),
    ("tuple in tuple as a key", "a.pt", lambda p: p.write_bytes(_torch_zip(b"})" + b"\x85" * 400_000 + b"Ns")), read_pickle),
    ("29,000 tuples as a key", "a.pt", lambda p: p.write_bytes(_torch_zip(b"})" + b"\x85" * 29_000 + b"Ns")), load_checkpoint),
    ("list in list", "a.pt", lambda p: p.write_bytes(_torch_zip(b"]" * 249_000 + b"a" * 248_999)), load_checkpoint),
    ("bytearray(1 << 30)", "a.pt", _torch_zip(b"c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R"), read_pickle),
    ("memo of 1 G places", "a.pt", _torch_zip(b"Nr\xff\xff\xff\x3f"), read_pickle),
    ("equal hashes", "a.pt", lambda p: p.write_bytes(_torch_zip(
        b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(200_000)) + b"u")), read_pickle),
    ("counter of a set of a list", "a.pt", _torch_zip(b"c__builtin__\nset\n](" + b"]" * 9 + b"e\x85R"), load_checkpoint),
    ("tensor of 2^60 values", "a.pt", _torch_zip(_tensor(16, 1 << 60, 0)), read_pickle),
    ("tensor beyond its storage", "a.pt", _torch_zip(_tensor(16, 16, 2)), read_pickle),
    ("storage larger than its file", "a.pt", _torch_zip(_tensor(1 << 40, 16, 1)), read_pickle),
    ("state of a checked tensor", "a.pt", _torch_zip(_tensor(16, 16, 1) + b"}b"), read_pickle),
    ("deflated storage of 2 GiB", "a.pt", lambda p: p.write_bytes(_deflated_zip(2047)), read_pickle),
    ("zip of 25,000 entries", "a.pt", lambda p: p.write_bytes(_zip(25_000)), read_pickle),
    ("old format: storage of 1 TiB", "a.pt", _legacy(_tensor(1 << 40, 16, 1).replace(b"tQ", b"NtQ")), read_pickle),
    ("old format: operations", "a.pt", lambda p: p.write_bytes(_legacy(b"](" + b"N" * 20_000_000 + b"e")), read_pickle),
    ("old format: keys", "a.pt", lambda p: p.write_bytes(_legacy(b"]", b"\x80\x02](" + b"N" * 20_000_000 + b"e.")), read_pickle),
    ("safetensors header of 40 MB", "a.safetensors", lambda p: p.write_bytes(_safetensors(b'{"a":' + b"[" * 40_000_000)), read_safetensors),
    ("safetensors of 60,000 empty tensors", "a.safetensors", lambda p: p.write_bytes(_safetensors(json.dumps(
        {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}).encode())), load_checkpoint),
    ("safetensors of 2^60 values", "a.safetensors", _safetensors(
        b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,0]}}'), read_safetensors),
    ("training state of 700,000 tensors", "training.safetensors", _training_state, load_checkpoint),
    ("HDF5 groups of 10^10 names", "a.h5", _hdf5(_links), read_hdf5),
    ("HDF5 fill value", "a.h5", _hdf5(lambda f: f.create_dataset("k", (100_000_000,), "f4", fillvalue=1.0)), read_hdf5),
    ("HDF5 pieces of 40 bytes", "a.h5", _hdf5(lambda f: f.create_dataset("k", (4_000_000,), "f4", chunks=(10,))), read_hdf5),
    ("HDF5 piece that inflates to 2 GiB", "a.h5", _hdf5(_inflated_chunk), read_hdf5),
    ("HDF5 attribute of 480 MB", "a.h5", _point_to_the_first, read_hdf5),
    ("HDF5 group of 15,000 groups", "a.h5", _hdf5(lambda f: [f.create_group(str(i)) for i in range(15_000)]), read_hdf5),
    ("HDF5 attribute of 1 M names", "a.h5", _hdf5(lambda f: f.attrs.create("weight_names", np.full(1_000_000, b"a"))), read_hdf5),
    ("YAML aliases", "a.yml", _YAML_ALIASES, read_yaml),
    ("YAML merge keys", "a.yml", "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 25)), read_yaml),
    ("YAML lists", "a.yml", _LONG, read_yaml),
    ("YAML of 10,000 settings", "a.yml", "- {a: [1.5, 0x1]}\n" * 3_600, read_yaml),
    ("YAML base 60", "a.yml", "a: 1" + ":1" * 30_000, read_yaml),
    ("YAML digits", "a.yml", "a: " + "9" * 60_000, read_yaml),
    ("JSON lists", "a.json", _LONG, read_json),
    ("JSON comments", "a.json", '{"a": 1' + '"' + '\\"' * 30_000, read_json),
    ("JSON digits", "a.json", '{"a": ' + "9" * 60_000 + "}", read_json),
    ("array of 2^50 values", "a.npy", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1125899906842624,), }"), read_npy),
    ("array of 2^33 values", "a.npy", _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (8589934592,), }"), read_npy),
    ("array of no bytes a value", "a.npy", _npy("{'descr': '|V0', 'fortran_order': False, 'shape': (1125899906842624,), }"), read_npy),
    ("zip of arrays", "a.npy", lambda p: p.write_bytes(_zip(1000, zipfile.ZIP_DEFLATED, bytes(100_000))), read_npy),
    ("statistics: memo of 1 G places", "a.npy", _statistics(b"Nr\xff\xff\xff\x3f"), read_npy_dict),
    ("statistics: 15 M operations", "a.npy", lambda p: p.write_bytes(_statistics(b"](" + b"N" * 15_000_000 + b"e")), read_npy_dict),
    ("tar.gz of 2 GiB", "a.tar.gz", lambda p: p.write_bytes(_deflated(_entry("a.pt", 2048), 2048, 31)), load_checkpoint),
    ("tar.gz with a name of 1 GiB", "a.tar.gz", lambda p: p.write_bytes(
        _deflated(_entry("a", 1024, tarfile.GNUTYPE_LONGNAME), 1025, 31)), load_checkpoint),
    ("tar.gz with a comment of 1 GiB", "a.tar.gz", lambda p: p.write_bytes(
        _deflated(_entry("a", 1024, tarfile.XHDTYPE), 1025, 31)), load_checkpoint),
    ("tar.gz with a comment of 64 MiB", "a.tar.gz", lambda p: p.write_bytes(
        _deflated(_entry("a", 64, tarfile.XHDTYPE), 90, 31)), load_checkpoint),
    ("tar.gz with 16 GiB for a device", "a.tar.gz", lambda p: p.write_bytes(
        _deflated(_entry("a", 7 << 10, b"Z"), 16 << 10, 31)), load_checkpoint),
    ("tar.bz2 of 512 MiB", "a.tar.bz2", lambda p: p.write_bytes(
        bz2.compress(_entry("a.pt", 512)) + bz2.compress(bytes(1 << 25)) * 16), load_checkpoint),
    ("tar.xz, dictionary of 1 GiB", "a.tar.xz", lambda p: p.write_bytes(lzma.compress(
        _entry("a.pt", 512), filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}])
        + lzma.compress(bytes(1 << 26)) * 8), load_checkpoint),
    ("tar of 20,000 folders", "a.tar", lambda p: p.write_bytes(b"".join(
        _entry(f"d{i}", 0, tarfile.DIRTYPE) for i in range(20_000))), load_checkpoint),
    ("zip archive of 2 GiB", "a.zip", lambda p: p.write_bytes(_deflated_zip(2047)), load_checkpoint),
    ("zip archive of 25,000 entries", "a.zip", lambda p: p.write_bytes(_zip(25_000)), load_checkpoint),
]  # fmt: skip


def measure(read: Reader, path: Path) -> tuple[float, float, str]:
    """Read a file in a process of its own, and return the CPU time in seconds, the memory in MiB, and the error or the fault.

    A process that this one starts counts with all its memory.
    """
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        before = _resident_kilobytes()
        signal.alarm(30)
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        try:
            read(path)
            text = "accepted"
        except MelrtError as error:
            text = f"refused: {error}"
        except BaseException as error:
            text = f"raised {type(error).__name__}: {error}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        os.write(sender, f"{grown} {text.replace(str(path), path.name)}".encode(errors="replace")[:300])
        os._exit(0)
    os.close(sender)
    _, status, used = os.wait4(child, 0)
    with open(receiver, "rb") as pipe:  # noqa: PTH123  # a pipe has no path
        text = pipe.read().decode(errors="replace")
    grown, _, text = (text or f"0 ended with status {status}").partition(" ")
    return used.ru_utime + used.ru_stime, int(grown) / 1024, text


def _resident_kilobytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def main() -> int:
    failed = 0
    print(f"{'bomb':<36} {'bytes':>9} {'seconds':>8} {'MiB':>5}  result")
    wanted = sys.argv[1:]
    for name, file, content, read in BOMBS:
        if wanted and not any(part in name for part in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file
            if callable(content):
                content(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
            if file == "a.safetensors":
                _native(path.parent)
            seconds, mebibytes, result = measure(read, path)
            wrong = not result.startswith("refused: ") or seconds > MAX_SECONDS or mebibytes > MAX_MEBIBYTES
            failed += wrong
            size = path.stat().st_size
        print(f"{name:<36} {size:>9} {seconds:>8.2f} {mebibytes:>5.0f}  {'FAILED ' if wrong else ''}{result[:150]}", flush=True)
    print(f"{failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
