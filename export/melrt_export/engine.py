"""TensorRT engines from a bundle's ONNX, through Polygraphy's loaders, for the flavour at hand.

`tensorrt` builds on the GPU that the engine is for. `tensorrt_rtx` also builds without one: portable engines, whose kernels
are compiled when they first run. Both are driven strongly typed: the graph says which precision each layer has.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

from melrt.bundle import Artifact, Bundle
from melrt.errors import BundleError, EngineBuildError, MissingExtraError
from melrt.machine import driver_version, find_gpu
from melrt.windows import GraphKind
from melrt_export.audit import audit_engine
from melrt_export.builder import FLAVOURS, Flavour, Progress, build_plan, polygraphy_for
from melrt_export.config import GeneratorConfig
from melrt_export.engine_cache import EngineCache
from melrt_export.gate import speak_on_gpu
from melrt_export.variants import Variant, rewritten

logger = logging.getLogger(__name__)

# Which ONNX graph an engine is built from: TF32 is a way to multiply float32, not a type.
SOURCES = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16", "int8": "int8-fp16"}
PORTABLE = "portable"
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
    flavour: str = "auto"
    """`tensorrt`, `tensorrt_rtx`, or `auto`: the first that is installed."""
    portable: bool = True
    """tensorrt_rtx only: an engine for every supported GPU, built without one; else for the GPU of this machine."""
    graph: GraphKind = "interior"
    """`interior` for windows of one length, `edge` for the ends and for short utterances at any length."""
    variant: Variant = field(default_factory=Variant)
    """The graph's form; `melrt_export.tune` finds the fastest."""
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
        allowed = {"precision": tuple(SOURCES), "flavour": ("auto", *FLAVOURS), "graph": get_args(GraphKind), "compatible": COMPATIBLE}
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

    def check_flavour(self, flavour: Flavour) -> None:
        """Raise EngineBuildError for what a flavour cannot do."""
        if flavour != "tensorrt_rtx":
            return
        if self.compatible == "hardware":
            raise EngineBuildError("tensorrt_rtx has no hardware-compatible engines: a portable one runs on every GPU that it supports.")
        if self.compatible == "version":
            raise EngineBuildError("tensorrt_rtx's wheels lack the library for version-compatible engines; build one for each version.")
        if self.refittable and self.portable:
            raise EngineBuildError("tensorrt_rtx builds refittable engines only for a GPU that is at hand: add --this-gpu, on that GPU.")


@dataclass(frozen=True, slots=True)
class Draft:
    """An engine that was built and checked, and is in no bundle yet."""

    entry: Artifact
    """What the bundle will say of it."""
    plan: bytes
    """The serialised engine."""
    source: Artifact
    """The ONNX graph that it was built from."""

    def keep(self, bundle: Bundle) -> Artifact:
        """Add it to its bundle, in place of an earlier one of its name."""
        return bundle.add(self.entry, self.plan, made_from=self.source)


def build_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> Artifact:
    """Build an engine, check it, and add it to the bundle; the bundle stays as it was if that fails.

    Args and errors: as `draft_engine`.

    Returns:
        The new entry of the bundle.
    """
    return draft_engine(bundle, options, on_progress).keep(bundle)


def draft_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> Draft:
    """Build an engine, audit its precision, and hear it where a GPU is at hand.

    Args:
        bundle: With the ONNX graph of the precision.
        options: What to build.
        on_progress: Called with a phase's name, its steps done and their number.

    Raises:
        EngineBuildError: The builder refuses, or the engine is not of the precision asked for, or says something else.
        BundleError: The bundle lacks the graph, or it is damaged.
        MissingExtraError: Polygraphy or TensorRT is not installed.
    """
    source, onnx = network(bundle, options)
    frames = options.frames or default_frames(options.graph, bundle.manifest.smallest_input)
    if frames[0] < bundle.manifest.smallest_input:
        raise EngineBuildError(f"frames start at {frames[0]}; this network takes at least {bundle.manifest.smallest_input}.")
    flavour = _flavour(options.flavour)
    options.check_flavour(flavour)
    trt = importlib.import_module(flavour)
    target = _target(flavour, options.portable)
    profile = [[b, bundle.manifest.spec.n_mels, t] for b, t in zip(options.batch, frames, strict=True)]
    plan, audited = _plan(trt, onnx, profile, options, target, on_progress)
    facts = {
        "flavour": flavour, "version": trt.__version__, **target, "profile": profile, "source": source.sha256, "audited": audited,
        "compatible": options.compatible, "refittable": options.refittable, "variant": options.variant.to_dict(),
    }  # fmt: skip
    capability = target["compute_capability"]
    where = capability if capability == PORTABLE else f"sm{capability.replace('.', '')}"
    name = f"{options.graph}.{options.precision}.{flavour}-{trt.__version__}-{where}.engine"
    entry = Artifact.of(name, plan, "engine", graph=options.graph, precision=options.precision, target=facts)
    if find_gpu():
        on_progress("speaking", 0, 1)
        entry = replace(entry, quality=speak_on_gpu(bundle, entry, plan, options.graph))
    return Draft(entry, plan, source)


