"""A request."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.files.wav import SampleFormat, to_int16
from melrt.planning.windows import Window

Frames = NDArray[np.float32]
Audio = NDArray[Any]


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """What a mel frame becomes."""

    hop: int
    """Samples of audio per frame."""
    sample_format: SampleFormat = "float32"
    """`float32`, or `int16` with full scale 32767."""


class Request:
    """Some windows over some frames, and the audio that they become; `future` ends with it."""

    def __init__(self, frames: Frames, first_frame: int, windows: Iterable[Window], sound: OutputFormat, deadline: float) -> None:
        """Prepare a request.

        Args:
            frames: (M, n) float32; not copied, and read until the future is done.
            first_frame: Index of its first frame in the utterance.
            windows: In order and without a gap, from `plan`.
            sound: What becomes of a frame.
            deadline: When it is due, on `time.monotonic`'s clock.
        """
        self.frames = frames
        self.first_frame = first_frame
        self.waiting = deque(windows)
        self.unfinished = len(self.waiting)
        self.ended = False
        """Result, error or cancellation is decided; guarded by the queue's lock."""
        self.keep_start = self.waiting[0].keep_start if self.waiting else 0
        kept = self.waiting[-1].keep_stop - self.keep_start if self.waiting else 0
        self.hop = sound.hop
        self.audio: Audio = np.empty(kept * sound.hop, sound.sample_format)
        self.deadline = deadline
        self.arrival = time.monotonic()
        self.future: Future[Audio] = Future()
        self.on_end: Callable[[Request, bool], None] | None = None
        """Called once, with whether the audio is complete, before those who wait for the future hear of it; not if there are no windows."""

    def cut(self, window: Window) -> Frames:
        """The window's frames."""
        return self.frames[:, window.start - self.first_frame : window.stop - self.first_frame]

    def keep(self, window: Window, audio: Audio) -> None:
        """Put the kept part of a window's audio in its place."""
        source = slice((window.keep_start - window.start) * self.hop, (window.keep_stop - window.start) * self.hop)
        target = slice((window.keep_start - self.keep_start) * self.hop, (window.keep_stop - self.keep_start) * self.hop)
        kept = audio[source]
        self.audio[target] = to_int16(kept) if self.audio.dtype == np.int16 and kept.dtype != np.int16 else kept
