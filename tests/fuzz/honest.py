"""Honest files that the attacks damage: checkpoints, archives, HDF5, mels and recordings, and the damage."""

from __future__ import annotations

import importlib.util
import io
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

ROOT = Path(__file__).parents[2]
ARCHIVES = ("zip", "tar", "gztar", "bztar", "xztar")
AUDIO = {
    ".wav": ("WAV", "PCM_16"), ".mp3": ("MP3", "MPEG_LAYER_III"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"), ".aiff": ("AIFF", "PCM_16"), ".caf": ("CAF", "ALAC_16"), ".w64": ("W64", "FLOAT"),
}  # fmt: skip


def damaged(data: bytes, noise: np.random.Generator) -> bytes:
    """Return data that is cut, or has bytes exchanged, repeated or inserted; mostly near the start, where headers are."""
    result = bytearray(data)
    for _ in range(noise.integers(1, 6)):
        at = int(noise.integers(len(result) + 1) if noise.random() < 0.5 else min(len(result), noise.integers(400)))
        match noise.integers(5):
            case 0:
                del result[at:]
            case 1:
                result[at : at + 1] = noise.bytes(1)
            case 2:
                result[at : at + 4] = noise.choice([b"\xff" * 4, b"\x00" * 4, b"\x80\x02c" + b"os", b'": [1e400, "'])
            case 3:
                result[at:at] = result[at : at + int(noise.integers(200))]
            case _:
                del result[at : at + int(noise.integers(1, 20))]
    return bytes(result)


def overwritten(data: bytes, noise: np.random.Generator) -> bytes:
    """Return data of the same length with a few bytes exchanged, for files that are not read at all if their length is wrong."""
    result = bytearray(data)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    for _ in range(noise.integers(1, 4)):
        at, other = (int(place) for place in noise.choice(used, 2))
        match noise.integers(4):
            case 0:
                result[at] = noise.integers(256)
            case 1:
                result[at] ^= 1 << noise.integers(8)
            case 2:
                result[at : at + 4] = b"\xff" * 4
            case _:
                size = int(noise.choice([1, 4, 8, 16]))
                result[at : at + size] = result[other : other + size]
    return bytes(result[: len(data)])


_kept = tempfile.TemporaryDirectory()


@cache
def checkpoints() -> list[Path]:
    """Return the folders of honest checkpoints: the demo voice, and the developers' if they are there."""
    from melrt_export.assets import DEMO_VOICE

    fixtures = ROOT.parent / "shared" / "fixtures" / "checkpoints"
    small = [path for path in sorted(fixtures.iterdir()) if path.name != "seungwonpark"] if fixtures.is_dir() else []
    return [Path(DEMO_VOICE), *small]


@cache
def archives() -> list[Path]:
    """Return a checkpoint in archives of all kinds, in a folder that is removed when the program ends."""
    folder = Path(_kept.name)
    return [Path(shutil.make_archive(str(folder / "packed"), kind, checkpoints()[0])) for kind in ARCHIVES]


@cache
def hdf5() -> list[bytes]:
    """Return small HDF5 files of the old and the new format: weights as Keras stores them, statistics, pieces, and many groups."""
    import h5py

    found = []
    for version in ("earliest", "latest"):
        for fill in (_keras, _statistics, _pieces, _groups):
            buffer = io.BytesIO()
            with h5py.File(buffer, "w", libver=version) as file:
                fill(file)
            found.append(buffer.getvalue())
    return found


def _keras(file: Any) -> None:
    for layer in ("conv", "res"):
        group = file.create_group(layer)
        group.attrs["weight_names"] = [b"kernel:0", b"bias:0"]
        group["kernel:0"], group["bias:0"] = np.ones((3, 4), np.float32), np.zeros(4, np.float32)
    file.attrs["layer_names"] = [b"conv", b"res"]


def _statistics(file: Any) -> None:
    file["mean"], file["scale"] = np.full(80, -4, np.float32), np.ones(80, np.float32)


def _pieces(file: Any) -> None:
    import h5py

    file.create_dataset("m", (80, 20), "f4", chunks=(8, 10), fillvalue=1.0)[:] = 2
    file.attrs.create("weight_names", ["m", "n"], dtype=h5py.string_dtype())
    file.create_dataset("n", (4,), "f8", maxshape=(None,))[:] = 1


def _groups(file: Any) -> None:
    for i in range(12):
        file.create_dataset(f"a/b{i}/c", data=np.float32(i))


@cache
def mels() -> list[tuple[str, bytes]]:
    """Return a mel in files of each kind with the suffix of the name; those of PyTorch only where it is installed."""
    mel = np.random.default_rng(0).standard_normal((80, 5)).astype(np.float32)
    npy, npz, torch = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(npy, mel)
    np.savez(npz, mel=mel)
    found = [(".npy", npy.getvalue()), (".npz", npz.getvalue()), (".wav", npy.getvalue()), (".bin", npy.getvalue())]
    if importlib.util.find_spec("torch"):
        import torch as pytorch

        pytorch.save({"mel": pytorch.from_numpy(mel)}, torch)
        found.append((".pt", torch.getvalue()))
    return found


@cache
def recordings() -> list[tuple[str, bytes]]:
    """Return a tone in files of several kinds, with the suffix of the name."""
    tone = np.sin(np.arange(6000) / 7).astype(np.float32) / 2
    found = []
    for suffix, (container, subtype) in AUDIO.items():
        buffer = io.BytesIO()
        soundfile.write(buffer, tone, 24_000, subtype, format=container)
        found.append((suffix, buffer.getvalue()))
    return found
