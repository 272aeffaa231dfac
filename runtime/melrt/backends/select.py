"""Choose the best artifact of a bundle that this machine can run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from melrt.backends.base import BACKENDS, PRECISIONS, Backend
from melrt.backends.cpu_choice import cpu_choices
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import is_trusted
from melrt.checks import Rule, check_fields, flag, one_of, optional, whole
from melrt.errors import BackendError, ConfigError, MelrtError, MissingExtraError
from melrt.files.audio import SAMPLE_FORMATS, SampleFormat
from melrt.planning.windows import GraphKind
from melrt.system import arithmetic, find_gpu

logger = logging.getLogger(__name__)

MAX_THREADS = 1024
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?")
_DEVICE_RULE = Rule(
    lambda value: isinstance(value, str) and bool(_DEVICE.fullmatch(value)),
    "auto, cpu, cuda, or cuda:N for GPU number N. `melrt doctor` shows the devices",
)
_THREADS_RULE = optional(whole(1, MAX_THREADS))._replace(
    allowed=f"a whole number from 1 to {MAX_THREADS}; the default is one for each usable core"
)
_GPU_PRECISIONS = ("fp16", "tf32", "fp32")
# Compute capabilities on which fused engines were measured (docs/fused.md): H100 and H200 run them faster than ONNX Runtime.
_CONFIRMED = ("9.0",)
# ONNX Runtime has no bfloat16 convolution on a CPU. Its half graph is the float32 graph with casts around it, and slower.
_CPU_BACKENDS = {"bf16": ("openvino",)}


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """Device, precision and backend that the caller asks for; `auto` leaves the choice to melrt."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ..., or `auto`: CUDA if it works."""
    precision: str = "auto"
    """`fp32`, `tf32`, `fp16`, `bf16`, `int8`, or `auto`: the fastest that keeps the voice's quality on the device."""
    backend: str = "auto"
    """`tensorrt`, `fused`, `onnxruntime`, `openvino`, or `auto`: a TensorRT engine if the bundle has one for this GPU, then a
    fused engine where such a GPU was measured."""
    threads: int | None = None
    """CPU threads in all; one per usable core if None."""
    sample_format: SampleFormat = "float32"
    """Format of the samples: `float32`, or `int16` with full scale 32767."""
    trust: bool = False
    """Open engines that nobody vouches for. An engine is executable code (`melrt.bundle.trust`)."""

    def __post_init__(self) -> None:
        rules = {
            "device": _DEVICE_RULE, "precision": one_of("auto", *PRECISIONS), "backend": one_of("auto", *BACKENDS),
            "threads": _THREADS_RULE, "sample_format": one_of(*SAMPLE_FORMATS), "trust": flag(),
        }  # fmt: skip
        check_fields(self, rules)

    @property
    def kind(self) -> str:
        """`auto`, `cpu` or `cuda`."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int:
        """Index of the CUDA device."""
        return int(self.device.partition(":")[2] or 0)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One way to run a voice."""

    description: str
    open: Callable[[], Backend]
    reason: str = ""
    """The reason why `auto` takes it rather than FP32."""


def open_backend(bundle: Bundle, choice: BackendChoice) -> Backend:
    """Load the best artifact of the bundle that this machine can run and the caller allows.

    Raises:
        BackendError: None of them runs here; the text gives the reason for each one tried.
    """
    skipped: dict[str, list[str]] = {}
    errors = []
    for candidate in (*_engines(bundle, choice), *_fused_engines(bundle, choice), *_models(bundle, choice)):
        try:
            backend = candidate.open()
        except (BackendError, MissingExtraError) as error:
            errors.append(error)
            skipped.setdefault(str(error), []).append(candidate.description)
            continue
        if skipped:
            logger.warning("%s is used. Skipped: %s.", candidate.description, "; ".join(line.rstrip(".") for line in _reasons(skipped)))
        if candidate.reason:
            backend.reason = candidate.reason
            logger.info("%s is used: %s.", candidate.description, candidate.reason)
        return backend
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BackendError("\n".join([f"nothing in {bundle.path} runs here:", *_reasons(skipped)]))
    raise BackendError(_nothing_fits(bundle, choice))


