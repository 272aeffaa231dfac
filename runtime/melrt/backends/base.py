"""The interface of an inference engine: a voice's two graphs, loaded on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from melrt.planning.edges import Edges
from melrt.planning.windows import GraphKind, Policy, Window
from melrt.types import Audio, Mel

BACKENDS = ("tensorrt", "fused", "onnxruntime", "openvino")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")


class Backend(Protocol):
    """A voice's two graphs, loaded on one device. Safe to call from several threads."""

    name: str
    """`tensorrt`, `fused`, `onnxruntime` or `openvino`."""
    device: str
    """`cpu`, `cuda:0`, ..."""
    machine: str
    """Name of the processor or GPU."""
    precision: str
    """Precision of the artifacts."""
    reason: str
    """Sentence that says why `auto` took this precision on a CPU; empty if the caller named it, or on a GPU."""
    policy: Policy
    """Default windows, used until `melrt tune` has measured this machine."""
    candidates: tuple[Policy, ...]
    """Windows that `melrt tune` tries."""

    def run(self, graph: GraphKind, mel: Mel) -> Audio:
        """Run mel frames (B, M, T) on the host through a graph.

        Returns:
            Samples (B, T*hop), float32 or (if the backend was opened so) int16. A fresh array.
        """
        ...

    def close(self) -> None:
        """Release the memory. No run is in progress, and none follows."""
        ...


class WindowBackend(Backend, Protocol):
    """A backend beside the processor that reuses its own host memory: audio is copied once, to its place in the caller's result."""

    def run_windows(self, graph: GraphKind, windows: Sequence[Mel], meanwhile: Callable[[], None], keep: Callable[[Audio], None]) -> None:
        """Run windows (M, T) of one length through a graph.

        Args:
            graph: Kind of the graph.
            windows: Windows on the host, which need not be contiguous.
            meanwhile: Called once while the device computes: work of the host that would otherwise delay the audio.
            keep: Called once with the samples (B, T*hop), all finite, in memory that a later run overwrites.

        Raises:
            BackendError: The run failed, or a sample is not finite.
        """
        ...


@dataclass(frozen=True, slots=True)
class DeviceUtterance:
    """One utterance of a mel in GPU memory, and its place in the output there."""

    mel: Any
    """The backend's view of the whole mel."""
    audio: Any
    """The backend's view of the whole output."""
    index: int
    """Index of the utterance in the batch."""
    edges: Edges
    """Frames added at its ends."""


class DeviceMelView(Protocol):
    """A mel in GPU memory that a backend can read there."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, bands and frames."""
        ...


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend that also reads mels in the memory of its GPU and writes audio there."""

    def view_mel(self, mel: object) -> DeviceMelView:
        """Look at a mel (M, T) or (B, M, T) without copying it.

        Raises:
            MelError: Another shape or dtype than float32, or memory of another device or context.
        """
        ...

    def make_audio(self, mel: DeviceMelView, samples: int) -> tuple[Any, Any]:
        """Make the output of a mel: the caller's array, (N,) or (B, N), and the backend's view of it.

        Raises:
            MelError: The mel's library is not one that melrt can make arrays of.
        """
        ...

    def run_on_device(self, jobs: Sequence[tuple[DeviceUtterance, Window]]) -> None:
        """Queue windows of one graph and length, in order with the streams that their mels were made on. Nothing is waited for."""
        ...
