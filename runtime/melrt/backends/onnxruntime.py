"""ONNX Runtime on CPU and CUDA."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from melrt.backends.onnxruntime_capture import CapturedWindow
from melrt.errors import BackendError, MissingExtraError
from melrt.planning.windows import GraphKind, Policy
from melrt.system import cpu_name, find_gpu, usable_cores
from melrt.types import FloatAudio, Mel

logger = logging.getLogger(__name__)

_ERRORS_ONLY = 3
# Measured per kept frame (docs/windows.md): shorter windows recompute more context, longer ones exceed the cache.
CPU_WINDOW = 128
CPU_WINDOWS = (48, 64, 96, 128, 192, 256, 384)
# Not confirmed on a GPU: long enough that the context is below a tenth; one shape, so that cuDNN chooses its kernels once.
CUDA_WINDOW = 256
CUDA_WINDOWS = (64, 128, 256, 512)
CUDA_BATCH = 8
CUDA_BATCHES = (1, 4, 8, 16, 32)


def usable_devices() -> tuple[str, ...]:
    """Return the device kinds that the installed ONNX Runtime was built for, best first. The device itself may still be absent."""
    available = _onnxruntime().get_available_providers()
    return ("cuda", "cpu") if "CUDAExecutionProvider" in available else ("cpu",)


class OnnxModel:
    """One ONNX model in one session. Safe to call from several threads."""

    def __init__(self, model: bytes, device: str = "cpu", threads: int = 0, *, blocked: bool = True, tf32: bool = False) -> None:
        """Load a model.

        Args:
            model: Serialized ONNX model, verified by the caller.
            device: `cpu`, or `cuda:0`, `cuda:1`, ...
            threads: CPU threads that share one run; 0 for one per physical core.
            blocked: Use ONNX Runtime's blocked layout: faster on one thread, slower if several threads share a run (docs/windows.md).
            tf32: On CUDA, round what a float32 model multiplies to 10 bits, for tensor cores.

        Raises:
            BackendError: ONNX Runtime rejects the model, or the device is not available.
        """
        ort = _onnxruntime()
        if device != "cpu" and "CUDAExecutionProvider" not in ort.get_available_providers():
            raise BackendError('this ONNX Runtime has no CUDA: pip uninstall onnxruntime, then pip install "melrt[gpu]"')
        if device != "cpu" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from NVIDIA's wheels, which the loader does not find by itself
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = threads
        if device == "cpu":
            _share_arena(ort)
            options.add_session_config_entry("session.use_env_allocators", "1")
        if not blocked:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self._window: CapturedWindow | None = None
        self._tf32 = tf32
        try:
            with tempfile.TemporaryDirectory(prefix="melrt-") as empty:
                # Weights outside the model are not verified: they are looked for in this folder, and not in the working directory.
                options.add_session_config_entry("session.model_external_initializers_file_folder_path", empty)
                self._session = ort.InferenceSession(model, options, providers=_providers(device, tf32=tf32))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BackendError(f"ONNX Runtime {ort.__version__} rejected the model: {error}") from error
        if device != "cpu" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise BackendError("ONNX Runtime found no usable CUDA device; `melrt doctor` shows what is missing.")

    def capture(self, model: bytes, device: str, frames: int, batch: int) -> None:
        """Capture the runs of one window length as CUDA graphs, for batches 1, 2, 4, ... up to `batch`.

        A provider that does not know CUDA graphs or cannot capture this model is logged, and every run stays as it was.

        Args:
            model: The model that this session runs.
            device: `cuda:0`, ...
            frames: Length of the window.
            batch: Largest batch.
        """
        try:
            self._window = CapturedWindow(_onnxruntime(), model, _providers(device, tf32=self._tf32, capture=True), frames, batch)
        except Exception as error:  # an old provider refuses the option; a node that is not on the GPU, or a call of another library
            logger.info("ONNX Runtime does not capture CUDA graphs of this model, so its kernels are launched one by one: %s", error)

    def run(self, mel: Mel) -> FloatAudio:
        """Run mel frames (B, M, T) through the model; the output's shape is the model's.

        Raises:
            BackendError: ONNX Runtime failed.
        """
        window = self._window
        if window is not None and window.takes(mel):
            try:
                return window.run(mel)
            except Exception as error:  # the same
                logger.warning("a captured CUDA graph failed, so kernels are launched one by one from now on: %s", error)
                self._window = None
        try:
            (audio,) = self._session.run(None, {"mel": mel})
        except Exception as error:  # the same
            raise BackendError(f"ONNX Runtime failed on a mel of shape {mel.shape}: {error}") from error
        return np.asarray(audio, np.float32)


class OnnxRuntime:
    """A voice's two graphs in ONNX Runtime.

    On a CPU every run has one thread, and as many windows run at the same time as there are cores: ONNX Runtime's blocked
    convolutions divide a run by channels and height only, so with height 1 half of this network would run on one core anyway.
    """

    name = "onnxruntime"
    reason = ""

    def __init__(self, models: Mapping[GraphKind, bytes], precision: str, device: str, threads: int | None = None) -> None:
        """Load both graphs.

        Args:
            models: Serialized ONNX models of `edge` and `interior`, verified by the caller.
            precision: Precision of the models; `tf32` for float32 models that are multiplied in TF32.
            device: `cpu`, or `cuda:0`, `cuda:1`, ...
            threads: CPU threads in all; one per usable core if None.

        Raises:
            BackendError: ONNX Runtime rejects a model, or the device is not available.
        """
        self.precision = precision
        self.device = device
        self._models = {graph: OnnxModel(model, device, threads=1, tf32=precision == "tf32") for graph, model in models.items()}
        if device == "cpu":
            self.machine = cpu_name()
            self.policy = Policy(frames=CPU_WINDOW, static=False, batch=1, workers=threads or usable_cores())
            self.candidates = tuple(replace(self.policy, frames=frames) for frames in CPU_WINDOWS)
        else:
            gpu = find_gpu()
            self.machine = gpu.name if gpu else "unknown GPU"
            self.policy = Policy(frames=CUDA_WINDOW, static=True, batch=CUDA_BATCH, workers=1)
            self._models["interior"].capture(models["interior"], device, CUDA_WINDOW, CUDA_BATCH)
            self.candidates = tuple(replace(self.policy, frames=f, batch=b) for f in CUDA_WINDOWS for b in CUDA_BATCHES)

    def run(self, graph: GraphKind, mel: Mel) -> FloatAudio:
        return self._models[graph].run(mel)

    def close(self) -> None:
        self._models.clear()


@cache
def _share_arena(ort: Any) -> None:
    """Make one memory arena for all sessions of the process. Otherwise each keeps an arena of the size of its largest run."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(Exception):  # the application has registered an arena; it serves as well
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def _providers(device: str, *, tf32: bool = False, capture: bool = False) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    # The default search, EXHAUSTIVE, tunes every new input shape for hundreds of milliseconds. HEURISTIC asks cuDNN once.
    # TF32 is on by default, and is not FP32: it rounds what is multiplied to 10 bits.
    options = {"device_id": device.partition(":")[2], "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": str(int(tf32))}
    if capture:
        return [("CUDAExecutionProvider", options | {"enable_cuda_graph": "1"})]  # a node on the CPU could not be captured
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("running a voice", "onnxruntime", "cpu") from error
    return onnxruntime
