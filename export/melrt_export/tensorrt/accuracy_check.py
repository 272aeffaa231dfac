"""Check the accuracy of a TensorRT engine on the GPU of this machine."""

from __future__ import annotations

from contextlib import nullcontext

from melrt.backends.tensorrt.engine import Engine
from melrt.backends.tensorrt.kernels import Kernels
from melrt.bundle import Artifact, Bundle
from melrt.planning.windows import GraphKind
from melrt_export.engine_accuracy import check_engine
from melrt_export.parity import Difference, int8_limit

# A GPU sums in another order, and may use Winograd convolutions. Not confirmed on a GPU: ten times what two CPUs differ by.
FP32_MAX_ABS = 1e-4


def check_accuracy(bundle: Bundle, entry: Artifact, plan: bytes, graph: GraphKind) -> dict[str, float]:
    """Run an engine on recorded speech, and compare its audio with that of the FP32 graph on the CPU.

    Args:
        bundle: Bundle with the FP32 graph.
        entry: Entry of the engine.
        plan: Serialized engine.
        graph: Kind of its graph.

    Returns:
        The measured quality, for the manifest.

    Raises:
        EngineBuildError: The bundle has no FP32 graph, or the difference is not within the limit of the engine's precision.
        BackendError: The engine cannot be opened or run on this machine.
    """
    bands = bundle.manifest.spec.n_mels
    return check_engine(
        bundle, entry.file, graph, lambda device, gpu: nullcontext((Engine(entry, plan, bands, gpu), Kernels(device))),
        lambda difference: _limit(bundle, entry, graph, difference),
    )  # fmt: skip


def _limit(bundle: Bundle, entry: Artifact, graph: GraphKind, difference: Difference) -> tuple[bool, str]:
    """Return whether the difference is within the limit of the engine's precision, and the limit as text."""
    if entry.precision == "fp32":
        return difference.max_abs <= FP32_MAX_ABS, f"max abs <= {FP32_MAX_ABS:g}"
    source = bundle.find("onnx", graph=graph, precision="int8-fp16")
    least = int8_limit(entry.precision, source[0].quality if source else {})
    if least is None:
        return difference.passes(entry.precision), difference.limit(entry.precision)
    return difference.snr_db >= least, f"SNR >= {least:.1f} dB"
