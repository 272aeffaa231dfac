"""Inference engines: each runs one artefact on one device behind the same small interface."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError
from melrt.windows import GraphKind, Policy

logger = logging.getLogger(__name__)

BACKENDS = ("onnxruntime",)
DEVICES = ("cuda", "cpu")
MAX_THREADS = 1024
PRECISIONS = ("fp32", "fp16", "int8")
# A CPU has no half-precision convolutions: there the half graph is the float32 graph with casts around it, and slower.
_AUTO_PRECISIONS = {"cuda": ("fp16", "fp32"), "cpu": ("fp32",)}


class Backend(Protocol):
    """A voice's two graphs, loaded on one device. Safe to call from several threads."""

    name: str
    """`onnxruntime`."""
    device: str
    """`cpu` or `cuda`."""
    machine: str
    """The processor or GPU that it runs on."""
    precision: str
    """Of the artefacts."""
    policy: Policy
    """How it likes its windows, where `melrt tune` has not measured it."""
    candidates: tuple[Policy, ...]
    """What `melrt tune` may try instead."""

    def run(self, graph: GraphKind, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        """Mel frames (B, M, T) through a graph to samples (B, T·hop), a fresh array."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What the caller asked for; `auto` leaves it to the machine."""

    device: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("device", DEVICES), ("precision", PRECISIONS), ("backend", BACKENDS)):
            if getattr(self, name) not in ("auto", *allowed):
                raise BackendError(f"{name} is {getattr(self, name)!r}; it is one of auto, {', '.join(allowed)}.")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise BackendError(f"threads is {self.threads}; it lies between 1 and {MAX_THREADS}, or is left out for one per core.")


def open_backend(bundle: Bundle, choice: Choice) -> Backend:
    """Load the best artefact of the bundle that this machine can run and the caller allows.

    Raises:
        BackendError: None can; the text says why for each one tried.
    """
    from melrt.backends.onnxruntime import OnnxRuntime, usable_devices

    devices = usable_devices() if choice.device == "auto" else (choice.device,)
    reasons = []
    for device, precision, graphs in _candidates(bundle, choice, devices):
        try:
            return OnnxRuntime({graph: bundle.read(artifact) for graph, artifact in graphs.items()}, precision, device, choice.threads)
        except BackendError as error:
            reasons.append(f"{precision} on {device}: {error}")
            logger.warning("%s does not run on %s here, trying the next: %s", precision, device, error)
    if len(reasons) == 1:
        raise BackendError(reasons[0])
    raise BackendError(f"nothing in {bundle.path} runs here. " + " · ".join(reasons) if reasons else _nothing_fits(bundle, choice))


def _candidates(bundle: Bundle, choice: Choice, devices: tuple[str, ...]) -> Iterator[tuple[str, str, dict[GraphKind, Artifact]]]:
    for device in devices:
        wanted = _AUTO_PRECISIONS[device] if choice.precision == "auto" else (choice.precision,)
        for precision in wanted:
            edge, interior = (bundle.find("onnx", graph=graph, precision=precision) for graph in ("edge", "interior"))
            if edge and interior:
                yield device, precision, {"edge": edge[0], "interior": interior[0]}


def _nothing_fits(bundle: Bundle, choice: Choice) -> str:
    there = sorted({a.precision for a in bundle.find("onnx")})
    return f"{bundle.path} has no {choice.precision} artefact; it has {', '.join(there) or 'none'}. Export it with `--precision`."
