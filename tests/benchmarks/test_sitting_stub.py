"""The stub engine's checks, on the fake GPU: each path runs, the audio is the expected one, and faults of the runtime are found."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtime import fake_gpu
from tests.runtime.fake_arrays import GpuArray
from tests.runtime.fake_gpu import Gpu
from tests.runtime.fake_tensorrt import install

from melrt.backends.tensorrt.backend import EngineBackend
from melrt.backends.tensorrt.slot import ExecutionSlot
from melrt.planning.windows import ReceptiveField, Window, plan
from melrt_benchmarks.inference import host
from melrt_benchmarks.sitting.rows import Rows
from melrt_benchmarks.sitting.stub import arrays, checks, engine, faults
from melrt_benchmarks.sitting.stub.bundles import stub_bundles
from melrt_benchmarks.sitting.stub.cli import CHECKS, Check, run_checks

# Two voices fit.
MEMORY = 80 << 20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A fake GPU that also has the stub's kernels and the driver's functions that the checks call."""
    kernels = fake_gpu._kernels
    monkeypatch.setattr(fake_gpu, "_kernels", lambda gpu: kernels(gpu) | _stub_kernels(gpu))
    monkeypatch.setattr(engine, "_kernels", {})
    for variable in ("MELRT_CACHE", "MELRT_KEY"):
        monkeypatch.setenv(variable, "")  # so that the stub's values end with the test
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("replaced"))
    gpu = install(monkeypatch)
    _extend_driver(gpu, sys.modules["cuda.bindings"].driver)
    monkeypatch.setitem(sys.modules, "torch", _torch(gpu))
    monkeypatch.setattr(Tensor, "total", 0)
    for module, name, value in ((arrays, "COUNTS", (1, 3)), (arrays, "ROUNDS", 2), (host, "CALLS", 9), (host, "CHUNKS", 9),
                                (host, "BULK_UTTERANCES", 3), (arrays, "STREAMS", 1)):  # fmt: skip  # its streams belong to one thread
        monkeypatch.setattr(module, name, value)
    return gpu


def _stub_kernels(gpu: Gpu) -> dict[str, Callable[..., None]]:
    """The stub's kernels in numpy."""

    def score(places, mel, bands, frames, left, right, edge, scores) -> None:
        mels = gpu.floats(mel, places * int(bands) * int(frames)).reshape(places, int(bands), int(frames))
        for place, one in enumerate(mels):
            padded = np.pad(one, ((0, 0), (int(left), int(right))), mode="edge" if edge else "constant")
            row = engine.expected_audio(padded, field := ReceptiveField(int(left), int(right), 1, 1), 1)[field.left :][: int(frames)]
            bad = np.lib.stride_tricks.sliding_window_view(padded.max(axis=0) >= engine.TOO_LARGE, field.context + 1).any(axis=1)
            gpu.floats(int(scores) + 4 * place * int(frames), int(frames))[:] = np.where(bad, np.inf, row / np.float32(engine.SCALE))

    def shape(places, scores, frames, hop, scale, audio) -> None:
        rows = gpu.floats(scores, places * int(frames))[:, None] * np.arange(1, int(hop) + 1, dtype=np.float32) * scale
        gpu.floats(audio, rows.size)[:] = rows.reshape(-1)

    return {"score": score, "shape": shape}


def _extend_driver(gpu: Gpu, driver: types.SimpleNamespace) -> None:
    def synchronize(handle: int) -> tuple[int]:
        gpu.streams[handle].invalidated = True  # within a capture
        return (900,)

    def make_context(*_: object) -> tuple[int, int]:
        gpu.set_context(7)
        return 0, 7

    def allocate(size: int) -> int:
        if used() + size > MEMORY:
            raise fake_gpu.CUDAError("CUDA_ERROR_OUT_OF_MEMORY")
        return Gpu.allocate(gpu, size)

    used = lambda: sum(map(len, gpu.memory.values())) - Tensor.total  # noqa: E731
    gpu.allocate = allocate  # type: ignore[method-assign]
    driver.CUstreamCaptureStatus = types.SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0)
    driver.cuStreamIsCapturing = lambda handle: (0, int(gpu.streams[handle].capturing is not None))
    driver.cuStreamSynchronize = synchronize
    driver.cuCtxCreate, driver.cuCtxDestroy, driver.cuCtxSynchronize = make_context, lambda own: (0,), lambda: (0,)
    driver.CUmemPool_attribute = types.SimpleNamespace(CU_MEMPOOL_ATTR_USED_MEM_CURRENT=1, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT=2)
    driver.cuDeviceGetMemPool, driver.cuMemPoolTrimTo = lambda device: (0, 5), lambda pool, keep: (0,)
    driver.cuMemPoolGetAttribute = lambda pool, kind: (0, used())
    driver.cuMemGetInfo = lambda: (0, MEMORY - used(), MEMORY)


