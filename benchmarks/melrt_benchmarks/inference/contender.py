"""One contender of the inference benchmark, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt.types import FloatAudio, Mel
from melrt_export.checkpoints import Checkpoint

Run = Callable[[Mel], FloatAudio]


class UnavailableError(MelrtError):
    """A contender that cannot run on this machine."""


@dataclass(frozen=True, slots=True)
class BenchVoice:
    """The voice that all contenders run."""

    bundle: Bundle
    checkpoint: Checkpoint | None
    """Checkpoint the bundle was exported from; without it only melrt runs."""
    threads: int
    """CPU threads of every contender."""

    def generator(self) -> Any:
        """Return the checkpoint's generator in PyTorch, with folded weights, on the CPU in float32.

        Raises:
            UnavailableError: There is no checkpoint.
        """
        if self.checkpoint is None:
            raise UnavailableError("it needs the checkpoint that the voice was exported from; give it with --checkpoint.")
        import torch

        from melrt_export.generator.network import Generator

        torch.set_num_threads(self.threads)
        return Generator.from_weights(self.checkpoint.config, {k: torch.from_numpy(v) for k, v in self.checkpoint.weights.items()})


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a voice, loaded."""

    name: str
    precision: str
    """Precision whose limit the output must keep: `fp32`, `tf32`, `fp16`, `bf16` or `int8`."""
    run: Run
    """Turns mels (B, M, T) into audio (B, N), both on the host."""
    close: Callable[[], None] = lambda: None
    """Frees what `run` holds."""
    on_gpu: bool = False
    """True if it computes on the GPU."""
    any_length: bool = True
    """False if each new length takes minutes of preparation."""
    on_device: Callable[[Mel], Callable[[], object]] | None = None
    """Copies mels (B, M, T) to the GPU, and returns a function that runs them there once and leaves the audio there. Its work is in order
    with PyTorch's current stream, or is done when it returns. None if the contender takes arrays on the host only."""
