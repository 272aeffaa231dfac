"""Options of an engine build."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from melrt.checks import Rule, check_fields, flag, one_of, optional, whole
from melrt.errors import ConfigError
from melrt.planning.windows import GraphKind
from melrt_export.graph.rewrites import Variant

Flavor = Literal["tensorrt", "tensorrt_rtx"]
Compatibility = Literal["exact", "hardware", "version"]
FLAVORS: tuple[Flavor, ...] = get_args(Flavor)
# Precision of the ONNX graph that each engine is built from. TF32 is a way to multiply float32 numbers, not a type of its own.
SOURCES = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "int8": "int8-fp16"}
# Frames of the interior engine's window, chosen as for the runtime's CUDA backend: the context is under a twentieth of it. Not
# confirmed on a GPU.
ENGINE_WINDOW = 256
# Frames that the edge engine is optimized for: most of its runs are the ends of utterances, a few frames long.
EDGE_FRAMES = 32
MAX_WORKSPACE = 1 << 20

_SIZES = Rule(
    lambda sizes: (
        isinstance(sizes, list | tuple) and len(sizes) == 3 and all(type(n) is int for n in sizes) and 1 <= sizes[0] <= sizes[1] <= sizes[2]
    ),
    "three whole numbers from 1 in rising order: smallest, best, largest",
)
_RULES = {
    "precision": one_of(*SOURCES),
    "flavor": one_of("auto", *FLAVORS),
    "portable": flag(),
    "graph": one_of(*get_args(GraphKind)),
    "batch": _SIZES,
    "frames": optional(_SIZES),
    "optimization_level": optional(whole(0, 5)),
    "workspace": optional(whole(0, MAX_WORKSPACE)),
    "compatible": one_of(*get_args(Compatibility)),
    "refittable": flag(),
    "cached": flag(),
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of an engine build."""

    precision: str = "fp16"
    """`fp32`, `tf32` (float32 multiplied with reduced precision on tensor cores), `fp16`, or `int8` (the layers that `melrt calibrate`
    chose; all others in FP16)."""
    flavor: str = "auto"
    """`tensorrt`, `tensorrt_rtx`, or `auto` for the first of them that is installed."""
    portable: bool = True
    """True for an engine that runs on every supported GPU and is built without one; False for one for the GPU of this machine. Used by
    `tensorrt_rtx` only."""
    graph: GraphKind = "interior"
    """`interior` for windows of one length; `edge` for the ends of utterances and for short utterances, of any length."""
    variant: Variant = field(default_factory=Variant)
    """Form of the graph. `melrt_export.tensorrt.variant_search` finds the fastest."""
    batch: tuple[int, int, int] = (1, 4, 16)
    """Smallest, best and largest batch."""
    frames: tuple[int, int, int] | None = None
    """Smallest, best and largest length in mel frames. None: `interior` gets one static window, and `edge` the lengths from the
    network's smallest input to that window."""
    optimization_level: int | None = None
    """Effort of the builder, from 0 (fast build) to 5 (fast engine); None for the builder's default."""
    timing_cache: Path | None = None
    """File that stores kernel timings between builds; None for one in the user's cache. `tensorrt_rtx` times nothing during a build."""
    workspace: int | None = None
    """Largest scratch memory of a kernel in MiB; None for all of the GPU's memory."""
    compatible: Compatibility = "exact"
    """Compatibility of the engine: `exact` runs on this GPU model with this TensorRT; `hardware` also on other GPUs from Ampere on;
    `version` also with later TensorRT of the same major version. The last two are slower, and need `tensorrt`."""
    refittable: bool = False
    """True if `melrt refit` can exchange the weights later. Such engines are slower."""
    cached: bool = True
    """True to take an engine from the user's cache if it was built there from the same graph with the same settings, TensorRT, GPU
    and driver."""

    def __post_init__(self) -> None:
        check_fields(self, _RULES)

    def check_flavor(self, flavor: Flavor) -> None:
        """Raise ConfigError if this flavor does not support the options."""
        if flavor != "tensorrt_rtx":
            return
        if self.compatible == "hardware":
            raise ConfigError(
                "tensorrt_rtx does not build hardware-compatible engines. A portable engine runs on every GPU that it supports."
            )
        if self.compatible == "version":
            raise ConfigError(
                "tensorrt_rtx does not build version-compatible engines: its wheels lack the library. Build one engine per version."
            )
        if self.refittable and self.portable:
            raise ConfigError(
                "tensorrt_rtx builds refittable engines only for the GPU of the build machine. Add --this-gpu, and build on that GPU."
            )


def default_frames(graph: GraphKind, smallest: int, window: int = ENGINE_WINDOW) -> tuple[int, int, int]:
    """Return the smallest, best and largest length in frames of a graph's engine.

    Args:
        graph: Kind of the graph.
        smallest: The network's smallest input in frames.
        window: Length of the interior engine's window; longer utterances are cut into windows.
    """
    if graph == "interior":
        return window, window, window
    return smallest, max(smallest, EDGE_FRAMES), max(smallest, window)
