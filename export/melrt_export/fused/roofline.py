"""Rooflines of a fused engine: the work of each kernel, from its own launch, and the shortest time that a GPU's public figures allow.

A bound is not a measurement. It counts each kernel's arithmetic, padding of its tiles included, and what it moves between memory and the
chip if every input is read once and every output is written once. It leaves out the start of a kernel, partly filled multiprocessors
and the second-level cache, whose traffic is counted but has no public rate for every GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from melrt_export.fused.lower import HALF, SINGLE, Kernel, Lowered
from melrt_export.fused.tiles import Tile, default_tile
from melrt_export.generator.config import GeneratorConfig
from melrt_export.gpu_table import GpuFigures

# A run of the backend: its largest batch of windows.
BATCH, FRAMES = 16, 256


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one kernel in one run."""

    flop: float
    """Operations; a multiply-add counts two."""
    memory: float
    """Bytes between memory and chip, if each tensor crosses once."""
    cache: tuple[float, float] = (0.0, 0.0)
    """Bytes that its blocks ask of the second-level cache: if the first level keeps a block's activations, and if it keeps nothing."""


Stages = Mapping[str, Sequence[Work]]


def fused_work(lowered: Lowered, batch: int = BATCH, frames: int = FRAMES, capability: str = "") -> Stages:
    """Return the kernels' work in a run, by stage: `first`, `stages.0`, ..., `last`, `pqmf`.

    Only the second-level cache's part depends on the tiles, and so on the compute capability.
    """
    stages: dict[str, list[Work]] = {}
    for launch in lowered.launches:
        kernel = lowered.kernels[launch.kernel]
        stage = ".".join(launch.layer.split(".")[:2]).removesuffix(".frames")
        stages.setdefault(stage, []).append(kernel_work(kernel, default_tile(kernel, capability), batch * launch.rate * frames))
    return stages


def kernel_work(kernel: Kernel, tile: Tile, steps: int) -> Work:
    """Return the work of a kernel that reads this many time steps."""
    c = {name: int(value) for name, value in kernel.constants.items()}
    tiles = math.ceil(steps / tile.rows)
    size, columns, group = HALF, tile.columns(kernel), c.get("GROUP", 1)
    if kernel.function == "filter_bank":
        size, taps, weights, read, written = SINGLE, c["TAPS"], c["TAPS"] * c["S"] * c["SP"], SINGLE * c["S"], SINGLE * c["S"]
    elif kernel.function == "frames":
        columns, taps, weights, read, written = 1, 1, 0, SINGLE * c["C"], HALF * c["C"]
    elif kernel.function == "block":
        # the taps, and the shortcut once for each part of the outputs
        taps, weights = c["TAPS"] + c["CP"] // tile.outputs, (c["TAPS"] + 2) * c["CP"] ** 2
        read = written = HALF * c["C"]
    else:
        taps, weights = c["TAPS"], c["TAPS"] * c["CP"] * c["W"]
        read, written = HALF * c["C"], (SINGLE if kernel.function == "last" else HALF) * c["N"]
    reread, each = size * tiles * weights, columns * steps * read
    cache = reread + each + steps * written, reread + taps * each // group + steps * written
    return Work(2 * steps * weights / group, steps * (read + written) + size * weights, cache)


def separate_work(config: GeneratorConfig, batch: int = BATCH, frames: int = FRAMES) -> Stages:
    """Return the work of one kernel for each convolution, at its best: activations, crops and additions cost nothing more.

    The pointwise convolution of a block adds the shortcut's result, which it reads. Nothing is padded.
    """
    stages: dict[str, list[Work]] = {}
    for layer in _convolutions(config, batch * frames):
        sizes = (SINGLE if layer.name == "first" else HALF), (SINGLE if layer.name == "last" else HALF)
        memory = sizes[0] * (layer.read + layer.added) + sizes[1] * layer.written + HALF * layer.weights
        stages.setdefault(layer.stage, []).append(Work(layer.flop, memory))
    if config.pqmf_taps:
        steps = batch * frames * math.prod(config.upsample_scales)
        flop = 2 * steps * config.subbands * (config.pqmf_taps + 1)
        stages["pqmf"] = [Work(flop, 2 * SINGLE * steps * config.subbands)]
    return stages


