"""Draw tables of a fused engine: the compiled kernels, and their rooflines."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Column, Table

from melrt.backends.fused.program import Program
from melrt.bundle import Bundle
from melrt_export.fused.build import source_graph
from melrt_export.fused.compile import CAPABILITIES, blocks_per_multiprocessor
from melrt_export.fused.lower import lower
from melrt_export.fused.roofline import (
    BATCH,
    FRAMES,
    Stages,
    Work,
    fused_work,
    int8_gains,
    memory_bound,
    real_time_factor,
    separate_work,
    whole_stage_work,
)
from melrt_export.generator.config import GeneratorConfig
from melrt_export.gpu_table import GPUS
from melrt_export.int8_plan import MIN_SPEEDUP

# Compute capability whose tiles the traffic of the second-level cache is shown for: that of H100 and H200.
CACHE_OF = "9.0"


def kernel_table(program: Program) -> Table:
    """Return a table with the code of each kernel for each GPU. Few blocks on a multiprocessor, or any stack, are findings."""
    table = Table(
        "capability",
        Column("kernel", no_wrap=True),
        "registers",
        "stack",
        "shared KiB",
        "blocks per SM",
        "cubin KB",
        title="Compiled kernels",
    )
    for capability, kernels in program.gpus.items():
        for name, kernel in kernels.items():
            blocks = blocks_per_multiprocessor(CAPABILITIES[capability], kernel)
            values = (kernel.registers, kernel.stack, f"{kernel.shared / 1024:.0f}", blocks, f"{kernel.size / 1000:.0f}")
            table.add_row(capability, name, *map(str, values))
    return table


def roofline_tables(bundle: Bundle) -> Iterator[Table]:
    """Yield the work of each stage, and the bounds of each GPU of `melrt_export.gpu_table`.

    Raises:
        EngineBuildError: The kernels cannot compute this voice's generator.
        BundleError: The bundle has no edge graph in FP32 or FP16, or is damaged.
    """
    config = GeneratorConfig.from_dict(bundle.manifest.architecture)
    fused = fused_work(lower(config, bundle.read(source_graph(bundle))), capability=CACHE_OF)
    separate = separate_work(config)
    whole = whole_stage_work(config, fused)
    spec = bundle.manifest.spec
    seconds = BATCH * FRAMES * spec.hop / spec.sample_rate
    yield _work_table((fused, separate, whole), seconds)
    bounds = Table(
        "GPU", "fused engine", "one kernel per convolution", "one kernel per stage", "bound by memory in the fused engine",
        title=f"Bounds by public figures, not measurements: times real time, {BATCH} windows of {FRAMES} frames",
    )  # fmt: skip
    for gpu in GPUS:
        factors = (f"{real_time_factor(stages, gpu, seconds):,.0f}" for stages in (fused, separate, whole))
        bounds.add_row(gpu.name, *factors, ", ".join(memory_bound(fused, gpu)))
    yield bounds
    yield _int8_table(config)


def _int8_table(config: GeneratorConfig) -> Table:
    """Return the bounds of INT8 layers. A layer that INT8 makes less than 5 % faster has "-"."""
    table = Table(
        "convolution", *(gpu.name for gpu in GPUS),
        title="Bounds of INT8 over FP16, one kernel per convolution: if the layer before writes INT8 / with a kernel that quantizes",
    )  # fmt: skip
    gains = [int8_gains(config, gpu) for gpu in GPUS]
    for kind in gains[0]:
        table.add_row(kind, *(" / ".join(f"{gain:.2f}" if gain >= MIN_SPEEDUP else "-" for gain in one[kind]) for one in gains))
    return table


def _work_table(networks: tuple[Stages, Stages, Stages], seconds: float) -> Table:
    table = Table(
        "stage", "GFLOP", "MB, fused engine", "MB, one kernel per convolution", "MB, one kernel per stage", f"MB of L2 on {CACHE_OF}",
        title="Work for each second of audio",
    )  # fmt: skip
    stages = [{name: list(works) for name, works in network.items()} for network in networks]
    for network in stages:
        network["sum"] = [work for works in network.values() for work in works]
    for name in stages[0]:
        memory = (f"{sum(work.memory for work in network[name]) / seconds / 1e6:.1f}" for network in stages)
        table.add_row(name, f"{sum(work.flop for work in stages[0][name]) / seconds / 1e9:.2f}", *memory, _cache(stages[0][name], seconds))
    return table


def _cache(works: list[Work], seconds: float) -> str:
    least, most = (sum(work.cache[i] for work in works) / seconds / 1e6 for i in (0, 1))
    return f"{least:.0f} to {most:.0f}"
