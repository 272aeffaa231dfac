"""Residency: the voices that stay in memory, and how much memory they take."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from melrt.bundle import MANIFEST, Bundle
from melrt.checks import check_fields, number, optional, whole
from melrt.errors import ConfigError, QueueFullError
from melrt.scheduling.queue import RequestQueue
from melrt.scheduling.stats import Stats
from melrt.vocoder import Vocoder

# Memory of a loaded voice for each byte of its graphs: weights, their blocked copies and the graph. ONNX Runtime takes 2.7 times the
# bytes of voices/lj's graphs. OpenVINO compiles a graph for each of several shapes: 11 times.
BYTES_PER_BYTE = {"onnxruntime": 3, "openvino": 12, "tensorrt": 3}
# Memory of a loaded voice that does not depend on its graphs, measured with voices of 0.15 MB.
BYTES_EACH = 3 << 20
# Interval in seconds at which the loader looks for the end of voices in use. A run takes milliseconds.
MEMORY_POLL = 0.01


@dataclass(frozen=True, slots=True)
class Residency:
    """Voices that stay in memory, and shares of the workers' time."""

    memory: int | None = None
    """Limit in bytes of the memory that loaded voices take, as estimated from the size of their graphs; None for no limit. Voices without
    work that have not been used for the longest time are unloaded first."""
    pinned: tuple[str, ...] = ()
    """Names of voices that are never unloaded."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Share of the workers' time that a voice gets while several voices have more work than there is time; 1 if it is not named."""
    check_seconds: float = 1.0
    """Seconds between two looks at a bundle on disk. A bundle that has changed is loaded again."""

    def __post_init__(self) -> None:
        check_fields(self, {"memory": optional(whole(1, 1 << 50)), "check_seconds": number(0)}, "residency")
        if not all(isinstance(name, str) for name in (*self.pinned, *self.weights)) or isinstance(self.pinned, str):
            raise ConfigError(f"residency: pinned is {self.pinned!r} and weights {self.weights!r}; both name voices, such as ('lj',).")
        for name, weight in self.weights.items():
            if not (isinstance(weight, int | float) and 0 < weight < 1e6):
                raise ConfigError(f"residency: the weight of {name} is {weight!r}; it must be a number above 0 and below 1,000,000.")


@dataclass(frozen=True, slots=True)
class VoiceStats:
    """State of one voice."""

    loaded: bool
    """True if the next request need not wait for loading."""
    memory: int
    """Estimated bytes that it takes, or took when it was loaded last."""
    loads: int
    """Number of times that it was loaded."""
    load_seconds: float
    """Duration of the last loading."""
    queue: Stats | None
    """Counters since it was loaded; None while it is not."""


@dataclass(slots=True)
class Entry:
    """One voice. Guarded by the lock of the voices."""

    path: Path
    vocoder: Vocoder | None = None
    loading: Future[Vocoder] | None = None
    version: tuple[int, ...] = ()
    checked: float = 0.0
    used: float = 0.0
    memory: int = 0
    loads: int = 0
    load_seconds: float = 0.0

    @property
    def on_disk(self) -> tuple[int, ...]:
        """Numbers that change with every write of the manifest, which is replaced as a whole; empty if there is none now."""
        try:
            facts = (self.path / MANIFEST).stat()
        except OSError:
            return ()
        return facts.st_ino, facts.st_mtime_ns, facts.st_size

    @property
    def gone(self) -> bool:
        """True if the voice is neither loaded nor on disk."""
        return self.vocoder is None and self.loading is None and not self.on_disk

    @property
    def busy(self) -> bool:
        """True while the voice has streams or windows."""
        return self.vocoder is not None and (self.vocoder.open_streams > 0 or self.vocoder.queue.busy)

    def stats(self) -> VoiceStats:
        """Return the state of the voice."""
        vocoder = self.vocoder
        queue = None if vocoder is None else vocoder.stats()
        return VoiceStats(vocoder is not None, self.memory, self.loads, self.load_seconds, queue)


