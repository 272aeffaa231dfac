"""Time launches of a fused engine by the GPU's clock: many in one captured graph, so that no time of the host is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from melrt.backends.fused.engine import FusedEngine, FusedRun, LoadedProgram
from melrt.backends.tensorrt.interface import Place, Profile
from melrt.backends.tensorrt.slot import FLOAT, Pinned
from melrt.types import Mel


class GraphClock:
    """Clock of the GPU for work on one stream."""

    def __init__(self, stream: Any) -> None:
        from cuda.bindings import driver

        self._stream = stream
        self._begin, self._end = (_done(driver.cuEventCreate(0)) for _ in range(2))

    def captured(self, enqueue: Callable[[], None], count: int) -> Callable[[], float]:
        """Capture work that was queued at least once before.

        Args:
            enqueue: Queues the work.
            count: How often the graph holds it.

        Returns:
            A function that runs the graph and returns the microseconds of one of so many.
        """
        builder = self._stream.create_graph_builder()
        builder.begin_building("thread_local")
        for _ in range(count):
            enqueue()
        builder.end_building()
        graph = builder.complete()
        return lambda: self._microseconds(graph) / count

    def _microseconds(self, graph: Any) -> float:
        from cuda.bindings import driver

        stream = driver.CUstream(int(self._stream.handle))
        _done(driver.cuEventRecord(self._begin, stream))
        graph.launch(self._stream)
        _done(driver.cuEventRecord(self._end, stream))
        self._stream.sync()
        return 1e3 * float(_done(driver.cuEventElapsedTime(self._begin, self._end)))


class Memory:
    """Memory of a fused engine for mels up to a size, outside an execution slot. The device is current."""

    def __init__(self, device: Any, stream: Any, loaded: LoadedProgram, shape: tuple[int, int]) -> None:
        """Allocate memory for so many mels of so many frames."""
        program, (batch, frames) = loaded.program, shape
        self._stream, self._largest = stream, (batch, program.bands, frames)
        self.mel = device.allocate(FLOAT * batch * program.bands * frames, stream=stream)
        self.audio = device.allocate(FLOAT * batch * frames * program.hop, stream=stream)
        scratch = device.allocate(program.places(batch, frames)[-1], stream=stream)
        self.place = Place(int(self.mel.handle), int(self.audio.handle), scratch, stream)

    def prepare(self, loaded: LoadedProgram, mel: Mel) -> FusedRun:
        """Copy mels (B, M, T) to the device, and prepare a run of their shape."""
        content = np.ascontiguousarray(mel, np.float32)
        staged = Pinned(content.nbytes)
        try:
            staged.array[:] = content.reshape(-1).view(np.uint8)
            part(self.place.mel, content.nbytes).copy_from(staged.buffer, stream=self._stream)
            self._stream.sync()
        finally:
            staged.close()
        batch, bands, frames = mel.shape
        engine = FusedEngine(loaded, Profile((1, bands, 1), self._largest))
        return engine.prepare((batch, bands, frames), batch * frames * loaded.program.hop, self.place)


def part(address: int, size: int) -> Any:
    """Return a buffer of cuda-core for memory that it does not own."""
    from cuda.core import Buffer

    return Buffer.from_handle(address, size)


def _done(result: tuple[Any, ...]) -> Any:
    """Return the value of a driver's call."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"the GPU's driver refused a call: {error}")
    return values[0] if values else None
