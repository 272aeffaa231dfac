"""The ways to run a MelGAN checkpoint, each as its own users would run it."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from melrt.backends.base import DeviceBackend
from melrt.backends.onnxruntime import OnnxModel, usable_devices
from melrt.backends.openvino import compile_first
from melrt.errors import MelrtError, MissingExtraError
from melrt.system import find_gpu
from melrt.types import FloatAudio, Mel
from melrt.vocoder import Options, Vocoder
from melrt_benchmarks.inference.contender import BenchVoice, Contender, Run, UnavailableError
from melrt_benchmarks.inference.onnx_gpu import LOADERS
from melrt_benchmarks.inference.plain_export import plain_onnx
from melrt_benchmarks.inference.torch_gpu import FORMS, load_torch
from melrt_benchmarks.report.results import Skipped

GPU_CONTENDERS = "contenders on a GPU"
# Characters of a reason: builders of engines report pages.
MAX_REASON = 400


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
    named = (*_others(voice), *_ours(voice, precisions, backends))
    wanted = [row for row in named if not only or any(part.lower() in row[0].lower() for part in only)]
    foreign = [name for name, *_ in wanted if "GPU" in name and not name.startswith("melrt")]
    if foreign and find_gpu() is None:
        yield Skipped(f"{len(foreign)} {GPU_CONTENDERS}", f"this machine has no NVIDIA GPU for {'; '.join(foreign)}.")
        wanted = [row for row in wanted if row[0] not in foreign]
    for name, precision, load in wanted:
        try:
            loaded = load()
            yield loaded if isinstance(loaded, Contender) else Contender(name, precision, loaded)
        except MelrtError as error:
            yield Skipped(name, str(error).splitlines()[0][:MAX_REASON])
        except ImportError as error:
            yield Skipped(name, str(MissingExtraError("this contender", error.name or "a package", "benchmarks")))
        except Exception as error:  # those of PyTorch, ONNX Runtime, TensorRT and CUDA have no common base
            yield Skipped.failure(name, "while it was loaded", error)


Row = tuple[str, str, Callable[[], Run | Contender]]


def _others(voice: BenchVoice) -> Iterator[Row]:
    """Name, precision and loader of each contender that is not melrt. The names of those on a GPU contain "GPU"."""
    yield "PyTorch eager, weight norm", "fp32", partial(_eager, voice, weight_norm=True)
    yield "PyTorch eager", "fp32", partial(_eager, voice)
    yield "torch.compile", "fp32", partial(_compiled, voice)
    for form in FORMS:
        yield form.name, form.precision, partial(load_torch, voice, form)
    yield "ONNX Runtime, plain export", "fp32", partial(_plain, voice)
    for name, precision, load in LOADERS:
        yield name, precision, partial(load, voice, name, precision)
    yield "OpenVINO, plain, float32", "fp32", partial(_openvino, voice, {"INFERENCE_PRECISION_HINT": "f32"})
    yield "OpenVINO, plain, default", "bf16", partial(_openvino, voice, {})
    yield "melrt's graph, whole", "fp32", partial(_whole, voice)


def _ours(voice: BenchVoice, precisions: tuple[str, ...], backends: tuple[str, ...]) -> Iterator[Row]:
    """Name, precision and loader of each backend and precision of melrt."""
    cuda = find_gpu() is not None and "cuda" in usable_devices()
    for backend in backends:
        on_gpu = backend in ("tensorrt", "fused") or (cuda and backend == "onnxruntime")
        for precision in precisions:
            name = f"melrt{' GPU' if on_gpu else ''}, {backend} {precision}"
            yield name, precision, partial(_melrt, voice, backend, precision, name)


def _eager(voice: BenchVoice, *, weight_norm: bool = False) -> Run:
    import torch

    generator = voice.generator()
    if weight_norm:  # published checkpoints run so: every forward pass computes the weights from direction and magnitude
        for layer in generator.modules():
            if isinstance(layer, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                torch.nn.utils.parametrizations.weight_norm(layer)
    return _on_cpu(generator)


def _compiled(voice: BenchVoice) -> Contender:
    import torch

    generator = voice.generator()
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise UnavailableError("torch.compile needs a C++ compiler; install one, for example with `apt install g++`.")
    return Contender("torch.compile", "fp32", _on_cpu(torch.compile(generator, dynamic=False)), any_length=False)


def _on_cpu(generator: Any) -> Run:
    import torch

    def run(mel: Mel) -> FloatAudio:
        with torch.inference_mode():
            return np.asarray(generator(torch.from_numpy(mel))[:, 0].numpy())

    return run


def _plain(voice: BenchVoice) -> Run:
    model = OnnxModel(plain_onnx(voice.generator()), threads=voice.threads)
    return lambda mel: model.run(mel).reshape(len(mel), -1)


def _openvino(voice: BenchVoice, settings: Mapping[str, str]) -> Run:
    """Run the plain export. By default OpenVINO rounds everything to bfloat16 on a processor that multiplies it."""
    if importlib.util.find_spec("openvino") is None:
        raise MissingExtraError("this contender", "OpenVINO", "openvino")
    openvino: Any = importlib.import_module("openvino")
    core = openvino.Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": voice.threads, **settings}
    compiled = compile_first(core, core.read_model(plain_onnx(voice.generator())), options)
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


def _melrt(voice: BenchVoice, backend: str, precision: str, name: str) -> Contender:
    device = "cuda" if "GPU" in name else "cpu"  # named, so that it does not fall back
    vocoder = Vocoder.load(voice.bundle, device=device, backend=backend, precision=precision, threads=voice.threads, options=Options())
    on_device = partial(_on_device, vocoder) if isinstance(vocoder.backend, DeviceBackend) else None
    return Contender(name, precision, vocoder, vocoder.close, device == "cuda", on_device=on_device)


def _on_device(vocoder: Vocoder, mel: Mel) -> Callable[[], object]:
    import torch

    return partial(vocoder, torch.from_numpy(mel).cuda())
