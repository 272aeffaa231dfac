"""A fused engine's code for the fake GPU: each cubin is a kernel's description, and Triton's interpreter runs it on the fake's memory.

The rules of a driver hold: as many arguments as the kernel declares, each as wide; a permit for more than 48 KiB of shared memory; the
block size that the kernel was compiled for; the device's context.
"""

from __future__ import annotations

import ctypes
import json
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.runtime.fake_gpu import Gpu
from tests.runtime.fake_tensorrt import install

import melrt.backends.fused.engine as engine
from melrt.backends.tensorrt.kernels import SOURCE
from melrt_export.fused.compile import Capability, Compiled
from melrt_export.fused.interpret import interpret
from melrt_export.fused.lower import POINTERS, Kernel
from melrt_export.fused.tiles import Tile

THREADS, SHARED, FREE_SHARED = 96, 60 << 10, 48 << 10
FIRST_HANDLE = 1000
AROUND = b"the kernels around an engine"


def compile_fake(kernel: Kernel, tile: Tile, capability: Capability) -> Compiled:
    """Compile a kernel for the fake GPU."""
    facts = {
        "name": kernel.name,
        "function": kernel.function,
        "constants": dict(kernel.constants),
        "all": tile.constants(kernel),
        "tile": asdict(tile),
    }
    return Compiled(json.dumps(facts).encode(), f"{kernel.function}_kernel", THREADS, SHARED, 64, 0, 0)


@dataclass
class Launched:
    """One launch as the driver received it."""

    kernel: Kernel
    grid: tuple[int, int, int]
    integers: list[int]
    pointers: list[int]