@dataclass(frozen=True, slots=True)
class _Convolution:
    """One convolution in one run, in numbers of values."""

    name: str
    flop: float
    read: int
    """Values of its input."""
    added: int
    """Values of the shortcut's result, which it adds to its own."""
    written: int
    weights: int

    @property
    def stage(self) -> str:
        return ".".join(self.name.split(".")[:2])

    @property
    def kind(self) -> str:
        """Name without the number of the block: the blocks of a stage have the same work."""
        return self.name if self.stage == self.name else f"{self.stage}.{self.name.rpartition('.')[2]}"


def _convolutions(config: GeneratorConfig, steps: int) -> Iterator[_Convolution]:
    for name, shape in config.convolutions():
        upsampled = name.endswith("upsample")
        scale = config.upsample_scales[int(name.split(".")[1])] if upsampled else 1
        inputs, outputs = shape[:2] if upsampled else shape[1::-1]
        weights = math.prod(shape)
        added = steps * outputs if name.endswith("pointwise") else 0
        yield _Convolution(name, 2 * steps * weights, steps * inputs, added, steps * outputs * scale, weights)
        steps *= scale


def int8_gains(config: GeneratorConfig, gpu: GpuFigures, batch: int = BATCH, frames: int = FRAMES) -> Mapping[str, tuple[float, float]]:
    """Return how many times faster than in FP16 each kind of convolution could be in INT8, with one kernel for each.

    INT8 has the tensor cores' higher rate, and reads one byte for each weight and value of its input. Its output stays in FP16, except
    between the two convolutions of a block, where nothing else reads it. The last convolution is left out: it stays in floating point.

    Returns:
        Two factors by kind: if the layer before writes INT8, and if a kernel of its own reads it and writes INT8.
    """
    gains = {}
    for layer in _convolutions(config, batch * frames):
        if layer.name == "last":
            continue
        size = SINGLE if layer.name == "first" else HALF
        before = size * layer.read + HALF * (layer.added + layer.written + layer.weights)
        written = layer.written if layer.name.endswith("dilated") else HALF * layer.written
        memory = layer.read + HALF * layer.added + written + layer.weights
        half = gpu.microseconds(layer.flop, before)
        fast = gpu.microseconds(layer.flop, memory, int8=True)
        gains[layer.kind] = half / fast, half / (fast + gpu.microseconds(0, (size + 1) * layer.read))
    return gains


def whole_stage_work(config: GeneratorConfig, fused: Stages, batch: int = BATCH, frames: int = FRAMES) -> Stages:
    """Return the work of one kernel for each stage, as a limit of fusing further: nothing is computed twice at the borders of tiles."""
    stages = dict(fused)
    steps = batch * frames
    for i, scale in enumerate(config.upsample_scales):
        before, after = config.stage_channels[i : i + 2]
        works = fused[f"stages.{i}"]
        weights = HALF * sum(math.prod(shape) for name, shape in config.convolutions() if name.startswith(f"stages.{i}."))
        memory = HALF * steps * (before + after * scale) + weights
        stages[f"stages.{i}"] = [Work(sum(work.flop for work in works), memory)]
        steps *= scale
    return stages


def bound(works: Sequence[Work], gpu: GpuFigures) -> float:
    """Return the shortest time in microseconds of kernels that run one after another."""
    return sum(gpu.microseconds(work.flop, work.memory) for work in works)


def memory_bound(stages: Stages, gpu: GpuFigures) -> Iterator[str]:
    """Yield the name of each stage that waits for memory longer than it computes."""
    for name, works in stages.items():
        if sum(gpu.microseconds(0, work.memory) for work in works) > sum(gpu.microseconds(work.flop, 0) for work in works):
            yield name


def real_time_factor(stages: Stages, gpu: GpuFigures, seconds: float) -> float:
    """Return how many times faster than real time a run that makes this many seconds of audio could be."""
    return 1e6 * seconds / sum(bound(works, gpu) for works in stages.values())
