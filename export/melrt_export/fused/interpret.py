"""Run the launches of a fused engine in Triton's interpreter, on a CPU and without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from melrt.backends.fused.program import CompiledKernel, Program
from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import EngineBuildError, MissingExtraError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.types import FloatAudio, Mel
from melrt_export.assets import RECORDING
from melrt_export.fused.lower import POINTERS, Kernel, Lowered
from melrt_export.fused.tiles import default_tile
from melrt_export.parity import Difference

INTERPRETER = "interpreter"
_THREADS = 32
# The kernels keep every sum in float32: trained voices and fixtures have 51 dB or more on speech (docs/fused.md), more than PyTorch's half
# precision.
LEAST_SNR_DB = 50.0
# Frames of speech that are compared: more than the receptive field of most voices.
SPEECH_FRAMES = 20
# The interpreter's time is mostly that of starting an operation; larger tiles have fewer.
FAST_ROWS = 1024
# One float32 or two halves that are not numbers: the content of memory that no kernel has written.
NAN = b"\xff" * 4


class Interpreter:
    """A lowered generator, run launch by launch as the runtime launches it, with memory and addresses laid out as on a GPU."""

    def __init__(self, lowered: Lowered, bands: int, hop: int, rows: int | None = None) -> None:
        """Prepare the launches.

        Args:
            lowered: The generator.
            bands: Mel bands.
            hop: Samples for each frame.
            rows: Rows of each tile, in place of the GPU's; more rows take less time.
        """
        self._tiles = {name: default_tile(kernel, rows=rows) for name, kernel in lowered.kernels.items()}
        compiled = {
            name: CompiledKernel(name, 0, 0, _THREADS, 0, self._tiles[name].rows, self._tiles[name].columns(kernel), 0, 0, 0)
            for name, kernel in lowered.kernels.items()
        }
        self.kernels = lowered.kernels
        self.program = Program(
            bands,
            hop,
            lowered.buffers,
            len(lowered.weights),
            lowered.launches,
            {INTERPRETER: compiled},
            {INTERPRETER: (0, 0)},
            "",
            lowered.weights,
        )

    def run(self, mel: Mel) -> FloatAudio:
        """Return the audio (B, N) of mel frames (B, M, T)."""
        batch, _, frames = mel.shape
        offsets = self.program.places(batch, frames)
        memory = {
            "mel": _memory(np.ascontiguousarray(mel, np.float32).tobytes()), "weights": _memory(self.program.payload),
            "audio": _memory(NAN * batch * frames * self.program.hop), "buffer": _memory(NAN * (offsets[-1] // 4)),
        }  # fmt: skip
        for launch in self.program.launches:
            arguments: list[int | torch.Tensor] = []
            for kind, value in launch.arguments:
                if kind == "steps":
                    arguments.append(launch.rate * frames)
                elif kind == "integer":
                    arguments.append(value)
                else:
                    arguments.append(memory[kind][offsets[value] if kind == "buffer" else value :])
            name = launch.kernel
            compiled = self.program.gpus[INTERPRETER][name]
            interpret(self.kernels[name], self._tiles[name].constants(self.kernels[name]), launch.grid(compiled, batch, frames), arguments)
        return memory["audio"].numpy().view(np.float32).reshape(batch, -1).copy()


def check_accuracy(bundle: Bundle, lowered: Lowered) -> dict[str, float]:
    """Run the kernels on the loudest frames of recorded speech, and compare their audio with that of the FP32 graph.

    Returns:
        The measured quality, for the manifest.

    Raises:
        EngineBuildError: The bundle has no FP32 graph, or the signal-to-noise ratio is below `LEAST_SNR_DB`.
        MissingExtraError: Triton is not installed.
    """
    model = bundle.find("onnx", graph="edge", precision="fp32")
    if not model:
        raise EngineBuildError(f"{bundle.path} has no edge graph in fp32 to compare the kernels with. Export the voice with fp32.")
    spec = bundle.manifest.spec
    speech = mel_from_audio(read_audio(RECORDING, spec.sample_rate), spec)
    frames = max(SPEECH_FRAMES, bundle.manifest.receptive_field.smallest_input)
    start = int(np.convolve(speech.mean(axis=0), np.ones(frames), "valid").argmax())
    mel = np.ascontiguousarray(speech[None, :, start : start + frames])
    audio = Interpreter(lowered, spec.n_mels, spec.hop, FAST_ROWS).run(mel)
    difference = Difference.between(OnnxModel(bundle.read(model[0])).run(mel), audio)
    if difference.snr_db < LEAST_SNR_DB:
        raise EngineBuildError(
            f"the interpreted kernels differ too much from FP32: SNR {difference.snr_db:.1f} dB; the limit is SNR >= {LEAST_SNR_DB:g} dB. "
            "The engine was not built."
        )
    return difference.facts()


def _memory(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def interpret(kernel: Kernel, constants: Mapping[str, Any], grid: tuple[int, int, int], arguments: Sequence[int | torch.Tensor]) -> None:
    """Run one launch of a kernel.

    Args:
        kernel: The kernel.
        constants: Its constants, with those of the tile.
        grid: Blocks in each dimension.
        arguments: Integers, and tensors of bytes that begin at the addresses.
    """
    types = iter(POINTERS[kernel.function])
    typed = [value if isinstance(value, int) else value.view(getattr(torch, next(types))) for value in arguments]
    getattr(_kernels(), kernel.function)[grid](*typed, **constants)


@cache
def _kernels() -> ModuleType:
    """Load a second copy of the kernels' module, whose functions run in the interpreter.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    try:
        from triton import knobs
    except ImportError as error:
        raise MissingExtraError("interpreting a fused engine's kernels", "triton", "fused-build") from error
    spec = importlib.util.spec_from_file_location("melrt_export.fused.interpreted_kernels", Path(__file__).with_name("kernels.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module
