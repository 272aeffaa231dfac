"""TensorRT engines from a bundle's ONNX, through Polygraphy's loaders, for the flavour at hand.

`tensorrt` builds on the GPU that the engine is for. `tensorrt_rtx` also builds without one: portable engines, whose kernels
are compiled when they first run. Both are driven strongly typed: the graph says which precision each layer has.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from melrt.bundle import Artifact, Bundle
from melrt.errors import BundleError, EngineBuildError, MissingExtraError
from melrt.files import user_cache
from melrt.machine import find_gpu
from melrt.windows import GraphKind
from melrt_export.audit import audit_engine, audit_network
from melrt_export.gate import speak_on_gpu

logger = logging.getLogger(__name__)

Flavour = Literal["tensorrt", "tensorrt_rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
# Which ONNX graph an engine is built from: TF32 is a way to multiply float32, not a type.
SOURCES = {"fp32": "fp32", "tf32": "fp32", "fp16": "fp16"}
Progress = Callable[[str, int, int], None]
PORTABLE = "portable"
# Not confirmed on a GPU: as the runtime's CUDA window, context under a twentieth of it.
ENGINE_WINDOW = 256
EDGE_FRAMES = 32


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What to build."""

    precision: str = "fp16"
    """`fp32`, `tf32` (float32 multiplied at reduced precision on tensor cores) or `fp16`."""
    flavour: str = "auto"
    """`tensorrt`, `tensorrt_rtx`, or `auto`: the first that is installed."""
    portable: bool = True
    """tensorrt_rtx only: an engine for every supported GPU, built without one; else for the GPU of this machine."""
    graph: GraphKind = "interior"
    """`interior` for windows of one length, `edge` for the ends and for short utterances at any length."""
    batch: tuple[int, int, int] = (1, 4, 16)
    """Smallest, best and largest batch."""
    frames: tuple[int, int, int] | None = None
    """Smallest, best and largest length in mel frames; None: one static window for `interior`, the smallest input to that for `edge`."""
    optimization_level: int | None = None
    """0 (fast build) to 5 (fast engine); the builder's own default if None."""
    timing_cache: Path | None = None
    """File that keeps kernel timings between builds, in the user's cache folder if None; `tensorrt_rtx` times nothing while it builds."""

    def __post_init__(self) -> None:
        if self.precision not in SOURCES:
            raise EngineBuildError(f"precision is {self.precision!r}; engines are built in {', '.join(SOURCES)}.")
        if self.flavour not in ("auto", *FLAVOURS):
            raise EngineBuildError(f"flavour is {self.flavour!r}; it is one of auto, {', '.join(FLAVOURS)}.")
        if self.graph not in get_args(GraphKind):
            raise EngineBuildError(f"graph is {self.graph!r}; it is one of {', '.join(get_args(GraphKind))}.")
        for name, span in (("batch", self.batch), ("frames", self.frames)):
            if span is not None and not 1 <= span[0] <= span[1] <= span[2]:
                raise EngineBuildError(f"{name} is {span}; it is smallest,best,largest in rising order, from 1.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise EngineBuildError(f"optimisation level is {self.optimization_level}; it lies between 0 and 5.")


def build_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> Artifact:
    """Build an engine, audit its precision, and add it to the bundle; the bundle stays as it was if that fails.

    Args:
        bundle: With the ONNX graph of the precision.
        options: What to build.
        on_progress: Called with a phase's name, its steps done and their number.

    Returns:
        The new entry of the bundle.

    Raises:
        EngineBuildError: The builder refuses, or the engine is not of the precision asked for.
        BundleError: The bundle lacks the graph, or it is damaged.
        MissingExtraError: Polygraphy or TensorRT is not installed.
    """
    source = bundle.find("onnx", graph=options.graph, precision=SOURCES[options.precision])
    if not source:
        raise BundleError(f"{bundle.path} has no {options.graph} graph in {SOURCES[options.precision]}. Export it with `--precision`.")
    frames = options.frames or _default_frames(options.graph, bundle.manifest.smallest_input)
    if frames[0] < bundle.manifest.smallest_input:
        raise EngineBuildError(f"frames start at {frames[0]}; this network takes at least {bundle.manifest.smallest_input}.")
    flavour = _flavour(options.flavour)
    trt = importlib.import_module(flavour)
    target = _target(flavour, options.portable)
    profile = [[b, bundle.manifest.spec.n_mels, t] for b, t in zip(options.batch, frames, strict=True)]
    onnx = bundle.read(source[0])
    with _polygraphy(flavour) as errors:
        plan = _build(trt, flavour, onnx, profile, options, on_progress)
        if errors:
            logger.warning("the builder finished, but complained: %s", " · ".join(dict.fromkeys(errors)))
        # A portable plan needs a GPU to be opened at all; where there is none, the network's own types were audited.
        audited = audit_engine(trt, plan, options.precision) if target["compute_capability"] != PORTABLE else "network"
    facts = {"flavour": flavour, "version": trt.__version__, **target, "profile": profile, "source": source[0].sha256, "audited": audited}
    capability = target["compute_capability"]
    where = capability if capability == PORTABLE else f"sm{capability.replace('.', '')}"
    name = f"{options.graph}.{options.precision}.{flavour}-{trt.__version__}-{where}.engine"
    entry = Artifact.of(name, plan, "engine", graph=options.graph, precision=options.precision, target=facts)
    if find_gpu():
        on_progress("speaking", 0, 1)
        entry = replace(entry, quality=speak_on_gpu(bundle, entry, plan, options.graph))
    return bundle.add(entry, plan, made_from=source[0])


def _default_frames(graph: GraphKind, smallest: int) -> tuple[int, int, int]:
    if graph == "interior":
        return ENGINE_WINDOW, ENGINE_WINDOW, ENGINE_WINDOW
    # what is longer than a window is cut; most runs are the ends of utterances, a few frames long
    return smallest, max(smallest, EDGE_FRAMES), max(smallest, ENGINE_WINDOW)


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


@contextlib.contextmanager
def _polygraphy(flavour: Flavour) -> Iterator[list[str]]:
    """Set Polygraphy to a flavour, and collect what the builder complains of instead of printing it."""
    try:
        from polygraphy import config
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingExtraError("building an engine", "polygraphy", "rtx" if flavour == "tensorrt_rtx" else "tensorrt") from error
    config.USE_TENSORRT_RTX = flavour == "tensorrt_rtx"  # read when Polygraphy first touches TensorRT: one flavour a process
    collector = _Collector()
    G_LOGGER.use_python_logging_system = True
    sink = logging.getLogger("Polygraphy")
    sink.addHandler(collector)
    propagate, sink.propagate = sink.propagate, False
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            yield collector.messages
    except PolygraphyException as error:
        raise EngineBuildError(" · ".join(dict.fromkeys([*collector.messages, str(error)]))) from error
    finally:
        sink.removeHandler(collector)
        sink.propagate = propagate


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().strip())


