"""The plain export on a GPU: ONNX Runtime with its CUDA and TensorRT providers, and TensorRT. No GPU has run the last two."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from melrt.errors import MissingExtraError
from melrt.types import FloatAudio, Mel
from melrt_benchmarks.inference.contender import BenchVoice, Contender, UnavailableError
from melrt_benchmarks.inference.plain_export import plain_onnx
from melrt_export.tensorrt.options import FLAVORS
from melrt_export.tensorrt.polygraphy import polygraphy_for

# ONNX Runtime multiplies FP32 in TF32 by default. The padding turns (B, C, T) into (B, C, 1, T) instead of (B, C, T, 1), which cuDNN
# computes faster (pull request 11040 of ONNX Runtime). The search for kernels is the default, which times them for each shape.
CUDA_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "fp32": {"use_tf32": "0"},
    "tf32": {"use_tf32": "1"},
    "fp16": {"cudnn_conv1d_pad_to_nc1d": "1"},
}
DEVICE = "cuda"
CUDA, TENSORRT, RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_ERRORS_ONLY = 3


def load_cuda(voice: BenchVoice, name: str, precision: str) -> Contender:
    """Load the plain export in ONNX Runtime's CUDA provider. Its precision is that of the export, in TF32 if `precision` says so."""
    ort = _onnxruntime(CUDA, "onnxruntime-gpu")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return _contender(ort, name, precision, _session(ort, voice, precision, CUDA, CUDA_OPTIONS[precision]))


def load_tensorrt_provider(voice: BenchVoice, name: str, precision: str) -> Contender:
    """Load the plain export in half precision in ONNX Runtime's TensorRT provider."""
    ort = _onnxruntime(TENSORRT, "onnxruntime-gpu")
    return _contender(ort, name, precision, _session(ort, voice, precision, TENSORRT, {"trt_fp16_enable": "True"}))


def load_rtx_provider(voice: BenchVoice, name: str, precision: str) -> Contender:
    """Load the plain export in half precision in ONNX Runtime's TensorRT-RTX provider: its plugin, or one that ONNX Runtime has."""
    if importlib.util.find_spec(RTX_PLUGIN) is None:
        ort = _onnxruntime(RTX, "onnxruntime-ep-nv-tensorrt-rtx")
        return _contender(ort, name, precision, _session(ort, voice, precision, RTX, {}))
    ort = importlib.import_module("onnxruntime")
    plugin: Any = importlib.import_module(RTX_PLUGIN)
    ep_name = plugin.get_ep_name()
    if ep_name not in {device.ep_name for device in ort.get_ep_devices()}:
        ort.register_execution_provider_library(ep_name, plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == ep_name][:1]
    if not devices:
        raise UnavailableError("the TensorRT-RTX provider supports no GPU of this machine.")
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_provider_for_devices(devices, {})
    return _contender(ort, name, precision, ort.InferenceSession(plain_onnx(_typed(voice, precision)), options))


def load_tensorrt(voice: BenchVoice, name: str, precision: str) -> Contender:
    """Build and load the plain export in half precision in TensorRT, strongly typed, through Polygraphy."""
    flavor = next((name for name in FLAVORS if importlib.util.find_spec(name)), None)
    if flavor is None:
        raise MissingExtraError("this contender", "TensorRT", "tensorrt")
    trt = importlib.import_module(flavor)
    bands = voice.bundle.manifest.spec.n_mels
    with polygraphy_for(flavor):
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import CreateConfig, EngineFromNetwork, NetworkFromOnnxBytes, Profile, TrtRunner

        # TensorRT versions without the flag build only strongly typed networks
        typed = True if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") else None
        profile = Profile().add("mel", (1, bands, 64), (1, bands, 400), (64, bands, 3000))
        config = CreateConfigRTX(profiles=[profile]) if flavor == "tensorrt_rtx" else CreateConfig(profiles=[profile])
        network = NetworkFromOnnxBytes(plain_onnx(_typed(voice, precision)), strongly_typed=typed)
        runner = TrtRunner(EngineFromNetwork(network, config=config))
        runner.activate()

    def run(mel: Mel) -> FloatAudio:
        (audio,) = runner.infer({"mel": mel.astype(np.float16)}).values()
        return np.array(audio, np.float32).reshape(len(mel), -1)

    return Contender(name, precision, run, runner.deactivate, on_gpu=True)


LOADERS: tuple[tuple[str, str, Callable[[BenchVoice, str, str], Contender]], ...] = (
    ("ONNX Runtime GPU, plain FP32", "fp32", load_cuda),
    ("ONNX Runtime GPU, plain TF32", "tf32", load_cuda),
    ("ONNX Runtime GPU, plain FP16", "fp16", load_cuda),
    ("ONNX Runtime TensorRT GPU, plain FP16", "fp16", load_tensorrt_provider),
    ("ONNX Runtime TensorRT-RTX GPU, plain FP16", "fp16", load_rtx_provider),
    ("TensorRT GPU, plain FP16", "fp16", load_tensorrt),
)
"""Name, precision and loader of each of these contenders."""


def _onnxruntime(provider: str, package: str) -> Any:
    """Return ONNX Runtime if it has this provider."""
    ort: Any = importlib.import_module("onnxruntime")
    if provider not in ort.get_available_providers():
        raise UnavailableError(f"this ONNX Runtime has no {provider}; pip uninstall onnxruntime, then pip install {package}.")
    return ort


def _typed(voice: BenchVoice, precision: str) -> Any:
    return voice.generator().half() if precision == "fp16" else voice.generator()


def _session(ort: Any, voice: BenchVoice, precision: str, provider: str, settings: Mapping[str, str]) -> Any:
    """Return a session of the plain export. Operations that a TensorRT provider refuses run on CUDA."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    others = [] if provider == CUDA else [name for name in (CUDA,) if name in ort.get_available_providers()]
    providers = [(provider, dict(settings)), *others, "CPUExecutionProvider"]
    session = ort.InferenceSession(plain_onnx(_typed(voice, precision)), options, providers=providers)
    if session.get_providers()[0] != provider:  # ONNX Runtime falls back silently
        raise UnavailableError(f"ONNX Runtime could not load its {provider}; `melrt doctor` shows what is missing.")
    return session


def _contender(ort: Any, name: str, precision: str, session: Any) -> Contender:
    dtype = np.float16 if precision == "fp16" else np.float32
    (output,) = (one.name for one in session.get_outputs())

    def run(mel: Mel) -> FloatAudio:
        (audio,) = session.run(None, {"mel": mel.astype(dtype, copy=False)})
        return np.asarray(audio, np.float32).reshape(len(mel), -1)

    def on_device(mel: Mel) -> Callable[[], object]:
        binding = session.io_binding()
        binding.bind_ortvalue_input("mel", ort.OrtValue.ortvalue_from_numpy(mel.astype(dtype), DEVICE, 0))
        binding.bind_output(output, DEVICE)
        return partial(session.run_with_iobinding, binding)  # returns when the GPU is done

    return Contender(name, precision, run, on_gpu=True, on_device=on_device)
