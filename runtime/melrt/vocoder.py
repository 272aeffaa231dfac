"""The vocoder: mel frames in, waveform out; whole utterances, batches and streams."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from melrt.backends.base import Backend
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.checks import check_fields, one_of
from melrt.errors import MelError
from melrt.files.audio import SAMPLE_FORMATS, SampleFormat
from melrt.files.output import Output
from melrt.mel.level_check import LevelCheck
from melrt.mel.spec import MelSpec
from melrt.planning.edges import ENDS, Edges, Ends
from melrt.planning.windows import Policy, ReceptiveField
from melrt.scheduling.limits import Limits
from melrt.scheduling.memory import RESULT_BYTES, ResultMemory
from melrt.scheduling.policy_tuning import recorded_policy
from melrt.scheduling.queue import CLOSE_TIMEOUT, RequestQueue
from melrt.scheduling.request import OutputFormat, Request
from melrt.scheduling.stats import Stats
from melrt.scheduling.stream import OpenStreams, Stream, StreamPace, stream, stream_async
from melrt.scheduling.synthesizer import Synthesizer
from melrt.scheduling.workers import Workers
from melrt.types import Audio


@dataclass(frozen=True, slots=True)
class Options:
    """Windows, queue, ends of utterances, streams and output of a vocoder."""

    policy: Policy | None = None
    """Windows; None for those that `melrt tune` recorded for this machine, or else the backend's default."""
    limits: Limits = field(default_factory=Limits)
    """Limits of the queue."""
    edges: Edges | Ends = "model"
    """Ends of an utterance: `model` adds no frames, as in PyTorch; `voice` adds those of the voice's project; or `Edges`."""
    pace: StreamPace = field(default_factory=StreamPace)
    """Pace of streams."""
    sample_format: SampleFormat = "float32"
    """Format of the audio: `float32`, or `int16` with full scale 32767, converted on the GPU if there is one."""

    def __post_init__(self) -> None:
        check_fields(self, {"sample_format": one_of(*SAMPLE_FORMATS)}, "options")
        if not isinstance(self.edges, Edges):
            check_fields(self, {"edges": ENDS}, "options")


