"""Attack `melrt serve http` with hostile requests, WebSocket messages and clients that break off: `make fuzz`.

Usage: python -m tests.fuzz.service [CASES]

A case depends on its seed alone. It fails if it is answered with a 5xx status or an internal error, if an error does not say what is
allowed, or if its connection stays open for longer than the limits. All fail together if the service logs an error, keeps a place, a
window, a connection or a thread, grows by more than 256 MiB, or does not return the same audio as before.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import re
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tests.fuzz.hostile_requests import hostile_request, hostile_stream
from tests.runtime.serving.http_service import Running, eventually

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "bundles" / "tiny.melrt"
MAKE_FUZZ = 3_000
CLIENTS = 8
LIMITS = ("--max-frames", 400, "--timeout", 4, "--upload-seconds", 1, "--idle-seconds", 0.5, "--max-requests", 4 * CLIENTS)
MAX_SECONDS = 20.0
MAX_KILOBYTES = 256 << 10
# Threads that asyncio keeps for work which would block its event loop: at most 4 more than cores, of which the service has one.
POOL = 5
# Answers of the HTTP and WebSocket libraries to what is neither HTTP nor WebSocket. All others are melrt's own.
PROTOCOL_ERRORS = (400, 426)
# Close codes of RFC 6455 for errors of the server: an internal error, and "try again later".
SERVER_ERRORS = (1011, 1013)
ENDINGS = ("read", "leave", "reset", "half", "slow")


def attack(count: int) -> tuple[collections.Counter[str], list[str]]:
    """Send the cases with seeds 0 to `count` - 1 to a service, several at a time; return the number of each result and the failures."""
    with tempfile.TemporaryDirectory() as folder:
        service = Running(Path(folder), TINY, *LIMITS)
        try:
            before, expected = _resources(service), _good_audio(service)
            with ThreadPoolExecutor(CLIENTS) as clients:
                cases = list(clients.map(lambda seed: case(service.port, seed), range(count)))
            failures = [f"requests, seed {seed}: {one}" for seed, (_, wrong) in enumerate(cases) for one in wrong]
            failures += _kept(service, before)
            if _good_audio(service) != expected:
                failures.append("a good request is not answered with the same audio as before")
        finally:
            service.client.close()
            service.process.kill()
            service.process.wait()
        logged = re.findall(r"^(?:ERROR.*|.*Error.*|.*Traceback.*)$", service.log.read_text(), re.MULTILINE)
    failures += [f"logged: {line.rstrip()}" for line in logged]
    return collections.Counter(result for found, _ in cases for result in found), failures


def _kept(service: Running, before: tuple[int, int, int]) -> list[str]:
    """Return what the service keeps of requests that have ended."""
    failures = []
    places = ("http_in_progress", "queue_windows")
    if not eventually(lambda: not any(map(service.metric, places))):
        failures.append(f"at the end, {[(name, service.metric(name)) for name in places]}")
    if not eventually(lambda: _resources(service)[0] <= before[0] and _resources(service)[1] <= before[1] + POOL):
        failures.append(f"files and threads: {before[:2]} before, {_resources(service)[:2]} after")
    if (grown := _resources(service)[2] - before[2]) > MAX_KILOBYTES:
        failures.append(f"{grown >> 10} MiB more than before")
    return failures


def case(port: int, seed: int) -> tuple[list[str], list[str]]:
    """Send one case, and return its results and what is wrong about them."""
    noise = np.random.default_rng(seed)
    stream = noise.random() < 0.4
    data = hostile_stream(noise) if stream else hostile_request(noise)
    if not stream and noise.random() < 0.1:
        data += hostile_request(noise)  # without waiting for the answer
    ending = ENDINGS[noise.choice(5, p=[0.7, 0.1, 0.08, 0.05, 0.07])]
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), MAX_SECONDS) as client:
        received = _converse(client, data, ending, noise)
    if time.monotonic() - start >= MAX_SECONDS:
        return ["hang"], [f"the connection is open after {MAX_SECONDS:g} s; received {received[:200]!r}"]
    statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", received, re.MULTILINE)]
    wrong = [f"status {status}: {received[:300]!r}" for status in statuses if status >= 500]
    for head, told in re.findall(rb"^HTTP/1\.1 (4\d\d) .*?\r\n\r\n([^\r\n]*)", received, re.MULTILINE | re.DOTALL):
        if ending == "read" and int(head) not in PROTOCOL_ERRORS and len(told) < len('{"detail":"12345"}') and b"HEAD" not in data[:5]:
            wrong.append(f"status {head.decode()} without a reason: {received[:300]!r}")
    codes = [code for code in _close_codes(received) if code] if 101 in statuses else []
    wrong += [f"close code {code}: {received[-300:]!r}" for code in codes if code in SERVER_ERRORS]
    results = [str(status) for status in statuses] + [f"closed {code}" for code in codes]
    return results or ["no answer"], wrong


def _converse(client: socket.socket, data: bytes, ending: str, noise: np.random.Generator) -> bytes:
    """Send data, all of it or up to a random byte, and read until the service closes the connection or the client leaves."""
    if ending in ("leave", "reset", "half"):
        data = data[: noise.integers(len(data) + 1)]
    if ending == "slow":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    received = bytearray()
    with contextlib.suppress(OSError):  # the request was refused, and its connection is closed
        _send(client, data, noise, received)
    with contextlib.suppress(OSError):
        if ending == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if ending in ("leave", "reset"):
            client.settimeout(float(noise.choice([0.001, 0.02])))
            received += client.recv(1 << 16)
            return bytes(received)
        if ending == "half":
            client.shutdown(socket.SHUT_WR)
        until = time.monotonic() + MAX_SECONDS
        while time.monotonic() < until and (part := client.recv(512 if ending == "slow" else 1 << 16)):
            received += part
            time.sleep(0.001 * (ending == "slow"))
    return bytes(received)


def _send(client: socket.socket, data: bytes, noise: np.random.Generator, received: bytearray) -> None:
    """Send data in a few pieces; most clients first wait for the answer to the handshake of a WebSocket."""
    if b"Upgrade: websocket" in data[:4000] and noise.random() < 0.9:
        head, end, data = data.partition(b"\r\n\r\n")
        client.sendall(head + end)
        received += client.recv(1 << 16)
    for piece in _pieces(data, noise):
        client.sendall(piece)
        time.sleep(noise.choice([0, 0, 0.002]))


def _pieces(data: bytes, noise: np.random.Generator) -> Iterator[bytes]:
    cuts = sorted({0, len(data), *(int(cut) for cut in noise.integers(len(data) + 1, size=noise.integers(4)))})
    for start, stop in itertools.pairwise(cuts):
        yield data[start:stop]


def _close_codes(received: bytes) -> Iterator[int]:
    """Yield the close codes in the frames of a WebSocket that follow its handshake."""
    rest = received[received.index(b"101 ") :].partition(b"\r\n\r\n")[2]
    while len(rest) >= 2:
        opcode, size, at = rest[0] & 15, rest[1] & 127, 2
        if size >= 126:
            at = 4 if size == 126 else 10
            size = int.from_bytes(rest[2:at], "big")
        if opcode == 8 and size >= 2:
            yield int.from_bytes(rest[at : at + 2], "big")
        rest = rest[at + size :]


def _good_audio(service: Running) -> bytes:
    mel = np.random.default_rng(0).standard_normal((60, 80)).astype("<f4")
    answer = service.client.post("/v1/speech", content=mel.tobytes(), params={"voice": "tiny"})
    assert answer.status_code == 200, answer.text
    return answer.content


def _resources(service: Running) -> tuple[int, int, int]:
    """Return the open files, the threads and the largest memory in kilobytes of the service's process."""
    process = Path(f"/proc/{service.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return len(list((process / "fd").iterdir())), int(status["Threads"]), int(status["VmHWM"].split()[0])


def main() -> int:
    count = int(sys.argv[1]) if sys.argv[1:] else MAKE_FUZZ
    start = time.monotonic()
    results, failures = attack(count)
    print(f"requests: {count} cases, {len(failures)} failures, {time.monotonic() - start:.0f} s; {dict(results)}")
    print("\n".join(failures[:40]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
