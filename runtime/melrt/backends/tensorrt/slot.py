"""Execution slot: one stream of a device with its own memory, used by one run at a time."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.tensorrt.interface import Engine, Place, Shape
from melrt.backends.tensorrt.kernels import Kernels
from melrt.errors import BackendError
from melrt.planning.windows import GraphKind
from melrt.types import Audio, Mel

logger = logging.getLogger(__name__)

FLOAT = 4
# TensorRT wants tensors at multiples of this address, in bytes.
ALIGNMENT = 256
# A shape that has run this often is worth a CUDA graph; one that ran once may never run again.
CAPTURE_AFTER = 2
# The same for an engine whose kernels are compiled in the background while fallback kernels run, which a capture would keep.
CAPTURE_LAZY_AFTER = 32
# Prepared shapes per slot; each has an execution context, and perhaps a CUDA graph, of some hundred kilobytes.
MOST_SHAPES = 64


class ExecutionSlot:
    """Stream, buffers and prepared shapes. All memory is allocated when the slot is made, none during a run."""

    def __init__(self, device: Any, kernels: Kernels, engines: Mapping[GraphKind, Engine], hop: int, *, int16: bool) -> None:
        """Allocate stream and memory.

        Args:
            device: The device, current in this thread.
            kernels: Its kernels.
            engines: Engine of each graph.
            hop: Samples per frame.
            int16: Return 16-bit samples, converted on the device.
        """
        self.stream = device.create_stream()
        self.event = self.stream.record()
        """Event for the order with callers' streams. One is enough: a wait refers to the record before it."""
        self.kernels, self.engines, self.hop = kernels, engines, hop
        self.dtype = np.dtype(np.int16 if int16 else np.float32)
        mels = max(int(np.prod(engine.profile.largest)) for engine in engines.values())
        samples = max(engine.profile.largest[0] * engine.profile.largest[2] * hop for engine in engines.values())
        places = max(engine.profile.largest[0] for engine in engines.values())
        self.header = -(-FLOAT * places // ALIGNMENT) * ALIGNMENT
        size = self.header + self.dtype.itemsize * samples
        self.scratch = device.allocate(max(1, *(engine.scratch_bytes for engine in engines.values())), stream=self.stream)
        self.mel = device.allocate(FLOAT * mels, stream=self.stream)
        self.result = device.allocate(size, stream=self.stream)
        """Flags, one for each place of the batch, and the audio behind them: one copy brings both to the host."""
        self.flags = _part(self.result, FLOAT * places)
        self.converted = int(self.result.handle) + self.header
        """Address of the audio in the output's format."""
        self._floats = device.allocate(FLOAT * samples, stream=self.stream) if int16 else None
        self.audio = self.converted if self._floats is None else int(self._floats.handle)
        """Address of the engine's audio."""
        self.host_mel, self.host_result, self._host_report = (Pinned(bytes_) for bytes_ in (FLOAT * mels, size, FLOAT))
        self.report = self._host_report.array.view(np.int32)
        """Set to 1 by the device for samples that are not finite in audio that stays there."""
        self.report[0] = 0
        self.failed_captures = 0
        """Shapes that could not be captured as CUDA graphs."""
        self._prepared: OrderedDict[tuple[GraphKind, Shape], PreparedShape] = OrderedDict()
        self._retired: deque[tuple[Any, PreparedShape]] = deque()
        self.stream.sync()

    def run(self, graph: GraphKind, windows: Sequence[Mel] | Mel, meanwhile: Callable[[], None] = lambda: None) -> Audio:
        """Run windows (M, T) of one length on the host, or an array (B, M, T) of them, through a graph.

        Args:
            graph: Kind of the graph.
            windows: The windows.
            meanwhile: Called once everything is queued, before the device is waited for.

        Returns:
            Samples (B, T*hop) in page-locked memory, which the next run overwrites.

        Raises:
            BackendError: The run failed, or a sample is not finite.
        """
        batch, (bands, frames) = len(windows), windows[0].shape
        shape = self.prepared(graph, batch, bands, frames)
        for target, window in zip(shape.windows, windows, strict=False):  # a batch that was rounded up has further places
            target[...] = window
        shape.mel.copy_from(shape.host_mel, stream=self.stream)
        shape.launch()
        shape.host_result.copy_from(shape.result, stream=self.stream)
        meanwhile()
        self.stream.sync()
        if shape.not_finite[:batch].any():
            precision = self.engines[graph].precision
            raise BackendError(f"the engine returned samples that are not finite. Is {precision} precise enough for this voice?")
        return shape.samples[:batch]

    def prepared(self, graph: GraphKind, batch: int, bands: int, frames: int) -> PreparedShape:
        """Return the prepared shape for a run. A window's batch is rounded up to one of its own, which keeps the CUDA graphs few."""
        engine = self.engines[graph]
        places = next((size for size in engine.windows.get(frames, ()) if size >= batch), max(batch, engine.profile.smallest[0]))
        shape = (places, bands, frames)
        found = self._prepared.pop((graph, shape), None) or PreparedShape(self, graph, shape)
        self._prepared[graph, shape] = found
        if len(self._prepared) > MOST_SHAPES:
            self._retired.append((self.stream.record(), self._prepared.popitem(last=False)[1]))
        while self._retired and self._retired[0][0].is_done:  # a context must outlive the work that was queued with it
            self._retired.popleft()
        return found

    def result_part(self, samples: int, host: bool = False) -> Any:
        """Return the flags and this many samples as a buffer, on the device or on the host."""
        return _part(self.host_result.buffer if host else self.result, self.header + samples * self.dtype.itemsize)

    def close(self) -> None:
        """Release everything after the queued work is done. The device is current."""
        self.stream.sync()
        self._prepared.clear()  # contexts and graphs are released before the memory that they use
        self._retired.clear()
        for buffer in (self.mel, self.result, self.scratch, *(() if self._floats is None else (self._floats,))):
            buffer.close(self.stream)
        self.report = self.report.copy()  # no view of freed memory remains
        for pinned in (self.host_mel, self.host_result, self._host_report):
            pinned.close()
        self.stream.sync()
        self.event.close()
        self.stream.close()


class PreparedShape:
    """One shape of one engine, launched as a CUDA graph once the shape has recurred. The shapes of a slot share its scratch memory."""

    def __init__(self, slot: ExecutionSlot, graph: GraphKind, shape: Shape) -> None:
        engine = slot.engines[graph]
        self._slot = slot
        self._places = shape[0]
        self._samples = shape[0] * shape[2] * slot.hop
        mel_bytes = FLOAT * int(np.prod(shape))
        self.mel, self.host_mel = _part(slot.mel, mel_bytes), _part(slot.host_mel.buffer, mel_bytes)
        self.result, self.host_result = slot.result_part(self._samples), slot.result_part(self._samples, host=True)
        self.windows = slot.host_mel.array.view(np.float32)[: mel_bytes // FLOAT].reshape(shape)
        """Input of the next run (B, M, T), on the host."""
        result = slot.host_result.array
        self.not_finite = result[: FLOAT * shape[0]].view(np.int32)
        """One for each place whose audio is not finite, after a run (B,)."""
        self.samples = result[slot.header :].view(slot.dtype)[: self._samples].reshape(shape[0], -1)
        """Audio of a run (B, T*hop), on the host."""
        place = Place(int(slot.mel.handle), slot.audio, slot.scratch, slot.stream)
        self._run = engine.prepare(shape, self._samples, place)
        self._captured: Any = None
        self._capturable = True
        self._capture_after = CAPTURE_LAZY_AFTER if engine.lazy else CAPTURE_AFTER
        self._launches = 0

    def launch(self) -> None:
        """Queue the run on the slot's stream."""
        if self._captured is not None:
            self._captured.launch(self._slot.stream)
            return
        self._enqueue()
        self._launches += 1
        # the first launch of a context may set itself up, which no graph can hold; TensorRT-RTX may still be compiling
        if self._launches >= self._capture_after and self._capturable:
            self._captured = self._capture()
            self._capturable = self._captured is not None

    def _capture(self) -> Any:
        """Capture the run as a CUDA graph; None if that is not possible. The stream can be used afterwards in any case."""
        if not self._run.capturable():
            return None
        builder = self._slot.stream.create_graph_builder()
        try:
            builder.begin_building("thread_local")
            try:
                self._enqueue()
            finally:
                builder.end_building()
            return builder.complete()
        except Exception as error:  # the binding's exceptions have no common base; the run itself was launched already
            self._slot.failed_captures += 1
            logger.warning("a shape could not be captured as a CUDA graph, so its kernels are launched one by one: %s", error)
            with contextlib.suppress(Exception):
                builder.close()
            return None

    def _enqueue(self) -> None:
        slot, each = self._slot, self._samples // self._places
        slot.flags.fill(0, stream=slot.stream)
        self._run.enqueue()
        slot.kernels.run(
            "finish", slot.stream, each, self._places, np.uint64(slot.audio), np.int32(each),
            np.uint64(0 if slot.audio == slot.converted else slot.converted), np.uint64(int(slot.flags.handle)),
        )  # fmt: skip


class Pinned:
    """Page-locked host memory as a buffer for copies and as an array of bytes."""

    def __init__(self, size: int) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        self.buffer = LegacyPinnedMemoryResource().allocate(size)
        memory = memoryview((ctypes.c_byte * size).from_address(int(self.buffer.handle)))
        self.array: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)

    def close(self) -> None:
        self.array = self.array[:0].copy()  # no view of freed memory remains
        self.buffer.close()


def _part(buffer: Any, size: int) -> Any:
    """Return the first bytes of a buffer as a buffer that does not own them."""
    from cuda.core import Buffer

    return Buffer.from_handle(int(buffer.handle), size)
