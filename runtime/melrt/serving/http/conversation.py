"""Streams over WebSocket: frames come in while audio goes out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException, WebSocket, WebSocketDisconnect
from numpy.typing import NDArray

from melrt.errors import ClosedError, MelError, MelrtError, QueueFullError
from melrt.files.output import Output
from melrt.serving.http.bodies import mel_of
from melrt.serving.http.config import ServiceConfig
from melrt.serving.http.formats import check_query, output_of
from melrt.serving.http.service import Service
from melrt.types import Audio
from melrt.vocoder import Vocoder

# Close codes of RFC 6455, section 7.4.1, and its registry: what the client sent, "try again later", an error of the server.
POLICY, LATER, INTERNAL = 1008, 1013, 1011
END = "end"


def converse(service: Service) -> Callable[[WebSocket], Awaitable[None]]:
    """Make the function that answers a WebSocket. A stream takes one of the service's places until it ends."""

    async def stream(socket: WebSocket) -> None:
        try:
            with service.place():
                check_query(socket, "voice", "format", "rate")
                query = socket.query_params
                vocoder = await service.voice(query.get("voice", ""))
                output = output_of(query.get("format", "pcm"), query.get("rate", ""), vocoder, streamed=True)
                await socket.accept()
                await _Conversation(socket, vocoder, output, service.config).run()
        except WebSocketDisconnect:
            pass  # other errors come before the connection is accepted, and are answered over HTTP

    return stream


class _Conversation:
    """One stream of one client."""

    def __init__(self, socket: WebSocket, vocoder: Vocoder, output: Output, config: ServiceConfig) -> None:
        self._socket = socket
        self._vocoder = vocoder
        self._output = output
        self._frames_seconds = config.timeout
        self._read_seconds = config.idle_seconds
        self._samples = 0

    async def run(self) -> None:
        """Return audio for frames until the client ends the utterance; an error is told before the connection is closed."""
        spec = self._vocoder.spec
        await self._send_text({"sample_rate": self._output.sample_rate or spec.sample_rate, "n_mels": spec.n_mels, "hop": spec.hop})
        try:
            with self._vocoder.open_stream(output=self._output) as stream:
                while (frames := await self._frames()) is not None:
                    await self._send(await stream.push_async(frames))
                await self._send(await stream.flush_async())
        except (MelrtError, HTTPException) as error:
            detail = error.detail if isinstance(error, HTTPException) else str(error)
            await self._send_text({"detail": detail})
            await self._socket.close(_code(error))
        else:
            await self._send_text({"samples": self._samples})
            await self._socket.close()

    async def _frames(self) -> NDArray[Any] | None:
        """Return the next frames (M, n); None at the utterance's end."""
        try:
            message = await asyncio.wait_for(self._socket.receive(), self._frames_seconds)
        except TimeoutError:
            raise HTTPException(408, f"no frames came for {self._frames_seconds:g} s (--timeout). Send frames, or {END!r}") from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"])
        if message.get("text") == END:
            return None
        if message.get("bytes") is None:
            raise HTTPException(422, f"send frames as binary messages, and the text {END!r} after the last")
        return mel_of(message["bytes"], self._vocoder.spec)

    async def _send(self, audio: Audio) -> None:
        if audio.size:
            self._samples += audio.size
            await self._in_time(self._socket.send_bytes(audio.tobytes()))

    async def _send_text(self, facts: dict[str, object]) -> None:
        await self._in_time(self._socket.send_text(json.dumps(facts)))

    async def _in_time(self, sending: Awaitable[None]) -> None:
        """Wait until the client has taken a message; one that does not read is treated as gone."""
        try:
            await asyncio.wait_for(sending, self._read_seconds)
        except TimeoutError:
            raise WebSocketDisconnect(INTERNAL) from None


def _code(error: MelrtError | HTTPException) -> int:
    if isinstance(error, MelError | HTTPException):
        return POLICY
    return LATER if isinstance(error, QueueFullError | ClosedError) else INTERNAL
