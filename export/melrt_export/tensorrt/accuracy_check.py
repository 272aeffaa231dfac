"""Check the accuracy of an engine: run it on the GPU on recorded speech, and compare with the FP32 graph on the CPU."""

from __future__ import annotations

import numpy as np

from melrt.backends.onnxruntime import OnnxModel
from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.engine import Engine
from melrt.backends.tensorrt.gpu_arrays import current_device
from melrt.backends.tensorrt.kernels import Kernels
from melrt.backends.tensorrt.slot import ExecutionSlot
from melrt.bundle import Artifact, Bundle
from melrt.errors import EngineBuildError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.planning.windows import GraphKind
from melrt.types import Mel
from melrt_export.assets import RECORDING
from melrt_export.parity import Difference, exact_samples, int8_limit

# A GPU sums in another order, and may use Winograd convolutions. Not confirmed on a GPU: ten times what two CPUs differ by.
FP32_MAX_ABS = 1e-4
# Frames between the starts of the pieces of speech in one batch.
BATCH_STEP = 40


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
    model = bundle.find("onnx", graph=graph, precision="fp32")
    if not model:
        raise EngineBuildError(f"{bundle.path} has no {graph} graph in fp32 to compare the engine with. Export the voice with fp32.")
    spec = bundle.manifest.spec
    device, gpu = open_device(0)
    speech = mel_from_audio(read_audio(RECORDING, spec.sample_rate), spec)
    with current_device(device):
        engine = Engine(entry, plan, spec.n_mels, gpu)
        batch = min(max(2, engine.profile.smallest[0]), engine.profile.largest[0])
        mel = _batch(speech, batch, engine.profile.largest[2])
        slot = ExecutionSlot(device, Kernels(device), {graph: engine}, spec.hop, int16=False)
        try:
            audio = slot.run(graph, mel).copy()
        finally:
            slot.close()
    reference = OnnxModel(bundle.read(model[0])).run(mel)
    kept = (exact_samples(graph, one, bundle.manifest.receptive_field, spec.hop) for one in (reference, audio))
    difference = Difference.between(*kept)
    passes, limit = _limit(bundle, entry, graph, difference)
    if not passes:
        raise EngineBuildError(
            f"{entry.file} on {gpu.name} differs too much from FP32 on the CPU: max abs {difference.max_abs:.1e}, "
            f"SNR {difference.snr_db:.1f} dB. The limit is {limit}. The engine was not added to the bundle."
        )
    return difference.facts()


def _batch(speech: Mel, batch: int, frames: int) -> Mel:
    """Return pieces (B, M, frames) of a recording (M, T), which is repeated if it is too short."""
    repeated = np.tile(speech, (1, -(-(frames + batch * BATCH_STEP) // speech.shape[1])))
    return np.stack([repeated[:, start : start + frames] for start in range(0, batch * BATCH_STEP, BATCH_STEP)])


def _limit(bundle: Bundle, entry: Artifact, graph: GraphKind, difference: Difference) -> tuple[bool, str]:
    """Return whether the difference is within the limit of the engine's precision, and the limit as text."""
    if entry.precision == "fp32":
        return difference.max_abs <= FP32_MAX_ABS, f"max abs <= {FP32_MAX_ABS:g}"
    source = bundle.find("onnx", graph=graph, precision="int8-fp16")
    least = int8_limit(entry.precision, source[0].quality if source else {})
    if least is None:
        return difference.passes(entry.precision), difference.limit(entry.precision)
    return difference.snr_db >= least, f"SNR >= {least:.1f} dB"
