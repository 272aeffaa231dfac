"""A real Triton server on the CPU, from the binary in the nvidia-pytriton wheel (`make triton`)."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[3] / ".triton"
# The server waits without end for a model's process that cannot start.
READY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its addresses, process and log."""

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[bytes]
    log: Path


def is_installed(*modules: str) -> bool:
    """Return whether there is a server, whose Python has these modules."""
    if not (HOME / ".installed").is_file():
        return False
    query = [str(HOME / "bin" / "python"), "-c", "".join(f"import {module};" for module in modules)]
    return subprocess.run(query, capture_output=True).returncode == 0


@contextlib.contextmanager
def serve(repository: Path, scratch: Path, ports: list[int] | None = None) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it with all its processes at the end of the context."""
    ports = ports or free_ports(3)
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
    prefix = f"melrt_{secrets.token_hex(4)}"
    log = scratch / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(repository, backends(scratch), ports, prefix),
            stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True,
        )  # fmt: skip
        try:
            wait_until_ready(process, http, log)
            yield Server(http, grpc, metrics, process, log)
        finally:
            end(process)
            for region in Path("/dev/shm").glob(f"{prefix}*"):
                region.unlink(missing_ok=True)


def command(repository: Path, backends: Path, ports: list[int], prefix: str) -> list[str]:
    server = tritonserver() / "bin" / "tritonserver"
    options = [f"--model-repository={repository}", f"--backend-directory={backends}", "--model-control-mode=explicit", "--load-model=*"]
    for protocol, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        options += [f"--{protocol}-address=127.0.0.1", f"--{protocol}-port={port}"]
    options += [f"--backend-config=python,shm-region-prefix-name={prefix}", "--exit-timeout-secs=5", "--allow-gpu-metrics=false"]
    return [str(server), *options]


def tritonserver() -> Path:
    return packages() / "pytriton" / "tritonserver"


def packages() -> Path:
    (found,) = HOME.glob("lib/python*/site-packages")
    return found


def environment() -> dict[str, str]:
    """Return the environment in which the models' processes find their Python (PATH) and the matching libpython (LD_LIBRARY_PATH)."""
    query = [str(HOME / "bin" / "python"), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libraries = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    paths = {"PATH": f"{HOME / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": f"{libraries}:{packages() / 'nvidia_pytriton.libs'}"}
    return os.environ | paths


def backends(scratch: Path) -> Path:
    """Copy the Python backend and the stub for this Python version into the layout that the server expects."""
    python = scratch / "backends" / "python"
    python.mkdir(parents=True, exist_ok=True)
    version = packages().parent.name.removeprefix("python")
    stub = tritonserver() / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in (*(tritonserver() / "backends" / "python").glob("*.*"), stub):
        shutil.copy(file, python)
    return python.parent


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def wait_until_ready(process: subprocess.Popen[bytes], http: str, log: Path) -> None:
    import urllib.request

    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{http}/v2/health/ready", timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"the server is not ready (exit code {process.poll()}):\n{log.read_text(errors='replace')[-3000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    with contextlib.suppress(ProcessLookupError):  # a model's process may outlive its server
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # end the server like Ctrl-C does
    with tempfile.TemporaryDirectory() as folder, serve(Path(sys.argv[1]), Path(folder), [8000, 8001, 8002]) as running:
        print(f"HTTP {running.http}, gRPC {running.grpc}, metrics {running.metrics}; Ctrl-C ends the server")
        with contextlib.suppress(KeyboardInterrupt):
            running.process.wait()
