"""`melrt serve http`, run as it is: audio, errors, clients that leave, overload and the end of the service."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from tests.runtime.reference import speech_mel
from tests.runtime.serving.http_service import TIMEOUT, Running, eventually, running
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from melrt import Edges, Options, Output
from melrt.bundle import MANIFEST, Bundle
from melrt.files.audio import to_int16
from melrt.vocoder import Vocoder

MAX_FRAMES = 4000
MAX_REQUESTS = 6
# Two runs of a window may differ in the last bit of float32, and so by one step of 16 bits.
ROUNDING = 1


# As the project of the voice does, the service adds frames at the ends unless told otherwise.
OPTIONS = Options(edges="voice")


def with_ends(source: Path, target: Path) -> Bundle:
    """Copy a voice, and say that its project adds frames after the last."""
    shutil.copytree(source, target)
    (target / MANIFEST).write_bytes(replace(Bundle.open(target).manifest, edges=Edges(0, 10, -5.0)).dumps())
    return Bundle.open(target)


@pytest.fixture(scope="module")
def tiny(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_ends(tiny_bundle_path, tmp_path_factory.mktemp("voices") / "tiny.melrt")


@pytest.fixture(scope="module")
def service(demo_bundle: Bundle, tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = ("--upload-seconds", 60, "--max-requests", MAX_REQUESTS, "--timeout", 60)
    with running(tmp_path_factory.mktemp("service"), demo_bundle.path, tiny.path, *limits) as one:
        yield one


def body(mel: np.ndarray) -> bytes:
    return mel.T.astype("<f4").tobytes()


def npy(mel: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, mel)
    return file.getvalue()


def assert_close(audio: np.ndarray, expected: np.ndarray) -> None:
    assert audio.shape == expected.shape
    assert np.abs(expected).max() > 500, "not silent"
    assert np.abs(audio.astype(np.int32) - expected).max() <= ROUNDING


def post(service: Running, content: object, voice: str = "lj", **query: str) -> httpx.Response:
    return service.client.post("/v1/speech", content=content, params={"voice": voice, **query})


def test_audio_of_both_voices(service: Running, demo_bundle: Bundle, tiny: Bundle) -> None:
    for bundle, name in ((demo_bundle, "lj"), (tiny, "tiny")):
        mel = speech_mel(bundle, 200)
        with Vocoder.load(bundle, device="cpu", options=OPTIONS) as vocoder:
            expected = to_int16(vocoder(mel))
        for content in (body(mel), npy(mel), npy(np.asfortranarray(mel, np.float64)[None])):
            samples, rate = soundfile.read(io.BytesIO(post(service, content, name).content), dtype="int16")
            assert rate == bundle.manifest.spec.sample_rate
            assert_close(samples, expected)
        with service.client.stream("POST", "/v1/speech", content=body(mel), params={"voice": name, "format": "pcm"}) as answer:
            pieces = list(answer.iter_raw())
        assert len(pieces) > 2
        assert len(pieces[0]) < 2 * len(expected) / 4, "the first piece comes before the last is computed"
        assert_close(np.frombuffer(b"".join(pieces), "<i2"), expected)
        assert_close(np.concatenate(converse(service, name, mel)), expected)
    facts = {voice["name"]: voice for voice in service.client.get("/voices").json()["voices"]}
    assert facts["lj"]["n_mels"] == demo_bundle.manifest.spec.n_mels
    assert facts["tiny"]["sample_rate"] == tiny.manifest.spec.sample_rate


def test_the_example_client(service: Running, demo_bundle: Bundle, tmp_path: Path) -> None:
    mel = speech_mel(demo_bundle, 150)
    (tmp_path / "demo").mkdir()
    np.save(tmp_path / "demo" / "mel.npy", mel)
    script = Path(__file__).parents[3] / "docs" / "examples" / "05_http_client.py"
    with Vocoder.load(demo_bundle, device="cpu") as vocoder:
        expected = to_int16(vocoder(mel))
    subprocess.run([sys.executable, script, f"127.0.0.1:{service.port}"], cwd=tmp_path, check=True, timeout=TIMEOUT)
    for name in ("http.wav", "http_stream.wav"):
        assert_close(soundfile.read(tmp_path / "demo" / name, dtype="int16")[0], expected)


def conversation(service: Running, voice: str) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{service.port}/v1/stream?voice={voice}", open_timeout=TIMEOUT)


def converse(service: Running, voice: str, mel: np.ndarray) -> list[np.ndarray]:
    """Stream a mel over WebSocket: audio comes back before the last frames are sent."""
    with conversation(service, voice) as stream:
        assert json.loads(stream.recv(TIMEOUT))["n_mels"] == len(mel)
        stream.send(body(mel[:, :100]))
        audio = [np.frombuffer(stream.recv(TIMEOUT), "<i2")]
        for start in range(100, mel.shape[1], 7):
            stream.send(body(mel[:, start : start + 7]))
        stream.send("end")
        while isinstance(message := stream.recv(TIMEOUT), bytes):
            audio.append(np.frombuffer(message, "<i2"))
        assert json.loads(message) == {"samples": sum(map(len, audio))}
        with pytest.raises(ConnectionClosed) as closed:
            stream.recv(TIMEOUT)
    assert closed.value.rcvd.code == 1000
    return audio


def test_bench_serving_compares_the_service_and_vocoder(service: Running, tiny: Bundle, melrt) -> None:
    short = "--clients", 2, "--seconds", 0.5, "--rounds", 1, "--overload", 4, "--overload-seconds", 0.5
    code, out, err = melrt("bench-serving", tiny.path, "--http", f"127.0.0.1:{service.port}", *short)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["Vocoder", "HTTP", "WebSocket", *np.repeat(["Vocoder", "HTTP", "WebSocket"], 2)]
    assert int(rows[5][-1]) > 0, "the service refuses what exceeds its places"


def test_formats_and_rates(service: Running, tiny: Bundle) -> None:
    """A telephone gets G.711 at 8 kHz, as a stream; files are whole."""
    mel = speech_mel(tiny, 200)
    with Vocoder.load(tiny, device="cpu", options=OPTIONS) as vocoder:
        for form, rate, encoding in (("mulaw", 8000, "mulaw"), ("alaw", 16000, "alaw"), ("pcm", 24000, "int16"), ("opus", 24000, "opus")):
            expected = vocoder(mel, Output(rate, encoding))
            answer = post(service, body(mel), "tiny", format=form, rate=str(rate))
            assert answer.status_code == 200, answer.text
            assert answer.headers["Content-Type"].endswith("audio/ogg" if form == "opus" else f"rate={rate}")
            if form == "opus":
                samples, found = soundfile.read(io.BytesIO(answer.content))
                assert (found, abs(len(samples) - 200 * 256 * rate / 22050) < 2) == (rate, True)
                assert np.abs(samples).max() > 0.02, "not silent"
                continue
            samples = np.frombuffer(answer.content, expected.dtype)
            assert samples.shape == expected.shape
            assert np.mean(samples == expected) > 0.98, "all but rounding"
            assert len(np.unique(samples)) > 50, "not silent"
    refused = post(service, body(mel), "tiny", format="opus")
    assert (refused.status_code, "24000" in refused.json()["detail"]) == (422, True)
    with pytest.raises(InvalidStatus, match="422"):
        connect(f"ws://127.0.0.1:{service.port}/v1/stream?voice=tiny&format=flac").__enter__()


def test_wrong_requests_are_told_what_is_allowed(service: Running, demo_bundle: Bundle) -> None:
    mel = speech_mel(demo_bundle, 200)
    forged = npy(mel).replace(b"(80, 200)", b"(80, 9" + b"9" * 2 + b")")
    late = mel.copy()
    late[7, -1] = np.inf  # after the first audio of a stream
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (1 << 32, 1 << 32)})
    for wrong, query, status, reason in (
        (b"", {}, 422, "0 bytes"), (b"123", {}, 422, "a frame of this voice is 80 float32, 320 bytes"),
        (npy(mel.astype(np.int16)), {}, 422, "float32 or float64"), (npy(mel)[:-1], {}, 422, "complete"), (forged, {}, 422, "(80, 999)"),
        (npy(mel[None, None]), {}, 422, "(bands, frames)"), (npy(mel.T), {}, 422, "80"),
        (b"\x93NUMPY\x01\x00\xff\xff{", {}, 422, "np.save"), (b"\x93NUMPY\x01\x00\x05\x00{(((\n", {}, 422, "np.save"),
        (huge.getvalue(), {}, 422, "complete"), (npy(mel.astype(np.longdouble)), {}, 422, "float32 or float64"),
        (body(late), {}, 422, "inf at (7, 199)"),
        (body(np.full((80, 20), np.nan, np.float32)), {}, 422, "finite"), (body(mel[:, :2]), {}, 422, "frames"),
        (body(mel), {"format": "mp3"}, 422, "wav, flac, opus, pcm"), (body(mel), {"rate": "fast"}, 422, "fast"),
        (body(mel), {"voice": "none"}, 404, "there are: lj, tiny"),
        (body(mel), {"rates": "8000"}, 422, "no parameter 'rates'; there are: voice, format, rate"),
        (body(mel), {"voice": ""}, 422, "There are: lj, tiny"), (bytes(320 * (MAX_FRAMES + 1)), {}, 413, "at most 4000 are accepted"),
        (bytes(640 * (MAX_FRAMES + 1) + 65536), {}, 413, "enough for 4000 frames"),
    ):  # fmt: skip
        for form in ("wav", "pcm"):
            answer = post(service, wrong, **{"format": form, **query})
            assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text
    recording = service.client.post("/v1/mel", content=np.full(9999, np.nan, "<f4").tobytes(), params={"voice": "lj"})
    assert (recording.status_code, "not finite" in recording.json()["detail"]) == (422, True)
    assert "/v1/speech" in service.client.get("/v1/sing").json()["detail"]
    assert "is for WebSocket connections" in service.client.get("/v1/stream").json()["detail"]
    with pytest.raises(InvalidStatus) as misspelled:
        connect(f"ws://127.0.0.1:{service.port}/v1/stream?vioce=lj").__enter__()
    assert b"no parameter 'vioce'" in misspelled.value.response.body
    for path in ("/", "/healthz", "/voices"):  # load balancers and monitors send HEAD
        assert (service.client.head(path).status_code, service.client.head(path).content) == (200, b"")
    assert "use POST" in service.client.get("/v1/speech").json()["detail"]
    with pytest.raises(InvalidStatus) as refused:
        conversation(service, "none")
    assert (refused.value.response.status_code, b"there are: lj, tiny" in refused.value.response.body) == (404, True)
    assert 'melrt_http_responses_total{path="/v1/stream",status="404"}' in service.client.get("/metrics").text
    for wrong, reason in ((b"123", "320 bytes"), ("begin", "'end'"), (body(np.full((80, 20), np.nan, np.float32)), "finite")):
        with conversation(service, "lj") as stream:
            stream.recv(TIMEOUT)
            stream.send(wrong)
            assert reason in json.loads(stream.recv(TIMEOUT))["detail"]
            with pytest.raises(ConnectionClosed) as closed:
                stream.recv(TIMEOUT)
        assert closed.value.rcvd.code == 1008
    assert eventually(lambda: service.metric("http_in_progress") == 0)


def test_clients_that_leave_free_their_windows(service: Running, demo_bundle: Bundle) -> None:
    long = body(speech_mel(demo_bundle, MAX_FRAMES))
    windows, cancelled = service.metric("windows_total"), service.metric("cancelled_total")
    with service.client.stream("POST", "/v1/speech", content=long, params={"voice": "lj", "format": "pcm"}) as answer:
        audio = answer.iter_raw()  # kept: httpx closes the response when its iterator is collected
        next(audio)
        assert service.metric("http_in_progress") == 1
    with pytest.raises(httpx.ReadTimeout):
        service.client.post("/v1/speech", content=long, params={"voice": "lj"}, timeout=0.1)
    with conversation(service, "lj") as stream:
        stream.send(long[: 320 * 200])
        stream.recv(TIMEOUT)
        stream.socket.shutdown(socket.SHUT_RDWR)
    assert eventually(lambda: service.metric("http_in_progress") == service.metric("queue_windows") == 0)
    assert service.metric("windows_total") - windows < MAX_FRAMES / 128, "less than the windows of one of the two long requests"
    assert service.metric("cancelled_total") > cancelled


def test_silent_connections_make_room_for_others(service: Running) -> None:
    """Open more connections than the limit of 512 and send nothing: those that are idle for the longest time end first, before 10 s."""
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(("127.0.0.1", service.port), 5)) for _ in range(600)]
        assert service.client.get("/healthz").status_code == 200
        assert [one.recv(1) for one in silent[:80]] == [b""] * 80


def test_overload_is_refused_at_once(service: Running, demo_bundle: Bundle) -> None:
    """Hold as many uploads as there are places; further requests are refused, and the held ones are completed."""
    mel = body(speech_mel(demo_bundle, 400))
    admitted, before = service.metric("http_admitted_total"), service.metric("http_refused_total")
    proceed = threading.Event()

    def slow_upload() -> Iterator[bytes]:
        yield mel[:320]
        proceed.wait(TIMEOUT)
        yield mel[320:]

    with ThreadPoolExecutor(40) as callers:
        held = [callers.submit(post, service, slow_upload()) for _ in range(MAX_REQUESTS)]
        try:
            assert eventually(lambda: service.metric("http_in_progress") == MAX_REQUESTS)
            refused = list(callers.map(lambda _: post(service, mel), range(40 - MAX_REQUESTS)))
            with pytest.raises(InvalidStatus) as stream:
                conversation(service, "lj")
        finally:
            proceed.set()
        answers = [one.result() for one in held]
    assert {answer.status_code for answer in refused} == {503} == {stream.value.response.status_code}
    for answer in refused:
        assert "6 requests are in progress" in answer.json()["detail"]
        assert (answer.headers["Retry-After"], answer.headers["Connection"]) == ("1", "close")
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert service.metric("http_admitted_total") - admitted == MAX_REQUESTS
    assert service.metric("http_refused_total") - before == len(refused) + 1
    assert post(service, mel).status_code == 200, "the places are free again"
    assert eventually(lambda: service.metric("http_in_progress") == 0)


def test_voices_of_a_folder_come_and_go(tiny_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "voices").mkdir()
    mel = speech_mel(Bundle.open(tiny_bundle_path), 50)
    with Vocoder.load(with_ends(tiny_bundle_path, tmp_path / "voices" / "one.melrt"), device="cpu") as vocoder:
        expected = to_int16(vocoder(mel))
    limits = ("--memory", 5, "--pin", "one", "--timeout", 1)
    with running(tmp_path, "voices", "--edges", "model", *limits) as service:
        assert_close(np.frombuffer(post(service, body(mel), "", format="pcm").content, "<i2"), expected)
        shutil.copytree(tiny_bundle_path, tmp_path / "voices" / "two.melrt")
        full = post(service, body(mel), "two")
        assert "MiB" in full.json()["detail"], "the pinned voice leaves no room"
        assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
        (tmp_path / "voices" / "two.melrt" / "manifest.json").write_text("{")
        facts = service.client.get("/voices").json()["voices"]
        assert [one["name"] for one in facts] == ["one", "two"]
        assert (facts[0]["loaded"], "manifest" in facts[1]["error"]) == (True, True)
        assert post(service, body(mel), "two").status_code == 500
        assert "/v1/speech" in service.log.read_text(), "an error of the service is logged"
        assert post(service, body(mel), "three").json()["detail"] == "there is no voice 'three'; there are: one, two"


def test_sigterm_completes_admitted_requests(demo_bundle: Bundle, tmp_path: Path) -> None:
    with running(tmp_path, demo_bundle.path, "--drain-seconds", 1) as service:
        end_with_sigterm(service, demo_bundle)


def test_a_second_signal_breaks_off(demo_bundle: Bundle, tmp_path: Path) -> None:
    with running(tmp_path, demo_bundle.path) as service:
        content = body(speech_mel(demo_bundle, MAX_FRAMES))
        with (
            service.client.stream("POST", "/v1/speech", content=content, params={"format": "pcm"}) as answer,
            conversation(service, "lj") as stream,
        ):
            pieces = answer.iter_raw()
            next(pieces)
            assert stream.recv(TIMEOUT)
            service.process.send_signal(signal.SIGINT)
            assert eventually(lambda: service.ready() == 503)
            service.process.send_signal(signal.SIGINT)
            with pytest.raises(httpx.TransportError):
                list(pieces)
            assert service.process.wait(TIMEOUT) == 0


def end_with_sigterm(service: Running, demo_bundle: Bundle) -> None:
    mel = speech_mel(demo_bundle, 3000)
    samples = mel.shape[1] * demo_bundle.manifest.spec.hop
    with (
        service.client.stream("POST", "/v1/speech", content=body(mel), params={"voice": "lj", "format": "pcm"}) as answer,
        conversation(service, "lj") as stream,
    ):
        pieces = answer.iter_raw()
        size = len(next(pieces))
        assert stream.recv(TIMEOUT)
        service.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: service.ready() == 503)
        assert post(service, body(mel[:, :50])).status_code == 503
        assert service.client.get("/healthz").status_code == 200
        size += sum(map(len, pieces))
        stream.send(body(mel[:, :100]))
        stream.send("end")
        streamed = sum(len(message) for message in stream if isinstance(message, bytes))
    assert (size, streamed) == (2 * samples, 2 * 100 * demo_bundle.manifest.spec.hop)
    assert service.process.wait(TIMEOUT) == 0
    with pytest.raises(httpx.ConnectError):
        service.client.get("/readyz")
