"""State of the HTTP service: voices, places for requests, and the way to its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator

from fastapi import HTTPException

from melrt.errors import BundleError
from melrt.serving.http.config import ServiceConfig
from melrt.vocoder import Vocoder
from melrt.voices import Voices


class Service:
    """Voices, and places for a limited number of requests. For use by one event loop."""

    def __init__(self, voices: Voices, config: ServiceConfig, stop: Callable[[bool], None]) -> None:
        """Make a service of voices; `stop` ends the server, and if True breaks off what is in progress."""
        self.voices = voices
        self.config = config
        self.draining = False
        self.in_progress = 0
        self.admitted = 0
        self.refused = 0
        self._stop = stop
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Reserve a place for a request until its response has been sent.

        Raises:
            HTTPException: 503 if there is no place, or if the service is about to end.
        """
        if self.draining or self.in_progress >= self.config.max_requests:
            self.refused += 1
            busy = f"{self.config.max_requests} requests are in progress, which is the limit (--max-requests); try again later"
            raise refusal(503, "the service is shutting down; try another instance" if self.draining else busy)
        self.admitted += 1
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1

    async def admit(self) -> AsyncIterator[None]:
        """Reserve a place like `place`, for FastAPI, which releases it after the response has been sent."""
        with self.place():
            yield

    async def voice(self, name: str) -> Vocoder:
        """Return a voice, loaded first if need be; the name may be empty if there is only one.

        Raises:
            HTTPException: 404 for an unknown name, 422 if several voices leave the choice open. It lists the names.
            MelrtError: The voice cannot be loaded, or not in time.
        """
        if not name:
            names = self.voices.names
            if len(names) != 1:
                raise HTTPException(422, f"{len(names)} voices are served: name one with ?voice=NAME. There are: {_list(names)}")
            (name,) = names
        try:
            return await self.voices.load_async(name)
        except BundleError:
            if (names := self.voices.names) and name in names:
                raise
            raise HTTPException(404, f"there is no voice {name[:80]!r}; there are: {_list(names)}") from None

    def drain(self, seconds: float) -> None:
        """Refuse new requests from now on, and stop after the delay, once those in progress are complete. A second call breaks them off."""
        if self._drain is not None:
            self._stop(True)
        self.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._drained(seconds))

    async def _drained(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        until = time.monotonic() + self.config.grace_seconds
        while self.in_progress and time.monotonic() < until:
            await asyncio.sleep(0.05)
        self._stop(self.in_progress > 0)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def refusal(status: int, detail: str) -> HTTPException:
    """Make the error for a request that was not read to its end: the connection closes, or the rest of the upload would follow."""
    return HTTPException(status, detail, {"Connection": "close"} | ({"Retry-After": "1"} if status == 503 else {}))
