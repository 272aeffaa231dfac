"""Mels, and the audio that every way of synthesis must give, without PyTorch."""

from __future__ import annotations

import numpy as np

from melrt import Vocoder
from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.planning.windows import Policy

# The limit of melrt_export.parity, which has the reason. tests/export/test_committed_bundle.py checks that the two are equal.
FP32_MAX_ABS = 2e-5
POLICIES = {
    "dynamic": Policy(40, static=False, batch=1, workers=2),
    "multiples": Policy(40, static=False, batch=1, workers=2, multiple=8),
    "static": Policy(40, static=True, batch=4, workers=1),
    "static, two workers": Policy(33, static=True, batch=3, workers=2),
    "static, short ones too": Policy(64, static=True, batch=3, workers=2, short=(17, 24, 40)),
}


def speech_mel(bundle: Bundle, frames: int, seed: int = 0) -> np.ndarray:
    """Return random frames of the bundle's probe mel, which have the levels of speech, shape (M, frames)."""
    probe = bundle.probe()[0][0]
    return np.ascontiguousarray(probe[:, np.random.default_rng(seed).integers(probe.shape[1], size=frames)])


def whole_audio(bundle: Bundle, mel: np.ndarray) -> np.ndarray:
    """Run the network on the whole mel (M, T) at once, and return its audio (N,).

    The export compared this graph with PyTorch at several lengths, and test_exact.py compares it with the audio of melgan-neurips's code.
    """
    (entry,) = bundle.find("onnx", graph="edge", precision="fp32")
    return OnnxModel(bundle.read(entry)).run(mel[None])[0]


def stream_audio(vocoder: Vocoder, mel: np.ndarray, size: int | None, noise: np.random.Generator) -> np.ndarray:
    """Stream a mel in pieces of `size` frames, or of random sizes if it is None, and return the joined audio."""
    pieces, at = [], 0
    while at < mel.shape[1]:
        step = size or int(noise.integers(0, 60))
        pieces.append(mel[:, at : at + step])
        at += step
    return np.concatenate(list(vocoder.stream(pieces)))
