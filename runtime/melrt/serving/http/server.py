"""Running the service: the port, uvicorn and signals."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable

import uvicorn
from fastapi import FastAPI

from melrt.errors import ConfigError
from melrt.serving.http.app import make_app
from melrt.serving.http.config import ServiceConfig
from melrt.serving.http.connection import BoundedConnection, BoundedStream, bounded
from melrt.serving.http.service import Service
from melrt.voices import Voices

# Largest message of a WebSocket: about 800 frames of 80 bands.
MESSAGE_BYTES = 256 << 10


def listen(host: str, port: int) -> socket.socket:
    """Open a port; 0 chooses a free one.

    Raises:
        ConfigError: The address does not belong to this machine, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"port {port} of {host} cannot be opened ({reason}). Choose another with --port, or address with --host."
        ) from error
    # Connections inherit it. asyncio sets it only on sockets that it opened itself; without it a response waits up to 40 ms until the
    # client has acknowledged the packet before.
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return opened


def serve(voices: Voices, config: ServiceConfig, port: socket.socket) -> None:
    """Serve voices on an open port until SIGTERM or Ctrl-C, and complete the admitted requests."""

    def stop(break_off: bool) -> None:
        server.should_exit = True
        for connection in list(server.server_state.connections) if break_off else []:
            connection.transport.abort()  # its request ends as for a client that has left

    service = Service(voices, config, stop)
    app = make_app(service)
    app.router.lifespan_context = _signals(service)
    settings = uvicorn.Config(
        app, http=bounded(BoundedConnection, config), ws=bounded(BoundedStream, config),
        ws_max_size=MESSAGE_BYTES, ws_per_message_deflate=False, log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=max(1, round(config.idle_seconds)), timeout_graceful_shutdown=round(config.grace_seconds),
    )  # fmt: skip
    server = uvicorn.Server(settings)
    server.run(sockets=[port])


def _signals(service: Service) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    """Make the context in which the application runs: SIGTERM and Ctrl-C drain the service in place of uvicorn's own handlers."""

    @contextlib.asynccontextmanager
    async def context(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # event loops of Windows have none; uvicorn's handlers stay
            loop.add_signal_handler(signal.SIGTERM, service.drain, service.config.drain_seconds)
            loop.add_signal_handler(signal.SIGINT, service.drain, 0.0)
        yield

    return context
