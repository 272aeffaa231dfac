"""Public figures of GPUs that rooflines are computed for."""

from __future__ import annotations

from dataclasses import dataclass

from melrt.errors import ConfigError

# NVIDIA's pages and the tables at the end of its whitepapers; they could not be opened when the figures were last compared (2026-11-26).
# H200, H100 and A100 are the SXM boards (A100: 80 GB). The pages of H200 and L4 give twice these rates, "with sparsity". Copies agree:
# - H200: https://www.morphllm.com/nvidia-h200 quotes the page: 4.8 TB/s, and with sparsity 1,979 for FP16 and 3,958 for INT8.
# - H100, A100: https://glennklockwood.com/garden/processors/h100 and .../A100 (dense rates, bandwidth, multiprocessors).
# - L4: https://grokipedia.com/page/NVIDIA_L4_vs_L40S quotes it: 300 GB/s, and with sparsity 242 and 485. 58 multiprocessors with 1024
#   FP16 operations a clock at 2.04 GHz are 121.2 TFLOP/s.
# - RTX 4090: https://hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-rtx-pro-5000-blackwell (by accumulator).
# - RTX 5090: https://www.spheron.network/blog/nvidia-rtx-5090-specs/ has 1,792 GB/s, and with sparsity 838 for FP16 (accumulated in FP16)
#   and 3,352 for FP4. A quarter of each is the dense rate of FP16 accumulated in FP32, and that of INT8.
_HOPPER = "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """Peak rates and sizes of one GPU, dense (without sparsity), at its boost clock."""

    name: str
    """Short name."""
    compute_capability: str
    """Compute capability, such as `9.0`."""
    gbytes_per_second: float
    """Bandwidth of its memory in GB/s."""
    fp16_tflops: float
    """Tensor rate of FP16 with FP32 accumulation; GeForce cards run it at half the rate of FP16 accumulation."""
    int8_tops: float
    """Tensor rate of INT8."""
    l2_mib: int
    """Second-level cache in MiB."""
    multiprocessors: int
    """Streaming multiprocessors."""
    source: str
    """NVIDIA's publication of the figures."""

    def microseconds(self, flop: float, size: float, *, int8: bool = False) -> float:
        """Return the shortest time of one kernel: the longer of its arithmetic and its memory traffic.

        Args:
            flop: Operations; a multiply-add counts two.
            size: Bytes read and written.
            int8: Take the tensor rate of INT8, not of FP16.
        """
        return max(flop / (self.int8_tops if int8 else self.fp16_tflops) / 1e6, size / self.gbytes_per_second / 1e3)


GPUS = (
    GpuFigures("H200", "9.0", 4800, 989.4, 1978.9, 50, 132, "https://www.nvidia.com/en-us/data-center/h200/"),
    GpuFigures("H100", "9.0", 3352, 989.4, 1978.9, 50, 132, _HOPPER),
    GpuFigures("A100", "8.0", 2039, 312, 624, 40, 108, "https://www.nvidia.com/en-us/data-center/a100/"),
    GpuFigures("L4", "8.9", 300, 121, 242, 48, 58, "https://www.nvidia.com/en-us/data-center/l4/"),
    GpuFigures("RTX 4090", "8.9", 1008, 165.2, 660.6, 72, 128, _ADA),
    GpuFigures(
        "RTX 5090", "12.0", 1792, 209.5, 838, 96, 170,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    ),
)  # fmt: skip


def gpu_figures(name: str) -> GpuFigures:
    """Return the figures of a GPU by its short name, or by a driver's name that contains it, such as `NVIDIA H100 80GB HBM3`.

    Raises:
        ConfigError: The table has no such GPU.
    """
    words = f" {name.lower()} "
    for gpu in GPUS:
        if f" {gpu.name.lower()} " in words:
            return gpu
    raise ConfigError(f"no public figures of the GPU {name!r} are known; it must be one of {', '.join(gpu.name for gpu in GPUS)}.")
