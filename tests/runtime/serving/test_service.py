"""The service of docs/examples/05_service.py, run as it is."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from tests.runtime.serving.triton_server import free_ports

from melrt.bundle import Bundle
from melrt.files.audio import to_int16
from melrt.vocoder import Vocoder
from melrt_export.parity import probe_mel

SERVICE = Path(__file__).parents[3] / "docs" / "examples" / "05_service.py"
TIMEOUT = 30.0
MAX_FRAMES = 4000
MAX_REQUESTS = 6
# Two runs of a window may differ in the last bit of float32, and so by one step of 16 bits.
ROUNDING = 1


@pytest.fixture
def service(demo_bundle: Bundle, tmp_path: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    (port,) = free_ports(1)
    settings = {"VOICE": str(demo_bundle.path), "PORT": str(port), "DRAIN": "2", "UPLOAD": "60", "MAX_REQUESTS": str(MAX_REQUESTS)}
    process = subprocess.Popen([sys.executable, SERVICE], cwd=tmp_path, env=os.environ | settings)
    os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})  # one core, so that requests take long enough on any machine
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT) as client:
        try:
            assert eventually(lambda: ready(client) == 200)
            yield client, process
        finally:
            process.kill()
            process.wait()


def ready(client: httpx.Client) -> int:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/readyz").status_code
    return 0


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + TIMEOUT
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def body(mel: np.ndarray) -> bytes:
    return mel.T.astype("<f4").tobytes()


def npy(mel: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, mel)
    return file.getvalue()


def metric(client: httpx.Client, name: str) -> float:
    (value,) = re.findall(rf"^melrt_{name} ([0-9.e+]+)$", client.get("/metrics").text, re.MULTILINE)
    return float(value)


def assert_close(audio: np.ndarray, expected: np.ndarray) -> None:
    assert audio.shape == expected.shape
    assert np.abs(expected).max() > 500, "not silent"
    assert np.abs(audio.astype(np.int32) - expected).max() <= ROUNDING


def test_audio_errors_and_disconnects(service: tuple[httpx.Client, subprocess.Popen[bytes]], demo_bundle: Bundle) -> None:
    client, _ = service
    mel = probe_mel(demo_bundle.manifest.spec, 200)
    with Vocoder.load(demo_bundle, device="cpu") as vocoder:
        expected = to_int16(vocoder(mel))
    assert client.get("/healthz").status_code == 200
    wav = client.post("/speech", content=body(mel))
    samples, rate = soundfile.read(io.BytesIO(wav.content), dtype="int16")
    assert rate == demo_bundle.manifest.spec.sample_rate
    assert_close(samples, expected)
    with client.stream("POST", "/stream", content=body(mel)) as answer:
        pieces = list(answer.iter_raw())
    assert len(pieces) > 2
    assert len(pieces[0]) < 2 * len(expected) / 4, "the first piece comes before the last is computed"
    assert_close(np.frombuffer(b"".join(pieces), "<i2"), expected)

    nothing_finite = np.full((80, 20), np.nan, np.float32)
    for wrong, status, reason in (
        (b"", 422, "0 bytes"), (b"123", 422, "3 bytes"), (npy(mel), 422, "raw float32 frames, not .npy"),
        (body(nothing_finite), 422, "finite"), (body(mel[:, :2]), 422, "frames"),
        (bytes(320 * (MAX_FRAMES + 1)), 413, "more than 4000 frames"),
    ):  # fmt: skip
        for path in ("/speech", "/stream"):
            answer = client.post(path, content=wrong)
            assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text

    long = body(np.tile(mel, (1, MAX_FRAMES // 200)))
    before = metric(client, "windows_total")
    with client.stream("POST", "/stream", content=long) as answer:
        audio = answer.iter_raw()  # kept: httpx closes the response when its iterator is collected
        next(audio)
        assert metric(client, "open_streams") == 1
    with pytest.raises(httpx.ReadTimeout):
        client.post("/speech", content=long, timeout=0.1)
    assert eventually(lambda: metric(client, "open_streams") == metric(client, "queue_windows") == 0)
    assert metric(client, "windows_total") - before < MAX_FRAMES / 128, "less than the windows of one of the two requests"
    assert metric(client, "cancelled_total") >= 1
    assert eventually(lambda: metric(client, "requests_in_progress") == 0)


def test_overload_is_refused_at_once(service: tuple[httpx.Client, subprocess.Popen[bytes]], demo_bundle: Bundle) -> None:
    """Hold as many uploads as there are places; further requests are refused, and the held ones are completed."""
    client, _ = service
    mel = body(probe_mel(demo_bundle.manifest.spec, 400))
    proceed = threading.Event()

    def slow_upload() -> Iterator[bytes]:
        yield mel[:320]
        proceed.wait(TIMEOUT)
        yield mel[320:]

    with ThreadPoolExecutor(40) as callers:
        held = [callers.submit(client.post, "/speech", content=slow_upload()) for _ in range(MAX_REQUESTS)]
        try:
            assert eventually(lambda: metric(client, "requests_in_progress") == MAX_REQUESTS)
            refused = list(callers.map(lambda _: client.post("/speech", content=mel), range(40 - MAX_REQUESTS)))
        finally:
            proceed.set()
        answers = [one.result() for one in held]
    assert {answer.status_code for answer in refused} == {503}
    assert all("requests are in progress already" in answer.json()["detail"] and answer.headers["Retry-After"] for answer in refused)
    assert {answer.status_code for answer in answers} == {200}
    assert len(answers) > 5
    assert len({answer.content for answer in answers}) == 1
    assert metric(client, "requests_total") == MAX_REQUESTS
    assert metric(client, "refused_total") == len(refused)
    assert client.post("/speech", content=mel).status_code == 200, "the places are free again"
    assert eventually(lambda: metric(client, "requests_in_progress") == 0)


def test_sigterm_completes_admitted_requests(service: tuple[httpx.Client, subprocess.Popen[bytes]], demo_bundle: Bundle) -> None:
    client, process = service
    mel = np.tile(probe_mel(demo_bundle.manifest.spec, 200), (1, 15))
    with client.stream("POST", "/stream", content=body(mel)) as answer:
        pieces = answer.iter_raw()
        size = len(next(pieces))
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: ready(client) == 503)
        assert client.post("/speech", content=body(mel[:, :50])).status_code == 503
        assert client.get("/healthz").status_code == 200
        size += sum(map(len, pieces))
    assert size == 2 * mel.shape[1] * demo_bundle.manifest.spec.hop
    assert process.wait(TIMEOUT) == 0
    with pytest.raises(httpx.ConnectError):
        client.get("/readyz")