def _reasons(skipped: dict[str, list[str]]) -> Iterator[str]:
    """Yield one line for each reason, with the candidates that it applies to."""
    for reason, descriptions in skipped.items():
        yield f"{', '.join(descriptions)}: {reason}"


def _engines(bundle: Bundle, choice: BackendChoice) -> Iterator[_Candidate]:
    """Yield pairs of engines, one for each graph, by precision and then by flavor, the newest first."""
    if choice.backend in ("fused", "onnxruntime", "openvino") or choice.kind == "cpu":
        return
    if (choice.backend, choice.kind) == ("auto", "auto") and find_gpu() is None:
        return  # the caller did not ask for a GPU, so its absence deserves no warning
    for precision in _on_gpu(choice):
        pairs: dict[tuple[str, ...], dict[GraphKind, Artifact]] = {}
        for artifact in bundle.find("engine", precision=precision):
            made_for = tuple(str(artifact.target.get(key)) for key in ("flavor", "version", "compute_capability"))
            pairs.setdefault(made_for, {})[artifact.graph] = artifact  # type: ignore[index]  # other graph names are never looked up
        for made_for, artifacts in reversed(pairs.items()):
            if {"edge", "interior"} <= set(artifacts):
                yield _Candidate(f"the {precision} engine of {' '.join(made_for)}", partial(_open_engines, bundle, artifacts, choice))


def _fused_engines(bundle: Bundle, choice: BackendChoice) -> Iterator[_Candidate]:
    """Yield the fused engine if the caller named it, or if nothing is named and such a GPU has confirmed it."""
    for precision in _on_gpu(choice) if choice.kind != "cpu" and choice.backend in ("auto", "fused") else ():
        for artifact in bundle.find("engine", graph="both", precision=precision):
            if choice.backend == "fused" or _gpu_is_confirmed():
                opened = partial(_open_engines, bundle, {"edge": artifact, "interior": artifact}, choice)
                yield _Candidate(f"the fused engine in {precision}", opened)


def _gpu_is_confirmed() -> bool:
    gpu = find_gpu()
    return gpu is not None and gpu.compute_capability in _CONFIRMED


def _open_engines(bundle: Bundle, artifacts: dict[GraphKind, Artifact], choice: BackendChoice) -> Backend:
    from melrt.backends.fused.backend import Fused
    from melrt.backends.tensorrt.backend import TensorRT

    try:
        trusted = choice.trust or all(is_trusted(artifact) for artifact in artifacts.values())
    except ConfigError as error:  # the key cannot be used: the ONNX graphs still can
        raise BackendError(str(error)) from error
    sources = {entry.sha256 for entry in bundle.find("onnx")}
    if not all(artifact.target.get("source") in sources for artifact in artifacts.values()):
        raise BackendError("the engine was built from another ONNX graph than this bundle's: rebuild it with `melrt build`")
    if not trusted:
        raise BackendError(
            f"the engine was not built by this user, and could run any code. If you trust its origin: melrt trust {bundle.path}; "
            "otherwise rebuild it with `melrt build`"
        )
    try:
        backend = Fused if artifacts["edge"].graph == "both" else TensorRT
        return backend(bundle, artifacts, choice.index, int16=choice.sample_format == "int16")
    except MelrtError:
        raise
    except Exception as error:  # the driver, NVRTC and TensorRT raise many exceptions without a common base
        raise BackendError(f"the engine could not be opened ({type(error).__name__}: {error})") from error


def _models(bundle: Bundle, choice: BackendChoice) -> Iterator[_Candidate]:
    """Yield ONNX models: on the GPU if ONNX Runtime can use it, then on the CPU."""
    tried = choice.kind == "cuda" or (choice.kind == "auto" and choice.precision != "bf16" and _cuda_is_usable())
    if tried and choice.backend in ("auto", "onnxruntime"):
        for precision in _on_gpu(choice):
            yield from _pair(bundle, choice, "onnxruntime", precision, f"cuda:{choice.index}")
    if choice.kind != "cuda":
        for backend, precision, reason in _on_cpu(bundle, choice):
            if choice.backend in ("auto", backend):
                yield from _pair(bundle, choice, backend, precision, "cpu", reason)


