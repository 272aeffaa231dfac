"""A GPU for tests on machines without one: the parts of cuda-core that melrt uses, with their rules of order and lifetime.

Work that is queued on a stream runs when the stream is synchronized, and not before. A read that comes too early finds the old content,
and a write that comes too early spoils what is queued. Use of freed memory is an error, and so are device work without the device's
context, and a kernel argument of another width than the CUDA source declares.
"""

from __future__ import annotations

import ctypes
import re
import threading
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

# Drivers align device memory so, and TensorRT requires it of tensors.
ALIGNMENT = 256


class CUDAError(Exception):
    """The driver's error; its base is Exception."""


class Gpu:
    """Memory, streams, and counters of what happened."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.freed: list[np.ndarray] = []
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.captures = 0
        self.captured_fallbacks = 0
        self.graph_launches = 0
        self.syncs = 0
        self.allocations_left = 1 << 30
        self.refused_runs = 0
        self.compilations = 0
        self.kernels: dict[int, Any] = {}
        self.launches: list[str] = []
        self.cache_blob = b""
        self.validity = "VALID"
        self.foreign_contexts: set[int] = set()
        self.own_streams: set[int] = set()
        self._thread = threading.local()

    @property
    def current_context(self) -> int:
        return getattr(self._thread, "context", 0)

    def set_context(self, context: int) -> None:
        self._thread.context = context

    def check_context(self) -> None:
        assert self.current_context == 1, "the device's context is not current in this thread"

    def allocate(self, size: int) -> int:
        if self.allocations_left == 0:
            raise CUDAError("CUDA_ERROR_OUT_OF_MEMORY")
        self.allocations_left -= 1
        whole = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # NaN as float32
        start = -whole.ctypes.data % ALIGNMENT
        block = whole[start : start + size]
        self.memory[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        block = self.memory.pop(address)
        block[:] = 0xFF
        self.freed.append(block)  # kept, so that a stale address reads NaN instead of ending the test run

    def view(self, address: int, size: int) -> np.ndarray:
        address, size = int(address), int(size)
        for start, block in self.memory.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not allocated, or were freed")

    def floats(self, address: int, count: int) -> np.ndarray:
        return self.view(address, 4 * count).view(np.float32)


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.handle = len(gpu.streams) + 1
        gpu.streams[self.handle] = self
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.invalidated = False
        self.closed = False

    def add(self, work: Callable[[], None]) -> None:
        assert not self.closed
        if self.handle in self.gpu.own_streams:
            self.gpu.check_context()
        (self.queue if self.capturing is None else self.capturing).append(work)

    def drain(self, until: int | None = None) -> None:
        work, self.queue = (self.queue, []) if until is None else (self.queue[:until], self.queue[until:])
        for item in work:
            item()

    def sync(self) -> None:
        assert self.capturing is None, "no waiting within a capture"
        self.gpu.syncs += 1
        self.drain()

    def record(self) -> Event:
        event = Event(self.gpu)
        event.record(self)
        return event

    def wait(self, event: Event) -> None:
        other, last = event.stream, event.last  # a later record of the event does not matter

        def catch_up() -> None:
            while any(item is last for item in other.queue):
                other.queue.pop(0)()

        self.add(catch_up)

    def close(self) -> None:
        assert not self.queue
        self.closed = True

    def create_graph_builder(self) -> Builder:
        return Builder(self)


class Event:
    stream: Stream
    last: Callable[[], None]

    def __init__(self, gpu: Gpu) -> None:
        self.handle = len(gpu.events) + 1000
        self.is_done = False
        gpu.events[self.handle] = self

    def record(self, stream: Stream) -> None:
        def reach() -> None:
            self.is_done = True

        stream.add(reach)
        self.stream, self.last, self.is_done = stream, reach, False

    def close(self) -> None:
        pass


class Builder:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.work: list[Callable[[], None]] = []

    def begin_building(self, mode: str) -> Builder:
        assert self.stream.capturing is None
        self.stream.capturing = []
        return self

    def end_building(self) -> Builder:
        assert self.stream.capturing is not None
        self.work, self.stream.capturing = self.stream.capturing, None
        if self.stream.invalidated:
            self.stream.invalidated = False
            raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        self.stream.gpu.captures += 1
        return self

    def close(self) -> None:
        assert self.stream.capturing is None, "closed during a capture"

    def complete(self) -> Builder:
        return self

    def launch(self, stream: Stream) -> None:
        stream.gpu.graph_launches += 1
        for item in self.work:
            stream.add(item)


class Buffer:
    def __init__(self, gpu: Gpu, handle: int, size: int, owned: bool) -> None:
        self.gpu, self.handle, self.size, self.owned = gpu, handle, size, owned

    def copy_from(self, source: Buffer, stream: Stream) -> None:
        assert self.size == source.size

        def copy() -> None:
            self.gpu.view(self.handle, self.size)[:] = self.gpu.view(source.handle, source.size)

        stream.add(copy)

    def fill(self, value: int, stream: Stream) -> None:
        stream.add(lambda: self.gpu.view(self.handle, self.size).fill(value))

    def close(self, stream: Stream | None = None) -> None:
        assert self.owned
        if stream is None:
            self.gpu.free(self.handle)
        else:
            stream.add(lambda: self.gpu.free(self.handle))


def _kernels(gpu: Gpu) -> dict[str, Callable[..., None]]:
    """The CUDA kernels in numpy."""

    def cut(places: int, jobs, bands, window, slot) -> None:
        bands, window = int(bands), int(window)
        for place, job in enumerate(jobs[:places]):
            wanted = int(job["start"]) + np.arange(window)
            inside = np.clip(wanted, 0, job["frames"] - 1)
            offsets = np.arange(bands)[:, None] * job["band_stride"] + inside * job["frame_stride"]
            addresses = int(job["mel"]) + 4 * offsets
            low, high = int(addresses.min()), int(addresses.max())
            out = gpu.floats(low, (high - low) // 4 + 1)[(addresses - low) // 4]
            value = job["value"]
            size = bands * window
            gpu.floats(int(slot) + 4 * place * size, size)[:] = np.where((inside != wanted) & (value == value), value, out).reshape(-1)

    def finish(places: int, audio, samples, pcm, flags) -> None:
        x = gpu.floats(audio, places * int(samples)).reshape(places, -1)
        gpu.view(flags, 4 * places).view(np.int32)[~np.isfinite(x).all(axis=1)] = 1
        if pcm:
            with np.errstate(invalid="ignore"):
                converted = np.where(np.isfinite(x), np.rint(np.clip(x, -1, 1) * np.float32(32767)), -32768).astype(np.int16)
            gpu.view(pcm, 2 * x.size).view(np.int16)[:] = converted.reshape(-1)

    return {"cut": cut, "finish": finish, "keep_float32": partial(_keep, gpu, 4), "keep_int16": partial(_keep, gpu, 2)}


def _keep(gpu: Gpu, size: int, places: int, jobs, flags, report) -> None:
    for job in jobs[:places]:
        gpu.view(job["out"], size * int(job["samples"]))[:] = gpu.view(job["audio"], size * int(job["samples"]))
        if gpu.view(int(flags) + 4 * int(job["place"]), 4).view(np.int32)[0]:
            gpu.view(report, 4).view(np.int32)[0] = 1


_C_TYPES = {"int": "i4", "float": "f4", "long long": "i8"}


def _c_type(text: str) -> Any:
    return np.dtype("u8" if "*" in text else _C_TYPES[re.sub(r"\bconst\b|\w+$", "", text.strip()).strip()])


def _parameters(source: str, name: str) -> list[np.dtype]:
    """The types of a kernel's parameters as its CUDA source declares them, tables of structures included."""
    structs: dict[str, list[tuple[str, np.dtype]]] = {}
    for struct, body in re.findall(r"struct (\w+) \{\s*(.*?);?\s*\};", source, re.DOTALL):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            if found := re.fullmatch(r"(\w+) \w+\[(\d+)\]", declaration):
                structs[struct] = np.dtype((np.dtype(structs[found[1]], align=True), (int(found[2]),)))
                break
            first, *others = declaration.split(",")
            kind = _c_type(first)
            fields += [(part.split()[-1].lstrip("*"), kind) for part in (first, *others)]
        else:
            structs[struct] = fields
    declared = re.search(rf"__global__ void {name}\((.*?)\)", source, re.DOTALL)[1]
    found = []
    for parameter in declared.split(","):
        table = re.fullmatch(r"\s*const __grid_constant__ (\w+) \w+", parameter)
        found.append(structs[table[1]] if table else _c_type(parameter))
    return found


