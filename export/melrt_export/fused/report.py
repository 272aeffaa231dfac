"""Draw tables of a fused engine: what the compiler made of each kernel."""

from __future__ import annotations

from rich.table import Table

from melrt.backends.fused.program import Program
from melrt_export.fused.compile import CAPABILITIES, blocks_per_multiprocessor


def kernel_table(program: Program) -> Table:
    """Return a table with the code of each kernel for each GPU. Few blocks on a multiprocessor, or any stack, are findings."""
    table = Table("capability", "kernel", "registers", "stack", "shared KiB", "blocks per SM", "cubin KB", title="Compiled kernels")
    for capability, kernels in program.gpus.items():
        for name, kernel in kernels.items():
            blocks = blocks_per_multiprocessor(CAPABILITIES[capability], kernel.threads, kernel.registers, kernel.shared)
            values = (kernel.registers, kernel.stack, f"{kernel.shared / 1024:.0f}", blocks, f"{kernel.size / 1000:.0f}")
            table.add_row(capability, name, *map(str, values))
    return table
