"""The page of `melrt serve http`: used in headless Chromium, wide and narrow, and read as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.runtime.reference import speech_mel
from tests.runtime.serving.chromium import PROGRAM, Tab, browser
from tests.runtime.serving.http_service import Running, eventually, running

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.mel.features import mel_from_audio

FRAMES = 300
# Number of colors in a canvas: a picture of speech has many, an empty one has one.
COLORS = """((id) => {
  const canvas = document.getElementById(id);
  return new Set(new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size;
})"""


@pytest.fixture(scope="module")
def service(tiny_bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service"), tiny_bundle_path) as one:
        yield one


def test_the_page_uses_this_service_alone(service: Running) -> None:
    answer = service.client.get("/")
    html = answer.text
    assert html == resources.files("melrt.serving.http").joinpath("page.html").read_text("utf-8")
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", html), "another host"
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:)", html), "a file that is not shipped"
    paths = set(re.findall(r"[\"'](/[\w/]+)[\"']", html))
    assert paths >= {"/voices", "/v1/mel", "/v1/speech"}
    for path in paths:
        assert service.client.get(path).status_code in (200, 405), path
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_a_recording_becomes_its_mel(service: Running, tiny_bundle: Bundle) -> None:
    spec = tiny_bundle.manifest.spec
    with Vocoder.load(tiny_bundle, device="cpu") as vocoder:
        audio = vocoder(speech_mel(tiny_bundle, 100))
    frames = np.frombuffer(service.client.post("/v1/mel", content=audio.astype("<f4").tobytes()).content, "<f4")
    np.testing.assert_allclose(frames.reshape(-1, spec.n_mels).T, mel_from_audio(audio, spec), atol=1e-5)  # sums in another order
    for wrong, reason in ((b"123", "3 bytes"), (b"", "0 samples"), (np.full(9000, np.inf, "<f4").tobytes(), "not finite")):
        answer = service.client.post("/v1/mel", content=wrong)
        assert (answer.status_code, reason in answer.json()["detail"]) == (422, True), answer.text


@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
def test_a_mel_and_a_recording_in_the_browser(service: Running, tiny_bundle: Bundle, tmp_path: Path) -> None:
    mel = speech_mel(tiny_bundle, FRAMES)
    np.save(tmp_path / "mel.npy", mel)
    np.save(tmp_path / "bands.npy", mel[:40])
    (tmp_path / "text.wav").write_text("not audio")
    with Vocoder.load(tiny_bundle, device="cpu") as vocoder:
        audio = np.asarray(vocoder(mel))
        soundfile.write(tmp_path / "recording.flac", np.stack([audio, audio], 1), vocoder.sample_rate)
    seconds = f"{len(audio) / vocoder.sample_rate:.2f} s"
    with browser(tmp_path / "profile") as tab:
        for width, name in ((1400, "mel.npy"), (390, "recording.flac")):
            tab.show(f"http://127.0.0.1:{service.port}/", width, 900)
            assert eventually(lambda: tab.evaluate("document.getElementById('voice')?.value") == "tiny")
            for wrong, reason in (("bands.npy", "40 bands"), ("text.wav", "neither a .npy file nor audio")):
                assert reason in chosen(tab, tmp_path / wrong, "wrong")
            text = chosen(tab, tmp_path / name, "done")
            assert f"{name}, {FRAMES} frames" in text
            assert text.count(seconds) == 3, "in the figures and at both axes"
            assert 0 < float(tab.evaluate("document.getElementById('factor').textContent")) < 10
            for canvas in ("source-mel", "result-mel"):
                assert tab.evaluate(f"{COLORS}('{canvas}')") > 100
            assert tab.evaluate(f"{COLORS}('result-wave')") > 1
            assert tab.evaluate("document.getElementById('source-audio').hidden") == (name == "mel.npy")
            assert eventually(lambda: abs(tab.evaluate("document.getElementById('result-audio').duration") - len(audio) / 22050) < 0.01)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
        hosts = {re.sub(r"^(blob:)?(\w+:(?://[^/]+)?).*", r"\2", request) for request in tab.requests}
    assert hosts <= {f"http://127.0.0.1:{service.port}", "data:"}
    assert len(tab.errors) == 2, tab.errors
    assert all("status of 422" in error for error in tab.errors), "the two mels of 40 bands, and nothing else"


def chosen(tab: Tab, path: Path, state: str) -> str:
    """Choose a file and return the page's text when it has been answered."""
    tab.evaluate("document.body.dataset.state = ''")
    tab.choose("#file", path)
    assert eventually(lambda: tab.evaluate("document.body.dataset.state") in ("done", "wrong"))
    text: str = tab.evaluate("document.body.innerText")
    assert tab.evaluate("document.body.dataset.state") == state, text
    return text
