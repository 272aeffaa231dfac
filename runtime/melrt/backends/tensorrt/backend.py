"""TensorRT engines of both flavors on NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from melrt.backends.base import DeviceUtterance
from melrt.backends.tensorrt.engine import Engine as TensorRTEngine
from melrt.backends.tensorrt.gpu_arrays import DeviceAudio, DeviceMel, current_device, in_order, make_audio, read_mel
from melrt.backends.tensorrt.interface import Engine
from melrt.backends.tensorrt.kernels import CUT_JOB, KEEP_JOB, MOST_JOBS, Kernels, table
from melrt.backends.tensorrt.slot import FLOAT, ExecutionSlot
from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError, MissingExtraError
from melrt.planning.windows import GraphKind, Policy, Window
from melrt.system import Gpu
from melrt.types import Audio, Mel

logger = logging.getLogger(__name__)

# Not confirmed on a GPU: while one slot computes, another's audio is copied back and the next windows are cut.
SLOTS = 3


class EngineBackend:
    """A voice's two engines on one GPU. Every run uses an execution slot of its own; there are as many slots as workers."""

    name = ""
    reason = ""
    extra = ""
    """Extra that brings the packages it needs."""

    def __init__(self, bundle: Bundle, artifacts: Mapping[GraphKind, Artifact], index: int = 0, *, int16: bool = False) -> None:
        """Open both engines, and capture the CUDA graphs of the window.

        Args:
            bundle: The voice.
            artifacts: Engines of `edge` and `interior`.
            index: Index of the CUDA device.
            int16: Return 16-bit samples, converted on the device.

        Raises:
            BundleError: An engine is missing or altered.
            BackendError: No GPU can be used, or it does not run these engines.
            MissingExtraError: TensorRT or cuda-core is not installed.
        """
        self._index = index
        self._device, self.gpu = open_device(index, self.extra)
        self._slots: list[ExecutionSlot] = []
        self.engines: dict[GraphKind, Engine] = {}
        self.machine = self.gpu.name
        self.device = f"cuda:{index}"
        self.precision = artifacts["interior"].precision
        with current_device(self._device):
            try:
                self._open(bundle, artifacts, int16)
            except BaseException:  # another backend will use the memory
                self.close()
                raise

    def _open(self, bundle: Bundle, artifacts: Mapping[GraphKind, Artifact], int16: bool) -> None:
        spec = bundle.manifest.spec
        self._open_engines(bundle, artifacts)
        windows = self.engines["interior"].windows
        if not windows:
            raise BackendError(f"{artifacts['interior'].file} takes windows of any length; build it with some, as `melrt build` does.")
        *shorter, frames = windows
        batch = windows[frames][-1]
        # windows of one length share a run of the policy's batch, so a length without it is of no use
        short = tuple(length for length in shorter if windows[length][-1] >= batch)
        self.policy = Policy(frames, static=True, batch=batch, workers=SLOTS, short=short)
        self.candidates = tuple(replace(self.policy, batch=size) for size in windows[frames])
        self._free: list[ExecutionSlot] = []  # the last one first: a lone caller always gets the slot whose graphs are captured
        self._vacancies = threading.Semaphore(0)
        kernels = self._load_kernels()
        for _ in range(SLOTS):
            slot = ExecutionSlot(self._device, kernels, self.engines, spec.hop, int16=int16)
            self._slots.append(slot)
            self._warm_up(slot, spec.silence)
            self._free.append(slot)
            self._vacancies.release()
        for engine in self.engines.values():
            engine.save_cache()

    def _open_engines(self, bundle: Bundle, artifacts: Mapping[GraphKind, Artifact]) -> None:
        """Open the engine of each graph, and enter it in `engines`."""
        raise NotImplementedError

    def _load_kernels(self) -> Kernels:
        """Return the kernels around an engine."""
        return Kernels(self._device)

    @property
    def failed_captures(self) -> int:
        """Shapes that could not be captured as CUDA graphs, over all slots; their kernels are launched one by one."""
        return sum(slot.failed_captures for slot in self._slots)

    def run(self, graph: GraphKind, mel: Mel) -> Audio:
        with self.slot() as slot:
            return slot.run(graph, mel).copy()

    def run_windows(self, graph: GraphKind, windows: Sequence[Mel], meanwhile: Callable[[], None], keep: Callable[[Audio], None]) -> None:
        with self.slot() as slot:
            keep(slot.run(graph, windows, meanwhile))

    @contextlib.contextmanager
    def slot(self) -> Iterator[ExecutionSlot]:
        """Take a slot for one run once one is free; the device is this thread's current one meanwhile."""
        with self._vacancies, current_device(self._device):
            slot = self._free.pop()
            try:
                yield slot
            finally:
                self._free.append(slot)  # work that a failed run left queued precedes the next run's work on the same stream

    def view_mel(self, mel: object) -> DeviceMel:
        with current_device(self._device):
            return read_mel(mel, self._index)

    def make_audio(self, mel: DeviceMel, samples: int) -> tuple[Any, DeviceAudio]:
        whole = (samples,) if len(mel.owner.shape) == 2 else (mel.shape[0], samples)  # type: ignore[attr-defined]  # an array
        with current_device(self._device):
            return make_audio(mel.owner, whole, self._slots[0].dtype)

    def run_on_device(self, jobs: Sequence[tuple[DeviceUtterance, Window]]) -> None:
        """Cut the windows into the slot's input, launch the engine, and copy the kept parts to their places; nothing is waited for.

        The device checks for samples that are not finite; a later run logs what it found, since nothing is waited for here.
        """
        with self.slot() as slot:
            self._warn_of_reports(slot)
            own, callers = int(slot.stream.handle), {utterance.mel.stream for utterance, _ in jobs}
            for caller in callers:
                in_order(caller, own, slot.event.handle)
            window = jobs[0][1]
            shape = slot.prepared(window.graph, len(jobs), jobs[0][0].mel.shape[1], window.frames)
            for first in range(0, len(jobs), MOST_JOBS):
                self._cut(slot, jobs[first : first + MOST_JOBS], first)
            shape.launch()
            for first in range(0, len(jobs), MOST_JOBS):
                self._keep(slot, jobs[first : first + MOST_JOBS], first)
            for caller in callers:
                in_order(own, caller, slot.event.handle)

    def _cut(self, slot: ExecutionSlot, jobs: Sequence[tuple[DeviceUtterance, Window]], first: int) -> None:
        """Copy windows to the slot's input, from this place of the batch on."""
        bands, frames = jobs[0][0].mel.shape[1], jobs[0][1].frames
        rows = []
        for utterance, window in jobs:
            mel, edges = utterance.mel, utterance.edges
            between, band_stride, frame_stride = mel.strides
            value = np.nan if edges.value is None else edges.value
            source = mel.pointer + FLOAT * utterance.index * between
            rows.append((source, band_stride, frame_stride, mel.shape[2], window.start - edges.left, value, 0))
        target = np.uint64(int(slot.mel.handle) + FLOAT * first * bands * frames)
        elements = bands * frames
        slot.kernels.run("cut", slot.stream, elements, len(jobs), table(CUT_JOB, rows), np.int32(bands), np.int32(frames), target)

    def _keep(self, slot: ExecutionSlot, jobs: Sequence[tuple[DeviceUtterance, Window]], first: int) -> None:
        """Copy the kept audio of windows, from this place of the batch on, to the callers' arrays."""
        frame = slot.dtype.itemsize * slot.hop
        rows = []
        for place, (utterance, window) in enumerate(jobs, first):
            source = slot.converted + frame * (place * window.frames + window.keep_start - window.start)
            first_frame = utterance.index * utterance.mel.shape[2] + window.keep_start - utterance.edges.left
            rows.append((source, utterance.audio.pointer + frame * first_frame, (window.keep_stop - window.keep_start) * slot.hop, place))
        addresses = np.uint64(int(slot.flags.handle)), np.uint64(slot.report.ctypes.data)
        longest = max(row[2] for row in rows)
        slot.kernels.run(f"keep_{slot.dtype.name}", slot.stream, longest, len(jobs), table(KEEP_JOB, rows), *addresses)

    def _warn_of_reports(self, slot: ExecutionSlot) -> None:
        if slot.report[0]:
            slot.report[0] = 0
            logger.warning(
                "audio that was made for arrays on the GPU has samples that are not finite. Is every value of the mels finite, and "
                "is %s precise enough for this voice?", self.precision,
            )  # fmt: skip

    def close(self) -> None:
        """Release the device's memory. No run is in progress."""
        with current_device(self._device):
            for engine in self.engines.values():
                engine.save_cache()
            for slot in self._slots:
                slot.stream.sync()
                self._warn_of_reports(slot)
                slot.close()
        self._slots.clear()

    def _warm_up(self, slot: ExecutionSlot, silence: float) -> None:
        """Run each window at each of its batches often enough that its CUDA graph is captured."""
        engine = self.engines["interior"]
        for frames, batches in engine.windows.items():
            for batch in batches:
                mel = np.full((batch, engine.profile.largest[1], frames), silence, np.float32)
                for _ in range(3):
                    slot.run("interior", mel)


