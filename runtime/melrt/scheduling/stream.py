"""Streams: frames in as an acoustic model makes them, audio out as early as it is exact."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from melrt.errors import ClosedError, MelError, QueueFullError
from melrt.mel.level_check import LevelCheck
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt.planning.windows import ReceptiveField, Span, look_back, plan, ready
from melrt.scheduling.queue import RequestQueue
from melrt.scheduling.request import OutputFormat, Request

Audio = NDArray[Any]


@dataclass(frozen=True, slots=True)
class StreamPace:
    """How a stream trades latency for throughput."""

    first: int = 8
    """Frames of the first piece of audio: it is out that many frames, and the look-ahead, after the first frame came."""
    growth: float = 2.0
    """Each piece waits for this many times the frames of the last, until a window is full."""

    def __post_init__(self) -> None:
        if self.first < 1 or self.growth < 1:
            raise MelError(f"{self}: first is at least 1 frame, growth at least 1.")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Synthesis:
    """What utterances and streams of a voice are computed with."""

    spec: MelSpec
    """The mel convention."""
    sound: OutputFormat
    """What a frame becomes."""
    field: ReceptiveField
    """What the network needs around a frame."""
    edges: Edges
    """How the ends of an utterance are treated."""
    inflight: RequestQueue
    """The queue."""
    mel_check: LevelCheck
    """Warns of mels of another convention."""


class Stream:
    """One utterance, frames coming in and audio going out; its audio, joined, is what `vocoder(mel)` gives. For one thread."""

    def __init__(self, synthesis: Synthesis, pace: StreamPace) -> None:
        self._synthesis = synthesis
        self._edges = synthesis.edges
        self._size = float(pace.first)
        self._growth = pace.growth
        self._frames = np.empty((synthesis.spec.n_mels, 0), np.float32)
        self._base = 0  # index of the first frame that is still held
        self._received = 0
        self._done = self._edges.left  # frames, of the utterance with its extension, whose audio is out
        self._stop: int | None = None  # where the utterance ends, once it has
        self._closed = False
        self._playing_until: float | None = None

    def push(self, frames: ArrayLike) -> Audio:
        """Take frames, and give the audio that is ready (often none, and then more at once).

        Args:
            frames: (M, n) log-mel frames, n may be 0 or 1.

        Returns:
            Samples, shape (k * hop,), that follow those given before.

        Raises:
            MelError: Wrong number of bands, or a value that is not finite; the stream goes on without these frames.
            QueueFullError: No room now; the frames are kept, and a later push gives their audio too.
            ClosedError: After `flush`, `close`, or an error of the backend.
        """
        return self._wait(self.submit(frames))

    def flush(self) -> Audio:
        """End the utterance, and give the rest of its audio; empty if no frame ever came.

        Raises:
            MelError: Fewer frames came than the network takes.
        """
        return self._wait(self._submit(self._end()))

    async def push_async(self, frames: ArrayLike) -> Audio:
        """As `push`, for a task; cancelling it frees its windows, and ends the stream."""
        return await self._submit_async(self._accept(frames))

    async def flush_async(self) -> Audio:
        """As `flush`, for a task."""
        return await self._submit_async(self._end())

    def submit(self, frames: ArrayLike) -> Future[Audio]:
        """As `push`, for callers that wait in their own way; the next call only after this one's future is done."""
        return self._submit(self._accept(frames))

    @property
    def closed(self) -> bool:
        """Whether it gives no more audio: flushed, closed or failed."""
        return self._closed

    def close(self) -> None:
        """Drop what is held; for an utterance that nobody listens to any more."""
        self._closed = True
        self._frames = np.empty((len(self._frames), 0), np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, frames: ArrayLike) -> Request:
        """Take frames; the request for what is ready now, which may be nothing."""
        self._check_open()
        if self._stop is not None:
            raise ClosedError("the stream is being flushed; flush again for the rest of its audio.")
        mel = self._synthesis.spec.check_frames(frames)
        self._synthesis.inflight.limits.check_frames(self._received + mel.shape[1])
        self._synthesis.mel_check.look(mel)
        if mel.shape[1] and not self._received:
            mel = np.concatenate([self._edges.before(mel), mel], axis=1)
        self._hold(mel)
        until = ready(self._received, False, self._synthesis.field)
        return self._request(until if until - self._done >= self._size else self._done, ended=False)

    def _end(self) -> Request:
        """Take no more frames; the request for the rest."""
        self._check_open()
        if self._stop is None:
            self._stop = self._received
            if self._received:
                self._hold(self._edges.after(self._frames))
        if 0 < self._received < self._synthesis.field.smallest_input:
            self._closed = True
            raise self._synthesis.spec.too_short(self._received, self._synthesis.field.smallest_input)
        return self._request(self._stop, ended=True)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the stream has ended; open another for another utterance.")

    def _hold(self, mel: NDArray[np.float32]) -> None:
        """Keep new frames, and of the old ones only those that a later window may still look back to."""
        keep_from = max(self._done - look_back(self._synthesis.field, self._synthesis.inflight.policy), self._base)
        self._frames = np.concatenate([self._frames[:, keep_from - self._base :], mel], axis=1)
        self._base = keep_from
        self._received += mel.shape[1]

    def _request(self, stop: int, *, ended: bool) -> Request:
        windows = plan(Span(self._done, stop, self._received, ended), self._synthesis.field, self._synthesis.inflight.policy)
        deadline = self._playing_until or time.monotonic()
        request = Request(self._frames, self._base, windows, self._synthesis.sound, deadline)
        request.on_end = self._heard
        return request

    def _submit(self, request: Request) -> Future[Audio]:
        self._synthesis.inflight.submit(request)
        return self._sent(request)

    async def _submit_async(self, request: Request) -> Audio:
        await self._synthesis.inflight.submit_async(request)
        try:
            return await asyncio.wrap_future(self._sent(request))
        except BaseException:
            self._closed = True  # cancelled or failed: what was lost leaves a gap
            raise

    def _sent(self, request: Request) -> Future[Audio]:
        """The request was let in: what it covers will be out."""
        frames = len(request.audio) // self._synthesis.spec.hop
        if frames:
            self._done += frames
            self._size = min(self._size * self._growth, self._synthesis.inflight.policy.frames)
        self._closed = self._closed or self._stop is not None
        return request.future

    def _heard(self, request: Request, completed: bool) -> None:
        """Keep the listener's clock: from the first audio on, playback goes on without a break until what was given is played."""
        if not completed:
            self._closed = True  # what was lost leaves a gap
            return
        now = time.monotonic()
        if self._playing_until is not None and now > self._playing_until:
            self._synthesis.inflight.count_underrun()
        self._playing_until = max(self._playing_until or now, now) + len(request.audio) / self._synthesis.spec.sample_rate

    def _wait(self, future: Future[Audio]) -> Audio:
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupted caller takes its windows along
            self._closed = True
            raise


