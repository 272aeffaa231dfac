"""Limits of a vocoder's queue."""

from __future__ import annotations

import time
from dataclasses import dataclass

from melrt.checks import check_fields, flag, number, optional, whole
from melrt.errors import MelError

_MOST = 1 << 40


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the amount of work that a vocoder accepts and on the time that it may take."""

    max_windows: int = 4096
    """Largest number of windows waiting, over all requests; at this number further requests wait or are refused."""
    wait: bool = True
    """True: a caller waits for room in the queue. False: it gets QueueFullError at once."""
    wait_timeout: float | None = None
    """Longest wait for room in seconds, then QueueFullError; None waits without limit."""
    default_deadline: float = 1.0
    """Seconds after arrival at which a request without a deadline is due; the earliest deadline runs first."""
    max_frames: int | None = None
    """Longest utterance in mel frames, whole or as a stream; a longer one is refused with MelError. None for no limit."""
    max_streams: int | None = None
    """Largest number of open streams; a further one is refused with QueueFullError. None for no limit."""
    timeout: float | None = None
    """Longest time from arrival to completion in seconds, then OverdueError, and the request's windows are freed. None for no limit."""

    def __post_init__(self) -> None:
        counts = {"max_windows": whole(1, _MOST), **dict.fromkeys(("max_frames", "max_streams"), optional(whole(1, _MOST)))}
        times = {"timeout": optional(number(0, above=True)), "wait_timeout": optional(number(0))}
        check_fields(self, {"wait": flag(), "default_deadline": number(0), **counts, **times}, "limits")

    def check_frames(self, frames: int) -> None:
        """Raise MelError for an utterance of more than `max_frames` frames."""
        if self.max_frames is not None and frames > self.max_frames:
            raise MelError(f"mel has {frames} frames; at most {self.max_frames} are accepted here. Cut the text into shorter utterances.")

    def room_deadline(self) -> float | None:
        """Return the time until which a caller waits for room; None for no limit."""
        if not self.wait:
            return time.monotonic()
        return None if self.wait_timeout is None else time.monotonic() + self.wait_timeout
