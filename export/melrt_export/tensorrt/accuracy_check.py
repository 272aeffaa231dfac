"""The last check of an engine: it speaks on the GPU that it was built for, and real speech comes out as it should."""

from __future__ import annotations

import numpy as np

from melrt.backends.onnxruntime import OnnxModel
from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.engine import Engine
from melrt.backends.tensorrt.slot import ExecutionSlot
from melrt.bundle import Artifact, Bundle
from melrt.errors import EngineBuildError
from melrt.planning.windows import GraphKind
from melrt_export.assets import RECORDING
from melrt_export.audio_features import mel_from_audio, read_audio
from melrt_export.parity import Difference, inside, int8_limit

# A GPU sums in another order, and its convolutions may be Winograd's: not confirmed on one, an order above what two CPUs differ by.
FP32_MAX_ABS = 1e-4
# Frames between the pieces of speech that stand in one batch.
STEP = 40


def check_accuracy(bundle: Bundle, entry: Artifact, plan: bytes, graph: GraphKind) -> dict[str, float]:
    """Run an engine on recorded speech and hold it against the FP32 graph on the CPU.

    Returns:
        The quality to be kept in the manifest.

    Raises:
        EngineBuildError: Samples that are not numbers, or too far from the CPU's for the engine's precision.
        BackendError: It cannot be opened or run here.
    """
    model = bundle.find("onnx", graph=graph, precision="fp32")
    if not model:
        raise EngineBuildError(f"{bundle.path} has no {graph} graph in fp32 to hold the engine against; export it with fp32.")
    spec = bundle.manifest.spec
    device, gpu = open_device(0)
    engine = Engine(entry, plan, spec.n_mels, gpu)
    lane = ExecutionSlot(device, {graph: engine}, spec.hop, int16=False)
    speech = mel_from_audio(read_audio(RECORDING, spec.sample_rate), spec)
    batch = min(max(2, engine.profile.smallest[0]), engine.profile.largest[0])
    frames = engine.profile.largest[2]
    long = np.tile(speech, (1, -(-(frames + batch * STEP) // speech.shape[1])))
    mel = np.stack([long[:, at * STEP : at * STEP + frames] for at in range(batch)])
    try:
        audio = lane.run(graph, mel)
    finally:
        lane.close()
    reference = OnnxModel(bundle.read(model[0])).run(mel)
    kept = (inside(graph, one, bundle.manifest.receptive_field, spec.hop) for one in (reference, audio))
    difference = Difference.between(*kept)
    passes, limit = _limit(bundle, entry, graph, difference)
    if not passes:
        raise EngineBuildError(
            f"{entry.file} on {gpu.name}: max abs {difference.max_abs:.1e}, SNR {difference.snr_db:.1f} dB against FP32 on the CPU; "
            f"the limit is {limit}. No engine was kept."
        )
    return difference.facts()


def _limit(bundle: Bundle, entry: Artifact, graph: GraphKind, difference: Difference) -> tuple[bool, str]:
    """Whether the engine is near enough to FP32, and the limit in words."""
    if entry.precision == "fp32":
        return difference.max_abs <= FP32_MAX_ABS, f"max abs <= {FP32_MAX_ABS:g}"
    source = bundle.find("onnx", graph=graph, precision="int8-fp16")
    least = int8_limit(entry.precision, source[0].quality if source else {})
    return (difference.passes(entry.precision), difference.limit(entry.precision)) if least is None else (
        difference.snr_db >= least, f"SNR >= {least:.1f} dB")  # fmt: skip
