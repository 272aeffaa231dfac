"""The ways to run a MelGAN checkpoint, each as its own users would run it."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from melrt.backends.onnxruntime import OnnxModel
from melrt.backends.openvino import compile_first
from melrt.bundle import Bundle
from melrt.errors import MelrtError, MissingExtraError
from melrt.system import find_gpu
from melrt.types import FloatAudio, Mel
from melrt.vocoder import Options, Vocoder
from melrt_benchmarks.inference.plain_export import plain_onnx
from melrt_benchmarks.report.results import Skipped
from melrt_export.checkpoints import Checkpoint
from melrt_export.tensorrt.options import FLAVORS
from melrt_export.tensorrt.polygraphy import polygraphy_for

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


def load_contenders(
    voice: BenchVoice, precisions: tuple[str, ...], backends: tuple[str, ...], only: tuple[str, ...] = ()
) -> Iterator[Contender | Skipped]:
    """Load each contender, or say why it cannot run. The first one that runs is the baseline.

    Args:
        voice: What they run.
        precisions: Precisions of melrt.
        backends: Backends of melrt.
        only: Parts of names; a contender is loaded if its name contains one of them. Empty: all.
    """
    for name, precision, load in _list(voice, precisions, backends):
        if only and not any(part.lower() in name.lower() for part in only):
            continue
        try:
            loaded = load()
            yield loaded if isinstance(loaded, Contender) else Contender(name, precision, loaded, on_gpu="GPU" in name or "CUDA" in name)
        except MelrtError as error:
            yield Skipped(name, str(error).splitlines()[0])
        except ImportError as error:
            yield Skipped(name, str(MissingExtraError("this contender", error.name or "a package", "benchmarks")))


def _list(
    voice: BenchVoice, precisions: tuple[str, ...], backends: tuple[str, ...]
) -> Iterator[tuple[str, str, Callable[[], Run | Contender]]]:
    """Name, precision and loader of each contender."""
    yield "PyTorch eager, weight norm", "fp32", partial(_eager, voice, weight_norm=True)
    yield "PyTorch eager", "fp32", partial(_eager, voice)
    yield "torch.compile", "fp32", partial(_compiled, voice)
    yield "PyTorch eager, GPU, FP16", "fp16", partial(_torch_gpu, voice, graph=False)
    yield "PyTorch CUDA graph, FP16", "fp16", partial(_torch_gpu, voice, graph=True)
    yield "ONNX Runtime, plain export", "fp32", partial(_plain, voice, "cpu")
    yield "ONNX Runtime CUDA, plain", "tf32", partial(_plain, voice, "cuda")
    yield "ONNX Runtime TensorRT GPU", "fp16", partial(_plain_tensorrt, voice)
    yield "TensorRT GPU, plain export", "tf32", partial(_tensorrt, voice)
    yield "OpenVINO, plain, float32", "fp32", partial(_openvino, voice, {"INFERENCE_PRECISION_HINT": "f32"})
    yield "OpenVINO, plain, default", "bf16", partial(_openvino, voice, {})
    yield "melrt's graph, whole", "fp32", partial(_whole, voice)
    for backend in backends:
        for precision in precisions:
            yield f"melrt, {backend} {precision}", precision, partial(_melrt, voice, backend, precision)


def _require_gpu() -> None:
    if find_gpu() is None:
        raise UnavailableError("this machine has no NVIDIA GPU.")


def _generator(voice: BenchVoice) -> Any:
    if voice.checkpoint is None:
        raise UnavailableError("it needs the checkpoint that the voice was exported from; give it with --checkpoint.")
    import torch

    from melrt_export.generator.network import Generator

    torch.set_num_threads(voice.threads)
    return Generator.from_weights(voice.checkpoint.config, {k: torch.from_numpy(v) for k, v in voice.checkpoint.weights.items()})


def _eager(voice: BenchVoice, *, weight_norm: bool = False) -> Run:
    import torch

    generator = _generator(voice)
    if weight_norm:  # published checkpoints run so: every forward pass computes the weights from direction and magnitude
        for layer in generator.modules():
            if isinstance(layer, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                torch.nn.utils.parametrizations.weight_norm(layer)
    return _on_cpu(generator)


def _compiled(voice: BenchVoice) -> Contender:
    import torch

    generator = _generator(voice)
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise UnavailableError("torch.compile needs a C++ compiler; install one, for example with `apt install g++`.")
    return Contender("torch.compile", "fp32", _on_cpu(torch.compile(generator, dynamic=False)), any_length=False)


def _on_cpu(generator: Any) -> Run:
    import torch

    def run(mel: Mel) -> FloatAudio:
        with torch.inference_mode():
            return np.asarray(generator(torch.from_numpy(mel))[:, 0].numpy())

    return run


def _torch_gpu(voice: BenchVoice, *, graph: bool) -> Run:
    """Run PyTorch at half precision. Mels and audio are copied to and from the GPU, as melrt does. Not yet run on a GPU."""
    import torch

    _require_gpu()
    if not torch.cuda.is_available():
        raise UnavailableError("this PyTorch cannot use the GPU; install a build for CUDA from https://pytorch.org/get-started.")
    generator = _generator(voice).half().cuda()
    captured: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}

    def audio_of(mel: Mel) -> Any:
        if not graph:
            return generator(torch.from_numpy(mel).cuda().half())
        if mel.shape not in captured:
            captured[mel.shape] = _capture(generator, mel.shape)
        recorded, frames, audio = captured[mel.shape]
        frames.copy_(torch.from_numpy(mel))
        recorded.replay()
        return audio

    def run(mel: Mel) -> FloatAudio:
        with torch.inference_mode():
            return np.asarray(audio_of(mel)[:, 0].float().cpu().numpy())

    return run


def _capture(generator: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Return a CUDA graph of the generator, its input and its output.

    PyTorch's notes on CUDA graphs ask for the warm-up on a side stream.
    """
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


