"""Time each kernel of a fused engine and the whole network by the GPU's clock.

`python -m melrt_benchmarks.sitting.fused_timing VOICE FILE` runs the kernels one after another in a captured graph, so that no time of
the host is counted. With `--tune` after it, the tiles of a copy of the voice are tuned first, and the record is part of the file.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from melrt import Bundle
from melrt.backends.fused.engine import LoadedProgram
from melrt.backends.fused.program import Program
from melrt.backends.fused.tuning import KEY
from melrt.backends.tensorrt.backend import open_device
from melrt.backends.tensorrt.gpu_arrays import current_device
from melrt.backends.tensorrt.kernels import queue_kernel
from melrt.errors import ConfigError, MelrtError
from melrt.system import Gpu
from melrt_benchmarks.sitting.steps import SKIPPED
from melrt_export.fused.build import FusedOptions, build_fused, source_graph
from melrt_export.fused.gpu_timing import GraphClock, Memory
from melrt_export.fused.lower import Kernel, lower
from melrt_export.fused.roofline import kernel_work
from melrt_export.fused.tiles import default_tile
from melrt_export.generator.config import GeneratorConfig
from melrt_export.gpu_table import GpuFigures, gpu_figures
from melrt_export.parity import probe_mel

# Batches and frames: one second, windows of the runtime, and its largest batch.
SHAPES = ((1, 86), (1, 256), (4, 256), (16, 256))
LAUNCHES, RUNS, ROUNDS = 10, 5, 7


def main() -> int:
    """Write the file, again after each shape."""
    voice, target = (Path(argument) for argument in sys.argv[1:3])
    bundle = Bundle.open(voice)
    try:
        if not bundle.find("engine", graph="both"):
            raise ConfigError(f"{voice} has no fused engine; `melrt build {voice} --engine fused` makes one.")
        device, gpu = open_device(0, "fused")
    except MelrtError as error:
        sys.stdout.write(f"{error}\n")
        return SKIPPED
    figures: dict[str, Any] = {"gpu": gpu.name, "voice": bundle.manifest.name, "shapes": {}}
    with tempfile.TemporaryDirectory() as folder, current_device(device):
        if sys.argv[3:] == ["--tune"]:
            bundle = Bundle.open(shutil.copytree(voice, Path(folder) / "tuned.melrt"))
            entry, _ = build_fused(bundle, FusedOptions((gpu.compute_capability,), tune=True))
            bundle, figures["tuning"] = Bundle.open(bundle.path), entry.target[KEY]
        for name, shape in _Timing(bundle, bundle.find("engine", graph="both")[0], device, gpu).shapes():
            figures["shapes"][name] = shape
            sys.stdout.write(f"{name} frames: {shape['us']:.1f} us, {shape['times_real_time']:,.0f} times real time\n")
            sys.stdout.flush()
            target.write_text(json.dumps(figures, indent=1))
    return 0


class _Timing:
    """A fused engine with memory for the largest shape. The device is current."""

    def __init__(self, bundle: Bundle, artifact: Any, device: Any, gpu: Gpu) -> None:
        self._program = Program.loads(bundle.read(artifact), artifact.file)
        self._loaded = LoadedProgram(self._program, device, gpu.compute_capability, artifact.file)
        self._kernels = lower(GeneratorConfig.from_dict(bundle.manifest.architecture), bundle.read(source_graph(bundle))).kernels
        self._capability, self._limits = gpu.compute_capability, _limits(gpu)
        self._spec = bundle.manifest.spec
        self._stream = device.create_stream()
        self._clock = GraphClock(self._stream)
        largest = max(batch for batch, _ in SHAPES), max(frames for _, frames in SHAPES)
        self._memory = Memory(device, self._stream, self._loaded, largest)

    def shapes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the times in microseconds of each shape, such as `16 x 256`: of the network, and of each layer with its bound."""
        for batch, frames in SHAPES:
            mel = np.stack([probe_mel(self._spec, frames, seed) for seed in range(batch)])
            run = self._memory.prepare(self._loaded, mel)
            whole = self._microseconds(run.enqueue, RUNS)
            layers = {}
            for launch, size, values in run.launches:
                enqueue = partial(queue_kernel, launch.layer, self._loaded.kernels[launch.kernel], self._stream, size, values)
                taken = self._microseconds(enqueue, LAUNCHES)
                layers[launch.layer] = {"us": taken, "bound_us": self._bound(self._kernels[launch.kernel], batch * launch.rate * frames)}
            seconds = batch * frames * self._program.hop / self._spec.sample_rate
            yield f"{batch} x {frames}", {"us": whole, "times_real_time": 1e6 * seconds / whole, "layers": layers}

    def _bound(self, kernel: Kernel, steps: int) -> float | None:
        work = kernel_work(kernel, default_tile(kernel, self._capability), steps)
        return self._limits.microseconds(work.flop, work.memory) if self._limits else None

    def _microseconds(self, enqueue: Callable[[], None], count: int) -> float:
        """Return the time of one of so many launches or runs, the median of several rounds."""
        enqueue()
        run = self._clock.captured(enqueue, count)
        run()
        return statistics.median(run() for _ in range(ROUNDS))


def _limits(gpu: Gpu) -> GpuFigures | None:
    """Return the GPU's public figures if they are known."""
    try:
        return gpu_figures(gpu.name)
    except ConfigError:
        return None


if __name__ == "__main__":
    sys.exit(main())
