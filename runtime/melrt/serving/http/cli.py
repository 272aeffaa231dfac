"""The command `melrt serve http`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from melrt.cli.commands import BackendName, Device, Precision, Threads
from melrt.errors import ConfigError
from melrt.scheduling.limits import Limits
from melrt.serving.http.config import ServiceConfig
from melrt.serving.http.server import listen, serve
from melrt.vocoder import Options, Vocoder

console = Console(highlight=False, soft_wrap=True)
DEFAULT = ServiceConfig()

Bundles = Annotated[list[Path], typer.Argument(metavar="VOICE.melrt...", help="One or more bundles.")]
Host = Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 for every address of this machine.")]
Port = Annotated[int, typer.Option(help="Port to serve on; 0 for a free one.")]
MaxRequests = Annotated[int, typer.Option(help="Requests and streams in progress; a further one is refused before its upload.")]
MaxFrames = Annotated[int, typer.Option(help="Longest utterance in mel frames.")]
MaxConnections = Annotated[int, typer.Option(help="Open connections; one more closes the one that has been idle for the longest time.")]
Timeout = Annotated[float, typer.Option(help="Seconds that an utterance may take, and that a stream may wait for frames.")]
Upload = Annotated[float, typer.Option(help="Seconds in which the body of a request must arrive.")]
Idle = Annotated[float, typer.Option(help="Seconds that a connection may be without a complete request, or a client may not read.")]
Drain = Annotated[float, typer.Option(help="Seconds after SIGTERM in which load balancers notice that the service is not ready.")]
Trust = Annotated[bool, typer.Option("--trust", help="Open engines that this user did not build.")]


def http(
    voices: Bundles,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: BackendName = "auto",
    threads: Threads = None,
    max_requests: MaxRequests = DEFAULT.max_requests,
    max_frames: MaxFrames = DEFAULT.max_frames,
    max_connections: MaxConnections = DEFAULT.max_connections,
    timeout: Timeout = DEFAULT.timeout,
    upload_seconds: Upload = DEFAULT.upload_seconds,
    idle_seconds: Idle = DEFAULT.idle_seconds,
    drain_seconds: Drain = DEFAULT.drain_seconds,
    trust: Trust = False,
) -> None:
    """Serve voices over HTTP and WebSocket: mels in, audio out; with metrics, limits and a clean end on SIGTERM or Ctrl-C."""
    config = ServiceConfig(max_requests, max_frames, max_connections, timeout, upload_seconds, idle_seconds, drain_seconds)
    options = Options(limits=Limits(max_frames=max_frames, timeout=timeout), sample_format="int16")
    paths: dict[str, Path] = {}
    for path in voices:
        name = path.resolve().name.removesuffix(".melrt")
        if name in paths:
            raise ConfigError(f"{paths[name]} and {path} both have the name {name}; rename one of them.")
        paths[name] = path
    with contextlib.ExitStack() as stack:
        choice = {"device": device, "precision": precision, "backend": backend}
        loaded = {
            name: stack.enter_context(Vocoder.load(path, **choice, threads=threads, options=options, trust=trust))
            for name, path in paths.items()
        }
        with listen(host, port) as opened:
            address = f"http://{f'[{host}]' if ':' in host else host}:{opened.getsockname()[1]}"
            console.print(f"Serving {', '.join(loaded)} at {address} until Ctrl-C. Metrics are at {address}/metrics.", markup=False)
            serve(loaded, config, opened)
    console.print("Stopped.", markup=False)