def _build(trt: Any, flavour: Flavour, onnx: bytes, profile: list[list[int]], options: EngineOptions, on_progress: Progress) -> bytes:
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxBytes, Profile
    from polygraphy.exception import PolygraphyException

    # where the flag is gone, every network is strongly typed
    flagged = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, parser = NetworkFromOnnxBytes(onnx, strongly_typed=flagged)()
    audit_network(trt, network, options.precision)
    monitor = _monitor(trt, on_progress)
    common = {
        "profiles": [Profile().add("mel", *profile)],
        "builder_optimization_level": options.optimization_level,
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # the inspector says each layer's type
    }
    cache: dict[str, str] = {}
    if flavour == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create = CreateConfigRTX(use_gpu=not options.portable, **common)
    else:
        file = options.timing_cache or user_cache() / f"{flavour}-{trt.__version__}.timing"
        file.parent.mkdir(parents=True, exist_ok=True)
        cache = {"save_timing_cache": str(file)}
        common["load_timing_cache"] = str(file)
        create = CreateConfig(tf32=options.precision == "tf32", **common)

    def configure(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        flag = trt.BuilderFlag.TF32  # on by default; CreateConfigRTX leaves it so
        config.set_flag(flag) if options.precision == "tf32" else config.clear_flag(flag)
        return config

    try:
        return bytes(EngineBytesFromNetwork((builder, network, parser), config=configure, **cache)())
    except PolygraphyException:
        if monitor.interrupted:
            raise KeyboardInterrupt from None
        raise


def _monitor(trt: Any, on_progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Hands the builder's phases on; an exception in a callback cannot cross the builder, so Ctrl-C is kept for after it."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps[phase_name])

        def _tell(self, phase_name: str, done: int) -> None:
            try:
                on_progress(phase_name, done, self.steps.get(phase_name, 1))
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
