"""Exchange the weights of engines: a fine-tuned voice gets the engines of the voice that it was fine-tuned from, without a build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.engine import check_target, flavor, runtime_logger
from melrt.backends.tensorrt.gpu_arrays import current_device
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import is_trusted, sign
from melrt.errors import BundleError, EngineBuildError
from melrt_export.generator.config import GeneratorConfig
from melrt_export.graph.rewrites import Variant, rewrite_graph
from melrt_export.tensorrt.accuracy_check import check_accuracy
from melrt_export.tensorrt.options import SOURCES


def refit_engines(bundle: Bundle, original: Bundle) -> Iterator[Artifact]:
    """Add the refittable engines of another bundle to this one, with this one's weights, each after its accuracy is checked.

    Args:
        bundle: Bundle that gets the engines.
        original: Bundle with the engines, of the same architecture.

    Yields:
        Each new entry of `bundle`.

    Raises:
        EngineBuildError: The original has no refittable engine, TensorRT refuses the weights, or an engine is inaccurate.
        BundleError: The architectures differ, or a graph is missing.
        BackendError: An engine is for another TensorRT or GPU, or this machine has no GPU.
    """
    ours, theirs = (GeneratorConfig.from_dict(one.manifest.architecture).to_dict() for one in (bundle, original))
    if ours != theirs:
        different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        raise BundleError(
            f"{bundle.path} and {original.path} differ in {', '.join(different)}; an engine takes only weights of the same network."
        )
    engines = [entry for entry in original.find("engine") if entry.target.get("refittable") is True]
    if not engines:
        raise EngineBuildError(f"{original.path} has no refittable engine. Build one: melrt build {original.path} --refittable")
    for entry in engines:
        yield _refit(bundle, original, entry)


def _refit(bundle: Bundle, original: Bundle, entry: Artifact) -> Artifact:
    if not is_trusted(entry):
        raise BundleError(f"{entry.file} was not built by this user, and could run any code. If you trust it: melrt trust {original.path}")
    precision = SOURCES[entry.precision]
    source = bundle.find("onnx", graph=entry.graph, precision=precision)
    if not source:
        raise BundleError(f"{bundle.path} has no {entry.graph} graph in {precision}. Export it with `--precision`.")
    device, gpu = open_device(0)
    trt = flavor(entry)
    check_target(entry, trt.__version__, gpu, f"Build it again: melrt build {original.path} --refittable")
    variant = Variant.from_dict(entry.target.get("variant", {}))
    onnx = rewrite_graph(bundle.read(source[0]), variant, GeneratorConfig.from_dict(bundle.manifest.architecture))
    with current_device(device):
        plan = _exchange_weights(trt, original.read(entry), onnx, entry.file)
    target = {**entry.target, "source": source[0].sha256}
    refitted = Artifact.of(entry.name, plan, "engine", graph=entry.graph, precision=entry.precision, target=target)
    quality = check_accuracy(bundle, refitted, plan, "edge" if entry.graph == "edge" else "interior")
    return bundle.add(sign(replace(refitted, quality=quality)), plan, made_from=source[0])


def _exchange_weights(trt: Any, plan: bytes, onnx: bytes, name: str) -> bytes:
    """Return the engine with the weights of the graph."""
    log = runtime_logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineBuildError(f"{name} cannot be opened on this GPU.")
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_bytes(onnx) or not refitter.refit_cuda_engine():
        raise EngineBuildError(f"{name} does not take these weights. Build an engine instead, with `melrt build`.")
    return bytes(memoryview(engine.serialize()))
