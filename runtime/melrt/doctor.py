"""What this machine can run: packages, GPU, providers. Nothing heavy is imported to find out."""

from __future__ import annotations

import importlib.metadata as metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass

from melrt.machine import cpu_name, find_gpu


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
