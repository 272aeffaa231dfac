"""Rooflines of GPUs: the table of public figures, and the bounds of fused engines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from melrt.bundle import Bundle
from melrt.errors import ConfigError
from melrt_export.fused.lower import Lowered, lower
from melrt_export.fused.roofline import BATCH, FRAMES, fused_work, int8_gains, real_time_factor, separate_work, whole_stage_work
from melrt_export.generator.config import GeneratorConfig
from melrt_export.gpu_table import GPUS, gpu_figures
from melrt_export.graph.deploy import deploy_graph

PUBLISHED = GeneratorConfig()


@pytest.mark.parametrize(
    ("name", "short"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("l4", "L4"), ("NVIDIA H200", "H200")],
)
def test_a_gpu_is_found_by_the_driver_s_name(name: str, short: str) -> None:
    assert gpu_figures(name).name == short


@pytest.mark.parametrize("name", ["NVIDIA L40S", "NVIDIA GeForce RTX 4090D", ""])
def test_a_gpu_that_only_looks_alike_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="H200, H100, A100, L4, RTX 4090, RTX 5090"):
        gpu_figures(name)


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic() -> None:
    h100 = gpu_figures("H100")
    assert h100.microseconds(989.4e6, 1) == pytest.approx(1)  # 989.4 TFLOP/s for one microsecond
    assert h100.microseconds(1, 3352e3) == pytest.approx(1)
    assert h100.microseconds(989.4e6, 1, int8=True) == pytest.approx(0.5, rel=1e-3)


def test_the_dense_rates_agree_with_the_public_clocks() -> None:
    """INT8 runs at twice the FP16 rate, or four times where FP32 accumulation halves FP16; sparse figures would break this for one."""
    for gpu in GPUS:
        assert gpu.int8_tops / gpu.fp16_tflops == pytest.approx(4 if gpu.name.startswith("RTX") else 2, rel=1e-2), gpu
        assert gpu.source.startswith("https://")


def lowered(config: GeneratorConfig) -> Lowered:
    weights = {name: np.zeros(shape, np.float32) for name, shape in config.tensors()}
    return lower(config, deploy_graph(config, weights).SerializeToString())


def test_the_work_of_the_published_generator() -> None:
    batch, frames = 4, 256
    fused, separate = fused_work(lowered(PUBLISHED), batch, frames), separate_work(PUBLISHED, batch, frames)
    assert list(fused) == list(separate) == ["first", "stages.0", "stages.1", "stages.2", "stages.3", "last"]
    assert sum(work.flop for works in separate.values() for work in works) == PUBLISHED.flop_per_frame * batch * frames
    for stage in list(fused)[1:-1]:
        assert sum(w.flop for w in fused[stage]) == sum(w.flop for w in separate[stage]), "no tile of a stage is padded"
    # stage 3, 256 steps a frame: 64 channels at half the steps are read, 32 written; each block reads and writes 32
    upsample, *blocks = fused["stages.3"]
    steps = batch * frames * 256
    assert upsample.memory == 2 * (steps // 2 * 64 + steps * 32 + 2 * 64 * 64)
    assert [block.memory for block in blocks] == [2 * (2 * steps * 32 + 5 * 32 * 32)] * 3
    # 128 steps of a tile read all weights again, and each of them three taps and the shortcut
    tiles = steps // 128
    assert blocks[0].cache == (2 * (2 * steps * 32 + tiles * 5 * 32**2), 2 * (5 * steps * 32 + tiles * 5 * 32**2))
    # the last convolution reads 24 steps for 16 outputs, the columns of its product, and writes them in float32
    (last,) = fused["last"]
    assert (last.flop, last.memory) == (2 * steps * 24 * 32, steps * (2 * 32 + 4) + 2 * 24 * 32 * 16)
    # the mel is read in float32 and written in half precision, which the first convolution reads
    transposed, first = fused["first"]
    assert (transposed.flop, transposed.memory) == (0, batch * frames * 80 * (4 + 2))
    assert first.memory == batch * frames * (2 * 80 + 2 * 512) + 2 * 7 * 96 * 512
    # the same stage in separate kernels: each block's dilated and shortcut convolution read and write, the pointwise one reads both
    assert sum(work.memory for work in separate["stages.3"]) == upsample.memory + 3 * 2 * (7 * steps * 32 + 5 * 32 * 32)
    whole = whole_stage_work(PUBLISHED, fused, batch, frames)
    assert whole["stages.3"][0].memory == upsample.memory + 2 * 3 * 5 * 32 * 32


def test_fewer_bytes_bound_a_voice_less() -> None:
    for config in (PUBLISHED, replace(PUBLISHED, channels=384, upsample_scales=(5, 5, 3), out_channels=4, pqmf_taps=62)):
        fused, separate = fused_work(lowered(config)), separate_work(config)
        whole = whole_stage_work(config, fused)
        memory = [sum(work.memory for works in stages.values() for work in works) for stages in (whole, fused, separate)]
        assert memory == sorted(memory)
        assert set(fused) == set(separate)
        for gpu in GPUS:
            assert real_time_factor(whole, gpu, 1) >= real_time_factor(fused, gpu, 1) * (1 - 1e-9), "but for rounding"
    h100, h200 = (real_time_factor(fused_work(lowered(PUBLISHED)), gpu_figures(name), 1) for name in ("H100", "H200"))
    assert h100 < h200 < h100 * 4800 / 3352, "only some kernels wait for memory"


def test_int8_pays_where_arithmetic_or_its_input_counts() -> None:
    h100 = int8_gains(PUBLISHED, gpu_figures("H100"))
    assert list(h100)[:5] == ["first", *(f"stages.0.{kind}" for kind in ("upsample", "dilated", "pointwise", "shortcut"))]
    assert "last" not in h100
    assert len(h100) == 1 + 4 * 4
    # stage 3, 32 channels, waits for memory: a shortcut reads and writes 2 + 2 bytes a value, in INT8 1 + 2, with its own kernel 3 more
    steps = BATCH * FRAMES * 256 * 32
    assert h100["stages.3.shortcut"][0] == pytest.approx((4 * steps + 2 * 32**2) / (3 * steps + 32**2), rel=1e-6)
    assert h100["stages.3.shortcut"][1] < 0.7
    # what a dilated convolution writes is read by the pointwise one alone, so it is INT8 as well
    assert h100["stages.3.dilated"][0] == pytest.approx(2, rel=1e-3)
    # the first upsampling computes: 256 x 512 x 16 weights for each step
    assert h100["stages.0.upsample"][0] == pytest.approx(2, rel=0.01)
    assert 1.2 < h100["stages.0.upsample"][1] < 2
    l4 = int8_gains(PUBLISHED, gpu_figures("L4"))
    assert l4["stages.1.dilated"][1] < 1.05 < int8_gains(PUBLISHED, gpu_figures("A100"))["stages.0.upsample"][1]


def test_the_command_shows_bounds_as_bounds(melrt, tiny_bundle: Bundle) -> None:
    code, out, _ = melrt("info", tiny_bundle.path, "--roofline")
    assert code == 0
    assert "Bounds by public figures, not measurements" in out
    assert all(gpu.name in out for gpu in GPUS)
    assert "Bounds of INT8 over FP16" in out
    assert "stages.1.dilated" in out