class Memory:
    """Memory of the voices that are loaded, or unloaded but still in use. Its methods are called by the thread that loads."""

    def __init__(self, residency: Residency, patience: float, entries: Mapping[str, Entry], lock: threading.RLock) -> None:
        """Prepare the memory of voices.

        Args:
            residency: Limit and pinned voices.
            patience: Longest wait in seconds for the memory of voices in use.
            entries: The voices.
            lock: Lock that guards them.
        """
        self.no_room = ""
        """Reason for which a voice waits to be loaded; empty if none does."""
        self.closed = False
        """True once nothing is loaded any more."""
        self._residency = residency
        self._patience = patience
        self._entries = entries
        self._lock = lock
        self._queues: dict[RequestQueue, int] = {}

    @property
    def total(self) -> int:
        """Estimated bytes."""
        return sum(memory for queue, memory in self._queues.items() if not queue.ended)

    def add(self, name: str, queue: RequestQueue, memory: int) -> None:
        """Count a voice until its queue has ended."""
        self._queues = {one: size for one, size in self._queues.items() if not one.ended} | {queue: memory}
        if self._residency.memory is not None:  # the backend may take more than was expected
            self._unload(name, self._residency.memory)

    def make_room(self, name: str, memory: int) -> None:
        """Unload voices until this much memory is free, and wait for those that are in use.

        Raises:
            QueueFullError: There is not enough memory within the limits' waiting time.
        """
        limit = self._residency.memory
        if limit is None:
            return
        if memory > limit:
            raise ConfigError(f"the voice {name} takes about {memory >> 20} MiB; Residency.memory is {limit >> 20} MiB. Raise it.")
        serves, until = self._entries[name].vocoder is not None, time.monotonic() + self._patience
        try:
            while not self._unload(name, limit - memory):
                if serves and self._entries[name].vocoder is None:  # just unloaded itself; its callers begin to wait now
                    serves, until = False, time.monotonic() + self._patience
                self.no_room = (
                    f"the voices in use and those pinned take {self.total >> 20} of {limit >> 20} MiB, so {name} was not loaded; "
                    "try again later, or raise Residency.memory."
                )
                if self.closed or time.monotonic() >= until:
                    raise QueueFullError(self.no_room)
                time.sleep(MEMORY_POLL)
        finally:
            self.no_room = ""
        _trim()

    def _unload(self, name: str, room: int) -> bool:
        """Drop voices until the loaded ones take at most `room` bytes; return False while voices in use take more.

        Voices without work go first, then those that were used longest ago. A voice with work keeps its memory until it is done. The
        voice `name` itself, which is loaded again, goes last, and only without work: until then it serves.
        """
        with self._lock:
            loaded = {other: entry for other, entry in self._entries.items() if entry.vocoder is not None}
            order = sorted((other == name, entry.busy, entry.used, other) for other, entry in loaded.items())
        for own, busy, _, other in order:
            held = sum(entry.memory for entry in loaded.values() if entry.vocoder is not None)
            if (held if busy else self.total) > room and (not busy if own else other not in self._residency.pinned):
                self.drop(loaded[other])
        return self.total <= room

    def drop(self, entry: Entry) -> None:
        """Unload a voice. Its memory is free once it is not in use."""
        with self._lock:
            vocoder, entry.vocoder = entry.vocoder, None
        del vocoder  # outside the lock: it may free the memory


def memory_of(bundle: Bundle, precision: str, backend: str) -> int:
    """Return about how many bytes a voice takes in memory."""
    kind = "engine" if backend == "tensorrt" else "onnx"
    found = bundle.find(kind, precision=precision) or bundle.find("onnx")
    return BYTES_EACH + BYTES_PER_BYTE.get(backend, 3) * sum(entry.size for entry in found[:2])


def _trim() -> None:
    """Give free memory back to the system, if the C library is glibc."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if release is not None:
        release(0)
