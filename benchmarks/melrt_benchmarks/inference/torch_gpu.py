"""PyTorch on a GPU, in the forms that its users run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from melrt.types import FloatAudio, Mel
from melrt_benchmarks.inference.contender import BenchVoice, Contender, UnavailableError

DEVICE = "cuda"
# PyTorch's notes on CUDA graphs ask for a few runs on a side stream before a capture.
WARM_UP_RUNS = 3


@dataclass(frozen=True, slots=True)
class TorchForm:
    """A way to run PyTorch on a GPU."""

    name: str
    precision: str
    """`fp32`, `tf32`, `fp16`, or `bf16` by autocast."""
    benchmark: bool = False
    """Let cuDNN time its kernels for every new shape."""
    graph: bool = False
    """Replay one captured CUDA graph for each shape."""
    backend: str = ""
    """Backend of torch.compile; empty to run eagerly."""
    mode: str | None = None
    """Mode of torch.compile."""


FORMS = (
    TorchForm("PyTorch GPU, FP32", "fp32"),
    TorchForm("PyTorch GPU, TF32", "tf32"),
    TorchForm("PyTorch GPU, BF16 autocast", "bf16"),
    TorchForm("PyTorch GPU, FP16", "fp16"),
    TorchForm("PyTorch GPU, FP16, cudnn.benchmark", "fp16", benchmark=True),
    TorchForm("PyTorch GPU, FP16, CUDA graph", "fp16", benchmark=True, graph=True),
    TorchForm("torch.compile GPU, FP16", "fp16", backend="inductor"),
    TorchForm("torch.compile GPU, FP16, reduce-overhead", "fp16", backend="inductor", mode="reduce-overhead"),
    TorchForm("Torch-TensorRT GPU, FP16", "fp16", backend="torch_tensorrt"),
)


def load_torch(voice: BenchVoice, form: TorchForm) -> Contender:
    """Load PyTorch on the GPU.

    Raises:
        UnavailableError: PyTorch cannot use the GPU, Torch-TensorRT is not installed, or there is no checkpoint.
    """
    import torch

    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("this PyTorch cannot use the GPU; install a build for CUDA from https://pytorch.org/get-started.")
    generator = voice.generator().to(DEVICE, torch.float16 if form.precision == "fp16" else torch.float32)
    network = _TorchGpu(form, _compiled(generator, form) if form.backend else generator)
    return Contender(form.name, form.precision, network.run, network.close, True, not form.backend, network.on_device)


def _compiled(generator: Any, form: TorchForm) -> Any:
    import torch

    if form.backend == "torch_tensorrt":
        if importlib.util.find_spec("torch_tensorrt") is None:
            raise UnavailableError("this contender needs Torch-TensorRT, which is not installed: pip install torch-tensorrt")
        importlib.import_module("torch_tensorrt")  # registers the backend
    return torch.compile(generator, backend=form.backend, mode=form.mode, dynamic=False)


class _TorchGpu:
    """A network on the GPU, as one contender runs it. Mels and audio on the host are float32, as melrt takes them."""

    def __init__(self, form: TorchForm, network: Any) -> None:
        self._form, self._network = form, network
        self._graphs: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}
        self._lock = threading.Lock()  # a graph has one input and one output

    def run(self, mel: Mel) -> FloatAudio:
        import torch

        with self._settings(), self._lock:
            audio = self._audio(torch.from_numpy(mel).to(DEVICE))
            return np.asarray(audio[:, 0].float().cpu().numpy())

    def on_device(self, mel: Mel) -> Callable[[], object]:
        import torch

        return partial(self._run_on_device, torch.from_numpy(mel).to(DEVICE))

    def close(self) -> None:
        self._graphs.clear()
        self._network = None

    def _run_on_device(self, frames: Any) -> Any:
        with self._settings():
            return self._audio(frames)

    def _audio(self, frames: Any) -> Any:
        """Return the audio (B, 1, N) on the GPU; a CUDA graph overwrites it in its next run."""
        if not self._form.graph:
            return self._network(frames.half() if self._form.precision == "fp16" else frames)
        if frames.shape not in self._graphs:
            self._graphs[frames.shape] = self._capture(frames.half())
        graph, mel, audio = self._graphs[frames.shape]
        mel.copy_(frames)
        graph.replay()
        return audio

    def _capture(self, mel: Any) -> tuple[Any, Any, Any]:
        """Return a CUDA graph of the network, its input and its output."""
        torch: Any = importlib.import_module("torch")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                self._network(mel)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": calls of another contender's threads must not end the capture
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            audio = self._network(mel)
        return graph, mel, audio

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """Set what this contender computes with: these settings belong to the process, and each contender has its own.

        PyTorch multiplies convolutions in TF32 unless that is switched off.
        """
        torch: Any = importlib.import_module("torch")
        cudnn = torch.backends.cudnn
        cudnn.benchmark, cudnn.allow_tf32 = self._form.benchmark, self._form.precision == "tf32"
        # CUDA graphs of torch.compile are documented with no_grad
        with torch.no_grad() if self._form.backend else torch.inference_mode():
            if self._form.precision == "bf16":
                with torch.autocast(DEVICE, torch.bfloat16):
                    yield
            else:
                yield