def core_module(gpu: Gpu, devices: int) -> types.SimpleNamespace:
    class Device:
        name, arch = "Fake GPU", "90"
        compute_capability = types.SimpleNamespace(major=9, minor=0)

        def __init__(self, index: int) -> None:
            if index >= devices:
                raise ValueError(f"device_id must be within [0, {devices})")

        def set_current(self) -> None:
            gpu.set_context(1)

        def create_stream(self) -> Stream:
            gpu.check_context()
            stream = Stream(gpu)
            gpu.own_streams.add(stream.handle)
            return stream

        def allocate(self, size: int, *, stream: Stream) -> Buffer:
            assert stream.capturing is None
            return Buffer(gpu, gpu.allocate(size), size, owned=True)

    class Pinned:
        def allocate(self, size: int) -> Buffer:
            return Buffer(gpu, gpu.allocate(size), size, owned=True)

    def part(handle: int, size: int) -> Buffer:
        gpu.view(handle, size)
        return Buffer(gpu, handle, size, owned=False)

    return types.SimpleNamespace(
        Device=Device, LEGACY_DEFAULT_STREAM=Stream(gpu), Buffer=types.SimpleNamespace(from_handle=part),
        LegacyPinnedMemoryResource=Pinned, **_compiler(gpu),
    )  # fmt: skip