class TensorRT(EngineBackend):
    """A voice's two TensorRT engines on one GPU."""

    name = "tensorrt"
    extra = "tensorrt"

    def _open_engines(self, bundle: Bundle, artifacts: Mapping[GraphKind, Artifact]) -> None:
        for graph, artifact in artifacts.items():
            self.engines[graph] = TensorRTEngine(artifact, bundle.read(artifact), bundle.manifest.spec.n_mels, self.gpu)


def open_device(index: int, extra: str = "tensorrt") -> tuple[Any, Gpu]:
    """Open a CUDA device and describe it. The thread's current context stays as it was; `current_device` changes it for a block.

    Raises:
        BackendError: No such device can be used.
        MissingExtraError: cuda-core is not installed.
    """
    try:
        from cuda.core import Device
    except ImportError as error:
        raise MissingExtraError("running an engine", "cuda-core", extra) from error
    try:
        device = Device(index)
        with current_device(device):  # creates the primary context
            pass
    except Exception as error:  # a missing driver and a missing device raise several exceptions without a common base
        raise BackendError(f"no CUDA device {index} can be used here ({error}); `melrt doctor` shows what is missing.") from error
    capability = device.compute_capability
    return device, Gpu(device.name, f"{capability.major}.{capability.minor}", 1)
