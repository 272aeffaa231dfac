"""Requests: windows of one utterance, and the audio that they become."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from melrt.backends.base import Backend, DeviceBackend, DeviceUtterance, WindowBackend
from melrt.checks import all_finite
from melrt.errors import BackendError
from melrt.files.audio import SampleFormat, clipped, to_int16
from melrt.planning.windows import Window
from melrt.types import Audio, Mel


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """Format of the audio that a mel frame becomes."""

    hop: int
    """Samples of audio per frame."""
    sample_format: SampleFormat = "float32"
    """`float32`, or `int16` with full scale 32767."""
    count_clipped: Callable[[int], None] | None = None
    """Told how many samples were clipped on their way to `int16`, if any were."""
    empty: Callable[[tuple[int, ...], DTypeLike], np.ndarray] = np.empty
    """Makes the arrays for audio."""
    encode: Callable[[Audio], Audio] | None = None
    """Turns the samples of a request into its result; None if the samples are the result."""


class AudioFuture(Future[Any]):
    """A future that refuses to wait without a limit in a callback of its queue, since that thread may have to compute it."""

    waits_for_itself: Callable[[], bool] | None = None
    """True in a thread that runs windows of the queue; set by the queue."""

    def result(self, timeout: float | None = None) -> Any:
        self._check_wait(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._check_wait(timeout)
        return super().exception(timeout)

    def _check_wait(self, timeout: float | None) -> None:
        if timeout is None and not self.done() and self.waits_for_itself is not None and self.waits_for_itself():
            raise BackendError(
                "a callback of this vocoder waits for audio that its own thread may have to compute. Call vocoder(mel), which computes "
                "it here, or add a callback to this future."
            )


class Request:
    """Windows of one utterance that wait, run or are done. `future` ends with the result."""

    kind: str
    """Windows of one kind can share a run: `host` or `device`."""
    result: Any
    """Result of the future."""

    def __init__(self, windows: Iterable[Window], deadline: float) -> None:
        """Prepare a request.

        Args:
            windows: Windows in order and without a gap, from `plan`.
            deadline: Time at which it is due, on `time.monotonic`'s clock.
        """
        self.windows = list(windows)
        self.waiting = 0
        """Number of windows that wait in the queue."""
        self.unfinished = len(self.windows)
        self.keep_start = self.windows[0].keep_start if self.windows else 0
        self.frames_kept = self.windows[-1].keep_stop - self.keep_start if self.windows else 0
        self.deadline = deadline
        self.arrival = time.monotonic()
        self.future = AudioFuture()
        self.ended = False
        """True once result, error or cancellation is decided. Guarded by the queue's lock."""
        self.on_end: Callable[[Request, bool], None] | None = None
        """Called once, with True if the audio is complete, before waiters are woken. Not called for a request without windows."""

    def complete(self) -> None:
        """Make the result of the audio of all windows. Called once, by the thread that ran the last of them."""

    @staticmethod
    def execute(backend: Backend, jobs: Sequence[Job]) -> None:
        """Run windows of one kind, graph and length together, and keep their audio.

        Raises:
            BackendError: The backend failed, or returned samples that are not finite or not of the expected shape.
        """
        raise NotImplementedError


Job = tuple[Request, Window]


class HostRequest(Request):
    """A request for frames on the host."""

    kind = "host"

    def __init__(
        self, frames: Mel, first_frame: int, windows: Iterable[Window], output: OutputFormat, deadline: float, result: Audio | None = None
    ) -> None:
        """Prepare a request.

        Args:
            frames: (M, n) float32. They are not copied, and are read until the future is done.
            first_frame: Index of the first of them in the utterance.
            windows: Windows in order and without a gap, from `plan`.
            output: Format of the audio.
            deadline: Time at which it is due, on `time.monotonic`'s clock.
            result: Where the audio shall be, of the output's format and of as many samples as the windows keep; None for new memory.
        """
        super().__init__(windows, deadline)
        self.frames = frames
        self.first_frame = first_frame
        self.hop = output.hop
        self.result: Audio = output.empty((self.frames_kept * output.hop,), output.sample_format) if result is None else result
        self._output = output
        self.observe: Callable[[], None] | None = None
        """Called once, while the first window runs: a look at the frames that the audio does not wait for."""
        if not self.windows:
            self.complete()

    def complete(self) -> None:
        if self._output.encode is not None:
            self.result = self._output.encode(self.result)

    @staticmethod
    def execute(backend: Backend, jobs: Sequence[Job]) -> None:
        requests = cast(Sequence[tuple[HostRequest, Window]], jobs)
        graph, frames = jobs[0][1].graph, [request._cut(window) for request, window in requests]

        def keep(audio: Audio) -> None:
            for (request, window), samples in zip(requests, audio, strict=True):
                request._keep(window, samples)

        def meanwhile() -> None:
            for request, _ in requests:
                request._observe()

        if hasattr(backend, "run_windows"):
            cast(WindowBackend, backend).run_windows(graph, frames, meanwhile, keep)
            return
        meanwhile()
        audio = backend.run(graph, np.stack(frames))
        _check_audio(backend, audio, (len(jobs), jobs[0][1].frames * requests[0][0].hop))
        keep(audio)

    def _observe(self) -> None:
        observe, self.observe = self.observe, None
        if observe is not None:
            observe()

    def _cut(self, window: Window) -> Mel:
        return self.frames[:, window.start - self.first_frame : window.stop - self.first_frame]

    def _keep(self, window: Window, audio: Audio) -> None:
        """Copy the kept part of a window's audio to its place in the result."""
        source = slice((window.keep_start - window.start) * self.hop, (window.keep_stop - window.start) * self.hop)
        target = slice((window.keep_start - self.keep_start) * self.hop, (window.keep_stop - self.keep_start) * self.hop)
        kept = audio[source]
        if self.result.dtype == np.int16 and kept.dtype != np.int16:
            if self._output.count_clipped and (count := clipped(kept)):
                self._output.count_clipped(count)
            kept = to_int16(kept)
        self.result[target] = kept


class DeviceRequest(Request):
    """A request for an utterance in GPU memory. It is done once its work is queued on the device, in order with the caller's stream."""

    kind = "device"

    def __init__(self, utterance: DeviceUtterance, windows: Iterable[Window], deadline: float) -> None:
        super().__init__(windows, deadline)
        self.utterance = utterance
        self.result = None

    @staticmethod
    def execute(backend: Backend, jobs: Sequence[Job]) -> None:
        requests = cast(Sequence[tuple[DeviceRequest, Window]], jobs)
        cast(DeviceBackend, backend).run_on_device([(request.utterance, window) for request, window in requests])


def _check_audio(backend: Backend, audio: Audio, expected: tuple[int, int]) -> None:
    if audio.shape != expected:
        raise BackendError(f"{backend.name} returned audio of shape {audio.shape} instead of {expected}. Is this the voice's model?")
    if not all_finite(audio):
        raise BackendError(f"{backend.name} returned samples that are not finite. Is {backend.precision} precise enough for this voice?")
