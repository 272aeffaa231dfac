"""The ways to run a MelGAN checkpoint, each as its own users would."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.onnxruntime import OnnxModel
from melrt.vocoder import Vocoder
from melrt_export.checkpoints import Checkpoint

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def contenders(checkpoint: Checkpoint, vocoder: Vocoder, threads: int) -> Iterator[tuple[str, Run]]:
    """Name and function of each; a function takes (M, T) and gives (N,)."""
    import torch

    from melrt_export.generator import Generator

    torch.set_num_threads(threads)
    generator = Generator.from_weights(checkpoint.config, {k: torch.from_numpy(v) for k, v in checkpoint.weights.items()})
    yield "PyTorch eager", _eager(torch, generator)
    naive = OnnxModel(_naive_onnx(torch, generator), threads=threads)
    yield "ONNX Runtime, plain torch.onnx.export", lambda mel: naive.run(mel[None]).reshape(-1)
    (edge,) = vocoder.bundle.find("onnx", graph="edge", precision="fp32")
    deploy = OnnxModel(vocoder.bundle.read(edge), threads=threads, blocked=threads == 1)
    yield "ONNX Runtime, melrt's graph, whole", lambda mel: deploy.run(mel[None])[0]
    yield f"melrt, {vocoder.backend.name} {vocoder.backend.precision}", vocoder


def _eager(torch: Any, generator: Any) -> Run:
    def run(mel: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(generator(torch.from_numpy(mel)[None])[0, 0].numpy())

    return run


def _naive_onnx(torch: Any, generator: Any) -> bytes:
    """What a user gets who exports the folded generator without further thought."""
    example = torch.zeros(1, generator.config.in_channels, 64)
    stream = io.BytesIO()
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                generator, (example,), dynamo=True, verbose=False, input_names=["mel"], dynamic_shapes={"mel": {0: "batch", 2: "frames"}}
            )
            program.save(stream, external_data=False)
    finally:
        noisy.setLevel(level)
    return stream.getvalue()
