"""Memory of results: fresh memory costs a page fault for every 4,096 bytes, which takes longer than copying the audio there."""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

# Smaller arrays come from the heap, whose pages the process keeps (`mallopt`: M_MMAP_THRESHOLD).
SMALLEST = 1 << 17
# Bytes that a vocoder keeps for new results: 64 utterances of ten seconds at 22,050 Hz have 56 million.
RESULT_BYTES = 1 << 26


class ResultMemory:
    """Arrays whose memory serves again once nothing refers to them any more. Safe for use by several threads."""

    def __init__(self, kept: int) -> None:
        """Begin without memory.

        Args:
            kept: Most bytes that are kept for new arrays; 0 for `numpy.empty` itself.
        """
        self._kept = kept
        self._free: dict[int, deque[np.ndarray]] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes that wait for new arrays."""
        return sum(size * len(buffers) for size, buffers in list(self._free.items()))

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Return an array whose values are not defined, as `numpy.empty` does."""
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        if size < SMALLEST or not self._kept:
            return np.empty(shape, dtype)
        step = 1 << (size.bit_length() - 3)  # four sizes per octave: at most a fifth of a buffer is not used
        size = -(-size // step) * step
        try:
            buffer = self._free[size].pop()
        except LookupError:
            buffer = np.empty(size, np.uint8)
        return np.asarray(_Lease(self, buffer, shape, dtype))

    def close(self) -> None:
        """Free the memory, now and of every array that is dropped later."""
        self._kept = 0
        self._free.clear()

    def _take_back(self, buffer: np.ndarray) -> None:
        """Keep a buffer. A garbage collection may call it in the middle of any other method, so that no lock is possible here."""
        if self.free_bytes + buffer.nbytes <= self._kept:
            self._free.setdefault(buffer.nbytes, deque()).append(buffer)


class _Lease:
    """Owner of an array's memory: numpy keeps it as long as the array or a view of it exists."""

    def __init__(self, memory: ResultMemory, buffer: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        address = buffer.__array_interface__["data"][0]
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (address, False), "version": 3}
        self._buffer, self._memory = buffer, weakref.ref(memory)

    def __del__(self) -> None:
        memory = self._memory()
        if memory is not None:
            memory._take_back(self._buffer)
