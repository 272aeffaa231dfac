"""The vocoder: mel frames in, waveform out."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import ArrayLike, NDArray

from melrt.backends import Backend, Choice, open_backend
from melrt.bundle import Bundle
from melrt.mel import MelSpec


class Vocoder:
    """A voice, loaded. Safe to call from several threads."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend

    @classmethod
    def load(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
    ) -> Vocoder:
        """Load the best artefact of a bundle that this machine can run.

        Args:
            bundle: A voice.melrt folder.
            device: `cuda`, `cpu`, or `auto`: CUDA if it works, else the CPU.
            precision: `fp32`, `fp16`, `int8`, or `auto`: the fastest that keeps the voice's quality on the device.
            backend: `onnxruntime` or `auto`.
            threads: CPU threads for one synthesis; one per physical core if None.

        Raises:
            BundleError: The bundle is missing, damaged or too new.
            BackendError: What was asked for cannot run here; the text says why.
        """
        choice = Choice(device, precision, backend, threads)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(bundle, open_backend(bundle, choice))

    @property
    def spec(self) -> MelSpec:
        """The mel convention of the input."""
        return self.bundle.manifest.spec

    @property
    def sample_rate(self) -> int:
        """Of the output, Hz."""
        return self.spec.sample_rate

    def __call__(self, mel: ArrayLike) -> NDArray[np.float32]:
        """Turn log-mel frames into a waveform.

        Args:
            mel: Log-mel frames in this voice's convention (`self.spec`), shape (M, T) or (B, M, T).

        Returns:
            Samples in [-1, 1], float32, shape (N,) or (B, N), N = T * hop. A fresh array.

        Raises:
            MelError: Wrong number of bands, too few frames, or a value that is not finite.
        """
        frames = self.spec.check(mel, self.bundle.manifest.smallest_input)
        audio = self.backend.run(frames.reshape(-1, *frames.shape[-2:]))
        return audio.reshape(*frames.shape[:-2], -1)
