"""`melrt doctor` reports each capability of a machine with the action that makes it usable."""

from __future__ import annotations

import pytest

from melrt import system
from melrt.system import Finding, Gpu, examine

RTX = "TensorRT-RTX engines, also built without a GPU"


def findings(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, missing: tuple[str, ...] = ()) -> dict[str, Finding]:
    monkeypatch.setattr(system, "find_gpu", lambda: gpu)
    monkeypatch.setattr(system, "_version", lambda name: None if name in missing else "1.0")
    return {finding.purpose: finding for finding in examine()}


@pytest.mark.parametrize(("capability", "ready"), [("8.7", False), ("9.0", False), ("10.0", False), ("8.9", True), ("12.0", True)])
def test_tensorrt_rtx_is_not_ready_on_unsupported_gpus(monkeypatch: pytest.MonkeyPatch, capability: str, ready: bool) -> None:
    found = findings(monkeypatch, Gpu("GPU", capability, 1))
    assert found[RTX].ready is ready
    assert ready or "8.7, 9.0, 10.0 are not supported" in found[RTX].found
    assert ready or "melrt[tensorrt]" in found[RTX].remedy
    assert found["TensorRT engines for data-center GPUs"].ready


def test_each_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, None, ("cuda-core", "soxr"))
    assert not found["NVIDIA GPU"].ready
    assert found[RTX] == Finding(RTX, False, "missing cuda-core", 'pip install "melrt[rtx]"')
    assert found["TensorRT engines for data-center GPUs"].remedy == 'pip install "melrt[tensorrt]"'
    assert found["reading and writing audio"] == Finding("reading and writing audio", False, "missing soxr", 'pip install "melrt[cli]"')
    assert found["export of checkpoints"].ready
    assert not any("librosa" in finding.found for finding in found.values())


def test_driver_of_cuda_12_names_its_own_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "driver_version", lambda: "12.8")
    found = findings(monkeypatch, Gpu("GPU", "8.9", 1), ("cuda-core",))
    assert found["NVIDIA GPU"].found.endswith("driver for CUDA 12.8")
    assert found[RTX].remedy == 'pip install "melrt[rtx-cuda12]"'
    monkeypatch.setattr(system, "driver_version", lambda: "13.0")
    assert findings(monkeypatch, None, ("cuda-core",))[RTX].remedy == 'pip install "melrt[rtx]"'
