"""Limits of a service."""

from __future__ import annotations

from dataclasses import dataclass

from melrt.errors import BackendError, MelError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a service lets in, and how long it holds windows back."""

    max_windows: int = 4096
    """Windows waiting, of all requests; while they are as many, a further request is refused or waits."""
    wait: bool = True
    """A caller waits for room in the queue; else it gets QueueFullError at once."""
    wait_timeout: float | None = None
    """Longest wait for room, seconds; then QueueFullError."""
    max_batch_delay: float = 0.002
    """Longest that a run is held back to fill its batch, seconds."""
    default_deadline: float = 1.0
    """A request without a deadline of its own is due this long after it came, seconds."""
    max_frames: int | None = None
    """Longest utterance, whole or as a stream, mel frames; a longer one is refused with MelError."""
    max_streams: int | None = None
    """Streams open at once; a further one is refused with QueueFullError."""
    timeout: float | None = None
    """Longest from coming in to done, seconds; then OverdueError, and the request's windows are freed."""

    def __post_init__(self) -> None:
        if self.max_windows < 1 or self.max_batch_delay < 0 or self.default_deadline < 0:
            raise BackendError(f"{self}: max_windows is at least 1, max_batch_delay and default_deadline at least 0 seconds.")
        if any(limit is not None and limit <= 0 for limit in (self.max_frames, self.max_streams, self.timeout)):
            raise BackendError(f"{self}: max_frames, max_streams and timeout are above 0, or None for no limit.")

    def check_frames(self, frames: int) -> None:
        """Raise MelError for an utterance of more frames than are let in."""
        if self.max_frames is not None and frames > self.max_frames:
            raise MelError(f"mel has {frames} frames; at most {self.max_frames} are taken here. Cut the text into shorter utterances.")
