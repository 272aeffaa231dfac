"""ONNX Runtime's CUDA settings, with a stand-in for its package: no GPU is needed to see what is asked of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.runtime.reference import speech_mel

from melrt.backends import onnxruntime, select
from melrt.backends.onnxruntime import CUDA_BATCH, CUDA_WINDOW, OnnxModel, OnnxRuntime
from melrt.bundle import Bundle
from melrt.errors import BackendError
from melrt.vocoder import Vocoder

# A further model of 0.07 MB takes 1.2 MB in a shared arena, and 13 MB if its runs have an arena of their own.
MOST_MB_EACH = 5.0


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
        return SimpleNamespace(add_session_config_entry=lambda key, value: None)

    def InferenceSession(self, model: bytes, options: object, providers: list[Any]) -> SimpleNamespace:  # noqa: N802
        self.calls.append("session")
        self.providers = providers
        return SimpleNamespace(get_providers=lambda: [self._used])


@pytest.mark.parametrize(("precision", "tf32"), [("auto", "0"), ("fp32", "0"), ("tf32", "1")])
def test_tf32_is_computed_only_by_name(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, precision: str, tf32: str) -> None:
    """Both FP32 graphs and the captured window compute alike."""
    used: list[str] = []
    package = Package("CUDAExecutionProvider")

    def session(model: bytes, options: object, providers: list[Any]) -> SimpleNamespace:
        used.append(providers[0][1]["use_tf32"])
        return SimpleNamespace(get_providers=lambda: [providers[0][0]])

    monkeypatch.setattr(package, "InferenceSession", session)
    monkeypatch.setattr(select, "_GPU_PRECISIONS", ("tf32", "fp32"))  # the bundle's FP16 graphs would come first
    monkeypatch.setattr(onnxruntime, "_onnxruntime", lambda: package)
    vocoder = Vocoder.load(tiny_bundle, device="cuda", backend="onnxruntime", precision=precision)
    assert vocoder.backend.precision == ("fp32" if precision == "auto" else precision)
    assert used[:3] == [tf32] * 3


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


class CudaSession:
    """ONNX Runtime's rules for CUDA graphs: one per number and thread, captured in the third run, with fixed addresses."""

    def __init__(self, package: CudaPackage, model: bytes, providers: list[Any]) -> None:
        self.package, self.model, self.providers = package, package.on_cpu[model], providers
        self.runs: dict[tuple[int, str], int] = {}
        self.captured: dict[tuple[int, str], Any] = {}

    def get_providers(self) -> list[str]:
        return [name if isinstance(name, str) else name[0] for name in self.providers]

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(shape=["batch", 80, "frames"])]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="audio")]

    def io_binding(self) -> SimpleNamespace:
        bound: dict[str, Any] = {}
        return SimpleNamespace(bound=bound, bind_ortvalue_input=bound.__setitem__, bind_ortvalue_output=bound.__setitem__)

    def run(self, names: None, feeds: dict[str, np.ndarray], options: Any = None) -> list[np.ndarray]:
        captures = "enable_cuda_graph" in self.providers[0][1]
        assert not captures or options.entries["gpu_graph_id"] == "-1", "it would be captured"
        self.package.plain.append(feeds["mel"].shape)
        return [self.model.run(feeds["mel"])]

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        key = threading.get_ident(), options.entries["gpu_graph_id"]
        self.runs[key] = self.runs.get(key, 0) + 1
        if self.runs[key] == 3:
            if self.package.failing:
                raise RuntimeError("CUDA error 900: operation not permitted when stream is capturing")
            assert not self.package.loaded, "a capture fails CUDA calls of other threads"
            self.captured[key] = binding.bound["mel"].array, binding.bound["audio"].array
        mel, audio = self.captured.get(key, (binding.bound["mel"].array, binding.bound["audio"].array))
        self.package.replays += key in self.captured
        if self.package.broken:
            raise RuntimeError("CUDA error 700")
        audio[:] = self.model.run(mel.copy())


