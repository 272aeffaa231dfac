"""Choose the best artifact of a bundle that this machine can run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from melrt.backends.base import BACKENDS, PRECISIONS, Backend
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import is_trusted
from melrt.checks import Rule, check_fields, flag, one_of, optional, whole
from melrt.errors import BackendError, ConfigError, MelrtError, MissingExtraError
from melrt.files.audio import SAMPLE_FORMATS, SampleFormat
from melrt.planning.windows import GraphKind
from melrt.system import find_gpu

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
# A CPU has no half-precision convolutions: there the half graph is the float32 graph with casts around it, and slower.
_AUTO_PRECISIONS = {"cuda": ("fp16", "tf32", "fp32"), "cpu": ("fp32",)}


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """Device, precision and backend that the caller asks for; `auto` leaves the choice to melrt."""

    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ..., or `auto`: CUDA if it works."""
    precision: str = "auto"
    """`fp32`, `tf32`, `fp16`, `int8`, or `auto`: the fastest that keeps the voice's quality on the device."""
    backend: str = "auto"
    """`tensorrt`, `onnxruntime`, or `auto`: an engine if the bundle has one for this GPU."""
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


def open_backend(bundle: Bundle, choice: BackendChoice) -> Backend:
    """Load the best artifact of the bundle that this machine can run and the caller allows.

    Raises:
        BackendError: None of them runs here; the text gives the reason for each one tried.
    """
    skipped: dict[str, list[str]] = {}
    errors = []
    for candidate in (*_engines(bundle, choice), *_models(bundle, choice)):
        try:
            backend = candidate.open()
        except (BackendError, MissingExtraError) as error:
            errors.append(error)
            skipped.setdefault(str(error), []).append(candidate.description)
            continue
        if skipped:
            logger.warning("%s is used. Skipped: %s.", candidate.description, "; ".join(line.rstrip(".") for line in _reasons(skipped)))
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
    if choice.backend == "onnxruntime" or choice.kind == "cpu":
        return
    if (choice.backend, choice.kind) == ("auto", "auto") and find_gpu() is None:
        return  # the caller did not ask for a GPU, so its absence deserves no warning
    for precision in _wanted(choice, "cuda"):
        pairs: dict[tuple[str, ...], dict[GraphKind, Artifact]] = {}
        for artifact in bundle.find("engine", precision=precision):
            made_for = tuple(str(artifact.target.get(key)) for key in ("flavor", "version", "compute_capability"))
            pairs.setdefault(made_for, {})[artifact.graph] = artifact  # type: ignore[index]  # other graph names are never looked up
        for made_for, artifacts in reversed(pairs.items()):
            if {"edge", "interior"} <= set(artifacts):
                yield _Candidate(f"the {precision} engine of {' '.join(made_for)}", partial(_open_engines, bundle, artifacts, choice))


def _open_engines(bundle: Bundle, artifacts: dict[GraphKind, Artifact], choice: BackendChoice) -> Backend:
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
        return TensorRT(bundle, artifacts, choice.index, int16=choice.sample_format == "int16")
    except MelrtError:
        raise
    except Exception as error:  # the driver, NVRTC and TensorRT raise many exceptions without a common base
        raise BackendError(f"the engine could not be opened ({type(error).__name__}: {error})") from error


def _models(bundle: Bundle, choice: BackendChoice) -> Iterator[_Candidate]:
    """Yield ONNX models: on the GPU if ONNX Runtime can use it, then on the CPU."""
    if choice.backend == "tensorrt":
        return
    from melrt.backends.onnxruntime import usable_devices

    for kind in usable_devices() if choice.kind == "auto" else (choice.kind,):
        for precision in _wanted(choice, kind):
            edge, interior = (bundle.find("onnx", graph=graph, precision=precision) for graph in ("edge", "interior"))
            if edge and interior:
                device = f"cuda:{choice.index}" if kind == "cuda" else "cpu"
                models: dict[GraphKind, Artifact] = {"edge": edge[0], "interior": interior[0]}
                yield _Candidate(f"{precision} in ONNX Runtime on {device}", partial(_open_models, bundle, models, device, choice.threads))


def _open_models(bundle: Bundle, models: dict[GraphKind, Artifact], device: str, threads: int | None) -> Backend:
    from melrt.backends.onnxruntime import OnnxRuntime

    precision = models["edge"].precision
    return OnnxRuntime({graph: bundle.read(artifact) for graph, artifact in models.items()}, precision, device, threads)


def _wanted(choice: BackendChoice, kind: str) -> tuple[str, ...]:
    return _AUTO_PRECISIONS[kind] if choice.precision == "auto" else (choice.precision,)


def _nothing_fits(bundle: Bundle, choice: BackendChoice) -> str:
    available = ", ".join(sorted({f"{a.precision} {a.kind}" for kind in ("engine", "onnx") for a in bundle.find(kind)})) or "none"
    asked = "" if choice.precision == "auto" else f"{choice.precision} "
    if choice.backend == "tensorrt":
        return f"{bundle.path} has no {asked}engines of both graphs; it has {available}. `melrt build` makes them."
    remedy = "`melrt calibrate` makes it." if choice.precision == "int8" else "Export it with `--precision`."
    return f"{bundle.path} has no {asked}artifact; it has {available}. {remedy}"
