"""A TensorRT engine: compared with its manifest entry and with this machine before any of it is executed."""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from melrt.backends.tensorrt.interface import Place, Profile, Shape, static_windows
from melrt.bundle import Artifact
from melrt.bundle.trust import seal, unseal
from melrt.errors import BackendError, MissingExtraError
from melrt.files.atomic import atomic_write, user_cache
from melrt.system import Gpu

logger = logging.getLogger(__name__)

# Distribution and extra of each flavor.
FLAVORS = {"tensorrt": ("tensorrt", "tensorrt"), "tensorrt_rtx": ("tensorrt-rtx", "rtx")}
PORTABLE = "portable"
# Lowest compute capability of hardware-compatible engines.
AMPERE = 8.0
# A voice's runtime cache is well below a megabyte per graph; a file far beyond that is not one.
MAX_CACHE_BYTES = 256 << 20


class Engine:
    """One engine on one device."""

    def __init__(self, artifact: Artifact, data: bytes, bands: int, gpu: Gpu) -> None:
        """Open an engine. The device's context is current.

        Args:
            artifact: Manifest entry of the engine.
            data: Serialized engine, verified by the caller.
            bands: Mel bands of the voice.
            gpu: The device.

        Raises:
            BackendError: The engine was built for another flavor, version or GPU, or the runtime rejects it; the text has the remedy.
            MissingExtraError: The flavor is not installed.
        """
        self.precision = artifact.precision
        self._trt = trt = flavor(artifact)
        rebuild = _rebuild_command(artifact)
        check_target(artifact, trt.__version__, gpu, rebuild)
        self._runtime = trt.Runtime(runtime_logger(trt))
        if hasattr(self._runtime, "get_engine_validity"):
            validity, diagnostics = self._runtime.get_engine_validity(data)
            if validity == trt.EngineValidity.INVALID:
                raise BackendError(f"{artifact.file} does not fit this runtime or GPU ({diagnostics}). {rebuild}")
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise BackendError(f"{artifact.file} cannot be opened by {artifact.target['flavor']} {trt.__version__}. {rebuild}")
        self._profiles = self._read_profiles(artifact, bands)
        smallest = zip(*(profile.smallest for profile in self._profiles), strict=True)
        largest = zip(*(profile.largest for profile in self._profiles), strict=True)
        self.profile = Profile(tuple(map(min, smallest)), tuple(map(max, largest)))
        """Shapes that the engine takes, over all its optimization profiles."""
        self.windows = static_windows(self._profiles)
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        self._cache_file = user_cache() / f"{artifact.sha256[:16]}-{_plain(gpu.name)}.runtime-cache"
        self._config = self._runtime_config()

    @property
    def lazy(self) -> bool:
        """True if TensorRT-RTX compiles the kernels of a new shape in the background: for engines that take many lengths."""
        return not self.windows and hasattr(self._trt, "IRuntimeCache")

    def context(self, scratch: Any) -> Any:
        """Create an execution context in this scratch memory (`scratch_bytes`). Contexts that never run at the same time may share it."""
        if self._config is not None:
            context = self._engine.create_execution_context(self._config)
        else:
            context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise BackendError("TensorRT could not create an execution context. Is the GPU's memory full?")
        context.set_device_memory(int(scratch.handle), scratch.size)
        return context

    def prepare(self, shape: Shape, samples: int, place: Place) -> ContextRun:
        """Prepare runs of a shape in an execution context of its own."""
        return ContextRun(self.context(place.scratch), self.profile_index(shape), shape, samples, place)

    def save_cache(self) -> None:
        """Store the kernels that TensorRT-RTX compiled for the next start; if that is not possible, continue without."""
        if self._config is None or not hasattr(self._config, "get_runtime_cache"):
            return
        data = bytes(memoryview(self._config.get_runtime_cache().serialize()))
        try:
            sealed = seal(self._cache_file.name, data)
            if sealed is not None and (not self._cache_file.is_file() or self._cache_file.read_bytes() != sealed):
                with atomic_write(self._cache_file) as temporary:
                    temporary.write_bytes(sealed)
        except OSError as error:  # a service may run without a writable home
            logger.info("the runtime cache %s was not written: %s", self._cache_file, error)

    def profile_index(self, shape: tuple[int, ...]) -> int:
        """Return the index of the tightest optimization profile for a shape.

        Raises:
            BackendError: No profile has the shape.
        """
        self.profile.check(shape)
        fitting = [(profile.spread, index) for index, profile in enumerate(self._profiles) if profile.has(shape)]
        if not fitting:
            raise BackendError(f"a mel of shape {shape} is in none of this engine's profiles, {self._profiles}.")
        return min(fitting)[1]

    def _read_profiles(self, artifact: Artifact, bands: int) -> list[Profile]:
        engine, trt = self._engine, self._trt
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != {"mel", "audio"} or any(engine.get_tensor_dtype(name) != trt.DataType.FLOAT for name in names):
            raise BackendError(f"{artifact.file} has tensors {sorted(names)}; a voice's engine has a float32 mel and audio.")
        profiles = []
        for index in range(engine.num_optimization_profiles):
            smallest, _, largest = (tuple(int(size) for size in shape) for shape in engine.get_tensor_profile_shape("mel", index))
            if len(largest) != 3 or largest[1] != bands:
                raise BackendError(f"{artifact.file} takes mels of shape {largest}; this voice's have {bands} bands.")
            profiles.append(Profile(smallest, largest))
        return profiles

    def _runtime_config(self) -> Any:
        """Configure TensorRT-RTX: kernels are compiled in the background and kept between processes; melrt captures the graphs."""
        trt = self._trt
        if not hasattr(trt, "IRuntimeCache"):
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        # The batch of a window's engine is dynamic. A lazily compiled shape first runs fallback kernels, which a capture would keep.
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.LAZY if self.lazy else strategies.EAGER
        cache = config.create_runtime_cache()
        kept = _read_cache(self._cache_file)
        if kept and not cache.deserialize(kept):
            logger.info("the runtime cache %s was made by another driver or version; kernels are compiled again.", self._cache_file)
        config.set_runtime_cache(cache)
        return config


