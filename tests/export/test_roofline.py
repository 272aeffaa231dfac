"""Rooflines of GPUs: the table of public figures."""

from __future__ import annotations

import pytest

from melrt.errors import ConfigError
from melrt_export.gpu_table import GPUS, gpu_figures


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
