"""The vocoder: mel frames in, waveform out, whole, in batches and as a stream."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from melrt.backends.base import Backend, DeviceBackend
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.errors import AudioError, MelError
from melrt.files.wav import SAMPLE_FORMATS, SampleFormat
from melrt.mel.arrays import on_gpu
from melrt.mel.level_check import LevelCheck
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt.planning.windows import Policy, Span, plan
from melrt.scheduling.limits import Limits
from melrt.scheduling.policy_tuning import recorded
from melrt.scheduling.queue import RequestQueue
from melrt.scheduling.request import OutputFormat, Request
from melrt.scheduling.stats import Stats
from melrt.scheduling.stream import OpenStreams, Stream, StreamPace, Synthesis, stream, stream_async

Audio = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Options:
    """How a vocoder cuts, queues and paces; what is left out is the backend's or melrt's own choice."""

    policy: Policy | None = None
    """Windows; if None what `melrt tune` recorded for this machine, or else the backend's own policy."""
    limits: Limits = field(default_factory=Limits)
    """Of the queue."""
    edges: Edges = field(default_factory=Edges)
    """The ends of an utterance: as PyTorch's forward has them by default; `bundle.manifest.edges` is the habit of the voice's project."""
    pace: StreamPace = field(default_factory=StreamPace)
    """Of streams."""
    sample_format: SampleFormat = "float32"
    """What a vocoder gives: `float32`, or `int16` with full scale 32767, converted on the GPU where there is one."""

    def __post_init__(self) -> None:
        if self.sample_format not in SAMPLE_FORMATS:
            raise AudioError(f"sample format is {self.sample_format!r}; it is one of {', '.join(SAMPLE_FORMATS)}.")


