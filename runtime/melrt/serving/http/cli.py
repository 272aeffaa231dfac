"""The command `melrt serve http`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from melrt.bundle import MANIFEST
from melrt.cli.commands import BackendName, Device, EndsOption, Memory, Precision, Threads
from melrt.errors import ConfigError
from melrt.planning.edges import Ends
from melrt.residency import Residency
from melrt.scheduling.limits import Limits
from melrt.serving.http.config import ServiceConfig
from melrt.vocoder import Options
from melrt.voices import Voices

console = Console(highlight=False, soft_wrap=True)
DEFAULT = ServiceConfig()

Bundles = Annotated[list[Path], typer.Argument(metavar="VOICE.melrt...", help="Bundles, or one folder in which bundles may come and go.")]
Pin = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Voice that is never unloaded; may be repeated.")]
Weight = Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="Share of the time of a voice under load, 1 if not given.")]
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
    edges: EndsOption = "voice",
    memory: Memory = 0,
    pin: Pin = None,
    weight: Weight = None,
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
    from melrt.serving.http.server import listen, serve

    config = ServiceConfig(max_requests, max_frames, max_connections, timeout, upload_seconds, idle_seconds, drain_seconds)
    options = Options(edges=cast(Ends, edges), limits=Limits(max_frames=max_frames, timeout=timeout, wait_timeout=timeout))
    residency = Residency(memory << 20 if memory else None, tuple(pin or ()), _weights(weight or []))
    folder = voices[0] if len(voices) == 1 and voices[0].is_dir() and not (voices[0] / MANIFEST).exists() else None
    with Voices(
        folder or voices, device=device, precision=precision, backend=backend, threads=threads, options=options, residency=residency,
        trust=trust,
    ) as opened:  # fmt: skip
        if unknown := {*residency.pinned, *residency.weights} - {*opened.names}:
            raise ConfigError(f"there is no voice {min(unknown)!r} for --pin or --weight; there are: {', '.join(opened.names)}.")
        for name in residency.pinned if folder or memory else opened.names:
            opened[name]  # loaded before the port opens
        with listen(host, port) as listening:
            address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
            names = f"the voices of {folder}" if folder else ", ".join(opened.names)
            console.print(f"Serving {names} at {address} until Ctrl-C. Metrics are at {address}/metrics.", markup=False)
            serve(opened, config, listening)
    console.print("Stopped.", markup=False)


def _weights(texts: list[str]) -> dict[str, float]:
    weights = {}
    for text in texts:
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError as error:
            raise ConfigError(f"--weight is {text!r}; it must be NAME=NUMBER, such as lj=2.") from error
    return weights