class OpenStreams:
    """The streams that are open; one that its owner dropped is open no more."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, opened: Stream) -> Stream:
        """Count a stream in.

        Raises:
            QueueFullError: As many as the limit are open.
        """
        with self._lock:
            if self._limit is not None and self._count() >= self._limit:
                raise QueueFullError(f"{self._limit} streams are open, which is the limit; try again later, or raise Limits.max_streams.")
            self._streams.add(opened)
        return opened

    def __len__(self) -> int:
        with self._lock:
            return self._count()

    def _count(self) -> int:
        """Open streams; what has ended is forgotten. Holds the lock."""
        for ended in [stream for stream in self._streams if stream.closed]:
            self._streams.discard(ended)
        return len(self._streams)


def stream(source: Iterable[ArrayLike], opened: Stream) -> Iterator[Audio]:
    """Audio of an iterable of frames, piece by piece, without empty pieces."""
    with opened:
        for frames in source:
            if (audio := opened.push(frames)).size:
                yield audio
        if (audio := opened.flush()).size:
            yield audio


async def stream_async(source: AsyncIterable[ArrayLike] | Iterable[ArrayLike], opened: Stream) -> AsyncIterator[Audio]:
    """As `stream`, without blocking the event loop; cancelling the task frees its windows."""
    with opened:
        async for frames in _each(source):
            if (audio := await opened.push_async(frames)).size:
                yield audio
        if (audio := await opened.flush_async()).size:
            yield audio


async def _each(source: AsyncIterable[ArrayLike] | Iterable[ArrayLike]) -> AsyncIterator[ArrayLike]:
    if isinstance(source, AsyncIterable):
        async for frames in source:
            yield frames
    else:
        for frames in source:
            yield frames
