"""Connections bounded in number and time, which uvicorn alone does not do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, TypeVar

import h11
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from melrt.serving.http.config import ServiceConfig

_Kind = TypeVar("_Kind", "BoundedConnection", "BoundedStream")
# Time in which a client must read a response that came before it had sent its whole request.
LINGER_SECONDS = 2.0


class BoundedConnection(H11Protocol):
    """A connection that ends when its client sends no complete request, or does not read its response.

    uvicorn limits only the time between two requests of a connection that sends nothing at all. A connection that sends nothing after
    it was opened, or one byte of a request now and then, would stay, and a few hundred of them would fill its limit of connections.
    """

    limits = ServiceConfig()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for the first request; at the limit, close the connection that has waited for the longest time."""
        self._request_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._idle_since = time.monotonic()
        self._aborted = False
        others = [one for one in self.connections if not (isinstance(one, BoundedConnection) and one._aborted)]
        super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
        if len(others) >= self.limits.max_connections:
            idle = [one for one in others if isinstance(one, BoundedConnection) and one._idle]
            min(idle, key=lambda one: one._idle_since, default=self)._abort()
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Take bytes. A part of a request does not extend its time."""
        if self.transport.is_closing():  # the rest of an upload that was refused
            return
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # the client broke the protocol after its response had begun
            self.transport.abort()
        self._await_request()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not HTTP. The application must not answer the request that they belong to as well."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        super().send_400_response(msg)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection to the WebSocket protocol, which closes it in its own way."""
        self.transport = self.transport._transport  # type: ignore[attr-defined]
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = time.monotonic()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._request_timer)
        _cancel(self._read_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Start the time in which the client must read: its buffers are full."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.limits.idle_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._read_timer)
        super().resume_writing()

    @property
    def _idle(self) -> bool:
        """True while the head of a request is awaited, or the rest of a body whose request has been answered."""
        return self.conn.their_state is h11.IDLE or self.conn.our_state in (h11.DONE, h11.CLOSED)

    def _abort(self) -> None:
        self._aborted = True  # asyncio may accept many connections before it reports the loss of this one
        self.transport.abort()

    def _await_request(self) -> None:
        if not self._idle:
            _cancel(self._request_timer)
            self._request_timer = None
        elif self._request_timer is None and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(self.limits.idle_seconds, self.transport.abort)


class BoundedStream(WebSocketsSansIOProtocol):
    """A WebSocket that ends in time, and quietly, when its client breaks the protocol.

    uvicorn alone would keep one whose request is not a handshake (a request with a body, for example), wait 10 s for the answer to the end
    of a stream, and log an error for each refused handshake and for bytes that are not WebSocket.
    """

    limits = ServiceConfig()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.close_timeout = self.limits.idle_seconds

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.handshake_initiated:
            self.transport.abort()

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message of the application, which may not know yet that the client has broken the protocol."""
        if self.close_sent:
            raise ClientDisconnected
        await super().send(message)
        self.handshake_complete |= self.close_sent  # a refusal answers the handshake as well

    def send_receive_event_to_app(self) -> None:
        """Pass a message on, if it is binary or UTF-8."""
        try:
            if self.curr_msg_data_type == "text":
                b"".join(self.frames).decode()
        except UnicodeDecodeError:
            self.frames = []
            if self._answered() and not self.close_sent:
                self.conn.fail(1007)
                self.handle_parser_exception()
        else:
            super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        if self._answered():
            super().handle_parser_exception()

    def handle_close(self, event: Frame) -> None:
        if self._answered():
            super().handle_close(event)

    def _answered(self) -> bool:
        """Return True once the handshake is answered; before that, end the connection like one that is lost."""
        if not self.handshake_complete:
            self.handshake_complete = self.disconnected = True
            self.transport.abort()
        return not self.disconnected


class _LingeringTransport:
    """A transport whose `close` leaves a client that still sends its upload the time to read the response.

    The kernel answers bytes that come after a socket was closed with a reset, and the client then loses the response that it has not
    read yet. Therefore only the sending side is closed at once; what still comes is discarded.
    """

    def __init__(self, transport: asyncio.Transport, connection: H11Protocol) -> None:
        self._transport = transport
        self._connection = connection
        self._lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection, at once unless a body is still coming."""
        if self.is_closing() or self._connection.conn.their_state is not h11.SEND_BODY:
            self._transport.close()
        else:
            self._lingering = True
            self._transport.resume_reading()
            with contextlib.suppress(OSError):  # the client has gone
                self._transport.write_eof()
            self._connection.loop.call_later(LINGER_SECONDS, self._transport.abort)


def bounded(kind: type[_Kind], limits: ServiceConfig) -> type[_Kind]:
    """Return a class of connections with these limits."""
    return type(kind.__name__, (kind,), {"limits": limits})


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