@dataclass
class FusedDriver:
    """Loads and launches the fake kernels."""

    gpu: Gpu
    kernels: list[tuple[Kernel, dict[str, Any]]] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    permitted: dict[int, int] = field(default_factory=dict)
    launches: list[Launched] = field(default_factory=list)
    spoil: Callable[[Launched, Tile, torch.Tensor], object] = lambda *_: None
    """A fault to plant: it may change what a kernel wrote."""
    refuse: Callable[[Tile], bool] = lambda tile: False
    """Whether the driver refuses to launch a kernel with this tile."""
    cost: Callable[[Kernel, Tile, tuple[int, ...]], float] = lambda *_: 0.07
    """Milliseconds of a launch with this grid, for events."""
    now: float = 0.0
    """Milliseconds of the GPU's clock."""

    def from_cubin(self, cubin: bytes) -> types.SimpleNamespace:
        self.gpu.check_context()
        if cubin == AROUND:
            self.gpu.compilations -= 1  # made for this GPU already
            return sys.modules["cuda.core"].Program(SOURCE, "c++", None).compile("cubin")
        facts = json.loads(cubin)

        def get_kernel(symbol: str) -> types.SimpleNamespace:
            assert symbol == f"{facts['function']}_kernel"
            self.tiles.append(Tile(**facts["tile"]))
            self.kernels.append((Kernel(facts["name"], facts["function"], facts["constants"]), facts["all"]))
            return types.SimpleNamespace(handle=FIRST_HANDLE + len(self.kernels) - 1)

        return types.SimpleNamespace(get_kernel=get_kernel)

    def permit(self, attribute: str, value: int, kernel: int, device: int) -> tuple[int]:
        assert (attribute, device) == ("shared", 0)
        self.permitted[kernel] = value
        return (0,)

    def parameters(self, handle: int) -> list[np.dtype]:
        """Types of a kernel's parameters, with the two pointers that Triton adds."""
        from melrt_export.fused import kernels

        kernel, constants = self.kernels[handle - FIRST_HANDLE]
        own = [name for name in getattr(kernels, kernel.function).arg_names if name not in constants]
        return [np.dtype(np.int32 if name.isupper() else np.uint64) for name in own] + [np.dtype(np.uint64)] * 2

    def launch(self, handle: int, size: tuple[int, ...], stream: int, addresses: int) -> tuple[int]:
        *grid, threads, height, depth, shared = size
        assert (threads, height, depth, shared) == (THREADS, 1, 1, SHARED)
        assert shared <= self.permitted.get(handle, FREE_SHARED), "more shared memory than the driver permits"
        kinds = self.parameters(handle)
        pointers = (ctypes.c_uint64 * len(kinds)).from_address(addresses)
        values = [np.frombuffer(ctypes.string_at(p, kind.itemsize), kind)[0] for p, kind in zip(pointers, kinds, strict=True)]
        assert values[-2:] == [0, 0]
        kernel, constants = self.kernels[handle - FIRST_HANDLE]
        tile = self.tiles[handle - FIRST_HANDLE]
        if self.refuse(tile):
            return (701,)  # too many resources requested for launch
        own = [int(value) for value in values[:-2]]
        count = len(POINTERS[kernel.function])
        launched = Launched(kernel, tuple(grid), own[count:], own[:count])
        self.launches.append(launched)

        def run() -> None:
            interpret(kernel, constants, tuple(grid), [*map(self.memory, own[:count]), *own[count:]])
            self.now += self.cost(kernel, tile, tuple(grid))
            self.spoil(launched, tile, self.memory(own[count - 1]).view(getattr(torch, POINTERS[kernel.function][-1])))

        self.gpu.streams[stream].add(run)
        return (0,)

    def record(self, event: dict[str, float], stream: int) -> tuple[int]:
        """Let an event take the time of the GPU's clock when the stream reaches it."""
        self.gpu.streams[stream].add(lambda: event.update(time=self.now))
        return (0,)

    def memory(self, address: int) -> torch.Tensor:
        """The allocated bytes from an address on."""
        for start, block in self.gpu.memory.items():
            if start <= address < start + len(block):
                assert address % 16 == 0, "the kernels are compiled for aligned addresses"
                rest = block[address - start :]
                return torch.from_numpy(rest[: len(rest) // 4 * 4])
        raise AssertionError(f"{address:#x} is not allocated, or was freed")


def install_fused(monkeypatch: pytest.MonkeyPatch) -> FusedDriver:
    """Install the fake GPU with this driver, and build engines for it."""
    fused = FusedDriver(install(monkeypatch))
    sys.modules["cuda.core"].ObjectCode = types.SimpleNamespace(from_cubin=fused.from_cubin)
    sys.modules["cuda.core"].Device.device_id = 0
    driver = sys.modules["cuda.bindings"].driver
    plain, order = driver.cuLaunchKernel, driver.cuEventRecord

    def launch(kernel: int, *rest: int) -> tuple[int]:
        return fused.launch(kernel, rest[:7], rest[7], rest[8]) if kernel >= FIRST_HANDLE else plain(kernel, *rest)

    def record(event: dict[str, float] | int, stream: int) -> tuple[int]:
        return fused.record(event, stream) if isinstance(event, dict) else order(event, stream)

    driver.cuLaunchKernel, driver.cuKernelSetAttribute, driver.CUkernel, driver.CUdevice = launch, fused.permit, int, int
    driver.CUstream, driver.cuEventCreate, driver.cuEventRecord = int, lambda flags: (0, {}), record
    driver.cuEventElapsedTime = lambda begin, end: (0, end["time"] - begin["time"])
    driver.CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    monkeypatch.setattr("melrt_export.fused.build.find_gpu", lambda: None)
    monkeypatch.setattr("melrt_export.fused.build.compile_kernel", compile_fake)
    monkeypatch.setattr("melrt_export.fused.build.compile_around", lambda capability: AROUND)
    queue = engine.queue_kernel

    def checked(name: str, kernel: Any, stream: Any, size: Any, values: list[np.ndarray]) -> None:
        """The driver reads as many bytes as the kernel declares, whatever was passed."""
        assert [value.dtype.itemsize for value in values] == [kind.itemsize for kind in fused.parameters(kernel.handle)], name
        queue(name, kernel, stream, size, values)

    monkeypatch.setattr(engine, "queue_kernel", checked)
    return fused
