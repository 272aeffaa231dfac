"""The interface of an inference engine: a voice's graphs, loaded on one device."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt.planning.windows import GraphKind, Policy, ReceptiveField

BACKENDS = ("tensorrt", "onnxruntime")
PRECISIONS = ("fp32", "tf32", "fp16", "int8")


class Backend(Protocol):
    """A voice's two graphs, loaded on one device. Safe to call from several threads."""

    name: str
    """`tensorrt` or `onnxruntime`."""
    device: str
    """`cpu`, `cuda:0`, ..."""
    machine: str
    """The processor or GPU that it runs on."""
    precision: str
    """Of the artifacts."""
    policy: Policy
    """How it likes its windows, where `melrt tune` has not measured it."""
    candidates: tuple[Policy, ...]
    """What `melrt tune` may try instead."""

    def run(self, graph: GraphKind, mel: NDArray[np.float32]) -> NDArray[Any]:
        """Mel frames (B, M, T) through a graph to samples (B, T·hop), float32 or (if so opened) int16, a fresh array."""
        ...

    def close(self) -> None:
        """Give memory back; no run is going on, and none follows."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend that also takes whole mels that are on its GPU."""

    def speak(self, mel: Any, spec: MelSpec, field: ReceptiveField, edges: Edges, policy: Policy) -> Any:
        """A mel on the GPU to audio of the same kind there, in order with the caller's stream."""
        ...
