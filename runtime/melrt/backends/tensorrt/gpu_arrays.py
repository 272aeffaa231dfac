"""Arrays of other libraries on a GPU: read where they are, and answered in kind, in order with the caller's own work.

Whatever has `__cuda_array_interface__` or DLPack can be read. None of the libraries is imported: who passes an array of one has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from melrt.errors import MelError


@dataclass(frozen=True, slots=True)
class DeviceMel:
    """A mel on a device: where it is, and how to step through it."""

    pointer: int
    shape: tuple[int, int, int]
    """(B, M, T)."""
    strides: tuple[int, int, int]
    """Elements between utterances, bands and frames."""
    owner: object
    """Keeps the memory alive."""


def read_mel(array: object, device_index: int, stream: Any) -> DeviceMel:
    """Look at a mel without copying it; `stream` is made to wait for the work of its producer.

    Raises:
        MelError: Not (M, T) or (B, M, T) float32, or in the memory of another device or context.
    """
    from cuda.core.utils import StridedMemoryView

    try:
        view = StridedMemoryView.from_any_interface(array, stream_ptr=int(stream.handle))
    except BufferError as error:
        raise MelError(f"a mel of {type(array).__name__} cannot be read on a GPU ({error}).") from error
    if np.dtype(view.dtype) != np.float32:
        raise MelError(f"mel has dtype {view.dtype} on the GPU; it is float32 there: convert it first.")
    if len(view.shape) not in (2, 3):
        raise MelError(f"mel has shape {tuple(view.shape)}; expected (bands, frames) or (batch, bands, frames).")
    shape = (1,) * (3 - len(view.shape)) + tuple(view.shape)
    strides = tuple(view.strides) if view.strides is not None else _contiguous(tuple(view.shape))
    _check_memory(int(view.ptr), view.device_id, device_index)
    return DeviceMel(int(view.ptr), shape, (0,) * (3 - len(strides)) + strides, view)


@dataclass(frozen=True, slots=True)
class DeviceAudio:
    """A fresh array of the caller's kind, to be filled."""

    array: Any
    pointer: int
    stream: int
    """The caller's current stream: the audio is ready for work that is queued on it afterwards."""


def make_audio(like: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceAudio:
    """An array of `like`'s library, on its device.

    Raises:
        MelError: Of a library that melrt cannot make arrays of.
    """
    library = type(like).__module__.partition(".")[0]
    if library not in _MAKERS:
        known = ", ".join(_MAKERS)
        raise MelError(f"melrt cannot make GPU arrays of {library} ({type(like).__name__}); it can of {known}. Or pass a numpy array.")
    array, stream = _MAKERS[library](like, shape, dtype)
    return DeviceAudio(array, int(array.__cuda_array_interface__["data"][0]), stream)


def _torch(like: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, int]:
    torch = sys.modules["torch"]
    array = torch.empty(shape, dtype=getattr(torch, dtype.name), device=like.device)
    return array, int(torch.cuda.current_stream(like.device).cuda_stream)


def _cupy(_: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, int]:
    cupy = sys.modules["cupy"]
    return cupy.empty(shape, dtype), int(cupy.cuda.get_current_stream().ptr)


def _pycuda(_: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, int]:
    return sys.modules["pycuda.gpuarray"].empty(shape, dtype), 0  # PyCUDA works on the default stream


def _numba(_: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, int]:
    return sys.modules["numba.cuda"].device_array(shape, dtype), 0


_MAKERS: dict[str, Callable[[Any, tuple[int, ...], np.dtype[Any]], tuple[Any, int]]] = {
    "torch": _torch, "cupy": _cupy, "pycuda": _pycuda, "numba": _numba,
}  # fmt: skip


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))


def _check_memory(pointer: int, device_id: int, wanted: int) -> None:
    """A pointer of another device or context would fault, or read what is not the mel."""
    if device_id != wanted:
        raise MelError(f"mel is on cuda:{device_id}, this voice on cuda:{wanted}; load one with device='cuda:{device_id}' for it.")
    from cuda.bindings import driver

    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
    error, context = driver.cuPointerGetAttribute(attribute, pointer)
    _, current = driver.cuCtxGetCurrent()
    if error == driver.CUresult.CUDA_SUCCESS and int(context) not in (0, int(current)):
        raise MelError(
            "mel is in the memory of another CUDA context than the device's primary one; "
            "with PyCUDA use pycuda.autoprimaryctx instead of pycuda.autoinit."
        )
