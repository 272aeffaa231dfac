"""The service of docs/embedding.md, run as it stands there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from tests.runtime.triton_server import free_ports

from melrt.bundle import Bundle
from melrt.files.wav import to_int16
from melrt.vocoder import Vocoder
from melrt_export.parity import probe_mel

PAGE = Path(__file__).parents[2] / "docs" / "embedding.md"
PATIENCE = 30.0
LONGEST = 4000
# Two runs of a window may differ in the last bit of float32, and so by one step of 16 bits.
STEP = 1


@pytest.fixture
def service(demo_bundle: Bundle, tmp_path: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "speech.py").write_text(code)
    (port,) = free_ports(1)
    given = {"VOICE": str(demo_bundle.path), "PORT": str(port), "DRAIN": "2"}
    process = subprocess.Popen([sys.executable, "speech.py"], cwd=tmp_path, env=os.environ | given)
    os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})  # one core, so that work takes its time on any machine
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
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
    until = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def body(mel: np.ndarray) -> bytes:
    return mel.T.astype("<f4").tobytes()


def metric(client: httpx.Client, name: str) -> float:
    (value,) = re.findall(rf"^melrt_{name} ([0-9.e+]+)$", client.get("/metrics").text, re.MULTILINE)
    return float(value)


def assert_alike(heard: np.ndarray, expected: np.ndarray) -> None:
    assert heard.shape == expected.shape
    assert np.abs(expected).max() > 500, "it sounds"
    assert np.abs(heard.astype(np.int32) - expected).max() <= STEP


def test_it_speaks_refuses_and_lets_go(service: tuple[httpx.Client, subprocess.Popen[bytes]], demo_bundle: Bundle) -> None:
    client, _ = service
    mel = probe_mel(demo_bundle.manifest.spec, 200)
    with Vocoder.load(demo_bundle, device="cpu") as vocoder:
        expected = to_int16(vocoder(mel))
    assert client.get("/healthz").status_code == 200
    wav = client.post("/speech", content=body(mel))
    samples, rate = soundfile.read(io.BytesIO(wav.content), dtype="int16")
    assert rate == demo_bundle.manifest.spec.sample_rate
    assert_alike(samples, expected)
    with client.stream("POST", "/stream", content=body(mel)) as answer:
        pieces = list(answer.iter_raw())
    assert len(pieces) > 2
    assert len(pieces[0]) < 2 * len(expected) / 4, "the first comes before the last is computed"
    assert_alike(np.frombuffer(b"".join(pieces), "<i2"), expected)

    nothing_finite = np.full((80, 20), np.nan, np.float32)
    for wrong, status, reason in (
        (b"", 422, "0 bytes"), (b"123", 422, "3 bytes"), (body(nothing_finite), 422, "finite"), (body(mel[:, :2]), 422, "frames"),
        (bytes(320 * (LONGEST + 1)), 413, "more than 4000 frames"),
    ):  # fmt: skip
        for path in ("/speech", "/stream"):
            answer = client.post(path, content=wrong)
            assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text

    long = body(np.tile(mel, (1, LONGEST // 200)))
    before = metric(client, "windows_total")
    with client.stream("POST", "/stream", content=long) as answer:
        heard = answer.iter_raw()
        next(heard)
        assert metric(client, "open_streams") == 1
    with pytest.raises(httpx.ReadTimeout):
        client.post("/speech", content=long, timeout=0.1)
    assert eventually(lambda: metric(client, "open_streams") == metric(client, "queue_windows") == 0)
    assert metric(client, "windows_total") - before < LONGEST / 128, "of the two, not even one's windows were computed"
    assert metric(client, "cancelled_total") >= 1


def test_overload_is_refused_at_once(service: tuple[httpx.Client, subprocess.Popen[bytes]], demo_bundle: Bundle) -> None:
    client, _ = service
    mel = body(np.tile(probe_mel(demo_bundle.manifest.spec, 200), (1, 10)))
    with ThreadPoolExecutor(40) as callers:
        answers = list(callers.map(lambda _: client.post("/speech", content=mel), range(40)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert all("windows wait already" in answer.json()["detail"] and answer.headers["Retry-After"] for answer in refused)
    spoken = [answer.content for answer in answers if answer.status_code == 200]
    assert len(spoken) == len(answers) - len(refused) > 5
    assert len(set(spoken)) == 1
    assert client.post("/speech", content=mel).status_code == 200, "there is room again"


def test_it_ends_without_breaking_a_word(service: tuple[httpx.Client, subprocess.Popen[bytes]], demo_bundle: Bundle) -> None:
    client, process = service
    mel = np.tile(probe_mel(demo_bundle.manifest.spec, 200), (1, 15))
    with client.stream("POST", "/stream", content=body(mel)) as answer:
        heard = answer.iter_raw()
        size = len(next(heard))
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: ready(client) == 503)
        assert client.post("/speech", content=body(mel[:, :50])).status_code == 503
        assert client.get("/healthz").status_code == 200
        size += sum(map(len, heard))
    assert size == 2 * mel.shape[1] * demo_bundle.manifest.spec.hop
    assert process.wait(PATIENCE) == 0
    with pytest.raises(httpx.ConnectError):
        client.get("/readyz")
