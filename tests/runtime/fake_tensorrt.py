"""A TensorRT-RTX for tests on machines without a GPU: the parts that melrt uses, on the fake GPU. ONNX Runtime computes the audio.

A missing address, a shape outside the profile, scratch memory in use on two streams, and a context that changed after its run was captured
are errors.
"""

from __future__ import annotations

import json
import sys
import time
import types
import weakref
from typing import Any

import numpy as np
import pytest
from tests.runtime.fake_arrays import utils_module
from tests.runtime.fake_gpu import ALIGNMENT, Gpu, _parameters, bindings_module, core_module

from melrt.backends.onnxruntime import OnnxModel
from melrt.backends.tensorrt.kernels import SOURCE, Kernels
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import sign

VERSION = "1.7.1"
MAGIC = b"ENGINE"
FALLBACK_LAUNCHES = 10
WINDOW, BATCH = 48, 4
TARGET: dict[str, object] = {
    "refittable": False,
    "flavor": "tensorrt_rtx",
    "version": VERSION,
    "compute_capability": "9.0",
    "gpu": "Fake GPU",
    "source": "",
}


def install(monkeypatch: pytest.MonkeyPatch, devices: int = 1) -> Gpu:
    """Install the fakes in place of cuda-core and TensorRT-RTX."""
    gpu = Gpu()
    monkeypatch.setattr("melrt.backends.tensorrt.kernels._compiled", {})
    run = Kernels.run

    def checked(self: Kernels, name: str, stream: object, elements: int, places: int, *arguments: np.generic) -> None:
        """The driver reads as many bytes as the kernel declares, whatever was passed."""
        given, declared = [np.asarray(argument).dtype for argument in arguments], _parameters(SOURCE, name)
        assert [kind.itemsize for kind in given] == [kind.base.itemsize for kind in declared], name
        run(self, name, stream, elements, places, *arguments)

    monkeypatch.setattr(Kernels, "run", checked)
    modules = {
        "cuda.core": core_module(gpu, devices),
        "cuda.core.utils": utils_module(gpu),
        "cuda.bindings": bindings_module(gpu),
        "tensorrt_rtx": tensorrt_module(gpu),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    return gpu


def engine_bytes(model: bytes, smallest: tuple[int, ...], largest: tuple[int, ...], **facts: Any) -> bytes:
    """Return a plan of the fake TensorRT, which holds an ONNX model and a profile. `facts` replace values of its header."""
    header = json.dumps({"profile": [smallest, smallest, largest], "scratch": 4096} | facts).encode()
    return MAGIC + len(header).to_bytes(4, "little") + header + model


def add_engines(bundle: Bundle, **facts: object) -> Bundle:
    """Add an FP32 engine of each graph. `facts` replace values of TARGET or of the engine's header."""
    for graph, smallest in (("edge", 4), ("interior", WINDOW)):
        (model,) = bundle.find("onnx", graph=graph, precision="fp32")
        target = TARGET | {"source": model.sha256} | {key: value for key, value in facts.items() if key in TARGET}
        options = {key: value for key, value in facts.items() if key not in TARGET}
        profiles = options.pop("interior_profiles", None)
        options["profiles"] = profiles if graph == "interior" else None
        data = engine_bytes(bundle.read(model), (1, 80, smallest), (BATCH, 80, WINDOW), **options)
        bundle.add(sign(Artifact.of(f"{graph}.fp32.engine", data, "engine", graph=graph, precision="fp32", target=target)), data)
    return Bundle.open(bundle.path)


class Context:
    def __init__(self, engine: EngineFake) -> None:
        self.engine = engine
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.changes = 0
        self.profile = 0
        self.launches = 0
        self.specialization = ""

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.header["scratch"]
        self.scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile]
        self.changes += 1
        self.shape = tuple(shape)
        return name == "mel" and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_optimization_profile_async(self, index: int, handle: int) -> bool:
        self.changes += 1
        self.shape, self.profile = None, index
        return index < len(self.engine.profiles)

    def infer_shapes(self) -> list[str]:
        return [] if self.shape else ["mel"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "audio"
        assert self.shape
        return self.shape[0], self.shape[2] * self.engine.header.get("hop", 256)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        assert address % ALIGNMENT == 0, "TensorRT requires aligned tensors"
        return name in ("mel", "audio")

    def is_stream_capturable(self, handle: int) -> bool:
        return not self.engine.header.get("not_capturable")

    def execute_async_v3(self, handle: int) -> bool:
        assert self.shape
        assert self.scratch
        assert set(self.addresses) == {"mel", "audio"}
        gpu = self.engine.gpu
        gpu.check_context()
        if gpu.refused_runs:
            gpu.refused_runs -= 1
            return False
        stream = gpu.streams[handle]
        shape, addresses, scratch, changes = self.shape, dict(self.addresses), self.scratch, self.changes
        self.launches += 1
        if stream.capturing is not None:
            assert not self.engine.header.get("not_capturable")
            if self.engine.header.get("uncapturable"):
                stream.invalidated = True
                return False
            # A lazily specialized shape runs fallback kernels until its own have been compiled in the background.
            self.engine.gpu.captured_fallbacks += self.specialization == "LAZY" and self.launches <= FALLBACK_LAUNCHES
        engine, alive = self.engine, weakref.ref(self)
        users = gpu.__dict__.setdefault("scratch_users", {})
        assert users.setdefault(scratch[0], handle) == handle, "scratch memory on two streams"

        def run() -> None:
            context = alive()
            assert context is not None, "the context was destroyed before its work ran"
            assert context.changes == changes, "the context changed after the run was queued or captured"
            gpu.view(*scratch)
            time.sleep(engine.header.get("seconds", 0))
            mel = gpu.floats(addresses["mel"], int(np.prod(shape))).reshape(shape)
            audio = engine.model.run(mel.copy())
            gpu.floats(addresses["audio"], audio.size)[:] = audio.reshape(-1)

        stream.add(run)
        return True


class EngineFake:
    num_io_tensors = 2

    def __init__(self, gpu: Gpu, data: bytes) -> None:
        self.gpu = gpu
        size = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "little")
        start = len(MAGIC) + 4
        self.header = json.loads(data[start : start + size])
        self.onnx = data[start + size :]
        self.model = OnnxModel(self.onnx)
        self.device_memory_size_v2 = self.header["scratch"]
        self.profiles = self.header.get("profiles") or [self.header["profile"]]
        self.num_optimization_profiles = len(self.profiles)
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()

    def serialize(self) -> bytes:
        return engine_bytes(self.onnx, *self.header["profile"][::2], profiles=self.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.header.get("names", ["mel", "audio"])[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return self.profiles[index]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.gpu)

    def create_execution_context(self, config: RuntimeConfig | str) -> Context:
        context = Context(self)
        if isinstance(config, str):  # the flavor `tensorrt` takes the strategy itself
            assert config == "USER_MANAGED"
        else:
            assert config.strategy == "USER_MANAGED"
            context.specialization = config.dynamic_shapes_kernel_specialization_strategy
        self.contexts.add(context)
        return context


class RuntimeCache:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def serialize(self) -> bytes:
        return b"kernels"

    def deserialize(self, blob: bytes) -> bool:
        self.gpu.cache_blob = blob
        return True


class RuntimeConfig:
    strategy = ""
    dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.gpu)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def get_runtime_cache(self) -> RuntimeCache:
        return self.cache