def _compiler(gpu: Gpu) -> dict[str, Any]:
    kernels = _kernels(gpu)

    class Program:
        def __init__(self, source: str, language: str, options: object) -> None:
            self.source = source

        def compile(self, kind: str) -> types.SimpleNamespace:
            gpu.compilations += 1

            def get_kernel(name: str) -> types.SimpleNamespace:
                handle = list(kernels).index(name) + 1
                gpu.kernels[handle] = name, kernels[name], _parameters(self.source, name)
                return types.SimpleNamespace(handle=handle)

            return types.SimpleNamespace(get_kernel=get_kernel)

    return {"Program": Program, "ProgramOptions": types.SimpleNamespace}


def _launch(gpu: Gpu, kernel: int, grid: tuple[int, int, int], stream: int, arguments: int) -> tuple[int]:
    """Read the arguments from memory, as wide as the CUDA source declares them, and queue the kernel."""
    name, run, parameters = gpu.kernels[kernel]
    assert min(grid) >= 1
    pointers = (ctypes.c_uint64 * len(parameters)).from_address(arguments)
    values = []
    for pointer, kind in zip(pointers, parameters, strict=True):
        value = np.frombuffer(ctypes.string_at(pointer, kind.itemsize), kind.base).reshape(kind.shape)
        values.append(value if kind.shape else value[()])
    gpu.launches.append(name)
    gpu.streams[stream].add(lambda: run(grid[1], *values))
    return (0,)


def bindings_module(gpu: Gpu) -> types.SimpleNamespace:
    driver = types.SimpleNamespace(
        CUpointer_attribute=types.SimpleNamespace(CU_POINTER_ATTRIBUTE_CONTEXT=2),
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=0),
        cuPointerGetAttribute=lambda _, pointer: (0, 2 if pointer in gpu.foreign_contexts else 1),
        cuCtxGetCurrent=lambda: (0, gpu.current_context),
        cuCtxSetCurrent=gpu.set_context,
        cuEventRecord=lambda event, stream: (gpu.events[event].record(gpu.streams[stream]) or 0,),
        cuStreamWaitEvent=lambda stream, event, _: (gpu.streams[stream].wait(gpu.events[event]) or 0,),
        CUfunction=int,
        cuLaunchKernel=lambda kernel, x, y, z, tx, ty, tz, shared, stream, arguments, extra: _launch(
            gpu, kernel, (x, y, z), stream, arguments
        ),
    )
    return types.SimpleNamespace(driver=driver)
