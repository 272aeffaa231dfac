"""ONNX Runtime's CUDA settings, with a stand-in for its package: no GPU is needed to see what is asked of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from melrt.backends import onnxruntime
from melrt.backends.onnxruntime import OnnxModel
from melrt.errors import BackendError


class Package:
    """The parts of onnxruntime-gpu that `OnnxModel` uses."""

    __version__ = "1.32"

    def __init__(self, used: str) -> None:
        self.calls: list[str] = []
        self.providers: list[Any] = []
        self._used = used

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        self.calls.append("preload")

    def SessionOptions(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace()

    def InferenceSession(self, model: bytes, options: object, providers: list[Any]) -> SimpleNamespace:  # noqa: N802
        self.calls.append("session")
        self.providers = providers
        return SimpleNamespace(get_providers=lambda: [self._used])


def test_cuda_computes_in_fp32_and_finds_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("CUDAExecutionProvider")
    monkeypatch.setattr(onnxruntime, "_onnxruntime", lambda: package)
    OnnxModel(b"", "cuda:1", threads=1)
    assert package.calls == ["preload", "session"]
    (name, options), fallback = package.providers
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert (options["device_id"], options["use_tf32"]) == ("1", "0")


def test_cuda_that_falls_back_to_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "_onnxruntime", lambda: Package("CPUExecutionProvider"))
    with pytest.raises(BackendError, match="no usable CUDA device"):
        OnnxModel(b"", "cuda:0")
