"""A fused engine on one GPU: its kernels loaded, its weights in the GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.fused.program import HIDDEN_POINTERS, CompiledKernel, Launch, Program
from melrt.backends.tensorrt.interface import Place, Profile, Shape
from melrt.backends.tensorrt.kernels import SOURCE_SHA256, Geometry, queue_kernel
from melrt.backends.tensorrt.slot import Pinned
from melrt.errors import BackendError

# A kernel may use this much dynamic shared memory unless it is told otherwise (CUDA C++ Programming Guide, compute capabilities).
_SHARED_BYTES = 48 << 10
# Within an utterance the kernels compute addresses in 32 bits, in elements of two bytes or more.
MOST_BYTES = 1 << 31
_HIDDEN = [np.zeros((), np.uint64)] * HIDDEN_POINTERS


class LoadedProgram:
    """The kernels and weights of a fused engine on one device."""

    def __init__(self, program: Program, device: Any, capability: str, file: str) -> None:
        """Load the kernels and copy the weights. The device is current.

        Raises:
            BackendError: The engine has no kernels for this GPU, or the driver refuses them.
        """
        if capability not in program.gpus:
            raise BackendError(
                f"{file} has kernels for compute capability {', '.join(program.gpus)}; {device.name} has {capability}. "
                f"Build it for this GPU: melrt build VOICE.melrt --engine fused --gpus {capability}"
            )
        self.program = program
        self.compiled = program.gpus[capability]
        self.kernels = {name: load_kernel(program.cubin(kernel), kernel, device) for name, kernel in self.compiled.items()}
        offset, size = program.around[capability] if program.around_source == SOURCE_SHA256 else (0, 0)
        self.around = program.payload[offset : offset + size]
        """Compiled kernels around an engine; empty if they were made from another version's source."""
        self._stream = device.create_stream()
        staged = Pinned(program.weights)
        try:
            staged.array[:] = np.frombuffer(program.payload, np.uint8, program.weights)
            self._weights = device.allocate(program.weights, stream=self._stream)
            self._weights.copy_from(staged.buffer, stream=self._stream)
            self._stream.sync()
        finally:
            staged.close()
        self.weights = int(self._weights.handle)
        """Address of the weights."""

    def close(self) -> None:
        """Release the weights. No run is in progress."""
        self._weights.close(self._stream)
        self._stream.sync()
        self._stream.close()


def load_kernel(cubin: bytes, kernel: CompiledKernel, device: Any) -> Any:
    """Load a kernel's code, with permission for its shared memory. The device is current.

    Raises:
        BackendError: The driver refuses so much shared memory.
    """
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    loaded = ObjectCode.from_cubin(cubin).get_kernel(kernel.symbol)
    if kernel.shared > _SHARED_BYTES:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle, index = driver.CUkernel(int(loaded.handle)), driver.CUdevice(device.device_id)
        (error,) = driver.cuKernelSetAttribute(attribute, kernel.shared, handle, index)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{device.name} refused {kernel.shared} bytes of shared memory for the kernel {kernel.symbol}: {error}.")
    return loaded


@dataclass(slots=True)
class FusedEngine:
    """One graph of a voice: the same kernels for both, within the lengths that a slot has memory for."""

    loaded: LoadedProgram
    """Kernels and weights."""
    profile: Profile
    """Shapes that a slot has memory for; the kernels take any."""
    windows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Batches of each window that is captured when the voice is loaded, both in rising order, by its length."""
    precision: str = "fp16"
    lazy: bool = False

    @property
    def scratch_bytes(self) -> int:
        """Memory of the activations."""
        batch, _, frames = self.profile.largest
        return self.loaded.program.places(batch, frames)[-1]

    def prepare(self, shape: Shape, samples: int, place: Place) -> FusedRun:
        """Prepare runs of a shape: every argument of every launch."""
        self.profile.check(shape)
        program = self.loaded.program
        batch, bands, frames = shape
        if bands != program.bands or samples != batch * frames * program.hop:
            raise BackendError(
                f"the engine takes {program.bands} bands and gives {program.hop} samples for each frame, not a mel of {shape}."
            )
        if max(program.buffers) * frames >= MOST_BYTES:
            raise BackendError(
                f"a mel of {frames} frames makes activations of more than {MOST_BYTES >> 30} GiB; the kernels address no more."
            )
        return FusedRun(self.loaded, shape, place)

    def save_cache(self) -> None:
        """Do nothing: nothing is compiled on this machine."""


class FusedRun:
    """The launches of one shape with their arguments, in the memory of one slot."""

    def __init__(self, loaded: LoadedProgram, shape: Shape, place: Place) -> None:
        self._loaded, self._stream = loaded, place.stream
        self.shape = shape
        """Shape (B, M, T) of the mels."""
        batch, _, frames = shape
        scratch = [int(place.scratch.handle) + offset for offset in loaded.program.places(batch, frames)]
        bases = {"mel": place.mel, "audio": place.audio, "weights": loaded.weights}
        self.launches: list[tuple[Launch, Geometry, list[NDArray[Any]]]] = []
        """Launches in order, with their geometry and arguments."""
        for launch in loaded.program.launches:
            values: list[NDArray[Any]] = []
            for kind, value in launch.arguments:
                if kind in ("steps", "integer"):
                    values.append(np.array(launch.rate * frames if kind == "steps" else value, np.int32))
                else:
                    values.append(np.array(scratch[value] if kind == "buffer" else bases[kind] + value, np.uint64))
            kernel = loaded.compiled[launch.kernel]
            size = Geometry(launch.grid(kernel, batch, frames), kernel.threads, kernel.shared)
            self.launches.append((launch, size, [*values, *_HIDDEN]))

    def enqueue(self) -> None:
        for launch, size, values in self.launches:
            queue_kernel(launch.layer, self._loaded.kernels[launch.kernel], self._stream, size, values)

    def capturable(self) -> bool:
        return True