def _on_gpu(choice: BackendChoice) -> tuple[str, ...]:
    return _GPU_PRECISIONS if choice.precision == "auto" else (choice.precision,)


def _on_cpu(bundle: Bundle, choice: BackendChoice) -> Iterator[tuple[str, str, str]]:
    """Yield backend, precision and reason of each way to run on the CPU, the best first."""
    precision = "fp32" if choice.precision == "auto" else choice.precision
    if choice.precision == "auto":
        yield from ((way.backend, way.precision, way.reason) for way in cpu_choices(bundle) if way.usable and way.precision != "fp32")
    for backend in _CPU_BACKENDS.get(precision, ("onnxruntime", "openvino")):
        # a backend that the caller did not name, and that is not installed, deserves no warning
        if backend == "onnxruntime" or choice.precision == "bf16" or choice.backend == backend or find_spec(backend):
            yield backend, precision, ""


def _pair(bundle: Bundle, choice: BackendChoice, backend: str, precision: str, device: str, reason: str = "") -> Iterator[_Candidate]:
    """Yield the candidate that runs both graphs of a precision, if the bundle has them."""
    stored = precision
    if (backend, precision) == ("openvino", "int8") and bundle.find("onnx", precision="int8-fp16"):
        stored = "int8-fp16"  # made for TensorRT; OpenVINO fuses its signed bytes better: 2.2 against 1.9 times FP32's speed
    if precision == choice.precision == "tf32" and device != "cpu":
        stored = "fp32"  # a way to multiply float32 numbers; `auto` computes an FP32 graph in FP32
    edge, interior = (bundle.find("onnx", graph=graph, precision=stored) for graph in ("edge", "interior"))
    if edge and interior:
        models: dict[GraphKind, Artifact] = {"edge": edge[0], "interior": interior[0]}
        name = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[backend]
        opened = partial(_open_models, bundle, models, (backend, precision, device), choice.threads)
        yield _Candidate(f"{precision} in {name} on {device}", opened, reason)


def _cuda_is_usable() -> bool:
    from melrt.backends.onnxruntime import usable_devices

    return find_spec("onnxruntime") is not None and "cuda" in usable_devices()


def _open_models(bundle: Bundle, models: dict[GraphKind, Artifact], way: tuple[str, str, str], threads: int | None) -> Backend:
    """Open models in a backend, precision and device."""
    from melrt.backends.onnxruntime import OnnxRuntime
    from melrt.backends.openvino import OpenVino

    backend, precision, device = way
    contents = {graph: bundle.read(artifact) for graph, artifact in models.items()}
    if precision == "bf16" and not arithmetic("bfloat16"):
        raise BackendError("this processor does not multiply bfloat16 (`melrt doctor` shows what it multiplies); take another precision.")
    return OpenVino(contents, precision, threads) if backend == "openvino" else OnnxRuntime(contents, precision, device, threads)


def _nothing_fits(bundle: Bundle, choice: BackendChoice) -> str:
    available = ", ".join(sorted({f"{a.precision} {a.kind}" for kind in ("engine", "onnx") for a in bundle.find(kind)})) or "none"
    asked = "" if choice.precision == "auto" else f"{choice.precision} "
    if choice.backend == "fused" and choice.precision not in ("auto", "fp16"):
        return f"fused engines compute in fp16, not {choice.precision}. Leave the precision out, or choose another backend."
    if choice.backend == "fused":
        return f"{bundle.path} has no fused engine; it has {available}. `melrt build {bundle.path} --engine fused` makes one."
    if choice.backend == "tensorrt":
        return f"{bundle.path} has no {asked}engines of both graphs; it has {available}. `melrt build` makes them."
    if bundle.find("onnx", precision=choice.precision if asked else ""):
        return f"{asked}does not run in {choice.backend} on {choice.device}: OpenVINO runs on a CPU only, and bf16 in OpenVINO only."
    remedy = "`melrt calibrate` makes it." if choice.precision == "int8" else "Export it with `--precision`."
    return f"{bundle.path} has no {asked}artifact; it has {available}. {remedy}"
