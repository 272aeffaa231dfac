"""Build TensorRT engines from a bundle's ONNX graphs, with Polygraphy and the installed flavor of TensorRT.

`tensorrt` builds on the GPU that the engine is for. `tensorrt_rtx` also builds without a GPU: its portable engines compile their
kernels at the first run. Both build strongly typed networks: the graph determines the precision of each layer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import dataclass, replace
from types import ModuleType

from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import sign
from melrt.errors import BundleError, ConfigError, EngineBuildError, MissingExtraError
from melrt.planning.windows import ReceptiveField, short_windows
from melrt.system import driver_version, find_gpu
from melrt_export.generator.config import GeneratorConfig
from melrt_export.graph.rewrites import rewrite_graph
from melrt_export.int8_plan import check_int8
from melrt_export.tensorrt.accuracy_check import check_accuracy
from melrt_export.tensorrt.audit import audit_engine, audit_plan
from melrt_export.tensorrt.cache import CachedEngine
from melrt_export.tensorrt.options import FLAVORS, SOURCES, EngineOptions, Flavor, default_frames
from melrt_export.tensorrt.polygraphy import Progress, build_plan, polygraphy_for

logger = logging.getLogger(__name__)

PORTABLE = "portable"


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """Engine that passed its checks."""

    entry: Artifact
    """Entry of the engine in a bundle's manifest."""
    plan: bytes
    """Serialized engine."""
    source: Artifact
    """ONNX graph that the engine was built from."""
    cached: bool
    """True if the engine was taken from the user's cache instead of built."""

    def add_to(self, bundle: Bundle) -> BuiltEngine:
        """Sign the engine, add it to its bundle in place of one with the same name, and return it with its entry there."""
        return replace(self, entry=bundle.add(sign(self.entry), self.plan, made_from=self.source))


@dataclass(frozen=True, slots=True)
class _Target:
    """TensorRT and GPU that an engine is for."""

    trt: ModuleType
    compute_capability: str
    gpu: str

    @property
    def portable(self) -> bool:
        return self.compute_capability == PORTABLE

    @property
    def label(self) -> str:
        """Part of the engine's name, such as `tensorrt-10.13.0-sm90`."""
        where = PORTABLE if self.portable else f"sm{self.compute_capability.replace('.', '')}"
        return f"{self.trt.__name__}-{self.trt.__version__}-{where}"


def build_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> Artifact:
    """Build an engine, check it, and add it to the bundle. The bundle does not change if the build fails.

    Arguments and errors are those of `build_unsaved_engine`.

    Returns:
        The new entry of the bundle.
    """
    return build_unsaved_engine(bundle, options, on_progress).add_to(bundle).entry


def build_unsaved_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> BuiltEngine:
    """Build an engine, audit its precision, and check its accuracy if this machine has a GPU.

    Args:
        bundle: Bundle with the ONNX graph of the precision.
        options: Options of the build.
        on_progress: Called with the name of a phase, its steps done and their number.

    Raises:
        EngineBuildError: The builder refuses the graph, or the engine has the wrong precision or is inaccurate.
        BundleError: The bundle lacks the graph or is damaged.
        MissingExtraError: Polygraphy or TensorRT is not installed.
    """
    source, onnx = source_graph(bundle, options)
    profile = _profile(bundle, options)
    profiles = _static_profiles(profile, bundle.manifest.receptive_field) or [profile]
    flavor = _choose_flavor(options.flavor)
    options.check_flavor(flavor)
    target = _find_target(flavor, options.portable)
    cache = _cache_file(target, onnx, profiles, options)
    plan = cache.load() if options.cached else None
    cached = plan is not None
    if plan is None:
        plan = _build(target.trt, onnx, profiles, options, on_progress)
    audited = audit_plan(plan, onnx, options.precision)
    if audited == "network" and not target.portable:  # opening a plan needs a GPU, which a portable build may not have
        audited = audit_engine(target.trt, plan, options.precision)
    if not cached:
        cache.save(plan)
    facts = {
        "flavor": flavor, "version": target.trt.__version__, "compute_capability": target.compute_capability, "gpu": target.gpu,
        "profile": profile, "profiles": profiles, "source": source.sha256, "audited": audited, "compatible": options.compatible,
        "refittable": options.refittable, "variant": options.variant.to_dict(),
    }  # fmt: skip
    name = f"{options.graph}.{options.precision}.{target.label}.engine"
    entry = Artifact.of(name, plan, "engine", graph=options.graph, precision=options.precision, target=facts)
    if find_gpu():
        on_progress("checking accuracy", 0, 1)
        entry = replace(entry, quality=check_accuracy(bundle, entry, plan, options.graph))
    return BuiltEngine(entry, plan, source, cached)


