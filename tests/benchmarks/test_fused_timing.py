"""Times of fused kernels, with the simulated driver's events."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.torch_voices import random_voice

from melrt.bundle import Bundle
from melrt_benchmarks.sitting import fused_timing
from melrt_benchmarks.sitting.steps import SKIPPED
from melrt_export.fused.build import FusedOptions, build_fused
from melrt_export.fused.tiles import default_tile
from melrt_export.generator.config import GeneratorConfig
from melrt_export.gpu_table import gpu_figures

pytest.importorskip("triton", reason="the kernels need the extra `fused-build`")
from tests.export.fake_fused import FusedDriver, compile_fake, install_fused
from tests.export.test_tuning import FAST, GPU, count_up, start_thread

CONFIG = GeneratorConfig(in_channels=8, channels=16, kernel_size=5, upsample_scales=(3,), stacks=2)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FusedDriver:
    monkeypatch.setattr("melrt_export.fused.build.default_tile", lambda kernel, capability: default_tile(kernel, capability, 256))
    monkeypatch.setattr(fused_timing, "SHAPES", ((1, 11), (2, 8)))
    for name, value in (("LAUNCHES", 1), ("RUNS", 2), ("ROUNDS", 1)):
        monkeypatch.setattr(fused_timing, name, value)
    monkeypatch.setattr(fused_timing, "_limits", lambda gpu: gpu_figures("H100"))
    fused = install_fused(monkeypatch)
    return fused


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> int:
    monkeypatch.setattr(sys, "argv", ["fused_timing", *map(str, arguments)])
    return fused_timing.main()


def test_every_layer_and_the_network_are_timed(driver: FusedDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(random_voice(CONFIG, tmp_path)[0])
    _, program = build_fused(bundle, FusedOptions(("9.0",)))
    assert run(monkeypatch, bundle.path, tmp_path / "times.json") == 0
    shapes = json.loads((tmp_path / "times.json").read_text())["shapes"]
    assert list(shapes) == ["1 x 11", "2 x 8"]
    for name, figures in shapes.items():
        assert list(figures["layers"]) == [launch.layer for launch in program.launches]
        assert figures["us"] == pytest.approx(70 * len(program.launches))
        assert all(layer["us"] == pytest.approx(70) for layer in figures["layers"].values()), name
        assert all(0 < layer["bound_us"] < 1 for layer in figures["layers"].values())
    sample_rate = bundle.manifest.spec.sample_rate
    assert shapes["2 x 8"]["times_real_time"] == pytest.approx(1e6 * 2 * 8 * 3 / sample_rate / shapes["2 x 8"]["us"])


def test_a_copy_of_the_voice_is_tuned_and_timed(driver: FusedDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution before the blocks takes 70 us with the default tile and 20 us with the other one."""
    bundle = Bundle.open(random_voice(CONFIG, tmp_path)[0])
    build_fused(bundle, FusedOptions(("9.0",)))
    before = (bundle.path / "manifest.json").read_bytes()
    tiles = lambda kernel, default: [default, *([replace(default, stages=FAST)] if kernel.name == "first" else [])]  # noqa: E731
    for name, value in (("tuning.WINDOW", 24), ("tuning.BATCH", 2), ("tuning.second", lambda spec: 11), ("trial_bench.ROUNDS", 1),
                        ("trial_bench.MOST_LAUNCHES", 1), ("children.start_process", start_thread), ("tuning.compile_kernel", compile_fake),
                        ("tuning.candidates", tiles), ("build.find_gpu", lambda: GPU),
                        ("build.check_on_gpu", lambda *_: {"snr_db": 61.0})):  # fmt: skip
        monkeypatch.setattr(f"melrt_export.fused.{name}", value)
    monkeypatch.setattr("tests.export.fake_fused.interpret", count_up)
    driver.cost = lambda kernel, tile, grid: 0.02 if tile.stages == FAST else 0.07
    assert run(monkeypatch, bundle.path, tmp_path / "times.json", "--tune") == 0
    figures = json.loads((tmp_path / "times.json").read_text())
    assert (figures["tuning"]["gpu"], figures["tuning"]["timed"], figures["tuning"]["kept"]) == ("a GPU", 1, True)
    times = {name: layer["us"] for name, layer in figures["shapes"]["1 x 11"]["layers"].items()}
    assert times == pytest.approx({name: 20 if name == "first" else 70 for name in times})
    assert (bundle.path / "manifest.json").read_bytes() == before


def test_a_call_that_the_driver_refuses_is_no_time(driver: FusedDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(random_voice(CONFIG, tmp_path)[0])
    assert run(monkeypatch, bundle.path, tmp_path / "times.json") == SKIPPED, "it has no fused engine"
    build_fused(bundle, FusedOptions(("9.0",)))
    sys.modules["cuda.bindings"].driver.cuEventElapsedTime = lambda begin, end: (600, 0.0)
    with pytest.raises(RuntimeError, match="refused a call: 600"):
        run(monkeypatch, bundle.path, tmp_path / "times.json")
    assert not (tmp_path / "times.json").exists()
