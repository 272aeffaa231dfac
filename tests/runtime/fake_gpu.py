"""A GPU for tests on machines without one: the parts of cuda-core that melrt uses, with their rules of order and lifetime.

Work that is queued on a stream runs when the stream is synchronized, and not before. A read that comes too early finds the old content,
and a write that comes too early spoils what is queued. Use of freed memory is an error.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


class Gpu:
    """Memory, streams, and counters of what happened."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.freed: list[np.ndarray] = []
        self.streams: dict[int, Stream] = {}
        self.captures = 0
        self.captured_fallbacks = 0
        self.graph_launches = 0
        self.syncs = 0
        self.cache_blob = b""
        self.validity = "VALID"
        self.foreign_contexts: set[int] = set()
        self.current_context = 0

    def set_context(self, context: int) -> None:
        self.current_context = context

    def allocate(self, size: int) -> int:
        block = np.full(size, 0xFF, np.uint8)  # NaN as float32
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
        (self.queue if self.capturing is None else self.capturing).append(work)

    def drain(self, until: int | None = None) -> None:
        work, self.queue = (self.queue, []) if until is None else (self.queue[:until], self.queue[until:])
        for item in work:
            item()

    def sync(self) -> None:
        assert self.capturing is None, "no waiting within a capture"
        self.gpu.syncs += 1
        self.drain()

    def wait(self, other: Stream) -> None:
        last = other.queue[-1] if other.queue else None

        def catch_up() -> None:
            while any(item is last for item in other.queue):
                other.queue.pop(0)()

        self.add(catch_up)

    def close(self) -> None:
        assert not self.queue
        self.closed = True

    def create_graph_builder(self) -> Builder:
        return Builder(self)


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

    def close(self, stream: Stream | None = None) -> None:
        assert self.owned
        if stream is None:
            self.gpu.free(self.handle)
        else:
            stream.add(lambda: self.gpu.free(self.handle))


def _kernels(gpu: Gpu) -> dict[str, Callable[..., None]]:
    """The CUDA kernels in numpy."""

    def cut(mel, band_stride, frame_stride, bands, frames, start, window, value, slot) -> None:
        wanted = start + np.arange(window)
        inside = np.clip(wanted, 0, frames - 1)
        addresses = int(mel) + 4 * (np.arange(bands)[:, None] * int(band_stride) + inside.astype(np.int64) * int(frame_stride))
        low, high = int(addresses.min()), int(addresses.max())
        source = gpu.floats(low, (high - low) // 4 + 1)
        out = source[(addresses - low) // 4]
        gpu.floats(slot, bands * window)[:] = np.where((inside != wanted) & (value == value), value, out).reshape(-1)

    def keep(size: int) -> Callable[..., None]:
        def run(audio, samples, out) -> None:
            gpu.view(out, size * int(samples))[:] = gpu.view(audio, size * int(samples))

        return run

    def to_int16(audio, samples, out) -> None:
        x = gpu.floats(audio, int(samples))
        with np.errstate(invalid="ignore"):
            pcm = np.where(np.isfinite(x), np.rint(np.clip(x, -1, 1) * np.float32(32767)), -32768).astype(np.int16)
        gpu.view(out, 2 * int(samples)).view(np.int16)[:] = pcm

    return {"cut": cut, "keep_float32": keep(4), "keep_int16": keep(2), "to_int16": to_int16}


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
            return Stream(gpu)

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
        Device=Device, Stream=types.SimpleNamespace(from_handle=gpu.streams.__getitem__), LEGACY_DEFAULT_STREAM=Stream(gpu),
        Buffer=types.SimpleNamespace(from_handle=part), LegacyPinnedMemoryResource=Pinned, **_compiler(gpu),
    )  # fmt: skip


def _compiler(gpu: Gpu) -> dict[str, Any]:
    kernels = _kernels(gpu)

    class Program:
        def __init__(self, source: str, language: str, options: object) -> None:
            assert all(f" {name}(" in source for name in kernels)

        def compile(self, kind: str) -> types.SimpleNamespace:
            return types.SimpleNamespace(get_kernel=kernels.__getitem__)

    def launch(stream: Stream, config: types.SimpleNamespace, kernel: Callable[..., None], *arguments: Any) -> None:
        assert all(isinstance(argument, np.generic) for argument in arguments)
        assert config.grid >= 1
        stream.add(lambda: kernel(*arguments))

    return {"Program": Program, "launch": launch, "ProgramOptions": types.SimpleNamespace, "LaunchConfig": types.SimpleNamespace}


def utils_module(gpu: Gpu) -> types.SimpleNamespace:
    def view(array: Any, stream_ptr: int) -> types.SimpleNamespace:
        facts = array.__cuda_array_interface__
        strides = facts.get("strides")
        gpu.streams[stream_ptr].wait(gpu.streams[facts["stream"]])
        return types.SimpleNamespace(
            ptr=facts["data"][0], shape=facts["shape"], dtype=np.dtype(facts["typestr"]), device_id=array.device_index,
            strides=None if strides is None else tuple(s // 4 for s in strides),
        )  # fmt: skip

    return types.SimpleNamespace(StridedMemoryView=types.SimpleNamespace(from_any_interface=view))


def bindings_module(gpu: Gpu) -> types.SimpleNamespace:
    driver = types.SimpleNamespace(
        CUpointer_attribute=types.SimpleNamespace(CU_POINTER_ATTRIBUTE_CONTEXT=2),
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=0),
        cuPointerGetAttribute=lambda _, pointer: (0, 2 if pointer in gpu.foreign_contexts else 1),
        cuCtxGetCurrent=lambda: (0, gpu.current_context),
        cuCtxSetCurrent=gpu.set_context,
    )
    return types.SimpleNamespace(driver=driver)


class GpuArray:
    """An array of the fake `cupy`, which works on its own stream."""

    def __init__(self, gpu: Gpu, values: np.ndarray, stream: Stream, device_index: int = 0) -> None:
        self.gpu, self.dtype, self.stream, self.device_index = gpu, values.dtype, stream, device_index
        self.shape, self.strides, self.base_size = values.shape, values.strides, values.base.nbytes if values.base is not None else 0
        whole = values if values.base is None else values.base
        assert whole.flags.c_contiguous, "the copy below is in C order"
        self.size = whole.nbytes
        self.base_pointer = gpu.allocate(whole.nbytes)
        self.pointer = self.base_pointer + (values.ctypes.data - whole.ctypes.data)
        content = whole.tobytes()
        stream.add(lambda: gpu.view(self.base_pointer, len(content)).__setitem__(slice(None), np.frombuffer(content, np.uint8)))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        strides = None if self.strides is None else tuple(self.strides)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False), "strides": strides,
                "stream": self.stream.handle, "version": 3}  # fmt: skip

    def get(self) -> np.ndarray:
        """Copy to the host, after the work on this array's stream."""
        self.stream.sync()
        count = int(np.prod(self.shape)) * self.dtype.itemsize
        return np.frombuffer(bytes(self.gpu.view(self.pointer, count)), self.dtype).reshape(self.shape)


GpuArray.__module__ = "cupy"


def install_cupy(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> Callable[..., GpuArray]:
    """Install a fake `cupy` with its own current stream, and return a function that makes its arrays."""
    stream = Stream(gpu)
    empty = lambda shape, dtype: GpuArray(gpu, np.empty(shape, dtype), stream)  # noqa: E731
    cupy = types.SimpleNamespace(
        empty=empty, cuda=types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=stream.handle))
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    return lambda values, **options: GpuArray(gpu, values, stream, **options)
