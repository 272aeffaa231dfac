"""Streams: an acoustic model pushes frames, and audio comes out as early as it is exact."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from melrt.checks import check_fields, number, whole
from melrt.errors import ClosedError, QueueFullError
from melrt.files.output import Output
from melrt.planning.windows import Span, longest_piece, look_back, piece, plan, ready
from melrt.scheduling.request import HostRequest, Request
from melrt.scheduling.synthesizer import Synthesizer
from melrt.types import Audio, Mel

_MOST_FRAMES = 65_536


@dataclass(frozen=True, slots=True)
class StreamPace:
    """Trade-off of a stream between latency and throughput."""

    first: int = 8
    """Frames of the first piece of audio. It is ready once these frames and the look-ahead have arrived."""
    growth: float = 2.0
    """Factor by which the pieces grow, until a window is full."""

    def __post_init__(self) -> None:
        check_fields(self, {"first": whole(1, _MOST_FRAMES), "growth": number(1)}, "stream pace")


class Stream:
    """One utterance: frames go in, audio comes out. Its pieces, joined, equal `vocoder(mel)`. For use by one thread."""

    def __init__(self, synthesizer: Synthesizer, pace: StreamPace, output: Output | None = None) -> None:
        if output is not None:
            output.check(synthesizer.spec.sample_rate, streamed=True)
        self._synthesizer = synthesizer
        self._encoder = synthesizer.encoder(output)
        self._queue = synthesizer.queue
        self._edges = synthesizer.edges
        self._size = float(pace.first)
        self._growth = pace.growth
        self._frame_seconds = synthesizer.spec.hop / synthesizer.spec.sample_rate
        self._frames: Mel = np.empty((synthesizer.spec.n_mels, 0), np.float32)
        self._base = 0  # index of the first frame that is still held
        self._received = 0
        self._done = self._edges.left  # frames of the extended utterance whose audio has been requested
        self._stop: int | None = None  # end of the utterance, once it is known
        self._closed = False
        self._playback_end: float | None = None

    def push(self, frames: ArrayLike) -> Audio:
        """Add frames, and return the audio that is ready: often none, then several frames' worth at once.

        Args:
            frames: Log-mel frames (M, n); n may be 0 or 1.

        Returns:
            Samples, shape (k*hop,), that follow those returned before; with an output, samples of its rate and encoding.

        Raises:
            MelError: Wrong number of bands, a value that is not finite, or more frames than `Limits.max_frames`; the stream continues
                without these frames.
            QueueFullError: The queue has no room; the frames are kept, and a later push returns their audio too.
            ClosedError: The stream was flushed or closed, or the backend failed.
        """
        return self._wait(self._submit(self._accept(frames), run_here=True))

    def flush(self) -> Audio:
        """End the utterance and return the rest of its audio; empty if there were no frames.

        Raises:
            MelError: Fewer frames came than the network takes.
        """
        return self._wait(self._submit(self._end(), run_here=True))

    async def push_async(self, frames: ArrayLike) -> Audio:
        """Add frames like `push`, without blocking the event loop. Cancelling the task frees the windows and ends the stream."""
        return await self._submit_async(self._accept(frames))

    async def flush_async(self) -> Audio:
        """End the utterance like `flush`, without blocking the event loop."""
        return await self._submit_async(self._end())

    def submit(self, frames: ArrayLike) -> Future[Audio]:
        """Add frames like `push`, and return a future. The next call must wait until this future is done."""
        return self._submit(self._accept(frames))

    @property
    def closed(self) -> bool:
        """True once the stream returns no more audio: flushed, closed or failed."""
        return self._closed

    def close(self) -> None:
        """Discard the held frames. Use it when the client is gone."""
        self._closed = True
        self._frames = np.empty((len(self._frames), 0), np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, frames: ArrayLike) -> HostRequest:
        """Add frames, and make the request for the frames that are ready, which may be none."""
        self._synthesizer.check_call(frames, self._received)
        self._check_open()
        if self._stop is not None:
            raise ClosedError("the stream is being flushed; flush again for the rest of its audio.")
        mel = self._synthesizer.spec.check_frames(frames)
        self._queue.limits.check_frames(self._received + mel.shape[1])
        self._synthesizer.level_check.observe(mel)
        if mel.shape[1] and not self._received:
            mel = np.concatenate([self._edges.before(mel), mel], axis=1)
        self._append(mel)
        field = self._synthesizer.field
        available = max(ready(self._received, False, field) - self._done, 0)
        return self._request(self._done + piece(available, self._size, field, self._queue.policy), ended=False)

    def _end(self) -> HostRequest:
        """Accept no more frames, and make the request for the rest."""
        self._check_open()
        if self._stop is None:
            self._stop = self._received
            if self._received:
                self._append(self._edges.after(self._frames))
        smallest = self._synthesizer.field.smallest_input
        if 0 < self._received < smallest:
            self._closed = True
            raise self._synthesizer.spec.too_short(self._received, smallest)
        return self._request(self._stop, ended=True)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the stream has ended; open another for another utterance.")

    def _append(self, mel: Mel) -> None:
        """Append new frames, and of the old ones keep only those that a later window may begin with."""
        keep_from = max(self._done - look_back(self._synthesizer.field, self._queue.policy), self._base)
        self._frames = np.concatenate([self._frames[:, keep_from - self._base :], mel], axis=1)
        self._base = keep_from
        self._received += mel.shape[1]

    def _request(self, stop: int, *, ended: bool) -> HostRequest:
        windows = plan(Span(self._done, stop, self._received, ended), self._synthesizer.field, self._queue.policy)
        deadline = self._playback_end or time.monotonic()
        output = self._synthesizer.output
        if self._encoder:
            output = replace(output, encode=partial(self._encoder, last=ended))
        request = HostRequest(self._frames, self._base, windows, output, deadline)
        request.on_end = self._update_playback
        return request

    def _submit(self, request: HostRequest, *, run_here: bool = False) -> Future[Audio]:
        self._queue.submit(request, run_here=run_here)
        return self._admitted(request)

    async def _submit_async(self, request: HostRequest) -> Audio:
        await self._queue.submit_async(request)
        try:
            return await asyncio.wrap_future(self._admitted(request))
        except BaseException:
            self._closed = True  # after a cancellation or failure the lost audio would leave a gap
            raise

    def _admitted(self, request: HostRequest) -> Future[Audio]:
        """Advance past the frames of a request that the queue admitted."""
        if request.frames_kept:
            self._done += request.frames_kept
            self._size = min(self._size * self._growth, longest_piece(self._synthesizer.field, self._queue.policy))
        self._closed = self._closed or self._stop is not None
        return request.future

    def _update_playback(self, request: Request, completed: bool) -> None:
        """Track the end of playback: it starts with the first audio and continues until all that was returned has been played."""
        if not completed:
            self._closed = True  # the lost audio would leave a gap
            return
        now = time.monotonic()
        if self._playback_end is not None and now > self._playback_end:
            self._queue.count_underrun()
        self._playback_end = max(self._playback_end or now, now) + request.frames_kept * self._frame_seconds

    def _wait(self, future: Future[Audio]) -> Audio:
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupted caller frees its windows
            self._closed = True
            raise


class OpenStreams:
    """The streams that are open. A stream that its owner dropped no longer counts."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, opened: Stream) -> Stream:
        """Count a stream.

        Raises:
            QueueFullError: The limit is reached.
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
        """Drop the streams that have ended, and count the others. The caller holds the lock."""
        for ended in [stream for stream in self._streams if stream.closed]:
            self._streams.discard(ended)
        return len(self._streams)


def stream(source: Iterable[ArrayLike], opened: Stream) -> Iterator[Audio]:
    """Yield the audio of an iterable of frames, without empty pieces."""
    with opened:
        for frames in source:
            if (audio := opened.push(frames)).size:
                yield audio
        if (audio := opened.flush()).size:
            yield audio


async def stream_async(source: AsyncIterable[ArrayLike] | Iterable[ArrayLike], opened: Stream) -> AsyncIterator[Audio]:
    """Yield audio like `stream`, without blocking the event loop. Cancelling the task frees its windows."""
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