class CudaPackage(Package):
    """onnxruntime-gpu with sessions that compute."""

    def __init__(self, *, refuses: bool = False, failing: bool = False) -> None:
        super().__init__("CUDAExecutionProvider")
        self.refuses, self.failing, self.loaded, self.broken = refuses, failing, False, False
        self.plain: list[tuple[int, ...]] = []
        self.replays = 0
        self.on_cpu: dict[bytes, OnnxModel] = {}
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self.allocate)

    def allocate(self, shape: list[int], kind: type, device: str, index: int) -> SimpleNamespace:
        assert (device, index) == ("cuda", 1)
        array = np.full(shape, np.nan, kind)
        return SimpleNamespace(array=array, numpy=array.copy, update_inplace=lambda values: array.__setitem__(slice(None), values))

    def RunOptions(self) -> SimpleNamespace:  # noqa: N802
        entries: dict[str, str] = {}
        return SimpleNamespace(entries=entries, add_run_config_entry=entries.__setitem__)

    def InferenceSession(self, model: bytes, options: object, providers: list[Any]) -> CudaSession:  # noqa: N802
        if self.refuses and "enable_cuda_graph" in providers[0][1]:
            raise ValueError("not all nodes are on the CUDAExecutionProvider")
        return CudaSession(self, model, providers)


def load(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, package: CudaPackage) -> OnnxRuntime:
    """Load a voice on the stand-in; its sessions compute on the CPU, with the real package."""
    models = {graph: bundle.read(bundle.find("onnx", graph=graph, precision="fp32")[0]) for graph in ("edge", "interior")}
    package.on_cpu = {data: OnnxModel(data) for data in models.values()}
    monkeypatch.setattr(onnxruntime, "_onnxruntime", lambda: package)
    backend = OnnxRuntime(models, "fp32", "cuda:1")
    package.loaded = True
    package.plain.clear()
    return backend


def windows(bundle: Bundle, batch: int, frames: int = CUDA_WINDOW) -> np.ndarray:
    return np.stack([speech_mel(bundle, frames, seed) for seed in range(batch)])


def test_the_window_is_replayed_as_a_cuda_graph(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    package = CudaPackage()
    reference = OnnxModel(tiny_bundle.read(tiny_bundle.find("onnx", graph="interior", precision="fp32")[0]))
    expected = {batch: reference.run(windows(tiny_bundle, batch)) for batch in (1, 3, CUDA_BATCH)}
    backend = load(monkeypatch, tiny_bundle, package)
    before = package.replays
    for batch, audio in expected.items():
        found: list[np.ndarray] = []
        caller = threading.Thread(
            target=lambda batch=batch, found=found: found.append(backend.run("interior", windows(tiny_bundle, batch)))
        )
        caller.start()
        caller.join()
        assert np.abs(found[0] - audio).max() < 1e-6
    assert package.replays == before + 3
    assert not package.plain
    backend.run("interior", windows(tiny_bundle, 1, 64))
    backend.run("interior", windows(tiny_bundle, CUDA_BATCH + 1))
    assert package.plain == [(1, 80, 64), (CUDA_BATCH + 1, 80, CUDA_WINDOW)], "other shapes are not captured"
    assert not caplog.messages


@pytest.mark.parametrize("fault", ["refuses", "failing"])
def test_a_provider_that_cannot_capture_runs_without(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, fault: str) -> None:
    package = CudaPackage(**{fault: True})
    backend = load(monkeypatch, tiny_bundle, package)
    assert backend.run("interior", windows(tiny_bundle, 2)).any()
    assert package.plain == [(2, 80, CUDA_WINDOW)]


def test_a_graph_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    package = CudaPackage()
    backend = load(monkeypatch, tiny_bundle, package)
    package.broken = True
    for _ in range(2):
        assert backend.run("interior", windows(tiny_bundle, 2)).any()
    assert len(package.plain) == 2
    assert caplog.text.count("a captured CUDA graph failed") == 1


LOADS_MANY = """
import sys, numpy as np
from pathlib import Path
from melrt.backends.onnxruntime import OnnxModel
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
model, mel, models = Path(sys.argv[1]).read_bytes(), np.full((1, 80, 144), -2.0, np.float32), []
for count in range(13):
    models.append(OnnxModel(model, threads=1))
    assert models[-1].run(mel).any()
    if not count:
        first = resident()
print((resident() - first) / 12)
"""


def test_models_share_the_memory_of_their_runs(tiny_bundle_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to see the memory of a process")
    command = [sys.executable, "-c", LOADS_MANY, str(tiny_bundle_path / "interior.fp32.onnx")]
    each = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert each < MOST_MB_EACH
