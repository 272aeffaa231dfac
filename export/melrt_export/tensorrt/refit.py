"""A fine-tuned voice in the engine of the one it began as: the weights are exchanged in milliseconds, nothing is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.engine import check_target, flavor, runtime_logger
from melrt.bundle import Artifact, Bundle
from melrt.errors import BundleError, EngineBuildError
from melrt_export.generator.config import GeneratorConfig
from melrt_export.graph.rewrites import Variant, rewritten
from melrt_export.tensorrt.accuracy_check import check_accuracy
from melrt_export.tensorrt.options import SOURCES


def refit_engines(bundle: Bundle, donor: Bundle) -> Iterator[Artifact]:
    """Give a bundle the donor's refittable engines with its own weights, each heard before it is kept.

    Raises:
        EngineBuildError: The donor has none, or TensorRT refuses.
        BundleError: The two are of different architectures, or a graph is missing.
        BackendError: An engine is for another TensorRT or GPU, or there is no GPU.
    """
    mine, theirs = (GeneratorConfig.from_dict(one.manifest.architecture).to_dict() for one in (bundle, donor))
    if mine != theirs:
        different = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        raise BundleError(f"{bundle.path} and {donor.path} differ in {', '.join(different)}; only the same network can take other weights.")
    engines = [entry for entry in donor.find("engine") if entry.target.get("refittable") is True]
    if not engines:
        raise EngineBuildError(f"{donor.path} has no refittable engine: melrt build {donor.path} --refittable")
    for entry in engines:
        yield _refit(bundle, donor, entry)


def _refit(bundle: Bundle, donor: Bundle, entry: Artifact) -> Artifact:
    precision = SOURCES[entry.precision]
    source = bundle.find("onnx", graph=entry.graph, precision=precision)
    if not source:
        raise BundleError(f"{bundle.path} has no {entry.graph} graph in {precision}. Export it with `--precision`.")
    _, gpu = open_device(0)
    trt = flavor(entry)
    check_target(entry, trt.__version__, gpu, f"Build it anew: melrt build {donor.path} --refittable")
    variant = Variant.from_dict(entry.target.get("variant", {}))
    onnx = rewritten(bundle.read(source[0]), variant, GeneratorConfig.from_dict(bundle.manifest.architecture))
    plan = _exchange(trt, donor.read(entry), onnx, entry.file)
    facts = dict(entry.target) | {"source": source[0].sha256}
    refitted = Artifact.of(entry.name, plan, "engine", graph=entry.graph, precision=entry.precision, target=facts)
    quality = check_accuracy(bundle, refitted, plan, "edge" if entry.graph == "edge" else "interior")
    return bundle.add(replace(refitted, quality=quality), plan, made_from=source[0])


def _exchange(trt: Any, plan: bytes, onnx: bytes, name: str) -> bytes:
    log = runtime_logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineBuildError(f"{name} cannot be opened on this GPU.")
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_bytes(onnx) or not refitter.refit_cuda_engine():
        raise EngineBuildError(f"{name} does not take these weights; build an engine instead.")
    return bytes(memoryview(engine.serialize()))
