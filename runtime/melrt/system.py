"""This machine: its processor and GPU, and the packages that melrt can use."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Flags of Linux for units that multiply a type faster than float32.
_UNITS = {"bfloat16": ("amx_bf16", "avx512_bf16"), "INT8": ("amx_int8", "avx512_vnni", "avx_vnni")}


def cpu_name() -> str:
    """Return the model name of the processor as Linux reports it; elsewhere its architecture."""
    return _cpu_fact("model name") or platform.machine()


def usable_cores() -> int:
    """Return the number of cores that this process may use, or of all cores where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def arithmetic(kind: str) -> tuple[str, ...]:
    """Return the flags of this processor's units for `bfloat16` or `INT8`, the fastest first; empty if it has none, or is not an x86."""
    flags = _cpu_fact("flags").split()
    return tuple(unit for unit in _UNITS[kind] if unit in flags)


def _cpu_fact(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU."""

    name: str
    """Model name."""
    compute_capability: str
    """Compute capability, such as `9.0`."""
    count: int
    """Number of GPUs in this machine."""


def find_gpu() -> Gpu | None:
    """Return the first GPU that the driver reports; None without a driver or a GPU."""
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
    """Return the highest CUDA version that the driver supports, such as `13.0`; empty without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One capability of this machine."""

    purpose: str
    """Task that it serves."""
    ready: bool
    """True if it can be used here."""
    found: str
    """Versions, or the reason why it cannot be used."""
    remedy: str
    """Action that makes it usable; empty if there is none."""


@dataclass(frozen=True, slots=True)
class _Capability:
    purpose: str
    distributions: tuple[str, ...]
    """Python distributions that are all needed; `a|b` accepts either."""
    extra: str
    """Extra that installs them."""
    unsupported: tuple[str, ...] = ()
    """Compute capabilities on which it does not run."""


# TensorRT-RTX 1.7 refuses these in `set_compute_capability`: Jetson Orin, Hopper and data-center Blackwell.
RTX_UNSUPPORTED = ("8.7", "9.0", "10.0")
_CAPABILITIES = (
    _Capability("synthesis on the CPU", ("onnxruntime|onnxruntime-gpu",), "cpu"),
    _Capability("synthesis on the CPU in bfloat16", ("openvino",), "openvino"),
    _Capability("synthesis on a GPU, ONNX Runtime", ("onnxruntime-gpu",), "gpu"),
    _Capability("TensorRT engines for data-center GPUs", ("tensorrt|tensorrt-cu12", "polygraphy", "cuda-core"), "tensorrt"),
    _Capability(
        "TensorRT-RTX engines, also built without a GPU",
        ("tensorrt-rtx|tensorrt-rtx-cu12", "polygraphy", "cuda-core"),
        "rtx",
        RTX_UNSUPPORTED,
    ),
    _Capability("export of checkpoints", ("torch", "onnx", "safetensors", "pyyaml", "h5py", "matplotlib"), "export"),
    _Capability("PyCUDA arrays", ("pycuda",), "pycuda"),
    _Capability("reading and writing audio", ("soundfile", "soxr"), "cli"),
)


def examine() -> Iterator[Finding]:
    """Yield the processor, the GPU, and every capability in turn."""
    units = "; ".join(f"multiplies {kind}: {', '.join(arithmetic(kind)) or 'no'}" for kind in _UNITS)
    yield Finding("CPU", True, f"{cpu_name()}, {usable_cores()} of {os.cpu_count()} cores usable; {units}", "")
    gpu = find_gpu()
    found = "none, or no driver (libcuda.so.1)"
    if gpu is not None:
        found = f"{gpu.name} (compute capability {gpu.compute_capability}), {gpu.count} in all, driver for CUDA {driver_version()}"
    yield Finding("NVIDIA GPU", gpu is not None, found, "install the NVIDIA driver")
    for capability in _CAPABILITIES:
        yield _examine_packages(capability, gpu)


def _examine_packages(capability: _Capability, gpu: Gpu | None) -> Finding:
    names = {distribution: distribution.partition("|")[0] for distribution in capability.distributions}
    versions = {distribution: _version(distribution) for distribution in names}
    missing = [names[distribution] for distribution, version in versions.items() if version is None]
    if missing:
        older = capability.extra in ("tensorrt", "rtx") and driver_version().startswith("12.")
        extra = f"{capability.extra}-cuda12" if older else capability.extra
        return Finding(capability.purpose, False, f"missing {', '.join(missing)}", f'pip install "melrt[{extra}]"')
    found = ", ".join(f"{names[distribution]} {version}" for distribution, version in versions.items())
    if gpu is not None and gpu.compute_capability in capability.unsupported:
        capabilities = ", ".join(capability.unsupported)
        found += f"; engines do not run on this GPU: compute capabilities {capabilities} are not supported, TensorRT runs there"
        return Finding(capability.purpose, False, found, 'pip install "melrt[tensorrt]"')
    return Finding(capability.purpose, True, found, "")


def _version(alternatives: str) -> str | None:
    for name in alternatives.split("|"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
