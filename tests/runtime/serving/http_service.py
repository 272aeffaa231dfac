"""Run `melrt serve http` for tests, and read its answers."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

TIMEOUT = 30.0


class Running:
    """A service in a process of its own, on one core, so that requests take long enough on any machine."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.log = folder / "service.log"
        command = [sys.executable, "-m", "melrt", "serve", "http", "--port", "0", *map(str, arguments)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"COLUMNS": "300"})
        os.sched_setaffinity(self.process.pid, {min(os.sched_getaffinity(0))})
        assert eventually(lambda: "Serving" in self.log.read_text() or self.process.poll() is not None), self.log.read_text()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read_text())
        assert found, self.log.read_text()
        self.port = int(found[1])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=TIMEOUT)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        text = self.client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^melrt_{name}(?:{{.*}})? ([0-9.e+]+)$", text, re.MULTILINE))

    def ready(self) -> int:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/readyz").status_code
        return 0


@contextlib.contextmanager
def running(folder: Path, *arguments: object) -> Iterator[Running]:
    """Run a service, and check at its end that no client made it log a traceback."""
    service = Running(folder, *arguments)
    try:
        assert eventually(lambda: service.ready() == 200), service.log.read_text()
        yield service
    finally:
        service.client.close()
        service.process.kill()
        service.process.wait()
    assert "Traceback" not in service.log.read_text(), service.log.read_text()


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + TIMEOUT
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()
