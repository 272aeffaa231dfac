"""Write the GPU, its driver, CUDA and the versions of packages as JSON: `python -m melrt_benchmarks.sitting.versions FILE`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "numpy", "scipy", "torch", "triton", "tensorrt", "tensorrt_cu13", "tensorrt-rtx", "torch-tensorrt", "onnx", "onnxruntime",
    "onnxruntime-gpu", "cuda-core", "cuda-bindings", "cuda-pathfinder", "cupy-cuda13x", "pycuda", "polygraphy", "soundfile", "soxr",
    "pytest", "nvidia-cudnn-cu13", "nvidia-cuda-nvrtc",
)  # fmt: skip
QUERY = (
    "name,compute_cap,driver_version,memory.total,memory.free,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem,power.limit,"
    "temperature.gpu,pcie.link.gen.current,pcie.link.width.current,mig.mode.current"
)


def main() -> int:
    """Write the file."""
    gpu = _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-i", "0")
    figures = dict(zip(QUERY.split(","), (value.strip() for value in gpu.split(",")), strict=False)) if gpu else {"name": "no nvidia-smi"}
    found = {
        "gpu": figures, "nvcc": _output("nvcc", "--version").splitlines()[-1:], "python": platform.python_version(),
        "machine": f"{os.cpu_count()} processors, {platform.platform()}", "packages": dict(_versions()),
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    Path(sys.argv[1]).write_text(text)
    sys.stdout.write(text + "\n")
    return 0


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