def _plain(voice: BenchVoice, device: str) -> Run:
    if device == "cuda":
        _require_gpu()
    model = OnnxModel(plain_onnx(_generator(voice)), "cuda:0" if device == "cuda" else "cpu", threads=voice.threads)
    return lambda mel: model.run(mel).reshape(len(mel), -1)


def _plain_tensorrt(voice: BenchVoice) -> Run:
    """Run ONNX Runtime's TensorRT provider at half precision. Not yet run on a GPU."""
    import onnxruntime

    _require_gpu()
    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingExtraError("ONNX Runtime's TensorRT provider", "onnxruntime-gpu", "gpu")
    providers = [("TensorrtExecutionProvider", {"trt_fp16_enable": True}), "CUDAExecutionProvider"]
    session = onnxruntime.InferenceSession(plain_onnx(_generator(voice)), providers=providers)
    return lambda mel: np.asarray(session.run(None, {"mel": mel})[0]).reshape(len(mel), -1)


def _tensorrt(voice: BenchVoice) -> Contender:
    """Run the plain export by Polygraphy's runner, as a first attempt with TensorRT would. Not yet run on a GPU."""
    _require_gpu()
    flavor = next((name for name in FLAVORS if importlib.util.find_spec(name)), None)
    if flavor is None:
        raise MissingExtraError("this contender", "TensorRT", "tensorrt")
    bands = voice.bundle.manifest.spec.n_mels
    with polygraphy_for(flavor):
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, NetworkFromOnnxBytes, Profile, TrtRunner

        profile = Profile().add("mel", (1, bands, 64), (1, bands, 400), (64, bands, 3000))
        config = CreateConfigRTX(profiles=[profile]) if flavor == "tensorrt_rtx" else CreateConfig(profiles=[profile], tf32=True)
        runner = TrtRunner(EngineFromNetwork(NetworkFromOnnxBytes(plain_onnx(_generator(voice))), config=config))
        runner.activate()

    def run(mel: Mel) -> FloatAudio:
        (audio,) = runner.infer({"mel": mel}).values()
        return np.array(audio, np.float32).reshape(len(mel), -1)

    return Contender("TensorRT GPU, plain export", "tf32", run, runner.deactivate, on_gpu=True)


def _openvino(voice: BenchVoice, settings: Mapping[str, str]) -> Run:
    """Run the plain export. By default OpenVINO rounds everything to bfloat16 on a processor that multiplies it."""
    if importlib.util.find_spec("openvino") is None:
        raise MissingExtraError("this contender", "OpenVINO", "openvino")
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": voice.threads, **settings}
    compiled = compile_first(core, core.read_model(plain_onnx(_generator(voice))), options)
    local = threading.local()  # an inference request serves one caller at a time

    def run(mel: Mel) -> FloatAudio:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        return np.array(local.request.infer([mel])[0]).reshape(len(mel), -1)

    return run


def _whole(voice: BenchVoice) -> Run:
    edge = voice.bundle.find("onnx", graph="edge", precision="fp32")
    if not edge:
        raise UnavailableError("the bundle has no graph in fp32; export the voice again with --precision fp32.")
    model = OnnxModel(voice.bundle.read(edge[0]), threads=voice.threads, blocked=voice.threads == 1)
    return model.run


def _melrt(voice: BenchVoice, backend: str, precision: str) -> Contender:
    vocoder = Vocoder.load(voice.bundle, backend=backend, precision=precision, threads=voice.threads, options=Options())
    return Contender(f"melrt, {backend} {precision}", precision, vocoder, vocoder.close, vocoder.backend.device != "cpu")
