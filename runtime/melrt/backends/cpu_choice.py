"""Choice of a precision on a CPU: the fastest that the bundle holds, the processor multiplies, and the voice's quality allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from melrt.bundle import Artifact, Bundle
from melrt.system import arithmetic

# Largest increase of the log-mel error over FP32's that `auto` accepts: calibration's default budget for INT8.
BUDGET = 0.02
# On a Xeon, OpenVINO's bfloat16 has 2.5 times FP32's speed with AMX, and 0.7 times if it may use AVX512-BF16 only.
AMX = "amx_bf16"
# Name in an artifact's quality of the increase of the log-mel error over FP32's, on recorded speech.
LOG_MEL = "log_mel_above_fp32"


@dataclass(frozen=True, slots=True)
class CpuChoice:
    """One way to run a voice on a CPU, and whether `auto` may take it here."""

    backend: str
    precision: str
    usable: bool
    reason: str
    """Sentence with the facts that allow it, or with the first one that forbids it."""

    def __str__(self) -> str:
        return f"{self.precision} in {self.backend}: {self.reason}"


def cpu_choices(bundle: Bundle) -> Iterator[CpuChoice]:
    """Yield the ways to run a voice on this CPU, the fastest first. The last one, FP32, always runs."""
    obstacle, facts = _bfloat16(bundle)
    yield CpuChoice("openvino", "bf16", not obstacle, obstacle or facts)
    yield CpuChoice("onnxruntime", "fp32", True, "exact to rounding")


def _bfloat16(bundle: Bundle) -> tuple[str, str]:
    """Return the first obstacle to bfloat16, empty if there is none, and the facts that allow it."""
    graphs = [entry for graph in ("edge", "interior") for entry in bundle.find("onnx", graph=graph, precision="bf16")[:1]]
    if len(graphs) < 2:
        return "the bundle has no bf16 graphs; `melrt export --precision fp32 --precision bf16` writes them", ""
    if not (units := arithmetic("bfloat16")):
        return "this processor does not multiply bfloat16", ""
    if AMX not in units:
        return f"without AMX, its units ({', '.join(units)}) were slower than FP32's where they were measured", ""
    if find_spec("openvino") is None:
        return 'OpenVINO is not installed: pip install "melrt[openvino]"', ""
    return _over_budget(graphs), f"this processor multiplies bfloat16 ({', '.join(units)}), and {_stated(graphs)}"


def _over_budget(graphs: list[Artifact]) -> str:
    if not all(LOG_MEL in entry.quality for entry in graphs):
        return "the manifest does not state their log-mel error on speech"
    return f"{_stated(graphs)}, and auto accepts {BUDGET:.0%}" if _increase(graphs) > BUDGET else ""


def _stated(graphs: list[Artifact]) -> str:
    return f"the log-mel error on speech is {_increase(graphs):+.1%} against FP32"


def _increase(graphs: list[Artifact]) -> float:
    return max(entry.quality.get(LOG_MEL, 0.0) for entry in graphs)
