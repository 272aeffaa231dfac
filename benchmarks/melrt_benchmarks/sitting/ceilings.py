"""Measure what this GPU can do at most, by its own clock: `python -m melrt_benchmarks.sitting.ceilings FILE`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from melrt_benchmarks.measure.gpu_meter import EventClock
from melrt_benchmarks.sitting.steps import SKIPPED

ROUNDS = 15
GIB = 1 << 30
MIB = 1 << 20
SIDE = 8192


def main() -> int:
    """Write the file."""
    try:
        import torch
    except ImportError:
        sys.stdout.write("PyTorch is not installed here\n")
        return SKIPPED
    if not torch.cuda.is_available():
        sys.stdout.write("this PyTorch has no CUDA, or there is no GPU\n")
        return SKIPPED
    gpu = torch.cuda.get_device_properties(0)
    figures: dict[str, Any] = {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "L2_MiB": gpu.L2_cache_size / MIB}
    for name, measure in (*_copies(torch).items(), *_products(torch).items()):
        figures[name] = measure()
        sys.stdout.write(f"{name}: {figures[name]:.1f}\n")
        sys.stdout.flush()
        torch.cuda.empty_cache()
        Path(sys.argv[1]).write_text(json.dumps(figures, indent=1))
    return 0


def _copies(torch: Any) -> dict[str, Callable[[], float]]:
    """GB/s, read and written bytes together on the device, and one way between host and device."""

    def on_device(size: int, times: int) -> float:
        source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
        return 2e-9 * size * times / seconds(lambda: [target.copy_(source) for _ in range(times)])

    def across(to_device: bool) -> float:
        ends = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True), torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        source, target = ends if to_device else ends[::-1]
        return 256e-9 * MIB / seconds(lambda: target.copy_(source, non_blocking=True))

    return {
        "copy_GBps": lambda: on_device(2 * GIB, 4), "copy_in_L2_GBps": lambda: on_device(8 * MIB, 100),
        "host_to_device_GBps": lambda: across(True), "device_to_host_GBps": lambda: across(False),
    }  # fmt: skip


def _products(torch: Any) -> dict[str, Callable[[], float]]:
    """TFLOP/s of a product of two square matrices."""

    def product(dtype: Any, tf32: bool = False) -> float:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(SIDE, SIDE, device="cuda").to(dtype) for _ in range(2))
        return 2e-12 * SIDE**3 / seconds(lambda: a @ b)

    return {
        "fp16_TFLOPs": lambda: product(torch.float16), "bf16_TFLOPs": lambda: product(torch.bfloat16),
        "tf32_TFLOPs": lambda: product(torch.float32, True), "fp32_TFLOPs": lambda: product(torch.float32),
    }  # fmt: skip


def seconds(run: Callable[[], object]) -> float:
    """Return the median time of a run by the GPU's clock."""
    for _ in range(3):
        run()
    clock = EventClock()
    return statistics.median(clock.seconds(run) for _ in range(ROUNDS))


if __name__ == "__main__":
    sys.exit(main())
