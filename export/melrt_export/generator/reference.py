"""PyTorch's output for a checkpoint: the reference that every exported artifact is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np
import torch

from melrt.types import FloatAudio, Mel
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.network import Generator


class PyTorchReference:
    """A checkpoint's generator in PyTorch, built once and run on one thread."""

    def __init__(self, config: GeneratorConfig, weights: Mapping[str, np.ndarray]) -> None:
        """Build the generator.

        Args:
            config: The generator's shape.
            weights: Folded float32 weights, named as `config.tensors()` names them.
        """
        self._generator = Generator.from_weights(config, weights)

    @cached_property
    def _half_generator(self) -> Generator:
        return copy.deepcopy(self._generator).half()

    def audio(self, mel: Mel) -> FloatAudio:
        """Return PyTorch's float32 output (B, N) for mel frames (B, M, T)."""
        with torch.inference_mode(), _one_thread():
            return _samples(self._generator(torch.from_numpy(mel)))

    def half_audio(self, mel: Mel) -> FloatAudio:
        """Return the output (B, N), as float32, for mel frames (B, M, T) if every layer computes in half precision."""
        with torch.inference_mode(), _one_thread():
            return _samples(self._half_generator(torch.from_numpy(mel).half()))


def _samples(audio: torch.Tensor) -> FloatAudio:
    return np.ascontiguousarray(audio[:, 0].float().numpy(), dtype=np.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: its rounding depends on the number of threads, and the content of a bundle must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
