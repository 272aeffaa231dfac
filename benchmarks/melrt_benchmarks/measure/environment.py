"""Environment of a measurement: machine, versions, settings and commit."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from melrt.system import cpu_name, driver_version, find_gpu, usable_cores

PACKAGES = ("melrt", "numpy", "torch", "onnxruntime", "onnxruntime-gpu", "onnx", "openvino", "tensorrt", "tensorrt-rtx", "cuda-core")
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY", "OMP_WAIT_POLICY")


def environment(threads: int) -> dict[str, Any]:
    """Return everything that the figures of a report depend on, ready for JSON.

    Args:
        threads: CPU threads of every contender.
    """
    gpu = find_gpu()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "governor": _governor(),
        "load_1min": round(os.getloadavg()[0], 2),
        "threads": threads,
        "thread_settings": {name: os.environ[name] for name in _THREAD_SETTINGS if name in os.environ},
        "gpu": f"{gpu.name}, compute capability {gpu.compute_capability}" if gpu else "none",
        "cuda_driver": driver_version(),
        "gpu_state": _gpu_state() if gpu else "",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions(),
        "source": _source(),
    }


def _governor() -> str:
    """Return the frequency governor of the first core."""
    with suppress(OSError):
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    return "unknown"


def _gpu_state() -> str:
    """Return driver, clocks, power and temperature, as `nvidia-smi` prints them."""
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0")


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _source() -> str:
    """Return the commit that runs, or `installed` outside a checkout."""
    folder = str(Path(__file__).parent)
    commit = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}{' and changes' if changed else ''}" if commit else "installed"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
