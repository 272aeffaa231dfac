"""Choose the best artifact of a bundle that this machine can run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from melrt.backends.base import BACKENDS, PRECISIONS, Backend
from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError, MissingExtraError
from melrt.files.wav import SampleFormat
from melrt.planning.windows import GraphKind
from melrt.system import find_gpu

logger = logging.getLogger(__name__)

MAX_THREADS = 1024
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?")
# A CPU has no half-precision convolutions: there the half graph is the float32 graph with casts around it, and slower.
_AUTO_PRECISIONS = {"cuda": ("fp16", "tf32", "fp32"), "cpu": ("fp32",)}


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What the caller asked for; `auto` leaves it to the machine."""

    device: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    sample_format: SampleFormat = "float32"

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise BackendError(f"device is {self.device!r}; it is one of auto, cpu, cuda, cuda:0, cuda:1, ...")
        for name, allowed in (("precision", PRECISIONS), ("backend", BACKENDS)):
            if getattr(self, name) not in ("auto", *allowed):
                raise BackendError(f"{name} is {getattr(self, name)!r}; it is one of auto, {', '.join(allowed)}.")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise BackendError(f"threads is {self.threads}; it lies between 1 and {MAX_THREADS}, or is left out for one per core.")

    @property
    def kind(self) -> str:
        """`auto`, `cpu` or `cuda`."""
        return self.device.partition(":")[0]

    @property
    def index(self) -> int:
        """Of the CUDA device."""
        return int(self.device.partition(":")[2] or 0)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a voice."""

    description: str
    open: Callable[[], Backend]


def open_backend(bundle: Bundle, choice: BackendChoice) -> Backend:
    """Load the best artifact of the bundle that this machine can run and the caller allows.

    Raises:
        BackendError: None can; the text says why for each one tried.
    """
    reasons = []
    for candidate in (*_engines(bundle, choice), *_models(bundle, choice)):
        try:
            return candidate.open()
        except (BackendError, MissingExtraError) as error:
            reasons.append((candidate.description, error))
            logger.warning("%s does not run here, trying the next: %s", candidate.description, error)
    if len(reasons) == 1:
        raise reasons[0][1]
    if reasons:
        raise BackendError(f"nothing in {bundle.path} runs here. " + " · ".join(f"{what}: {error}" for what, error in reasons))
    raise BackendError(_nothing_fits(bundle, choice))


def _engines(bundle: Bundle, choice: BackendChoice) -> Iterator[Candidate]:
    """Pairs of engines, one for each graph, by precision and then by flavor; the newest of each comes last in the manifest."""
    if choice.backend == "onnxruntime" or choice.kind == "cpu":
        return
    if (choice.backend, choice.kind) == ("auto", "auto") and find_gpu() is None:
        return  # nothing was promised, so there is nothing to warn of
    for precision in _wanted(choice, "cuda"):
        pairs: dict[tuple[str, ...], dict[GraphKind, Artifact]] = {}
        for artifact in bundle.find("engine", precision=precision):
            made_for = tuple(str(artifact.target.get(key)) for key in ("flavor", "version", "compute_capability"))
            pairs.setdefault(made_for, {})[artifact.graph] = artifact  # type: ignore[index]  # a graph of another name is never asked for
        for made_for, artifacts in reversed(pairs.items()):
            if {"edge", "interior"} <= set(artifacts):
                yield Candidate(f"the {precision} engine of {' '.join(made_for)}", partial(_open_engines, bundle, artifacts, choice))


def _open_engines(bundle: Bundle, artifacts: dict[GraphKind, Artifact], choice: BackendChoice) -> Backend:
    from melrt.backends.tensorrt.backend import TensorRT

    return TensorRT(bundle, artifacts, choice.index, int16=choice.sample_format == "int16")


def _models(bundle: Bundle, choice: BackendChoice) -> Iterator[Candidate]:
    """ONNX models, on the GPU if ONNX Runtime can, and on the CPU."""
    if choice.backend == "tensorrt":
        return
    from melrt.backends.onnxruntime import usable_devices

    for kind in usable_devices() if choice.kind == "auto" else (choice.kind,):
        for precision in _wanted(choice, kind):
            edge, interior = (bundle.find("onnx", graph=graph, precision=precision) for graph in ("edge", "interior"))
            if edge and interior:
                device = f"cuda:{choice.index}" if kind == "cuda" else "cpu"
                models: dict[GraphKind, Artifact] = {"edge": edge[0], "interior": interior[0]}
                yield Candidate(
                    f"{precision} by ONNX Runtime on {device}", partial(_open_models, bundle, models, precision, device, choice)
                )


def _open_models(bundle: Bundle, models: dict[GraphKind, Artifact], precision: str, device: str, choice: BackendChoice) -> Backend:
    from melrt.backends.onnxruntime import OnnxRuntime

    return OnnxRuntime({graph: bundle.read(artifact) for graph, artifact in models.items()}, precision, device, choice.threads)


def _wanted(choice: BackendChoice, kind: str) -> tuple[str, ...]:
    return _AUTO_PRECISIONS[kind] if choice.precision == "auto" else (choice.precision,)


def _nothing_fits(bundle: Bundle, choice: BackendChoice) -> str:
    there = ", ".join(sorted({f"{a.precision} {a.kind}" for kind in ("engine", "onnx") for a in bundle.find(kind)})) or "none"
    asked = "" if choice.precision == "auto" else f"{choice.precision} "
    if choice.backend == "tensorrt":
        return f"{bundle.path} has no {asked}engines of both graphs; it has {there}. `melrt build` makes them."
    remedy = "`melrt calibrate` makes it." if choice.precision == "int8" else "Export it with `--precision`."
    return f"{bundle.path} has no {asked}artifact; it has {there}. {remedy}"
