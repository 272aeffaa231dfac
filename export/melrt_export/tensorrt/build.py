"""TensorRT engines from a bundle's ONNX, through Polygraphy's loaders, for the flavor at hand.

`tensorrt` builds on the GPU that the engine is for. `tensorrt_rtx` also builds without one: portable engines, whose kernels
are compiled when they first run. Both are driven strongly typed: the graph says which precision each layer has.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import dataclass, replace
from types import ModuleType

from melrt.bundle import Artifact, Bundle
from melrt.errors import BundleError, EngineBuildError, MissingExtraError
from melrt.system import driver_version, find_gpu
from melrt_export.generator.config import GeneratorConfig
from melrt_export.graph.rewrites import rewritten
from melrt_export.tensorrt.accuracy_check import check_accuracy
from melrt_export.tensorrt.audit import audit_engine
from melrt_export.tensorrt.cache import EngineCache
from melrt_export.tensorrt.options import FLAVORS, SOURCES, EngineOptions, Flavor, default_frames
from melrt_export.tensorrt.polygraphy import Progress, build_plan, polygraphy_for

logger = logging.getLogger(__name__)

PORTABLE = "portable"


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that was built and checked, and is in no bundle yet."""

    entry: Artifact
    """What the bundle will say of it."""
    plan: bytes
    """The serialized engine."""
    source: Artifact
    """The ONNX graph that it was built from."""

    def keep(self, bundle: Bundle) -> Artifact:
        """Add it to its bundle, in place of an earlier one of its name."""
        return bundle.add(self.entry, self.plan, made_from=self.source)


def build_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> Artifact:
    """Build an engine, check it, and add it to the bundle; the bundle stays as it was if that fails.

    Args and errors: as `build_unsaved_engine`.

    Returns:
        The new entry of the bundle.
    """
    return build_unsaved_engine(bundle, options, on_progress).keep(bundle)


def build_unsaved_engine(bundle: Bundle, options: EngineOptions, on_progress: Progress = lambda *_: None) -> BuiltEngine:
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
    frames = options.frames or default_frames(options.graph, bundle.manifest.receptive_field.smallest_input)
    if frames[0] < bundle.manifest.receptive_field.smallest_input:
        raise EngineBuildError(
            f"frames start at {frames[0]}; this network takes at least {bundle.manifest.receptive_field.smallest_input}."
        )
    flavor = _flavor(options.flavor)
    options.check_flavor(flavor)
    trt = importlib.import_module(flavor)
    target = _target(flavor, options.portable)
    profile = [[b, bundle.manifest.spec.n_mels, t] for b, t in zip(options.batch, frames, strict=True)]
    plan, audited = _plan(trt, onnx, profile, options, target, on_progress)
    facts = {
        "flavor": flavor, "version": trt.__version__, **target, "profile": profile, "source": source.sha256, "audited": audited,
        "compatible": options.compatible, "refittable": options.refittable, "variant": options.variant.to_dict(),
    }  # fmt: skip
    capability = target["compute_capability"]
    where = capability if capability == PORTABLE else f"sm{capability.replace('.', '')}"
    name = f"{options.graph}.{options.precision}.{flavor}-{trt.__version__}-{where}.engine"
    entry = Artifact.of(name, plan, "engine", graph=options.graph, precision=options.precision, target=facts)
    if find_gpu():
        on_progress("speaking", 0, 1)
        entry = replace(entry, quality=check_accuracy(bundle, entry, plan, options.graph))
    return BuiltEngine(entry, plan, source)


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
    """The serialized engine, built or from the cache, and what its precision was audited by."""
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


def _flavor(wanted: str) -> Flavor:
    for flavor in FLAVORS:
        if wanted in ("auto", flavor):
            with contextlib.suppress(ImportError):
                importlib.import_module(flavor)
                return flavor
    missing = "tensorrt-rtx" if wanted != "tensorrt" else "tensorrt"
    raise MissingExtraError("building an engine", missing, "rtx" if wanted != "tensorrt" else "tensorrt")


def _target(flavor: Flavor, portable: bool) -> dict[str, str]:
    if flavor == "tensorrt_rtx" and portable:
        return {"compute_capability": PORTABLE, "gpu": "any"}
    try:
        from cuda.core import Device

        device = Device()
        capability = device.compute_capability
        return {"compute_capability": f"{capability.major}.{capability.minor}", "gpu": device.name}
    except Exception as error:  # the binding's exceptions have no common base, and a missing driver is any of several
        remedy = "" if flavor == "tensorrt" else " Or build a portable engine, which needs none."
        raise EngineBuildError(f"{flavor} builds on the GPU that the engine is for, and none works here ({error}).{remedy}") from error
