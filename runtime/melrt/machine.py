"""What this machine is: its processor and its GPU, asked of the system itself."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
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
