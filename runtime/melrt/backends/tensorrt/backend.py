"""TensorRT engines, of both flavors, on NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.tensorrt.engine import Engine
from melrt.backends.tensorrt.gpu_arrays import DeviceAudio, DeviceMel, make_audio, read_mel
from melrt.backends.tensorrt.slot import FLOAT, ExecutionSlot
from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError, MissingExtraError
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt.planning.windows import GraphKind, Policy, ReceptiveField, Span, Window, plan
from melrt.system import Gpu

# Not confirmed on a GPU: while one lane computes, another's audio is copied back and the next windows are cut.
LANES = 3


class TensorRT:
    """A voice's two engines on one GPU. Every run has a lane of its own; there are as many as workers."""

    name = "tensorrt"

    def __init__(self, bundle: Bundle, artifacts: Mapping[GraphKind, Artifact], index: int = 0, *, int16: bool = False) -> None:
        """Open both engines, and capture the window's CUDA graphs.

        Args:
            bundle: The voice.
            artifacts: Engines of `edge` and `interior`.
            index: Of the CUDA device.
            int16: Give 16-bit samples, converted on the device.

        Raises:
            BundleError, BackendError, MissingExtraError: As `Engine`; also where no GPU can be used.
        """
        self._index = index
        self._device, self.gpu = open_device(index)
        self.machine = self.gpu.name
        self.device = f"cuda:{index}"
        self.precision = artifacts["interior"].precision
        spec = bundle.manifest.spec
        self.engines = {graph: Engine(artifact, bundle.read(artifact), spec.n_mels, self.gpu) for graph, artifact in artifacts.items()}
        profile = self.engines["interior"].profile
        if profile.window is None:
            raise BackendError(f"{artifacts['interior'].file} takes windows of several lengths; build it with one, as `melrt build` does.")
        self.policy = Policy(frames=profile.window, static=True, batch=profile.largest[0], workers=LANES)
        self.candidates = tuple(replace(self.policy, batch=batch) for batch in _powers_of_two(profile.largest[0]))
        self._free: queue.LifoQueue[ExecutionSlot] = queue.LifoQueue()
        self._lanes = [ExecutionSlot(self._device, self.engines, spec.hop, int16=int16) for _ in range(LANES)]
        for lane in self._lanes:
            self._warm_up(lane, spec.silence)
            self._free.put(lane)
        for engine in self.engines.values():
            engine.save_cache()

    def run(self, graph: GraphKind, mel: NDArray[np.float32]) -> NDArray[Any]:
        with self.lane() as lane:
            return lane.run(graph, mel)

    @contextlib.contextmanager
    def lane(self) -> Iterator[ExecutionSlot]:
        """A lane for one run, when one is free; the device is this thread's current one meanwhile."""
        lane = self._free.get()
        try:
            self._device.set_current()
            yield lane
        finally:
            self._free.put(lane)  # what a failed run left queued comes before the next run's work, on the same stream

    def speak(self, mel: Any, spec: MelSpec, field: ReceptiveField, edges: Edges, policy: Policy) -> Any:
        """A whole mel on the GPU to an array of the same kind there, in order with the caller's stream; nothing is waited for.

        Args:
            mel: (M, T) or (B, M, T) float32. That its values are finite is not checked: it would have to be waited for.
            spec: The voice's convention.
            field: The network's context.
            edges: The ends of an utterance.
            policy: The windows.

        Raises:
            MelError: Wrong bands, too few frames, another dtype, device or context, or a library that melrt cannot make arrays of.
        """
        with self.lane() as lane:
            found = read_mel(mel, self._index, lane.stream)
            batch, bands, frames = found.shape
            spec.check_shape((bands, frames), max(field.smallest_input - edges.left - edges.right, 1))
            samples = frames * spec.hop
            audio = make_audio(mel, (samples,) if len(mel.shape) == 2 else (batch, samples), lane.dtype)
            caller = self._stream(audio.stream)
            lane.stream.wait(caller)
            total = edges.left + frames + edges.right
            windows = list(plan(Span(edges.left, edges.left + frames, total, ended=True), field, policy))
            for shape in {(w.graph, w.frames): None for w in windows}:
                alike = [(b, w) for b in range(batch) for w in windows if (w.graph, w.frames) == shape]
                for at in range(0, len(alike), policy.batch):
                    self._run_on_device(lane, found, audio, edges, alike[at : at + policy.batch])
            caller.wait(lane.stream)
        return audio.array

    def _run_on_device(self, lane: ExecutionSlot, mel: DeviceMel, audio: DeviceAudio, edges: Edges, jobs: list[tuple[int, Window]]) -> None:
        """One run: cut the windows into its slots, launch it, and keep the middles."""
        _, bands, frames = mel.shape
        window = jobs[0][1]
        ready = lane.ready(window.graph, len(jobs), bands, window.frames)
        value = np.float32(np.nan if edges.value is None else edges.value)
        between, band_stride, frame_stride = mel.strides
        for slot, (utterance, w) in enumerate(jobs):
            source = np.uint64(mel.pointer + FLOAT * utterance * between)
            target = np.uint64(int(lane.mel.handle) + FLOAT * slot * bands * w.frames)
            lane.kernels.run(
                "cut", lane.stream, bands * w.frames, source, np.int64(band_stride), np.int64(frame_stride), np.int32(bands),
                np.int32(frames), np.int32(w.start - edges.left), np.int32(w.frames), value, target,
            )  # fmt: skip
        ready.launch()
        size, hop = lane.dtype.itemsize, lane.hop
        for slot, (utterance, w) in enumerate(jobs):
            source = np.uint64(int(lane.pcm.handle) + size * hop * (slot * w.frames + w.keep_start - w.start))
            target = np.uint64(audio.pointer + size * hop * (utterance * frames + w.keep_start - edges.left))
            kept = (w.keep_stop - w.keep_start) * hop
            lane.kernels.run(f"keep_{lane.dtype.name}", lane.stream, kept, source, np.int32(kept), target)

    def _stream(self, handle: int) -> Any:
        from cuda.core import LEGACY_DEFAULT_STREAM, Stream

        return Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM

    def close(self) -> None:
        """Give the device's memory back; no run is going on."""
        self._device.set_current()
        for engine in self.engines.values():
            engine.save_cache()
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()

    def _warm_up(self, lane: ExecutionSlot, silence: float) -> None:
        """The window of each batch size, often enough that its CUDA graph is captured."""
        profile = self.engines["interior"].profile
        for batch in _powers_of_two(profile.largest[0]):
            mel = np.full((max(batch, profile.smallest[0]), *profile.largest[1:]), silence, np.float32)
            for _ in range(3):
                lane.run("interior", mel)


def _powers_of_two(largest: int) -> list[int]:
    return [1 << power for power in range(largest.bit_length()) if 1 << power < largest] + [largest]


def open_device(index: int) -> tuple[Any, Gpu]:
    """A CUDA device, made this thread's current one, and what it is.

    Raises:
        BackendError: There is none that can be used.
        MissingExtraError: cuda-core is not installed.
    """
    try:
        from cuda.core import Device
    except ImportError as error:
        raise MissingExtraError("running an engine", "cuda-core", "tensorrt") from error
    try:
        device = Device(index)
        device.set_current()
    except Exception as error:  # a missing driver and a missing device are any of several exceptions
        raise BackendError(f"no CUDA device {index} can be used here ({error}); `melrt doctor` shows what is missing.") from error
    capability = device.compute_capability
    return device, Gpu(device.name, f"{capability.major}.{capability.minor}", 1)
