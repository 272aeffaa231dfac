"""Check the accuracy of a fused engine on the GPU of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from melrt.backends.fused.backend import WINDOW
from melrt.backends.fused.engine import FusedEngine, LoadedProgram
from melrt.backends.fused.program import Program
from melrt.backends.tensorrt.interface import Profile
from melrt.backends.tensorrt.kernels import Kernels
from melrt.bundle import Bundle
from melrt.system import Gpu
from melrt_export.engine_accuracy import check_engine
from melrt_export.fused.interpret import LEAST_SNR_DB

BATCH = 2


def check_on_gpu(bundle: Bundle, program: Program, file: str) -> dict[str, float]:
    """Run a fused engine on recorded speech, and compare its audio with that of the FP32 graph on the CPU.

    Args:
        bundle: Bundle with the FP32 graph.
        program: The engine's content, with kernels for this machine's GPU.
        file: Its name, for messages.

    Returns:
        The measured quality, for the manifest.

    Raises:
        EngineBuildError: The bundle has no FP32 graph, or the signal-to-noise ratio is below `LEAST_SNR_DB`.
        BackendError: The engine cannot be opened or run on this machine.
    """
    frames = max(WINDOW, bundle.manifest.receptive_field.smallest_input)

    @contextmanager
    def opened(device: Any, gpu: Gpu) -> Iterator[tuple[FusedEngine, Kernels]]:
        loaded = LoadedProgram(program, device, gpu.compute_capability, file)
        try:
            yield FusedEngine(loaded, Profile((1, program.bands, frames), (BATCH, program.bands, frames))), Kernels(device, loaded.around)
        finally:
            loaded.close()

    return check_engine(bundle, file, "edge", opened, lambda difference: (difference.reaches(LEAST_SNR_DB), f"SNR >= {LEAST_SNR_DB:g} dB"))
