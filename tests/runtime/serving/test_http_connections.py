"""Connections of `melrt serve http` that send too little, too much, or do not read: each ends, and none stops the service."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import h11
import pytest
from tests.runtime.serving.http_service import TIMEOUT, Running, eventually, running

from melrt.bundle import Bundle
from melrt.serving.http.config import ServiceConfig
from melrt.serving.http.connection import LINGER_SECONDS, _LingeringTransport
from melrt.serving.http.server import listen
from melrt.serving.http.service import Service
from melrt.voices import Voices

IDLE_SECONDS = 1
# Bytes of the longest stream: more than the kernel buffers for a client that does not read.
MAX_FRAMES = 40_000
UPGRADE = (
    b"GET /v1/stream HTTP/1.1\r\nHost: melrt\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
POST = b"POST /v1/speech?format=pcm HTTP/1.1\r\nHost: melrt\r\n"


@pytest.fixture(scope="module")
def service(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = {"idle-seconds": IDLE_SECONDS, "upload-seconds": 1, "max-frames": MAX_FRAMES}
    options = [part for name, value in limits.items() for part in (f"--{name}", value)]
    with running(tmp_path_factory.mktemp("service"), tiny_bundle_path, *options) as one:
        yield one


def opened(service: Running, data: bytes = b"") -> socket.socket:
    one = socket.create_connection(("127.0.0.1", service.port), TIMEOUT)
    one.sendall(data)
    return one


def answer(one: socket.socket) -> bytes:
    """Read until the service closes the connection."""
    received = b""
    with one, contextlib.suppress(ConnectionResetError):
        while part := one.recv(65536):
            received += part
    return received


def dribble(one: socket.socket) -> float:
    """Send a byte every tenth of a second until the service has closed the connection; return the seconds."""
    start = time.monotonic()
    one.settimeout(0.1)
    with one, contextlib.suppress(ConnectionError):
        while time.monotonic() - start < TIMEOUT:
            one.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                while one.recv(65536):
                    pass
                break
    return time.monotonic() - start


def test_connections_without_a_whole_request_end(service: Running) -> None:
    assert answer(opened(service)) == b""
    refused = POST + b"Content-Length: 99999999999\r\n\r\n"
    for head in (refused, b"GET /healthz HTTP/1.1\r\nX: ", b"GET /healthz HTTP/1.1\r\nHost: melrt\r\nContent-Length: 1000000\r\n\r\n"):
        assert dribble(opened(service, head)) < 5 * IDLE_SECONDS


def test_bodies_that_are_too_long_or_too_slow_close_their_connection(service: Running) -> None:
    told = answer(opened(service, POST + b"Content-Length: 99999999999\r\n\r\n" + bytes(32 << 20)))
    assert told.startswith(b"HTTP/1.1 413")
    assert b"enough for 40000 frames" in told
    assert b"connection: close" in told
    told = answer(opened(service, POST + b"Transfer-Encoding: chunked\r\n\r\n1000000\r\n"))
    assert told.startswith(b"HTTP/1.1 408")
    assert b"within 1 s" in told
    assert b"connection: close" in told
    assert answer(opened(service, POST + b"Content-Length: %b\r\n\r\n" % (b"9" * 20))).startswith(b"HTTP/1.1 413")
    assert answer(opened(service, POST + b"Content-Length: 1e9\r\n\r\n")).startswith(b"HTTP/1.1 400")


def test_clients_that_break_off_or_do_not_read_free_their_place(service: Running) -> None:
    opened(service, POST + b"Content-Length: 32000\r\n\r\n" + bytes(1000)).close()
    opened(service, POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n").close()
    answer(opened(service, b"GET /healthz HTTP/1.1\r\nHost: melrt\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"))
    answered = opened(service, b"GET /healthz HTTP/1.1\r\nHost: melrt\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert answered.recv(65536).startswith(b"HTTP/1.1 200")
    answered.sendall(b"zz\r\n")
    answer(answered)
    for _ in range(5):
        reset = opened(service, POST + b"Content-Length: 99999999999\r\n\r\n")
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
    assert answer(opened(service, UPGRADE + b"Content-Length: 5\r\n\r\n" + b"\xff" * 20)) == b""
    start, stream = time.monotonic(), opened(service, UPGRADE + b"\r\n")
    assert stream.recv(12) == b"HTTP/1.1 101"
    stream.sendall(b"\x81\x83\x00\x00\x00\x00end")
    assert answer(stream).endswith(b'{"samples": 0}\x88\x02\x03\xe8'), "the end, which this client does not answer"
    assert time.monotonic() - start < 5 * IDLE_SECONDS
    frames = bytes(4 * 80 * MAX_FRAMES)
    deaf = opened(service)
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(frames) + frames)
    assert eventually(lambda: service.metric("http_in_progress") == 1)
    assert eventually(lambda: service.metric("http_in_progress") == 0)
    deaf.close()


def test_a_client_that_leaves_while_its_upload_is_refused_is_no_error() -> None:
    """asyncio may not know yet that the client has reset the connection: closing one side of it fails then."""
    transport, connection = Mock(), Mock()
    transport.is_closing.return_value = False
    transport.write_eof.side_effect = OSError(errno.ENOTCONN, "not connected")
    connection.conn.their_state = h11.SEND_BODY
    _LingeringTransport(transport, connection).close()
    connection.loop.call_later.assert_called_once_with(LINGER_SECONDS, transport.abort)


def test_requests_that_exceed_the_grace_period_are_broken_off(tiny_bundle_path: Path) -> None:
    ends: list[bool] = []

    async def drain(service: Service, in_progress: bool) -> None:
        with service.place() if in_progress else contextlib.nullcontext():
            service.drain(0.0)
            while not ends:
                await asyncio.sleep(0.001)

    with Voices([tiny_bundle_path]) as voices:
        for in_progress in (True, False):
            asyncio.run(drain(Service(voices, ServiceConfig(grace_seconds=0.0), ends.append), in_progress))
            assert ends.pop() is in_progress


def test_responses_do_not_wait_for_acknowledgments() -> None:
    with listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()[:2]), server.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_command_says_what_is_wrong(melrt, service: Running, tiny_bundle: Bundle, tmp_path: Path) -> None:
    for arguments, reason in (
        ((tiny_bundle.path, "--port", service.port), "Choose another with --port"),
        ((tiny_bundle.path, tiny_bundle.path), "rename one of them"),
        ((tiny_bundle.path, "--edges", "none"), "edges is 'none'; it must be voice"),
        ((tiny_bundle.path, "--max-requests", 0), "max_requests is 0; it must be a whole number from 1"),
        ((tmp_path / "none.melrt",), "does not exist"),
        ((tmp_path, "--pin", "lj"), "there is no voice 'lj'"),
        ((tiny_bundle.path, "--weight", "tiny"), "NAME=NUMBER"),
    ):
        code, _, error = melrt("serve", "http", *arguments)
        assert (code, reason in error) == (2, True), error
