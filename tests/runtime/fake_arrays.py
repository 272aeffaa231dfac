"""Arrays of other libraries in the memory of the fake GPU, and how cuda-core views them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.runtime.fake_gpu import Gpu, Stream


def utils_module(gpu: Gpu) -> types.SimpleNamespace:
    def view(array: Any, stream_ptr: int) -> types.SimpleNamespace:
        """DLPack is tried first, as cuda-core does: its producer orders the streams. The other protocol only names its stream."""
        if hasattr(array, "__dlpack__"):
            return array.__dlpack__(stream=stream_ptr)
        facts = array.__cuda_array_interface__
        strides = facts.get("strides")
        gpu.streams[stream_ptr].wait(gpu.streams[facts["stream"]].record())
        return types.SimpleNamespace(
            ptr=facts["data"][0], shape=facts["shape"], dtype=np.dtype(facts["typestr"]), device_id=array.device_index,
            strides=None if strides is None else tuple(s // 4 for s in strides),
        )  # fmt: skip

    return types.SimpleNamespace(StridedMemoryView=types.SimpleNamespace(from_any_interface=view))


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

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device_index

    def __dlpack__(self, *, stream: int) -> types.SimpleNamespace:
        assert stream not in (None, 0), "DLPack refuses 0 on CUDA: it could be either default stream"
        self.gpu.streams[stream].wait(self.stream.record())
        strides = None if self.strides is None else tuple(size // self.dtype.itemsize for size in self.strides)
        return types.SimpleNamespace(ptr=self.pointer, shape=self.shape, dtype=self.dtype, device_id=self.device_index, strides=strides)

    def get(self) -> np.ndarray:
        """Copy to the host, after the work on this array's stream."""
        self.stream.sync()
        count = int(np.prod(self.shape)) * self.dtype.itemsize
        return np.frombuffer(bytes(self.gpu.view(self.pointer, count)), self.dtype).reshape(self.shape)


GpuArray.__module__ = "cupy"


def install_cupy(monkeypatch: pytest.MonkeyPatch, gpu: Gpu, *, default_stream: bool = False) -> Callable[..., GpuArray]:
    """Install a fake `cupy` with its own current stream or the default one, whose address is 0; return a function that makes its arrays."""
    stream = sys.modules["cuda.core"].LEGACY_DEFAULT_STREAM if default_stream else Stream(gpu)
    pointer = 0 if default_stream else stream.handle
    empty = lambda shape, dtype: GpuArray(gpu, np.empty(shape, dtype), stream)  # noqa: E731
    cupy = types.SimpleNamespace(empty=empty, cuda=types.SimpleNamespace(get_current_stream=lambda: types.SimpleNamespace(ptr=pointer)))
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    return lambda values, **options: GpuArray(gpu, values, stream, **options)