class Tensor(GpuArray):
    """A tensor of the fake PyTorch."""

    device = "cuda:0"
    total = 0
    """Bytes of all tensors, which are never freed."""

    def __init__(self, gpu: Gpu, values: np.ndarray, stream: fake_gpu.Stream) -> None:
        Tensor.total += values.nbytes
        super().__init__(gpu, values, stream)

    def data_ptr(self) -> int:
        return self.pointer

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.get()

    def is_contiguous(self) -> bool:
        return self.strides == np.empty(self.shape, self.dtype).strides

    @property
    def T(self) -> Tensor:  # noqa: N802
        twin = copy.copy(self)
        twin.shape, twin.strides = self.shape[::-1], self.strides[::-1]
        return twin

    def copy_(self, source: Tensor) -> None:
        self._queue(lambda view: np.copyto(view, self.gpu.view(source.pointer, len(view))))

    def zero_(self) -> None:
        self._queue(lambda view: view.fill(0))

    def clone(self) -> Tensor:
        twin = sys.modules["torch"].empty(self.shape, self.dtype)
        twin.copy_(self)
        return twin

    def _queue(self, work: Callable[[np.ndarray], object]) -> None:
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        sys.modules["torch"].current.add(lambda: work(self.gpu.view(self.pointer, size)))


Tensor.__module__ = "torch"


def _torch(gpu: Gpu) -> types.ModuleType:
    """A PyTorch whose arrays are on the fake GPU, with a default stream and others."""

    class Stream(fake_gpu.Stream):
        cuda_stream = property(lambda self: self.handle)
        synchronize = fake_gpu.Stream.sync

        def query(self) -> bool:
            return not self.queue

    @contextlib.contextmanager
    def stream(other: Stream) -> Iterator[None]:
        default, torch.current = torch.current, other
        yield
        torch.current = default

    def empty(shape: tuple[int, ...], dtype: object, device: object = None) -> Tensor:
        return Tensor(gpu, np.empty(shape, dtype), torch.current)

    torch = types.ModuleType("torch")
    torch.current = Stream(gpu)
    torch.float32, torch.int16, torch.empty, torch.zeros_like = np.float32, np.int16, empty, lambda like: empty(like.shape, like.dtype)
    torch.from_numpy = lambda array: types.SimpleNamespace(cuda=lambda: Tensor(gpu, array, torch.current))
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: True, Stream=lambda: Stream(gpu), stream=stream, current_stream=lambda device: torch.current,
        synchronize=lambda: [one.sync() for one in list(gpu.streams.values()) if not one.closed],
        _sleep=lambda cycles: torch.current.add(lambda: None),
    )  # fmt: skip
    return torch


def run(voice: Path, *wanted: Check, file: Path | None = None) -> Rows:
    rows = Rows(file)
    with stub_bundles(voice) as bundles:
        run_checks(bundles, rows, wanted)
    return rows


def test_all_checks(gpu: Gpu, tiny_bundle_path: Path, tmp_path: Path) -> None:
    rows = run(tiny_bundle_path, *CHECKS, file=tmp_path / "stub.json")
    outcomes = {row.name: (row.outcome, row.detail) for row in rows.rows}
    elsewhere = {"arrays of cupy", "order with a stream of cupy", "arrays of pycuda"}
    assert [(name, *row) for name, row in outcomes.items() if row[0] != "passed" and name not in elsewhere] == []
    written = json.loads((tmp_path / "stub.json").read_text())
    assert [row["name"] for row in written["rows"]] == list(outcomes)
    assert written["host_cost"]["bulk_times_real_time"] > 0
    assert written["device_arrays"]["1 s"]["p50_ms"] > 0


def _less_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: Any) -> Iterator[Window]:
        for window in plan(*arguments):
            late = window.graph == "interior"
            yield replace(window, start=window.start + late, stop=window.stop + late) if late else window

    monkeypatch.setattr("melrt.scheduling.synthesizer.plan", shifted)


def _wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = EngineBackend._keep
    monkeypatch.setattr(EngineBackend, "_keep", lambda self, slot, jobs, first: keep(self, slot, jobs[::-1], first))


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Check]] = {
    "windows that lack a frame of context": (_less_context, checks.calls_of_many_lengths),
    "graphs that are never launched": (
        lambda patch: patch.setattr("melrt.backends.tensorrt.slot.CAPTURE_AFTER", 10**6), checks.captured_graphs_are_used,
    ),
    "windows of a batch in each other's place": (_wrong_place, arrays.arrays_of_torch),
    "a run that does not wait for the mel": (
        lambda patch: patch.setattr("melrt.backends.tensorrt.backend.in_order", lambda *_: None),
        arrays.order_with_a_stream_of_torch,
    ),
    "a context that stays current": (
        lambda patch: patch.setattr("melrt.backends.tensorrt.gpu_arrays.preserved_context", contextlib.nullcontext),
        faults.the_callers_context_is_restored,
    ),
    "memory that is not released": (lambda patch: patch.setattr(ExecutionSlot, "close", lambda self: None), faults.memory_is_released),
    "reports that are not logged": (
        lambda patch: patch.setattr(EngineBackend, "_warn_of_reports", lambda self, slot: None),
        faults.samples_that_are_not_finite_on_the_device,
    ),
    "memory that a failed opening keeps": (
        lambda patch: patch.setattr(EngineBackend, "close", lambda self: None), faults.a_full_gpu,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_runtime_are_found(gpu: Gpu, tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    plant, check = FAULTS[fault]
    plant(monkeypatch)
    (row,) = run(tiny_bundle_path, check).rows
    assert row.outcome == "failed", row
