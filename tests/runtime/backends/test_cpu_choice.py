"""`auto` on a CPU takes bfloat16 only if bundle, processor, OpenVINO and the stated quality allow it, and says why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from melrt import Vocoder
from melrt.backends import cpu_choice, select
from melrt.backends.cpu_choice import LOG_MEL, cpu_choices
from melrt.bundle import Artifact, Bundle
from melrt.errors import BackendError


@pytest.fixture
def with_bf16(tiny_bundle: Bundle) -> Callable[[dict[str, float]], Bundle]:
    """Return a function that adds graphs of this quality under the name of bf16; they are the FP32 graphs."""

    def add(quality: dict[str, float]) -> Bundle:
        for graph in ("edge", "interior"):
            data = tiny_bundle.read(tiny_bundle.find("onnx", graph=graph, precision="fp32")[0])
            entry = Artifact.of(f"{graph}.bf16.onnx", data, "onnx", graph=graph, precision="bf16", quality=quality)
            tiny_bundle.add(entry, data)
        return Bundle.open(tiny_bundle.path)

    return add


def set_machine(monkeypatch: pytest.MonkeyPatch, units: tuple[str, ...], installed: bool = True) -> None:
    for module in (cpu_choice, select):
        monkeypatch.setattr(module, "arithmetic", lambda kind: units)
    monkeypatch.setattr(cpu_choice, "find_spec", lambda name: object() if installed else None)


@pytest.mark.parametrize(
    ("quality", "units", "installed", "reason"),
    [
        ({LOG_MEL: 0.003}, ("amx_bf16",), True, "multiplies bfloat16 (amx_bf16), and the log-mel error on speech is +0.3%"),
        ({LOG_MEL: 0.02}, ("amx_bf16",), True, "+2.0%"),
        ({LOG_MEL: 0.021}, ("amx_bf16",), True, "+2.1% against FP32, and auto accepts 2%"),
        ({}, ("amx_bf16",), True, "does not state their log-mel error"),
        ({LOG_MEL: 0.003}, (), True, "does not multiply bfloat16"),
        ({LOG_MEL: 0.003}, ("avx512_bf16",), True, "without AMX, its units (avx512_bf16) were slower"),
        ({LOG_MEL: 0.003}, ("amx_bf16",), False, 'pip install "melrt[openvino]"'),
    ],
)
def test_auto_needs_everything_that_bfloat16_needs(
    with_bf16: Callable[[dict[str, float]], Bundle], monkeypatch: pytest.MonkeyPatch,
    quality: dict[str, float], units: tuple[str, ...], installed: bool, reason: str,
) -> None:  # fmt: skip
    bundle = with_bf16(quality)
    set_machine(monkeypatch, units, installed)
    bf16, fp32 = cpu_choices(bundle)
    assert reason in bf16.reason
    assert bf16.usable is (quality in ({LOG_MEL: 0.003}, {LOG_MEL: 0.02}) and "amx_bf16" in units and installed)
    assert (fp32.backend, fp32.precision, fp32.usable) == ("onnxruntime", "fp32", True)
    worse = replace(bundle.find("onnx", graph="edge", precision="bf16")[0], quality={LOG_MEL: 0.5})
    bundle.add(worse, bundle.read(worse))
    assert not next(iter(cpu_choices(Bundle.open(bundle.path)))).usable, "the worse of both graphs counts"


def test_bundle_without_bf16_runs_fp32(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, ("amx_bf16",))
    assert "the bundle has no bf16 graphs" in next(iter(cpu_choices(tiny_bundle))).reason
    with Vocoder.load(tiny_bundle, device="cpu") as vocoder:
        assert (vocoder.backend.name, vocoder.backend.precision, vocoder.backend.reason) == ("onnxruntime", "fp32", "")


def test_choice_is_logged_once_and_kept(
    with_bf16: Callable[[dict[str, float]], Bundle], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    bundle = with_bf16({LOG_MEL: 0.003})
    set_machine(monkeypatch, ("amx_bf16",))
    with caplog.at_level(logging.INFO, "melrt"), Vocoder.load(bundle, device="cpu") as vocoder:
        assert (vocoder.backend.name, vocoder.backend.precision) == ("openvino", "bf16")
        assert "+0.3%" in vocoder.backend.reason
    assert caplog.messages == [f"bf16 in OpenVINO on cpu is used: {vocoder.backend.reason}."]
    with Vocoder.load(bundle, device="cpu", precision="fp32") as vocoder:
        assert (vocoder.backend.name, vocoder.backend.reason) == ("onnxruntime", "")
    set_machine(monkeypatch, ())
    with pytest.raises(BackendError, match="does not multiply bfloat16.*melrt doctor"):
        Vocoder.load(bundle, precision="bf16")