class ContextRun:
    """One shape of an engine in an execution context of its own.

    A captured graph depends on the state of its context, so each shape has its own context (TensorRT's developer guide, CUDA graphs).
    """

    def __init__(self, context: Any, profile: int, shape: Shape, samples: int, place: Place) -> None:
        self._context, self._stream = context, int(place.stream.handle)
        if (
            not context.set_optimization_profile_async(profile, self._stream)
            or not context.set_input_shape("mel", shape)
            or (context.infer_shapes())
        ):
            raise BackendError(f"the engine rejects a mel of shape {shape}.")
        audio_shape = tuple(int(size) for size in context.get_tensor_shape("audio"))
        if math.prod(audio_shape) != samples:  # or the engine would write outside its buffer
            raise BackendError(f"the engine gives audio of shape {audio_shape} for a mel of shape {shape}; it must have {samples} samples.")
        for name, address in (("mel", place.mel), ("audio", place.audio)):
            if not context.set_tensor_address(name, address):
                raise BackendError(f"the engine rejects the address of its {name}.")

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise BackendError("TensorRT could not queue the run.")

    def capturable(self) -> bool:
        supported = getattr(self._context, "is_stream_capturable", None)
        return supported is None or bool(supported(self._stream))


def flavor(artifact: Artifact) -> ModuleType:
    """Import the module of the flavor that an engine was built with.

    Raises:
        BackendError: The manifest names an unknown flavor.
        MissingExtraError: The flavor is not installed.
    """
    name = artifact.target.get("flavor")
    if name not in FLAVORS:
        raise BackendError(f"{artifact.file} was built by {name!r}; engines are built by one of {', '.join(FLAVORS)}.")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"running {artifact.file}", *FLAVORS[name]) from error


def check_target(artifact: Artifact, version: str, gpu: Gpu, rebuild: str) -> None:
    """Raise BackendError if an engine was built for another TensorRT version or GPU."""
    target: Mapping[str, Any] = artifact.target
    if not _runs_on_version(target, version):
        raise BackendError(f"{artifact.file} was built by {target['flavor']} {target.get('version')}; here is {version}. {rebuild}")
    capability = target.get("compute_capability")
    from_ampere_on = target.get("compatible") == "hardware" and float(gpu.compute_capability) >= AMPERE
    if capability not in (PORTABLE, gpu.compute_capability) and not from_ampere_on:
        raise BackendError(
            f"{artifact.file} was built for compute capability {capability}; {gpu.name} has {gpu.compute_capability}. {rebuild}"
        )


def _runs_on_version(target: Mapping[str, Any], version: str) -> bool:
    built = str(target.get("version"))
    if target.get("compatible") != "version":
        return built == version
    return built.partition(".")[0] == version.partition(".")[0] and _numbers(built) <= _numbers(version)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _rebuild_command(artifact: Artifact) -> str:
    portable = artifact.target.get("compute_capability") == PORTABLE
    kind = f"--precision {artifact.precision} --flavor {artifact.target.get('flavor')}"
    return f"Rebuild it: melrt build VOICE.melrt {kind}{'' if portable else ' --this-gpu'}"


def runtime_logger(trt: ModuleType) -> Any:
    """Make a TensorRT logger that passes its messages to Python's logging."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Logger that passes TensorRT's messages to Python's logging."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            serious = severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)
            logger.log(logging.WARNING if serious else logging.DEBUG, "TensorRT: %s", message)

    return Log()


def _read_cache(file: Path) -> bytes:
    try:
        sealed = file.read_bytes() if file.stat().st_size <= MAX_CACHE_BYTES else b""
        return unseal(file.name, sealed) or b""
    except OSError:
        return b""


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