def network(bundle: Bundle, options: EngineOptions) -> tuple[Artifact, bytes]:
    """The graph that an engine is built from: its entry in the bundle, and its bytes in the form that the options name.

    Raises:
        BundleError: The bundle lacks it, or it is damaged.
    """
    source = bundle.find("onnx", graph=options.graph, precision=SOURCES[options.precision])
    if not source:
        remedy = "`melrt calibrate` makes it." if options.precision == "int8" else "Export it with `--precision`."
        raise BundleError(f"{bundle.path} has no {options.graph} graph in {SOURCES[options.precision]}. {remedy}")
    config = GeneratorConfig.from_dict(bundle.manifest.architecture)
    return source[0], rewritten(bundle.read(source[0]), options.variant, config)


def _plan(
    trt: ModuleType, onnx: bytes, profile: list[list[int]], options: EngineOptions, target: dict[str, str], on_progress: Progress
) -> tuple[bytes, str]:
    """The serialised engine, built or from the cache, and what its precision was audited by."""
    settings = [profile, options.precision, options.optimization_level, options.workspace, options.compatible, options.refittable]
    driver = "" if target["compute_capability"] == PORTABLE else driver_version()
    cache = EngineCache.of(onnx, settings, trt.__name__, trt.__version__, target["gpu"], driver)
    plan = cache.load() if options.cached else None
    built = plan is None
    if plan is None:
        with polygraphy_for(trt.__name__) as errors:
            plan = build_plan(trt, onnx, profile, options, on_progress)
            if errors:
                logger.warning("the builder finished, but complained: %s", " · ".join(dict.fromkeys(errors)))
    # A portable plan needs a GPU to be opened at all; where there is none, the network's own types were audited.
    audited = audit_engine(trt, plan, options.precision) if target["compute_capability"] != PORTABLE else "network"
    if built:
        cache.save(plan)
    return plan, audited


def default_frames(graph: GraphKind, smallest: int, window: int = ENGINE_WINDOW) -> tuple[int, int, int]:
    """Smallest, best and largest length of a graph's engine, for windows of this length."""
    if graph == "interior":
        return window, window, window
    # what is longer than a window is cut; most runs are the ends of utterances, a few frames long
    return smallest, max(smallest, EDGE_FRAMES), max(smallest, window)


def _flavour(wanted: str) -> Flavour:
    for flavour in FLAVOURS:
        if wanted in ("auto", flavour):
            with contextlib.suppress(ImportError):
                importlib.import_module(flavour)
                return flavour
    missing = "tensorrt-rtx" if wanted != "tensorrt" else "tensorrt"
    raise MissingExtraError("building an engine", missing, "rtx" if wanted != "tensorrt" else "tensorrt")


def _target(flavour: Flavour, portable: bool) -> dict[str, str]:
    if flavour == "tensorrt_rtx" and portable:
        return {"compute_capability": PORTABLE, "gpu": "any"}
    try:
        from cuda.core import Device

        device = Device()
        capability = device.compute_capability
        return {"compute_capability": f"{capability.major}.{capability.minor}", "gpu": device.name}
    except Exception as error:  # the binding's exceptions have no common base, and a missing driver is any of several
        remedy = "" if flavour == "tensorrt" else " Or build a portable engine, which needs none."
        raise EngineBuildError(f"{flavour} builds on the GPU that the engine is for, and none works here ({error}).{remedy}") from error
