"""Tile sizes of the kernels: data, one tile for each kernel and compute capability."""

from __future__ import annotations

from dataclasses import dataclass

from melrt_export.fused.lower import CHUNK, GROUP, LEAST_SIDE, MOST_OUTPUTS, READ, Constant, Kernel

# A multiprocessor's 65,536 registers serve two blocks of 8 warps if each thread has no more than this.
TWO_BLOCKS = 128
# Blocks of these channels hold 128 rows instead of 64, as many at the same time, so that the weights are read half as often. On 10.0 each
# product takes the tensor memory of 128 rows in any case, and 256 channels all of it.
LONG = {("8.0", 128), ("10.0", 128), ("10.0", 256)}


@dataclass(frozen=True, slots=True)
class Tile:
    """Shape of the work of one block of threads."""

    rows: int
    """Time steps."""
    outputs: int
    """Output channels of one product."""
    chunk: int
    """Input channels of one product."""
    warps: int
    """Warps of 32 threads."""
    stages: int
    """Loads that are in flight at once."""
    registers: int | None = None
    """Most registers of a thread; None for the compiler's choice."""

    def constants(self, kernel: Kernel) -> dict[str, Constant]:
        """Return all constants of a kernel with this tile."""
        own: dict[str, Constant] = {"BT": self.rows}
        if kernel.function in ("convolution", "block", "last"):
            own["BK"] = self.chunk
        if kernel.function in ("frames", "convolution", "block"):
            own["BN"] = self.outputs
        if kernel.function == "block":
            own["EARLY"] = self.outputs == self.chunk == kernel.constants["CP"]
        return {**own, **kernel.constants}

    def columns(self, kernel: Kernel) -> int:
        """Return how many blocks share the output channels of the same rows."""
        wide = {"frames": "C", "convolution": "W"}.get(kernel.function)
        return -(-int(kernel.constants[wide]) // self.outputs) if wide else 1


# The fastest of 8 to 100 candidates for each kernel of a 512-channel voice on an H100, timed for 86 frames and for 16 x 256 frames
# (docs/fused.md); the two sizes differ, and these are chosen for the second where the first loses little. For blocks, by channels.
_MEASURED_BLOCKS = {256: (128, 128, 64, 8, 3), 128: (128, 128, 64, 4, 2), 64: (128, 64, 64, 4, 3)}
MEASURED = "9.0"


# Except for MEASURED, chosen from compiled code: registers, spills, shared and tensor memory of each candidate for 8.0 to 12.0.
def default_tile(kernel: Kernel, capability: str = "", rows: int | None = None) -> Tile:
    """Return the tile of a kernel.

    Args:
        kernel: The kernel.
        capability: Compute capability, such as `9.0`; the smallest tile of any if it is not given.
        rows: Rows of the tile, in place of the default. More rows make Triton's interpreter faster.
    """
    constants = kernel.constants
    chunk = min(CHUNK, int(constants.get("CP", CHUNK)))
    if capability == MEASURED and rows is None and (measured := _measured_tile(kernel, chunk)):
        return measured
    if kernel.function == "block":
        side = int(constants["CP"])
        default = 64 if side >= 128 and (capability, side) not in LONG else 128
        outputs = 64 if side == 128 or (capability, side) in LONG else min(side, 32)
        registers = TWO_BLOCKS if side >= 128 and capability != "10.0" else None  # there tensor memory is the limit
        return Tile(rows or default, outputs, chunk, 8 if side >= 128 else 4, 3, registers)
    if kernel.function == "frames":
        return Tile(rows or 32, CHUNK, 0, 4, 1)
    if kernel.function == "convolution":
        return Tile(rows or 64, min(int(constants["W"]), MOST_OUTPUTS), chunk, 4, 3)
    if kernel.function == "last":
        return Tile(rows or 64 * GROUP, 0, READ * LEAST_SIDE, 4, 3)
    return Tile(rows or 128, 0, chunk, 4, 3)


def _measured_tile(kernel: Kernel, chunk: int) -> Tile | None:
    """Return the tile that was the fastest on an H100, or None where the default was."""
    if kernel.function == "block":
        found = _MEASURED_BLOCKS.get(int(kernel.constants["CP"]))
        return Tile(*found) if found else None
    if kernel.function != "convolution" or int(kernel.constants["TAPS"]) > 2:
        return None
    wide = int(kernel.constants["N"])  # with padded outputs, 256 in one tile spill registers
    outputs = 2 * MOST_OUTPUTS if wide % (2 * MOST_OUTPUTS) == 0 else min(int(kernel.constants["W"]), MOST_OUTPUTS)
    chunk = 2 * CHUNK if int(kernel.constants["CP"]) % (2 * CHUNK) == 0 else chunk
    return Tile(128 if wide < MOST_OUTPUTS else 64, outputs, chunk, 4, 3)
