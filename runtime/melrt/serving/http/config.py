"""Limits of the HTTP service."""

from __future__ import annotations

from dataclasses import dataclass

from melrt.checks import check_fields, number, whole

_MOST = 1 << 20
_LONGEST = 86_400.0


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Limits on requests and connections, and times. Every wait for a client ends."""

    max_requests: int = 64
    """Largest number of requests and open streams in progress; a further one is refused before its upload."""
    max_frames: int = 4000
    """Longest utterance in mel frames, whole or streamed: 46 s at 22,050 Hz and hop 256."""
    max_connections: int = 512
    """Largest number of connections. One more closes the connection that has been without a request for the longest time."""
    timeout: float = 20.0
    """Longest time in seconds from the arrival of a mel to its audio, and longest wait of a stream for its next frames."""
    upload_seconds: float = 10.0
    """Longest time in seconds in which the body of a request must arrive."""
    idle_seconds: float = 10.0
    """Longest time in seconds for which a connection may be without a complete request, or a client may not read its audio."""
    drain_seconds: float = 5.0
    """Seconds between SIGTERM and the end of the service, in which load balancers notice that it is not ready."""
    grace_seconds: float = 30.0
    """Longest time in seconds for which requests in progress may continue after that."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("max_requests", "max_frames", "max_connections"), whole(1, _MOST))
        waits = dict.fromkeys(("timeout", "upload_seconds", "idle_seconds"), number(0, _LONGEST, above=True))
        ends = dict.fromkeys(("drain_seconds", "grace_seconds"), number(0, _LONGEST))
        check_fields(self, counts | waits | ends, "service")
