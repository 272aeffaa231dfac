"""Accuracy of a new engine: run it on the GPU on recorded speech, and compare with the FP32 graph on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from melrt.backends.onnxruntime import OnnxModel
from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.gpu_arrays import current_device
from melrt.backends.tensorrt.interface import Engine
from melrt.backends.tensorrt.kernels import Kernels
from melrt.backends.tensorrt.slot import ExecutionSlot
from melrt.bundle import Bundle
from melrt.errors import EngineBuildError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.planning.windows import GraphKind
from melrt.system import Gpu
from melrt.types import Mel
from melrt_export.assets import RECORDING
from melrt_export.parity import Difference, exact_samples

# Frames between the starts of the pieces of speech in one batch.
BATCH_STEP = 40
# Opens an engine and the kernels around it on a device, for a block.
Opener = Callable[[Any, Gpu], AbstractContextManager[tuple[Engine, Kernels]]]
# Returns true if a difference is within the limit of an engine, and the limit as text.
Limit = Callable[[Difference], tuple[bool, str]]


def check_engine(bundle: Bundle, file: str, graph: GraphKind, opened: Opener, limit: Limit) -> dict[str, float]:
    """Run an engine on recorded speech, and compare its audio with that of the FP32 graph on the CPU.

    Args:
        bundle: Bundle with the FP32 graph.
        file: Name of the engine, for messages.
        graph: Kind of its graph.
        opened: Opens it.
        limit: Limit of its precision.

    Returns:
        The measured quality, for the manifest.

    Raises:
        EngineBuildError: The bundle has no FP32 graph, or the difference is not within the limit.
        BackendError: The engine cannot be opened or run on this machine.
    """
    model = bundle.find("onnx", graph=graph, precision="fp32")
    if not model:
        raise EngineBuildError(f"{bundle.path} has no {graph} graph in fp32 to compare the engine with. Export the voice with fp32.")
    spec = bundle.manifest.spec
    device, gpu = open_device(0)
    speech = mel_from_audio(read_audio(RECORDING, spec.sample_rate), spec)
    with current_device(device), opened(device, gpu) as (engine, kernels):
        profile = engine.profile
        batch = min(max(2, profile.smallest[0]), profile.largest[0])
        mels = [_batch(speech, batch, frames) for frames in engine.windows or profile.largest[2:]]
        slot = ExecutionSlot(device, kernels, {graph: engine}, spec.hop, int16=False)
        try:
            audio = [slot.run(graph, mel).copy() for mel in mels]
        finally:
            slot.close()
    reference = OnnxModel(bundle.read(model[0]))
    exact = partial(exact_samples, graph, field=bundle.manifest.receptive_field, hop=spec.hop)
    kept = ([exact(one) for one in outputs] for outputs in (map(reference.run, mels), audio))
    difference = Difference.between(*(np.concatenate(one, axis=1) for one in kept))
    passes, allowed = limit(difference)
    if not passes:
        raise EngineBuildError(
            f"{file} on {gpu.name} differs too much from FP32 on the CPU: max abs {difference.max_abs:.1e}, "
            f"SNR {difference.snr_db:.1f} dB, in the median piece {difference.typical_snr_db:.1f} dB. The limit is {allowed}. "
            "The engine was not added to the bundle."
        )
    return difference.facts()


def _batch(speech: Mel, batch: int, frames: int) -> Mel:
    """Return pieces (B, M, frames) of a recording (M, T), which is repeated if it is too short."""
    repeated = np.tile(speech, (1, -(-(frames + batch * BATCH_STEP) // speech.shape[1])))
    return np.stack([repeated[:, start : start + frames] for start in range(0, batch * BATCH_STEP, BATCH_STEP)])
