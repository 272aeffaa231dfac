"""Arrays of other libraries in GPU memory: read in place, and answered with an array of the same library, in order with the caller's work.

Arrays with `__cuda_array_interface__` or DLPack can be read. None of the libraries is imported: a caller that passes an array has done so.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from melrt.errors import BackendError, MelError

# CUDA's handle of the legacy default stream; 0 would be ambiguous in DLPack.
LEGACY_STREAM = 1


@dataclass(frozen=True, slots=True)
class DeviceMel:
    """A mel in GPU memory."""

    pointer: int
    """Address of the first element."""
    shape: tuple[int, int, int]
    """Batch, bands and frames (B, M, T)."""
    strides: tuple[int, int, int]
    """Elements between utterances, bands and frames."""
    owner: object
    """The caller's array, which keeps the memory alive."""
    stream: int
    """Handle of the stream that the caller's library works on."""


@dataclass(frozen=True, slots=True)
class DeviceAudio:
    """An output array in GPU memory, to be filled."""

    pointer: int
    """Address of the first sample."""
    owner: object
    """The array, which keeps the memory alive."""


def read_mel(array: object, device_index: int) -> DeviceMel:
    """Look at a mel without copying it. Its library's current stream is made to wait for the work that produces it.

    Raises:
        MelError: Not (M, T) or (B, M, T) float32, in memory of another device or context, or of a library that melrt does not know.
    """
    from cuda.core.utils import StridedMemoryView

    stream = _library(array).current_stream(array) or LEGACY_STREAM
    try:
        view = StridedMemoryView.from_any_interface(array, stream_ptr=stream)
    except BufferError as error:
        raise MelError(f"a mel of {type(array).__name__} cannot be read on a GPU ({error}).") from error
    if np.dtype(view.dtype) != np.float32:
        raise MelError(f"mel has dtype {view.dtype}; in GPU memory it must be float32. Convert it first.")
    if len(view.shape) not in (2, 3):
        raise MelError(f"mel has shape {tuple(view.shape)}; expected (bands, frames) or (batch, bands, frames).")
    missing = 3 - len(view.shape)
    shape = (1,) * missing + tuple(view.shape)
    strides = tuple(view.strides) if view.strides is not None else _contiguous(tuple(view.shape))
    _check_memory(int(view.ptr), view.device_id, device_index)
    return DeviceMel(int(view.ptr), shape, (0,) * missing + strides, array, stream)


def make_audio(like: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Any, DeviceAudio]:
    """Make an array of `like`'s library on its device, and melrt's view of it.

    Raises:
        MelError: The library is not one that melrt can make arrays of.
    """
    library = _library(like)
    array = library.empty(like, shape, dtype)
    return array, DeviceAudio(library.pointer(array), array)


class _Library(NamedTuple):
    """Functions that melrt needs of an array library."""

    empty: Callable[[Any, tuple[int, ...], np.dtype[Any]], Any]
    current_stream: Callable[[Any], int]
    pointer: Callable[[Any], int] = lambda array: int(array.__cuda_array_interface__["data"][0])


def _library(array: object) -> _Library:
    name = type(array).__module__.partition(".")[0]
    if name not in _LIBRARIES:
        known = ", ".join(_LIBRARIES)
        raise MelError(f"melrt cannot make GPU arrays of {name} ({type(array).__name__}); it can for {known}. Or pass a numpy array.")
    return _LIBRARIES[name]


def _module(name: str) -> Any:
    return sys.modules[name]


_LIBRARIES = {
    "torch": _Library(
        lambda like, shape, dtype: _module("torch").empty(shape, dtype=getattr(_module("torch"), dtype.name), device=like.device),
        lambda like: int(_module("torch").cuda.current_stream(like.device).cuda_stream),
        lambda array: int(array.data_ptr()),  # PyTorch describes an array in some ten microseconds
    ),
    "cupy": _Library(
        lambda _, shape, dtype: _module("cupy").empty(shape, dtype), lambda _: int(_module("cupy").cuda.get_current_stream().ptr)
    ),
    # PyCUDA and Numba work on the default stream
    "pycuda": _Library(lambda _, shape, dtype: _module("pycuda.gpuarray").empty(shape, dtype), lambda _: 0),
    "numba": _Library(lambda _, shape, dtype: _module("numba.cuda").device_array(shape, dtype), lambda _: 0),
}


@contextlib.contextmanager
def current_device(device: Any) -> Iterator[None]:
    """Make a device current in this thread, and restore the caller's context afterwards."""
    with preserved_context():
        device.set_current()
        yield


def preserved_context() -> contextlib.AbstractContextManager[None]:
    """Restore the caller's current context after a block that may change it."""
    return _PreservedContext()


class _PreservedContext(contextlib.AbstractContextManager[None]):
    """A class, not a generator: every run enters it."""

    def __enter__(self) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._error, self._previous = driver.cuCtxGetCurrent()

    def __exit__(self, *_: object) -> None:
        if self._error == self._driver.CUresult.CUDA_SUCCESS:
            self._driver.cuCtxSetCurrent(self._previous)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def in_order(first: int, then: int, event: Any) -> None:
    """Make the work that a stream is given from now on wait for what another has been given. The event may be used again at once.

    Args:
        first: Handle of the stream that is waited for.
        then: Handle of the stream that waits.
        event: Handle of an event of the same device.

    Raises:
        BackendError: The driver refuses.
    """
    from cuda.bindings import driver

    (error,) = driver.cuEventRecord(event, first)
    if error == driver.CUresult.CUDA_SUCCESS:
        (error,) = driver.cuStreamWaitEvent(then, event, 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the GPU's driver refused to order melrt's work with the caller's stream: {error}.")


def _check_memory(pointer: int, device_id: int, wanted: int) -> None:
    """Refuse a pointer of another device or context: reading it would fault, or return something other than the mel."""
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
