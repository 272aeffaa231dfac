"""Options of an engine build."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from melrt.errors import EngineBuildError
from melrt.planning.windows import GraphKind
from melrt_export.graph.rewrites import Variant

# Which ONNX graph an engine is built from: TF32 is a way to multiply float32, not a type.
SOURCES = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "int8": "int8-fp16"}
Flavor = Literal["tensorrt", "tensorrt_rtx"]
FLAVORS: tuple[Flavor, ...] = ("tensorrt", "tensorrt_rtx")
# Not confirmed on a GPU: as the runtime's CUDA window, context under a twentieth of it.
ENGINE_WINDOW = 256
EDGE_FRAMES = 32
MAX_WORKSPACE = 1 << 20
COMPATIBLE = ("exact", "hardware", "version")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What to build."""

    precision: str = "fp16"
    """`fp32`, `tf32` (float32 multiplied at reduced precision on tensor cores), `fp16`, or `int8` (as
    `melrt calibrate` chose its layers, the rest FP16)."""
    flavor: str = "auto"
    """`tensorrt`, `tensorrt_rtx`, or `auto`: the first that is installed."""
    portable: bool = True
    """tensorrt_rtx only: an engine for every supported GPU, built without one; else for the GPU of this machine."""
    graph: GraphKind = "interior"
    """`interior` for windows of one length, `edge` for the ends and for short utterances at any length."""
    variant: Variant = field(default_factory=Variant)
    """The graph's form; `melrt_export.tensorrt.variant_search` finds the fastest."""
    batch: tuple[int, int, int] = (1, 4, 16)
    """Smallest, best and largest batch."""
    frames: tuple[int, int, int] | None = None
    """Smallest, best and largest length in mel frames; None: one static window for `interior`, the smallest input to that for `edge`."""
    optimization_level: int | None = None
    """0 (fast build) to 5 (fast engine); the builder's own default if None."""
    timing_cache: Path | None = None
    """File that keeps kernel timings between builds, in the user's cache folder if None; `tensorrt_rtx` times nothing while it builds."""
    workspace: int | None = None
    """Most scratch memory that a kernel may ask for, MiB; the GPU's memory if None."""
    compatible: Literal["exact", "hardware", "version"] = "exact"
    """tensorrt only: `exact` runs on such a GPU with this TensorRT, `hardware` also on others from Ampere on, `version` also with later
    TensorRT of the same major version; both cost speed."""
    refittable: bool = False
    """The weights can be exchanged later (`melrt refit`); costs some speed."""
    cached: bool = True
    """Take an engine that was built from the same graph with the same settings, TensorRT, GPU and driver, if the user's cache has it."""

    def __post_init__(self) -> None:
        allowed = {"precision": tuple(SOURCES), "flavor": ("auto", *FLAVORS), "graph": get_args(GraphKind), "compatible": COMPATIBLE}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise EngineBuildError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(values)}.")
        for name, span in (("batch", self.batch), ("frames", self.frames)):
            if span is not None and not 1 <= span[0] <= span[1] <= span[2]:
                raise EngineBuildError(f"{name} is {span}; it is smallest,best,largest in rising order, from 1.")
        for name, most in (("optimization_level", 5), ("workspace", MAX_WORKSPACE)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise EngineBuildError(f"{name} is {value}; it lies between 0 and {most}.")

    def check_flavor(self, flavor: Flavor) -> None:
        """Raise EngineBuildError for what a flavor cannot do."""
        if flavor != "tensorrt_rtx":
            return
        if self.compatible == "hardware":
            raise EngineBuildError("tensorrt_rtx has no hardware-compatible engines: a portable one runs on every GPU that it supports.")
        if self.compatible == "version":
            raise EngineBuildError("tensorrt_rtx's wheels lack the library for version-compatible engines; build one for each version.")
        if self.refittable and self.portable:
            raise EngineBuildError("tensorrt_rtx builds refittable engines only for a GPU that is at hand: add --this-gpu, on that GPU.")


def default_frames(graph: GraphKind, smallest: int, window: int = ENGINE_WINDOW) -> tuple[int, int, int]:
    """Smallest, best and largest length of a graph's engine, for windows of this length."""
    if graph == "interior":
        return window, window, window
    # what is longer than a window is cut; most runs are the ends of utterances, a few frames long
    return smallest, max(smallest, EDGE_FRAMES), max(smallest, window)
