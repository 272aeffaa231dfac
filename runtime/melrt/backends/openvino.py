"""OpenVINO on CPUs: the only engine here that multiplies bfloat16, and that uses the matrix units (AMX) of Intel's server processors."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from melrt.errors import BackendError, MissingExtraError
from melrt.planning.windows import GraphKind, Policy
from melrt.system import cpu_name, usable_cores
from melrt.types import FloatAudio, Mel

# Measured per kept frame (docs/windows.md).
WINDOW = 128
WINDOWS = (48, 64, 96, 128, 192, 256, 384)
# A new length costs a compilation of 0.1 s, or 20 to 50 ms without a graph of its own. Multiples of 8 are at most 16 lengths up to 128
# frames, and recompute 3.5 frames per window more.
MULTIPLE = 8
# A graph of one shape saves 1 to 2 ms per run, 5 to 10 % in bfloat16, and takes 20 to 35 MB for the published generator.
MOST_SHAPES = 8
# What a dynamic graph keeps of each layer and length that it ran (https://github.com/openvinotoolkit/openvino/issues/20633): 16 lengths or
# more. The default, 5,000, took 5 GB after 200 lengths.
LAYERS_KEPT = 512
_first_use = threading.Lock()


class OpenVinoModel:
    """One ONNX model in OpenVINO. Safe to call from several threads; each run has one thread."""

    def __init__(self, model: bytes, workers: int = 1, *, shapes: int = 0) -> None:
        """Load a model.

        Args:
            model: Serialized ONNX model, verified by the caller. Every layer computes in the type that the model gives it.
            workers: Runs at the same time.
            shapes: Number of shapes that get a compiled graph of their own, in the order in which they come. Others share a dynamic one.

        Raises:
            BackendError: OpenVINO rejects the model.
        """
        self._openvino = _openvino()
        self._core = self._openvino.Core()
        # Without the hint, OpenVINO rounds float32 layers to bfloat16. Pinned threads of two models would share one core.
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": workers, "INFERENCE_NUM_THREADS": workers, "ENABLE_CPU_PINNING": False,
            "CPU_RUNTIME_CACHE_CAPACITY": LAYERS_KEPT,
        }  # fmt: skip
        try:
            self._model = self._core.read_model(io.BytesIO(model))
            self._dynamic = _Compiled(compile_first(self._core, self._model, self._settings))
        except Exception as error:  # OpenVINO raises RuntimeError and others
            raise BackendError(f"OpenVINO {self._openvino.__version__} rejected the model: {error}") from error
        self._shapes = shapes
        self._static: dict[tuple[int, ...], _Compiled] = {}
        self._lock = threading.Lock()

    def run(self, mel: Mel) -> FloatAudio:
        """Run mel frames (B, M, T) through the model; the output's shape is the model's.

        Raises:
            BackendError: OpenVINO failed.
        """
        try:
            return (self._static.get(mel.shape) or self._for_shape(mel.shape)).run(mel)
        except Exception as error:  # the same
            raise BackendError(f"OpenVINO failed on a mel of shape {mel.shape}: {error}") from error

    def executed_types(self) -> dict[str, str]:
        """Return the type in which each convolution computes, such as `f32`, `bf16`, `i8` or `u8`, by name."""
        types = {}
        for node in self._dynamic.graph.get_runtime_model().get_ops():
            facts = node.get_rt_info()
            if facts["layerType"].astype(str) == "Convolution":
                types[node.get_friendly_name().removesuffix("/WithoutBiases")] = facts["runtimePrecision"].astype(str)
        return types

    def _for_shape(self, shape: tuple[int, ...]) -> _Compiled:
        with self._lock:
            if shape not in self._static and len(self._static) < self._shapes:
                model = self._model.clone()
                model.reshape(list(shape))
                self._static[shape] = _Compiled(self._core.compile_model(model, "CPU", self._settings))
            return self._static.get(shape, self._dynamic)


def compile_first(core: Any, model: Any, settings: Mapping[str, Any]) -> Any:
    """Compile the first model of an `openvino.Core` for the CPU, in a thread of its own, and return it.

    OpenVINO gives the thread of the first compilation a signal stack, and frees that stack with the last model, although the thread may
    still use it; the next signal would then kill the process (https://github.com/openvinotoolkit/openvino/pull/11894).
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(core.compile_model, model, "CPU", settings).result()


class _Compiled:
    """A compiled graph and its idle inference requests, each of which serves one run at a time."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self._idle: list[Any] = []  # append and pop are single steps in every thread

    def run(self, mel: Mel) -> FloatAudio:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.graph.create_infer_request()
        request.infer([np.ascontiguousarray(mel)], share_inputs=True)
        audio = np.array(request.get_output_tensor().data, np.float32)
        self._idle.append(request)
        return audio


class OpenVino:
    """A voice's two graphs in OpenVINO, on a CPU. As many windows run at the same time as there are cores, each on one thread."""

    name = "openvino"
    device = "cpu"
    reason = ""

    def __init__(self, models: Mapping[GraphKind, bytes], precision: str, threads: int | None = None) -> None:
        """Load both graphs.

        Args:
            models: Serialized ONNX models of `edge` and `interior`, verified by the caller.
            precision: Precision of the models.
            threads: CPU threads in all; one per usable core if None.

        Raises:
            BackendError: OpenVINO rejects a model.
        """
        workers = threads or usable_cores()
        self.precision = precision
        self.machine = cpu_name()
        self.policy = Policy(WINDOW, static=False, batch=1, workers=workers, multiple=MULTIPLE)
        self.candidates = tuple(replace(self.policy, frames=frames) for frames in WINDOWS)
        # Short utterances run whole on the edge graph, in any length, so it stays dynamic.
        self._models = {
            graph: OpenVinoModel(model, workers, shapes=MOST_SHAPES if graph == "interior" else 0) for graph, model in models.items()
        }

    def run(self, graph: GraphKind, mel: Mel) -> FloatAudio:
        return self._models[graph].run(mel)

    def close(self) -> None:
        self._models.clear()


def _openvino() -> Any:
    with _first_use:
        openvino = _import_without_telemetry()
        # OpenVINO 2026.4 makes its tables of numpy types at their first use; two threads that use them first can wait for each other
        _ = openvino.Type.f32.to_dtype(), openvino.Tensor(np.zeros(1, np.float32)).data
    return openvino


def _import_without_telemetry() -> Any:
    """Import OpenVINO without the package through which its import would start a thread and report the use to its makers."""
    absent = "openvino_telemetry" not in sys.modules
    if absent:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to make an import fail
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("running a voice in OpenVINO", "openvino", "openvino") from error
    finally:
        if absent:
            del sys.modules["openvino_telemetry"]
    return openvino