def source_graph(bundle: Bundle, options: EngineOptions) -> tuple[Artifact, bytes]:
    """Return the bundle's entry of the graph that an engine is built from, and the graph in the form of `options.variant`.

    Raises:
        BundleError: The bundle lacks the graph or is damaged.
        CalibrationError: The bundle has INT8 of an older melrt.
    """
    precision = SOURCES[options.precision]
    if options.precision == "int8":
        check_int8(bundle)
    source = bundle.find("onnx", graph=options.graph, precision=precision)
    if not source:
        remedy = (
            "`melrt calibrate` writes it if it is within the budget." if options.precision == "int8" else "Export it with `--precision`."
        )
        raise BundleError(f"{bundle.path} has no {options.graph} graph in {precision}. {remedy}")
    config = GeneratorConfig.from_dict(bundle.manifest.architecture)
    return source[0], rewrite_graph(bundle.read(source[0]), options.variant, config)


def _profile(bundle: Bundle, options: EngineOptions) -> list[list[int]]:
    """Return the smallest, best and largest shape (B, M, T) of the engine's input."""
    smallest = bundle.manifest.receptive_field.smallest_input
    frames = options.frames or default_frames(options.graph, smallest)
    if frames[0] < smallest:
        raise ConfigError(f"frames is {frames}, which starts at {frames[0]}; this network takes at least {smallest}.")
    return [[b, bundle.manifest.spec.n_mels, t] for b, t in zip(options.batch, frames, strict=True)]


def _static_profiles(profile: list[list[int]], field: ReceptiveField) -> list[list[list[int]]]:
    """Return the optimization profiles of a window of one length; none for several lengths.

    The window has one for each batch 1, 2, 4, ..., and each shorter window one for the smallest, best and largest batch. A kernel for a
    fixed shape computes no addresses at run time, and its plan has no shape copies.
    """
    (smallest, bands, least), (best, _, _), (largest, _, most) = profile
    if least != most:
        return []
    batches = {smallest, largest, *(1 << power for power in range(largest.bit_length()) if smallest < 1 << power < largest)}
    shapes = [(batch, most) for batch in sorted(batches)]
    shapes += [(batch, length) for length in short_windows(field, most) for batch in sorted({smallest, best, largest})]
    return [[[batch, bands, length]] * 3 for batch, length in shapes]


def _build(trt: ModuleType, onnx: bytes, profiles: list[list[list[int]]], options: EngineOptions, on_progress: Progress) -> bytes:
    with polygraphy_for(trt.__name__) as messages:
        plan = build_plan(trt, onnx, profiles, options, on_progress)
        if messages:
            logger.warning("the builder finished, but reported errors: %s", " · ".join(dict.fromkeys(messages)))
    return plan


def _cache_file(target: _Target, onnx: bytes, profiles: list[list[list[int]]], options: EngineOptions) -> CachedEngine:
    settings = [profiles, options.precision, options.optimization_level, options.workspace, options.compatible, options.refittable]
    driver = "" if target.portable else driver_version()
    return CachedEngine.locate(onnx, settings, target.trt.__name__, target.trt.__version__, target.gpu, driver)


def _choose_flavor(wanted: str) -> Flavor:
    for flavor in FLAVORS:
        if wanted in ("auto", flavor):
            with contextlib.suppress(ImportError):
                importlib.import_module(flavor)
                return flavor
    missing = "tensorrt-rtx" if wanted != "tensorrt" else "tensorrt"
    raise MissingExtraError("building an engine", missing, "rtx" if wanted != "tensorrt" else "tensorrt")


def _find_target(flavor: Flavor, portable: bool) -> _Target:
    trt = importlib.import_module(flavor)
    if flavor == "tensorrt_rtx" and portable:
        return _Target(trt, PORTABLE, "any")
    try:
        from cuda.core import Device

        device = Device()
        capability = device.compute_capability
        return _Target(trt, f"{capability.major}.{capability.minor}", device.name)
    except Exception as error:  # the binding's exceptions have no common base class, and a missing driver raises any of several
        remedy = "" if flavor == "tensorrt" else " Or build a portable engine, which needs no GPU."
        raise EngineBuildError(f"{flavor} builds on the GPU that the engine is for, but no GPU works here ({error}).{remedy}") from error