class Vocoder:
    """A voice, loaded. Every call is safe from several threads, and their work shares the backend's runs."""

    def __init__(self, bundle: Bundle, backend: Backend, options: Options | None = None) -> None:
        self.bundle = bundle
        self.backend = backend
        self.options = options or Options()
        manifest = bundle.manifest
        self.field = manifest.receptive_field
        self.policy = self.options.policy or recorded(bundle, backend) or backend.policy
        self.policy.check(self.field)
        self.inflight = RequestQueue(backend, self.policy, self.options.limits)
        self._sound = OutputFormat(manifest.spec.hop, self.options.sample_format)
        mel_check = LevelCheck(manifest.spec, manifest.levels, manifest.normalization)
        self._synthesis = Synthesis(manifest.spec, self._sound, self.field, self.options.edges, self.inflight, mel_check)
        self._streams = OpenStreams(self.options.limits.max_streams)
        # The vocoder and its streams hold on to this, the workers do not: once all of them are dropped, and what was asked of them
        # is done, the workers go.
        weakref.finalize(self._synthesis, self.inflight.stop, drain=True)

    @classmethod
    def load(
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        options: Options | None = None,
    ) -> Self:
        """Load the best artifact of a bundle that this machine can run.

        Args:
            bundle: A voice.melrt folder.
            device: `cuda` (the first), `cuda:1`, `cpu`, or `auto`: CUDA if it works, else the CPU.
            precision: `fp32`, `fp16`, `int8`, or `auto`: the fastest that keeps the voice's quality on the device.
            backend: `tensorrt`, `onnxruntime`, or `auto`: an engine if the bundle has one for this GPU.
            threads: CPU threads in all; one per usable core if None.
            options: Windows, queue, ends and streams.

        Raises:
            BundleError: The bundle is missing, damaged or too new.
            BackendError: What was asked for cannot run here; the text says why.
        """
        options = options or Options()
        choice = BackendChoice(device, precision, backend, threads, options.sample_format)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(bundle, open_backend(bundle, choice), options)

    @property
    def spec(self) -> MelSpec:
        """The mel convention of the input."""
        return self.bundle.manifest.spec

    @property
    def sample_rate(self) -> int:
        """Of the output, Hz."""
        return self.spec.sample_rate

    @property
    def edges(self) -> Edges:
        """How the ends of an utterance are treated."""
        return self.options.edges

    def __call__(self, mel: ArrayLike) -> Audio:
        """Turn log-mel frames into a waveform.

        Args:
            mel: Log-mel frames in this voice's convention (`self.spec`), shape (M, T) or (B, M, T). An engine also takes float32 arrays
                on its GPU (PyTorch, CuPy, PyCUDA, Numba) and reads them there.

        Returns:
            Samples in [-1, 1], shape (N,) or (B, N), N = T * hop. A fresh numpy array; for an array on a GPU a fresh one of its kind there,
            in order with the work on its library's current stream, and not waited for.

        Raises:
            MelError: Wrong number of bands, too few or too many frames, or a value that is not finite (on a GPU that is not looked for).
            OverdueError: It was not done within `Limits.timeout`.
            BackendError: The backend failed.
        """
        if on_gpu(mel) and isinstance(self.backend, DeviceBackend):
            self.options.limits.check_frames(cast(Any, mel).shape[-1])
            audio = self.backend.speak(mel, self.spec, self.field, self.edges, self.policy)
            return cast(Audio, audio)  # of the caller's kind; in most programs numpy arrays go in and out
        frames = self.spec.check(mel, self._fewest())
        utterances = frames.reshape(-1, *frames.shape[-2:])
        pieces = list(self._in_order(self.inflight.submit(self._request(one)) for one in utterances))
        return pieces[0] if frames.ndim == 2 else np.stack(pieces)

    def batch(self, mels: Iterable[ArrayLike]) -> Iterator[Audio]:
        """Utterances of any lengths, in order; their windows share runs without padding.

        Args:
            mels: (M, T) each; a generator is read only as far ahead as keeps the backend busy.

        Raises:
            MelError: As for a call; it gives the utterance's index, and comes after the audio of those before it. None after it is read.
        """
        return self._in_order(self._submitted(mels))

    def submit(self, mel: ArrayLike) -> Future[Audio]:
        """As a call with (M, T), without waiting: a future to wait for, await (`asyncio.wrap_future`) or cancel.

        Raises:
            MelError: As for a call.
            QueueFullError: The queue is full, and `Limits.wait` is false.
        """
        return self.inflight.submit(self._request(self._own(mel)))

    async def call_async(self, mel: ArrayLike) -> Audio:
        """As a call with (M, T), for a task: it waits, the event loop does not; cancelling it frees its windows."""
        return await asyncio.wrap_future(await self.inflight.submit_async(self._request(self._own(mel))))

    def open_stream(self, pace: StreamPace | None = None) -> Stream:
        """Open a stream for one utterance: `push(frames)` gives audio as early as it is exact, `flush()` the rest.

        Raises:
            QueueFullError: As many streams as `Limits.max_streams` are open.
        """
        return self._streams.add(Stream(self._synthesis, pace or self.options.pace))

    @property
    def open_streams(self) -> int:
        """Streams that are open now."""
        return len(self._streams)

    def stream(self, source: Iterable[ArrayLike], pace: StreamPace | None = None) -> Iterator[Audio]:
        """Audio of an iterable of frames (M, n), piece by piece."""
        return stream(source, self.open_stream(pace))

    def stream_async(self, source: AsyncIterable[ArrayLike] | Iterable[ArrayLike], pace: StreamPace | None = None) -> AsyncIterator[Audio]:
        """As `stream`, for `async for`; cancelling the task frees its windows."""
        return stream_async(source, self.open_stream(pace))

    def stats(self) -> Stats:
        """Counters for a service to scrape."""
        return self.inflight.stats()

    def close(self, *, drain: bool = True) -> None:
        """End the vocoder: after what is queued is done, or (not `drain`) with ClosedError for it."""
        self.inflight.close(drain=drain)
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own(self, mel: ArrayLike) -> NDArray[np.float32]:
        """Checked frames of one utterance, in memory of our own: the caller may refill its array while its windows wait."""
        frames = self.spec.check(mel, self._fewest())
        if frames.ndim != 2:
            raise self.spec.wrong_axes(frames.shape)
        return frames.copy() if np.may_share_memory(frames, np.asarray(mel)) else frames

    def _request(self, frames: NDArray[np.float32]) -> Request:
        self.options.limits.check_frames(frames.shape[1])
        self._synthesis.mel_check.look(frames)
        edges = self.edges
        extended = edges.extend(frames)
        total = extended.shape[1]
        windows = plan(Span(edges.left, total - edges.right, total, ended=True), self.field, self.policy)
        return Request(extended, 0, windows, self._sound, time.monotonic() + self.options.limits.default_deadline)

    def _fewest(self) -> int:
        return max(self.field.smallest_input - self.edges.left - self.edges.right, 1)

    def _submitted(self, mels: Iterable[ArrayLike]) -> Iterator[Future[Audio]]:
        """A future for each utterance; the first refused one has its error, and is the last."""
        for index, mel in enumerate(mels):
            try:
                request = self._request(self._own(mel))
            except MelError as error:
                refused: Future[Audio] = Future()
                refused.set_exception(MelError(f"utterance {index}: {error}"))
                yield refused
                return
            yield self.inflight.submit(request)

    def _in_order(self, futures: Iterable[Future[Audio]]) -> Iterator[Audio]:
        """What lazily submitted futures give, submitting only as far ahead as keeps the backend busy."""
        ahead = 2 * self.policy.workers * self.policy.batch
        pending: deque[Future[Audio]] = deque()
        try:
            for future in futures:
                pending.append(future)
                if len(pending) > ahead:
                    yield pending[0].result()  # taken out afterwards: an interrupted wait must not leave it queued
                    pending.popleft()
            while pending:
                yield pending[0].result()
                pending.popleft()
        finally:
            for future in pending:  # the caller has gone, or one failed
                future.cancel()
