"""Candidate tiles of a kernel: what `melrt build --engine fused --tune` compiles and times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from melrt_export.fused.lower import Kernel
from melrt_export.fused.tiles import TWO_BLOCKS, Tile

ROWS, SIDES, CHUNKS, WARPS, STAGES = (32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
_SHARES = (0.25, 0.5, 1, 2, 4)
# A thread keeps 128 float32 sums at most in registers; fewer than 32 leave the tensor cores waiting.
_MOST_SUMS, _LEAST_SUMS = 128, 32
_WARP = 32


def candidates(kernel: Kernel, default: Tile) -> list[Tile]:
    """Return the tiles to try for a kernel, the default first; for a voice of the published shape they are about 600 in all."""
    shared = default.outputs and "W" in kernel.constants
    tiles = _blocks(kernel) if kernel.function == "block" else _products(kernel, default) if shared else _rows(default)
    return list(dict.fromkeys([default, *tiles]))


def _blocks(kernel: Kernel) -> Iterator[Tile]:
    """Yield tiles of a residual block: each holds the sums of all channels of its rows."""
    side = int(kernel.constants["CP"])
    for rows, outputs, chunk, warps, stages in itertools.product(ROWS, SIDES, CHUNKS, WARPS, STAGES):
        fits = outputs <= side and chunk <= side and (side < 128 or outputs >= 64)
        if fits and _is_sensible(rows * side, chunk, warps, stages):
            yield Tile(rows, outputs, chunk, warps, stages)
            if side >= 128 and warps == 8:
                yield Tile(rows, outputs, chunk, warps, stages, TWO_BLOCKS)


def _products(kernel: Kernel, default: Tile) -> Iterator[Tile]:
    """Yield tiles of a convolution whose outputs are shared between blocks of threads."""
    width, inputs = int(kernel.constants["W"]), int(kernel.constants["CP"])
    for rows, outputs, chunk, warps, stages in itertools.product(ROWS, {*SIDES[1:], default.outputs}, CHUNKS, WARPS, STAGES):
        if width % outputs == 0 and inputs % chunk == 0 and _is_sensible(rows * outputs, chunk, warps, stages):
            yield Tile(rows, outputs, chunk, warps, stages)


def _rows(default: Tile) -> Iterator[Tile]:
    """Yield tiles of a kernel whose blocks of threads differ in their rows alone."""
    for share, warps, stages in itertools.product(_SHARES, WARPS, STAGES):
        rows = int(default.rows * share)
        if rows >= _WARP * warps // 2:
            yield Tile(rows, default.outputs, default.chunk, warps, stages)


def _is_sensible(sums: int, chunk: int, warps: int, stages: int) -> bool:
    """Return whether a thread has a sensible number of sums, and whether the loads in flight suit the size of a product."""
    each = sums / (_WARP * warps)
    return _LEAST_SUMS <= each <= _MOST_SUMS and (chunk, stages) not in ((32, 2), (128, 3), (128, 4))
