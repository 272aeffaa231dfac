"""A lane: one stream of a device with memory of its own, through which one run goes at a time."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.tensorrt.engine import Engine
from melrt.backends.tensorrt.kernels import Kernels
from melrt.errors import BackendError
from melrt.planning.windows import GraphKind

FLOAT = 4
# A shape that comes this often is worth a CUDA graph; one that came once may never come again.
CAPTURE_AFTER = 2
# Shapes that a lane keeps ready; each has an execution context, and perhaps a CUDA graph, of some hundred kilobytes.
MOST_SHAPES = 64

Shape = tuple[int, int, int]


class ExecutionSlot:
    """Stream, buffers and ready shapes; everything is allocated when it is made, and nothing in a run."""

    def __init__(self, device: Any, engines: Mapping[GraphKind, Engine], hop: int, *, int16: bool) -> None:
        """Allocate.

        Args:
            device: Current in this thread.
            engines: Of both graphs.
            hop: Samples per frame.
            int16: Give 16-bit samples, converted on the device.
        """
        self.stream = device.create_stream()
        self.kernels = Kernels(device)
        self.engines = engines
        self.hop = hop
        self.dtype = np.dtype(np.int16 if int16 else np.float32)
        mels = max(int(np.prod(engine.profile.largest)) for engine in engines.values())
        samples = max(engine.profile.largest[0] * engine.profile.largest[2] * hop for engine in engines.values())
        self.scratch = device.allocate(max(1, *(engine.scratch_bytes for engine in engines.values())), stream=self.stream)
        self.mel = device.allocate(FLOAT * mels, stream=self.stream)
        self.audio = device.allocate(FLOAT * samples, stream=self.stream)
        self.pcm = device.allocate(self.dtype.itemsize * samples, stream=self.stream) if int16 else self.audio
        self.host_mel = _Pinned(FLOAT * mels, np.dtype(np.float32))
        self.host_audio = _Pinned(self.dtype.itemsize * samples, self.dtype)
        self._ready: OrderedDict[tuple[GraphKind, Shape], PreparedShape] = OrderedDict()
        self.stream.sync()

    def run(self, graph: GraphKind, mel: NDArray[np.float32]) -> NDArray[Any]:
        """Mel frames (B, M, T) on the host through a graph to samples (B, T·hop), a fresh array."""
        ready = self.ready(graph, *mel.shape)
        self.host_mel.array[: mel.size] = mel.reshape(-1)
        ready.mel.copy_from(ready.host_mel, stream=self.stream)
        ready.launch()
        ready.host_audio.copy_from(ready.pcm, stream=self.stream)
        self.stream.sync()
        batch, _, frames = mel.shape
        audio: NDArray[Any] = self.host_audio.array[: batch * frames * self.hop].reshape(batch, -1).copy()
        return audio

    def ready(self, graph: GraphKind, batch: int, bands: int, frames: int) -> PreparedShape:
        """What runs this shape. A window's batch is rounded up to a power of two: few CUDA graphs, and a spare slot is no harm."""
        profile = self.engines[graph].profile
        slots = min(1 << (batch - 1).bit_length(), profile.largest[0]) if profile.window else batch
        shape = (max(slots, batch, profile.smallest[0]), bands, frames)
        found = self._ready.pop((graph, shape), None) or PreparedShape(self, graph, shape)
        self._ready[graph, shape] = found
        if len(self._ready) > MOST_SHAPES:
            self._ready.popitem(last=False)
        return found

    def close(self) -> None:
        """Give everything back, after what was queued is done; the device is current."""
        self.stream.sync()
        self._ready.clear()  # contexts and graphs go before the memory that they use
        for buffer in {id(b): b for b in (self.mel, self.audio, self.pcm, self.scratch)}.values():
            buffer.close(self.stream)
        self.host_mel.close()
        self.host_audio.close()
        self.stream.sync()
        self.stream.close()


class PreparedShape:
    """One shape of one engine, ready to be launched again and again: in a context of its own, as a CUDA graph once it has recurred.

    A captured graph stands for the state that its context had; so each has its own, and contexts of a lane share its scratch memory
    (TensorRT's developer guide, CUDA graphs).
    """

    def __init__(self, lane: ExecutionSlot, graph: GraphKind, shape: Shape) -> None:
        engine = lane.engines[graph]
        engine.profile.check(shape)
        self._lane = lane
        self._samples = shape[0] * shape[2] * lane.hop
        mel_bytes, sample_bytes = FLOAT * int(np.prod(shape)), self._samples * lane.dtype.itemsize
        self.mel, self.host_mel = _part(lane.mel, mel_bytes), _part(lane.host_mel.buffer, mel_bytes)
        self.pcm, self.host_audio = _part(lane.pcm, sample_bytes), _part(lane.host_audio.buffer, sample_bytes)
        self._context = engine.context(lane.scratch)
        if not self._context.set_input_shape("mel", shape) or self._context.infer_shapes():
            raise BackendError(f"the {graph} engine refuses a mel of shape {shape}.")
        for name, buffer in (("mel", lane.mel), ("audio", lane.audio)):
            if not self._context.set_tensor_address(name, int(buffer.handle)):
                raise BackendError(f"the {graph} engine refuses the address of its {name}.")
        self._captured: Any = None
        self._launches = 0

    def launch(self) -> None:
        """Queue the run on the lane's stream."""
        if self._captured is not None:
            self._captured.launch(self._lane.stream)
            return
        self._enqueue()
        self._launches += 1
        # the first launch of a context may set itself up, which no graph can hold; TensorRT-RTX may still be compiling
        if self._launches >= CAPTURE_AFTER and self._capturable():
            builder = self._lane.stream.create_graph_builder().begin_building("thread_local")
            self._enqueue()
            self._captured = builder.end_building().complete()

    def _capturable(self) -> bool:
        capturable = getattr(self._context, "is_stream_capturable", None)
        return capturable is None or bool(capturable(int(self._lane.stream.handle)))

    def _enqueue(self) -> None:
        lane = self._lane
        if not self._context.execute_async_v3(int(lane.stream.handle)):
            raise BackendError("TensorRT could not queue the run.")
        if lane.pcm is not lane.audio:
            addresses = (np.uint64(int(lane.audio.handle)), np.uint64(int(lane.pcm.handle)))
            lane.kernels.run("to_int16", lane.stream, self._samples, addresses[0], np.int32(self._samples), addresses[1])


class _Pinned:
    """Page-locked host memory, as a buffer for copies and as an array."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        self.buffer = LegacyPinnedMemoryResource().allocate(size)
        memory = memoryview((ctypes.c_byte * size).from_address(int(self.buffer.handle)))
        self.array: NDArray[Any] = np.frombuffer(memory, dtype)

    def close(self) -> None:
        self.array = self.array[:0].copy()  # nobody reads freed memory through us
        self.buffer.close()


def _part(buffer: Any, size: int) -> Any:
    """The first bytes of a buffer, as a buffer that owns nothing."""
    from cuda.core import Buffer

    return Buffer.from_handle(int(buffer.handle), size)
