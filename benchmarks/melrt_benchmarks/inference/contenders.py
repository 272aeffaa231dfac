"""The ways to run a MelGAN checkpoint, each as its own users would; what cannot run here says why."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import MelrtError
from melrt.system import find_gpu
from melrt.vocoder import Options, Vocoder
from melrt_benchmarks.inference.plain_export import plain_onnx
from melrt_benchmarks.report.results import Skipped
from melrt_export.checkpoints import Checkpoint
from melrt_export.tensorrt.options import FLAVORS
from melrt_export.tensorrt.polygraphy import polygraphy_for

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class UnavailableError(MelrtError):
    """A contender that cannot run here."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What the contenders run."""

    bundle: Bundle
    checkpoint: Checkpoint | None
    """None: only melrt runs."""
    threads: int


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to run a voice."""

    name: str
    precision: str
    """Whose limit its output is held to: `fp32`, `tf32`, `fp16` or `int8`."""
    run: Run
    """Mels (B, M, T) to audio (B, N), both on the host."""
    close: Callable[[], None] = lambda: None
    on_gpu: bool = False
    """Whether the GPU is what it costs."""


def contenders(
    bench: Bench, precisions: tuple[str, ...], backends: tuple[str, ...], only: tuple[str, ...] = ()
) -> Iterator[Contender | Skipped]:
    """Each contender whose name holds one of `only`, ready to run, or why it cannot; the first that runs is what all are compared with."""
    for name, precision, make in _list(bench, precisions, backends):
        if only and not any(part.lower() in name.lower() for part in only):
            continue
        try:
            made = make()
            yield made if isinstance(made, Contender) else Contender(name, precision, made, on_gpu="GPU" in name or "CUDA" in name)
        except (MelrtError, ImportError) as error:
            yield Skipped(name, str(error).splitlines()[0])


def _list(bench: Bench, precisions: tuple[str, ...], backends: tuple[str, ...]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    yield "PyTorch eager, weight norm", "fp32", partial(_eager, bench, weight_norm=True)
    yield "PyTorch eager", "fp32", partial(_eager, bench)
    yield "torch.compile", "fp32", partial(_compiled, bench)
    yield "PyTorch eager, GPU, FP16", "fp16", partial(_torch_gpu, bench, graph=False)
    yield "PyTorch CUDA graph, FP16", "fp16", partial(_torch_gpu, bench, graph=True)
    yield "ONNX Runtime, plain export", "fp32", partial(_plain, bench, "cpu")
    yield "ONNX Runtime CUDA, plain", "tf32", partial(_plain, bench, "cuda")
    yield "ONNX Runtime TensorRT GPU", "fp16", partial(_plain_tensorrt, bench)
    yield "TensorRT GPU, plain export", "tf32", partial(_tensorrt, bench)
    yield "OpenVINO, plain export", "fp32", partial(_openvino, bench)
    yield "melrt's graph, whole", "fp32", partial(_whole, bench)
    for backend in backends:
        for precision in precisions:
            yield f"melrt, {backend} {precision}", precision, partial(_melrt, bench, backend, precision)


def _checkpoint(bench: Bench) -> Checkpoint:
    if bench.checkpoint is None:
        raise UnavailableError("needs the weights: --checkpoint")
    return bench.checkpoint


def _generator(bench: Bench) -> Any:
    import torch

    from melrt_export.generator.network import Generator

    checkpoint = _checkpoint(bench)
    torch.set_num_threads(bench.threads)
    return Generator.from_weights(checkpoint.config, {k: torch.from_numpy(v) for k, v in checkpoint.weights.items()})


def _eager(bench: Bench, *, weight_norm: bool = False) -> Run:
    import torch

    generator = _generator(bench)
    if weight_norm:  # as published checkpoints are run: every forward computes the weights from direction and magnitude
        for layer in generator.modules():
            if isinstance(layer, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                torch.nn.utils.parametrizations.weight_norm(layer)
    return _on_cpu(generator)


def _on_cpu(generator: Any) -> Run:
    import torch

    def run(mel: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(generator(torch.from_numpy(mel))[:, 0].numpy())

    return run


def _compiled(bench: Bench) -> Run:
    import torch

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise UnavailableError("torch.compile needs a C++ compiler")
    return _on_cpu(torch.compile(_generator(bench), dynamic=False))


def _torch_gpu(bench: Bench, *, graph: bool) -> Contender:
    """Never run by melrt's authors on a GPU yet: device-synchronized, mels and audio cross the bus as they do for melrt."""
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("this PyTorch sees no GPU")
    generator = _generator(bench).half().cuda()
    captured: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}

    def audio_of(mel: NDArray[np.float32]) -> Any:
        if not graph:
            return generator(torch.from_numpy(mel).cuda().half())
        if mel.shape not in captured:
            captured[mel.shape] = _capture(generator, mel.shape)
        recorded, frames, audio = captured[mel.shape]
        frames.copy_(torch.from_numpy(mel))
        recorded.replay()
        return audio

    def run(mel: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(audio_of(mel)[:, 0].float().cpu().numpy())

    return Contender(f"PyTorch {'CUDA graph' if graph else 'eager, GPU'}, FP16", "fp16", run, on_gpu=True)


def _capture(generator: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """A CUDA graph of the generator, its input and its output (PyTorch's notes on CUDA graphs: warm up on a side stream)."""
    torch: Any = importlib.import_module("torch")
    frames = torch.zeros(shape, dtype=torch.half, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            generator(frames)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        audio = generator(frames)
    return recorded, frames, audio


def _plain(bench: Bench, device: str) -> Run:
    if device == "cuda" and find_gpu() is None:
        raise UnavailableError("no NVIDIA GPU")
    model = OnnxModel(plain_onnx(_generator(bench)), "cuda:0" if device == "cuda" else "cpu", threads=bench.threads)
    return lambda mel: model.run(mel).reshape(len(mel), -1)


def _plain_tensorrt(bench: Bench) -> Run:
    """ONNX Runtime's TensorRT provider, at half precision; never run by melrt's authors on a GPU yet."""
    import onnxruntime

    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        raise UnavailableError("this ONNX Runtime has no TensorRT provider")
    providers = [("TensorrtExecutionProvider", {"trt_fp16_enable": True}), "CUDAExecutionProvider"]
    session = onnxruntime.InferenceSession(plain_onnx(_generator(bench)), providers=providers)
    return lambda mel: np.asarray(session.run(None, {"mel": mel})[0]).reshape(len(mel), -1)


def _tensorrt(bench: Bench) -> Contender:
    """A first attempt with TensorRT: Polygraphy's own runner on the plain export; never run by melrt's authors on a GPU yet."""
    flavor = next((name for name in FLAVORS if importlib.util.find_spec(name)), None)
    if find_gpu() is None or flavor is None:
        raise UnavailableError("no NVIDIA GPU" if flavor else "TensorRT is not installed")
    bands = bench.bundle.manifest.spec.n_mels
    with polygraphy_for(flavor):
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, NetworkFromOnnxBytes, Profile, TrtRunner

        profile = Profile().add("mel", (1, bands, 64), (1, bands, 400), (64, bands, 3000))
        config = CreateConfigRTX(profiles=[profile]) if flavor == "tensorrt_rtx" else CreateConfig(profiles=[profile], tf32=True)
        runner = TrtRunner(EngineFromNetwork(NetworkFromOnnxBytes(plain_onnx(_generator(bench))), config=config))
        runner.activate()

    def run(mel: NDArray[np.float32]) -> NDArray[np.float32]:
        (audio,) = runner.infer({"mel": mel}).values()
        return np.array(audio, np.float32).reshape(len(mel), -1)

    return Contender("TensorRT GPU, plain export", "tf32", run, runner.deactivate, on_gpu=True)


def _openvino(bench: Bench) -> Run:
    if importlib.util.find_spec("openvino") is None:
        raise UnavailableError('not installed: pip install "melrt[openvino]"')
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    # its default on processors that have bfloat16 is to round everything to it: 2e-2 off, where fp32 is meant
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": bench.threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(plain_onnx(_generator(bench))), "CPU", settings)
    mine = threading.local()  # a request serves one caller at a time

    def run(mel: NDArray[np.float32]) -> NDArray[np.float32]:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        return np.array(mine.request.infer([mel])[0]).reshape(len(mel), -1)

    return run


def _whole(bench: Bench) -> Run:
    edge = bench.bundle.find("onnx", graph="edge", precision="fp32")
    if not edge:
        raise UnavailableError("the bundle has no fp32 graph")
    model = OnnxModel(bench.bundle.read(edge[0]), threads=bench.threads, blocked=bench.threads == 1)
    return model.run


def _melrt(bench: Bench, backend: str, precision: str) -> Contender:
    vocoder = Vocoder.load(bench.bundle, backend=backend, precision=precision, threads=bench.threads, options=Options())
    return Contender(f"melrt, {backend} {precision}", precision, vocoder, vocoder.close, vocoder.backend.device != "cpu")