class Vocoder:
    """A loaded voice. Every method is safe to call from several threads; all calls share the backend's runs."""

    def __init__(self, bundle: Bundle, backend: Backend, options: Options | None = None, workers: Workers | None = None) -> None:
        """Make a vocoder of an opened backend; `Vocoder.load` opens the best one.

        Args:
            bundle: The voice.
            backend: Backend with the voice's graphs. It belongs to the vocoder, and is closed with it.
            options: Windows, queue, ends of utterances and streams.
            workers: Workers of the device, which other vocoders may use too; None for workers of its own.
        """
        self.bundle = bundle
        self.backend = backend
        self.options = options or Options()
        manifest = bundle.manifest
        policy = self.options.policy or recorded_policy(bundle, backend) or backend.policy
        policy.check(manifest.receptive_field)
        queue = RequestQueue(backend, policy, self.options.limits, workers)
        beside = hasattr(backend, "run_windows")  # a processor computes audio so slowly that new memory costs nothing beside it
        self._memory = ResultMemory(RESULT_BYTES if beside else 0)
        self._synthesizer = Synthesizer(
            spec=manifest.spec,
            output=OutputFormat(manifest.spec.hop, self.options.sample_format, queue.count_clipped, self._memory.empty),
            field=manifest.receptive_field,
            edges=manifest.choose_edges(self.options.edges),
            queue=queue,
            level_check=LevelCheck(manifest.spec, manifest.levels, manifest.normalization),
        )
        self._streams = OpenStreams(self.options.limits.max_streams)
        # The vocoder and its streams refer to the synthesizer, the workers do not: once all of them are dropped and their requests
        # are done, the workers end.
        weakref.finalize(self._synthesizer, self.queue.stop, drain=True)

    @classmethod
    def load(  # noqa: PLR0913  # each is one choice, by keyword
        cls,
        bundle: Bundle | str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        options: Options | None = None,
        trust: bool = False,
    ) -> Self:
        """Load the best artifact of a bundle that this machine can run.

        Args:
            bundle: A voice.melrt folder.
            device: `cuda` (the first GPU), `cuda:1`, `cpu`, or `auto`: CUDA if it works, otherwise the CPU.
            precision: `fp32`, `fp16`, `bf16`, `int8`, or `auto`: the fastest that keeps the voice's quality on the device.
            backend: `tensorrt`, `fused`, `onnxruntime`, `openvino`, or `auto`: a TensorRT engine if the bundle has one for this GPU,
                then a fused engine on compute capability 9.0.
            threads: CPU threads in all; one per usable core if None.
            options: Windows, queue, ends of utterances and streams.
            trust: Open TensorRT engines that neither this user nor a key in `MELRT_TRUSTED_KEYS` vouches for. Engines are executable code.

        Raises:
            BundleError: The bundle is missing, damaged, or newer than this melrt.
            BackendError: The requested device, precision or backend cannot run here; the text gives the reason.
            ConfigError: An argument is not one of the values above.
        """
        options = options or Options()
        choice = BackendChoice(device, precision, backend, threads, options.sample_format, trust)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        return cls(bundle, open_backend(bundle, choice), options)

    @property
    def spec(self) -> MelSpec:
        """Mel convention of the input."""
        return self.bundle.manifest.spec

    @property
    def sample_rate(self) -> int:
        """Sample rate of the output in Hz."""
        return self.spec.sample_rate

    @property
    def edges(self) -> Edges:
        """Frames added at an utterance's ends."""
        return self._synthesizer.edges

    @property
    def field(self) -> ReceptiveField:
        """Receptive field of the network."""
        return self._synthesizer.field

    @property
    def queue(self) -> RequestQueue:
        """Queue that batches the windows of all calls."""
        return self._synthesizer.queue

    @property
    def policy(self) -> Policy:
        """Windows that the backend runs."""
        return self.queue.policy

    def __repr__(self) -> str:
        backend = self.backend
        return f"<Vocoder {self.bundle.manifest.name}: {backend.name} {backend.precision} on {backend.device}, {self.spec.describe()}>"

    def __call__(self, mel: ArrayLike, output: Output | None = None) -> Audio:
        """Turn log-mel frames into a waveform.

        Args:
            mel: Log-mel frames in this voice's convention (`self.spec`), shape (M, T) or (B, M, T). A vocoder that runs TensorRT engines
                also takes float32 arrays in its GPU's memory (PyTorch, CuPy, PyCUDA, Numba) and reads them there.
            output: Sample rate and encoding of the audio, `Output(8000, "mulaw")`; None for the voice's own.

        Returns:
            Samples in [-1, 1], shape (N,) or (B, N), N = T*hop. A fresh numpy array. For an array in GPU memory it is a fresh array of the
            same library, in order with the work on that library's current stream; it is not waited for.

        Raises:
            MelError: Wrong number of bands, too few or too many frames, or a value that is not finite (not checked in GPU memory).
            ConfigError: The output is not possible for this voice or this mel.
            OverdueError: The audio was not done within `Limits.timeout`.
            QueueFullError: The queue is full, and the limits say not to wait (longer).
            BackendError: The backend failed.
        """
        requests, audio = self._synthesizer.utterances(mel, output)
        futures = [self.queue.submit(requests[0], run_here=True)] if len(requests) == 1 else self.queue.submit_all(requests)
        try:
            pieces = [future.result() for future in futures]
        finally:
            for future in futures:  # an interrupted wait, or a request that failed, must not leave others queued
                future.cancel()
        if audio is None:
            return pieces[0] if np.ndim(mel) == 2 else np.stack(pieces)
        return audio  # type: ignore[no-any-return]  # an array of the caller's library

    def batch(self, mels: Iterable[ArrayLike], output: Output | None = None) -> Iterator[Audio]:
        """Turn utterances of any lengths into waveforms, in order. Their windows share runs without padding.

        Args:
            mels: Utterances (M, T) on the host. A generator is read only as far ahead as keeps the backend busy.
            output: Sample rate and encoding of the audio; None for the voice's own.

        Raises:
            MelError: An utterance does not fit this voice. The error names its index and comes after the audio of the earlier ones;
                later ones are not read.
        """
        if isinstance(mels, np.ndarray) and mels.ndim != 3:
            raise MelError(f"batch takes an iterable of utterances (bands, frames); it got one array of shape {mels.shape}.")
        self._synthesizer.encoder(output)  # an output that is not possible is refused before anything is synthesized
        return self._in_order(self._submitted(mels, output, self.policy.batch if isinstance(mels, Sequence | np.ndarray) else 1))

    def submit(self, mel: ArrayLike, output: Output | None = None) -> Future[Audio]:
        """Queue one utterance (M, T) and return a future to wait for, to await (`asyncio.wrap_future`) or to cancel.

        Raises:
            MelError: The utterance does not fit this voice.
            QueueFullError: The queue is full, and the limits say not to wait (longer).
        """
        return self.queue.submit(self._synthesizer.utterance(self._synthesizer.owned_frames(mel), output))

    async def call_async(self, mel: ArrayLike, output: Output | None = None) -> Audio:
        """Turn one utterance (M, T) into a waveform without blocking the event loop. Cancelling the task frees its windows."""
        request = self._synthesizer.utterance(self._synthesizer.owned_frames(mel), output)
        audio: Audio = await asyncio.wrap_future(await self.queue.submit_async(request))
        return audio

    def open_stream(self, pace: StreamPace | None = None, output: Output | None = None) -> Stream:
        """Open a stream for one utterance: `push(frames)` returns audio as early as it is exact, `flush()` returns the rest.

        Raises:
            QueueFullError: `Limits.max_streams` streams are open.
            ConfigError: The output is not possible for this voice, or only for a whole utterance.
        """
        self.queue.check_process()
        return self._streams.add(Stream(self._synthesizer, pace or self.options.pace, output))

    @property
    def open_streams(self) -> int:
        """Number of open streams."""
        self.queue.check_process()
        return len(self._streams)

    def stream(self, source: Iterable[ArrayLike], pace: StreamPace | None = None, output: Output | None = None) -> Iterator[Audio]:
        """Turn an iterable of frames (M, n) into audio, piece by piece."""
        return stream(source, self.open_stream(pace, output))

    def stream_async(
        self, source: AsyncIterable[ArrayLike] | Iterable[ArrayLike], pace: StreamPace | None = None, output: Output | None = None
    ) -> AsyncIterator[Audio]:
        """Turn frames into audio like `stream`, for `async for`. Cancelling the task frees its windows."""
        return stream_async(source, self.open_stream(pace, output))

    def stats(self) -> Stats:
        """Return counters for a service's monitoring."""
        return self.queue.stats()

    def close(self, *, drain: bool = True, timeout: float = CLOSE_TIMEOUT) -> None:
        """Close the vocoder: after the queue is empty, or (not `drain`) with ClosedError for the requests that wait.

        Args:
            drain: Complete the waiting requests first.
            timeout: Longest wait in seconds for the end of any one run of the backend.

        Raises:
            BackendError: No run ended for `timeout` seconds. Every request has ended with this error; the memory is not freed.
        """
        self.queue.close(drain=drain, timeout=timeout)
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submitted(self, mels: Iterable[ArrayLike], output: Output | None, together: int) -> Iterator[list[Future[Any]]]:
        """Yield futures of utterances, submitted together; the first one that is refused has its error, and is the last."""
        requests: list[Request] = []
        for index, mel in enumerate(mels):
            try:
                requests.append(self._synthesizer.utterance(self._synthesizer.owned_frames(mel), output))
            except MelError as error:
                refused: Future[Any] = Future()
                refused.set_exception(MelError(f"utterance {index}: {error}"))
                yield [*self.queue.submit_all(requests), refused]
                return
            if len(requests) == together:
                yield self.queue.submit_all(requests)
                requests = []
        yield self.queue.submit_all(requests)

    def _in_order(self, groups: Iterable[list[Future[Any]]]) -> Iterator[Any]:
        """Yield the results of lazily submitted futures, submitting only as far ahead as keeps the backend busy."""
        ahead = 2 * self.policy.workers * self.policy.batch
        pending: deque[Future[Any]] = deque()
        try:
            for futures in groups:
                pending.extend(futures)
                while len(pending) > ahead:
                    yield pending[0].result()  # removed afterwards: an interrupted wait must not leave it queued
                    pending.popleft()
            while pending:
                yield pending[0].result()
                pending.popleft()
        finally:
            for future in pending:  # the caller stopped, or one failed
                future.cancel()
