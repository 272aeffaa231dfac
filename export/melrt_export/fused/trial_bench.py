"""Candidates of a kernel on this machine's GPU: compared with the default bit by bit, and timed. It runs in a child process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.fused.engine import FusedRun, LoadedProgram, load_kernel
from melrt.backends.fused.program import CompiledKernel, Program
from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.kernels import Geometry, queue_kernel
from melrt.backends.tensorrt.slot import FLOAT, Pinned
from melrt.timing import shuffled
from melrt.types import Mel
from melrt_export.fused.gpu_timing import GraphClock, Memory, part

# Rounds of the timing of each candidate, and microseconds of one timing at least: events resolve half a microsecond.
ROUNDS = 7
LEAST_MICROSECONDS = 200.0
MOST_LAUNCHES = 20
# Outputs are compared for this many utterances of a batch; the code for further ones is the same.
COMPARED = 2

# Kinds of arguments that are addresses of activations, mels or audio.
_MEMORY = ("mel", "buffer", "audio")

Candidate = tuple[CompiledKernel, bytes]
Times = tuple[float, ...]


class TrialBench:
    """The default engine on the first GPU, with memory for two mels."""

    def __init__(self, engine: bytes, file: str, mels: Sequence[Mel]) -> None:
        """Open the GPU and load the engine.

        Args:
            engine: Content of the engine with the default tiles.
            file: Its name, for messages.
            mels: Mels (B, M, T) to time, which are compared for the first utterances.
        """
        self._device, gpu = open_device(0, "fused")
        self._device.set_current()
        self._file, self._capability = file, gpu.compute_capability
        self._stream = self._device.create_stream()
        self._clock = GraphClock(self._stream)
        self._default = LoadedProgram(Program.loads(engine, file), self._device, gpu.compute_capability, file)
        self._mels = mels
        self._memory = [Memory(self._device, self._stream, self._default, (mel.shape[0], mel.shape[2])) for mel in mels]
        self._staged = Pinned(max(FLOAT * mel.shape[0] * mel.shape[2] * self._default.program.hop for mel in mels))
        self._prepared = ""
        self._compared: list[tuple[FusedRun, NDArray[np.uint8]]] = []

    def usable(self) -> bool:
        """Return whether the GPU still works after an error; an access to memory outside of what is allocated ruins its context."""
        try:
            self._stream.sync()
        except Exception:  # the binding's exceptions have no common base
            return False
        return True

    def is_equal(self, kernel: str, candidate: Candidate) -> bool:
        """Return whether a candidate's first launch writes the same bits as the default."""
        if self._prepared != kernel:
            self._prepare(kernel)
        loaded = self._load(candidate)
        return all(
            np.array_equal(expected, self._output(run, kernel, partial(self._queue, run, kernel, candidate[0], loaded, 1)))
            for run, expected in self._compared
        )

    def times(self, kernel: str, tried: Sequence[Candidate]) -> list[Times]:
        """Return the microseconds of all launches of a kernel in one run: for each candidate, one time for each mel.

        The candidates take turns, in another order in each round; each time is a median.
        """
        self._prepared = ""  # the timing overwrites the input of the comparison
        runs = self._runs(self._default, self._mels)
        for run in runs:
            self._make_input(run, kernel)
        graphs = {}
        for number, candidate in enumerate(tried):
            loaded = self._load(candidate)
            for place, run in enumerate(runs):
                graphs[number, place] = self._captured(partial(self._queue, run, kernel, candidate[0], loaded))
        medians = self._medians(graphs)
        return [tuple(medians[number, place] for place in range(len(runs))) for number in range(len(tried))]

    def networks(self, engine: bytes) -> tuple[bool, list[Times]]:
        """Compare the network with the default tiles and with others.

        Args:
            engine: Content of the engine with the other tiles.

        Returns:
            True if the audio of every mel is the same to the bit; and for each mel the microseconds of both networks.
        """
        other = LoadedProgram(Program.loads(engine, self._file), self._device, self._capability, self._file)
        pairs = list(zip(self._runs(self._default, self._mels), self._runs(other, self._mels), strict=True))
        sizes = [FLOAT * mel.shape[0] * mel.shape[2] * self._default.program.hop for mel in self._mels]
        equal = True
        for memory, size, pair in zip(self._memory, sizes, pairs, strict=True):
            first, second = (self._written(memory.place.audio, size, run.enqueue) for run in pair)
            equal &= np.array_equal(first, second)
        medians = self._medians(
            {(mel, index): self._captured(run.enqueue) for mel, pair in enumerate(pairs) for index, run in enumerate(pair)}
        )
        return equal, [(medians[mel, 0], medians[mel, 1]) for mel in range(len(pairs))]

    def _runs(self, loaded: LoadedProgram, mels: Sequence[Mel]) -> list[FusedRun]:
        return [memory.prepare(loaded, mel) for memory, mel in zip(self._memory, mels, strict=True)]

    def _prepare(self, kernel: str) -> None:
        """Give the kernel its input, and keep what the default writes."""
        self._compared = []
        for run in self._runs(self._default, [mel[:COMPARED] for mel in self._mels]):
            self._make_input(run, kernel)
            enqueue = partial(self._queue, run, kernel, self._default.compiled[kernel], self._default.kernels[kernel], 1)
            self._compared.append((run, self._output(run, kernel, enqueue)))
        self._prepared = kernel

    def _make_input(self, run: FusedRun, kernel: str) -> None:
        """Queue the launches before the first one of a kernel."""
        for launch, size, values in run.launches:
            if launch.kernel == kernel:
                return
            queue_kernel(launch.layer, self._default.kernels[launch.kernel], self._stream, size, values)

    def _output(self, run: FusedRun, kernel: str, enqueue: Callable[[], None]) -> NDArray[np.uint8]:
        """Return the whole buffer that the first launch of a kernel writes: its last address that is not a weight's."""
        launch, _, values = next(item for item in run.launches if item[0].kernel == kernel)
        index = max(i for i, (kind, _) in enumerate(launch.arguments) if kind in _MEMORY)
        batch, _, frames = run.shape
        size = FLOAT * batch * frames * self._default.program.hop
        if launch.arguments[index].kind == "buffer":
            size = self._default.program.buffers[launch.arguments[index].value] * batch * frames
        return self._written(int(values[index]), size, enqueue)

    def _written(self, address: int, size: int, enqueue: Callable[[], None]) -> NDArray[np.uint8]:
        """Fill memory with bytes that are not numbers, run queued work, and return the content."""
        if size > len(self._staged.array):
            self._staged.close()
            self._staged = Pinned(size)
        memory = part(address, size)
        memory.fill(0xFF, stream=self._stream)
        enqueue()
        part(int(self._staged.buffer.handle), size).copy_from(memory, stream=self._stream)
        self._stream.sync()
        return self._staged.array[:size].copy()

    def _load(self, candidate: Candidate) -> Any:
        compiled, cubin = candidate
        return load_kernel(cubin, compiled, self._device)

    def _queue(self, run: FusedRun, kernel: str, compiled: CompiledKernel, loaded: Any, most: int | None = None) -> None:
        """Queue the launches of a kernel in a run, with the code of a candidate.

        Those at the rate of the first one read its input and write its output, so that activations do not grow from one to the next.
        """
        batch, _, frames = run.shape
        own = [(launch, values) for launch, _, values in run.launches if launch.kernel == kernel]
        first, places = own[0]
        for launch, values in own[:most]:
            moved = [
                place if kind in _MEMORY and launch.rate == first.rate else value
                for (kind, _), place, value in zip(launch.arguments, places, values, strict=False)
            ]
            size = Geometry(launch.grid(compiled, batch, frames), compiled.threads, compiled.shared)
            queue_kernel(launch.layer, loaded, self._stream, size, [*moved, *values[len(moved) :]])

    def _captured(self, enqueue: Callable[[], None]) -> Callable[[], float]:
        """Capture work often enough for the clock's resolution, and run it once."""
        enqueue()
        self._stream.sync()
        once = self._clock.captured(enqueue, 1)
        once()
        count = min(MOST_LAUNCHES, math.ceil(LEAST_MICROSECONDS / max(once(), 1.0)))
        run = self._clock.captured(enqueue, count) if count > 1 else once
        run()
        return run

    def _medians(self, graphs: dict[tuple[int, int], Callable[[], float]]) -> dict[tuple[int, int], float]:
        times: dict[tuple[int, int], list[float]] = {key: [] for key in graphs}
        for key in shuffled(graphs, ROUNDS):
            times[key].append(graphs[key]())
        return {key: statistics.median(values) for key, values in times.items()}