class OnnxParserRefitter:
    """Accepts everything that begins like an ONNX model."""

    def __init__(self, engine: EngineFake, log: object) -> None:
        self.engine = engine

    def refit_from_bytes(self, onnx: bytes) -> bool:
        if not onnx.startswith(b"\x08"):
            return False
        self.engine.onnx, self.engine.model = onnx, OnnxModel(onnx)
        return True


def _refitter(engine: EngineFake, log: object) -> EngineFake:
    engine.refit_cuda_engine = lambda: True
    return engine


def plain_tensorrt_module(gpu: Gpu) -> types.SimpleNamespace:
    """The flavor `tensorrt`: no runtime cache, no runtime configuration, no check of an engine before it is opened."""
    module = tensorrt_module(gpu)
    module.__name__ = "tensorrt"
    del module.IRuntimeCache, module.EngineValidity, module.CudaGraphStrategy, module.DynamicShapesKernelSpecializationStrategy
    del module.Runtime.get_engine_validity
    return module


def tensorrt_module(gpu: Gpu) -> types.SimpleNamespace:
    class ILogger:
        Severity = types.SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

        def __init__(self) -> None:
            pass

    class Runtime:
        def __init__(self, log: ILogger) -> None:
            self.log = log

        def get_engine_validity(self, data: bytes) -> tuple[str, str]:
            return gpu.validity, "the fake's diagnostics"

        def deserialize_cuda_engine(self, data: bytes) -> EngineFake | None:
            return EngineFake(gpu, data) if data.startswith(MAGIC) else None

    return types.SimpleNamespace(
        Refitter=_refitter, OnnxParserRefitter=OnnxParserRefitter,
        __name__="tensorrt_rtx", __version__=VERSION, ILogger=ILogger, Runtime=Runtime, IRuntimeCache=RuntimeCache,
        DataType=types.SimpleNamespace(FLOAT="float"),
        EngineValidity=types.SimpleNamespace(INVALID="INVALID", VALID="VALID"),
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="USER_MANAGED"),
        CudaGraphStrategy=types.SimpleNamespace(DISABLED="DISABLED"),
        DynamicShapesKernelSpecializationStrategy=types.SimpleNamespace(LAZY="LAZY", EAGER="EAGER"),
    )  # fmt: skip
