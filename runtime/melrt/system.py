"""What this machine is: its processor and its GPU, asked of the system itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's model, as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), os.uname().machine)


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU."""

    name: str
    compute_capability: str
    """As `9.0`."""
    count: int
    """GPUs in all."""


def find_gpu() -> Gpu | None:
    """The first GPU, straight from the driver; None without a driver that finds one."""
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
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", count.value)


def driver_version() -> str:
    """The highest CUDA version that the driver knows, as `13.0`; empty without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


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
    ("TensorRT engines for data-center GPUs", ("tensorrt", "polygraphy", "cuda-core"), "tensorrt"),
    ("TensorRT-RTX engines, also built without a GPU", ("tensorrt-rtx", "polygraphy", "cuda-core"), "rtx"),
    ("export of checkpoints", ("torch", "onnx", "safetensors", "pyyaml", "librosa"), "export"),
    ("PyCUDA arrays", ("pycuda",), "pycuda"),
    ("reading and writing audio", ("soundfile",), "cli"),
)
_NO_GPU = "no driver (libcuda.so.1) that finds a device"


def examine() -> Iterator[Finding]:
    """Every capability in turn."""
    yield Finding("CPU", True, f"{cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable", "")
    gpu = find_gpu()
    found = f"{gpu.name} (compute capability {gpu.compute_capability}), {gpu.count} in all" if gpu else _NO_GPU
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
