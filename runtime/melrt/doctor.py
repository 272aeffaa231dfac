"""What this machine can run: packages, GPU, providers. Nothing heavy is imported to find out."""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One capability."""

    purpose: str
    ready: bool
    found: str
    """Versions, or what is missing."""
    remedy: str
    """The command that installs it."""


# Each capability: what for, distributions that all must be there, extra.
_PACKAGES = (
    ("synthesis on the CPU", ("onnxruntime|onnxruntime-gpu",), "cpu"),
    ("synthesis on a GPU, ONNX Runtime", ("onnxruntime-gpu",), "gpu"),
    ("TensorRT engines for data-centre GPUs", ("tensorrt", "polygraphy", "cuda-core"), "tensorrt"),
    ("TensorRT-RTX engines, also built without a GPU", ("tensorrt-rtx", "polygraphy", "cuda-core"), "rtx"),
    ("export of checkpoints", ("torch", "onnx", "safetensors", "pyyaml", "librosa"), "export"),
    ("PyCUDA arrays", ("pycuda",), "pycuda"),
    ("reading and writing audio", ("soundfile",), "cli"),
)


def examine() -> Iterator[Finding]:
    """Every capability in turn."""
    yield Finding("CPU", True, f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable", "")
    gpu = _gpu()
    found = gpu or "no driver (libcuda.so.1) that finds a device"
    yield Finding("NVIDIA GPU", gpu is not None, found, "the NVIDIA driver, from your distribution")
    for purpose, distributions, extra in _PACKAGES:
        versions = {name: _version(name) for name in distributions}
        missing = [name for name, version in versions.items() if version is None]
        found = ", ".join(f"{name.partition('|')[0]} {version}" for name, version in versions.items() if version)
        text = f"missing {', '.join(name.partition('|')[0] for name in missing)}" if missing else found
        yield Finding(purpose, not missing, text, f'pip install "melrt[{extra}]"')


def _version(alternatives: str) -> str | None:
    for name in alternatives.split("|"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _gpu() -> str | None:
    """Name and compute capability of the first device, straight from the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, count, major, minor = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(256)
    # CUDA driver API: attributes 75 and 76 are COMPUTE_CAPABILITY_MAJOR and _MINOR
    calls: tuple[tuple[Any, ...], ...] = (
        (driver.cuInit, 0),
        (driver.cuDeviceGetCount, ctypes.byref(count)),
        (driver.cuDeviceGet, ctypes.byref(device), 0),
        (driver.cuDeviceGetName, name, 256, device),
        (driver.cuDeviceGetAttribute, ctypes.byref(major), 75, device),
        (driver.cuDeviceGetAttribute, ctypes.byref(minor), 76, device),
    )
    if any(call(*arguments) != 0 for call, *arguments in calls):
        return None
    return f"{name.value.decode()} (compute capability {major.value}.{minor.value}), {count.value} in all"
