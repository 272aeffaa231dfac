"""Tune a fused engine on this machine's GPU: compile candidate tiles of every kernel, time them, and keep the fastest.

Two mels are timed: one second at batch 1, and the backend's largest batch of windows. The best tiles are those with the smallest sum of
the network's two times, each as a share of the default's. A candidate that gives other bits than the default is dropped, and so is one
that is slower for one of the mels. The default tiles stay if the whole network is not faster with the chosen ones.
"""

from __future__ import annotations

import datetime
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from melrt.backends.fused.backend import BATCH, WINDOW
from melrt.backends.fused.program import CompiledKernel, Program
from melrt.backends.fused.tuning import TunedKernel, Tuning
from melrt.bundle import Bundle
from melrt.errors import ConfigError, EngineBuildError
from melrt.mel.spec import MelSpec
from melrt.system import Gpu, driver_version, usable_cores
from melrt.types import Mel
from melrt_export.fused.candidates import candidates
from melrt_export.fused.children import Child, ChildError, Children
from melrt_export.fused.compile import CAPABILITIES, Compiled, compile_kernel
from melrt_export.fused.lower import Kernel
from melrt_export.fused.tiles import Tile
from melrt_export.fused.trial_bench import Candidate, Times, TrialBench
from melrt_export.parity import probe_mel

# A candidate must save this share of a kernel's time to replace the default: a smaller difference is noise. So must the tuned network.
MIN_GAIN = 0.02
# Loss that is taken for noise in the time of one mel. Times of equal kernels in two networks differed by less on an H200.
MOST_LOSS = 0.01
# Limits of one compilation, of a comparison, and of the timing of all candidates of a kernel, in seconds.
COMPILE_SECONDS, COMPARE_SECONDS, TIME_SECONDS = 120.0, 20.0, 240.0
OnPhase = Callable[[str, int, int], None]
Code = tuple[Tile, Compiled]
Codes = Mapping[str, Mapping[str, Code]]
Pairs = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """The engine to tune."""

    bundle: Bundle
    """Bundle with the voice."""
    kernels: Mapping[str, Kernel]
    """Kernels by name."""
    codes: Codes
    """Tile and code of each kernel for each compute capability, to begin with."""
    gpu: Gpu
    """The GPU of this machine."""
    assemble: Callable[[Codes], Program]
    """Makes an engine."""

    @property
    def default(self) -> Mapping[str, Code]:
        """Tile and code of each kernel for the GPU."""
        return self.codes[self.gpu.compute_capability]

    def engine(self, kernels: Mapping[str, Code]) -> bytes:
        """Return an engine for the GPU alone."""
        return self.assemble({self.gpu.compute_capability: kernels}).dumps()


@dataclass(slots=True)
class _Trials:
    """Candidates of one kernel that give the same bits as the default, which is the first, and their times."""

    codes: list[Code]
    times: list[Times] = field(default_factory=list)


class Compiler:
    """Compiles candidates in a child."""

    def __init__(self, capability: str) -> None:
        self._capability = CAPABILITIES[capability]

    def usable(self) -> bool:
        """Return true: a refused candidate does not spoil the next one."""
        return True

    def compile(self, kernel: Kernel, tile: Tile) -> Compiled:
        """Compile a candidate."""
        return compile_kernel(kernel, tile, self._capability)


def check_gpu(gpu: Gpu | None, gpus: tuple[str, ...]) -> Gpu:
    """Return the GPU to tune on.

    Raises:
        EngineBuildError: This machine has none.
        ConfigError: The engine is not built for it.
    """
    if gpu is None:
        raise EngineBuildError("--tune measures on the GPU of this machine, and it has none that works (`melrt doctor`). Build without it.")
    if gpu.compute_capability not in gpus:
        built = ", ".join(gpus)
        raise ConfigError(
            f"--tune measures on this machine's GPU, {gpu.name} of compute capability {gpu.compute_capability}; the engine is built "
            f"for {built}. Add {gpu.compute_capability} to --gpus, or build without --tune."
        )
    return gpu


def tune(target: Target, on_step: Callable[[str], None], on_phase: OnPhase) -> tuple[Codes, Tuning]:
    """Compile and time candidates.

    Args:
        target: The engine to tune.
        on_step: Called with the name of each of the two steps.
        on_phase: Called with the name of a phase, its steps done and their number.

    Returns:
        The codes with those of the fastest tiles for this GPU, and the record for the engine's entry.

    Raises:
        EngineBuildError: The GPU cannot run the default, or the tuned network gives other bits.
    """
    jobs = [
        (kernel, tile)
        for name, kernel in target.kernels.items()
        for tile in candidates(kernel, target.default[name][0])
        if tile != target.default[name][0]
    ]
    processes = min(usable_cores(), max(len(jobs), 1))
    on_step(f"compiling {len(jobs)} candidate tiles of {len(target.kernels)} kernels in {processes} processes")
    usable, skipped = _compile(target, jobs, processes, on_phase)
    on_step(f"timing {sum(map(len, usable.values())) - len(usable)} candidates on {target.gpu.name}")
    measurement = _Measurement(target, skipped)
    try:
        kept, record = measurement.run(usable, on_phase)
        return {**target.codes, target.gpu.compute_capability: kept}, record
    finally:
        measurement.bench.close()


def _mels(bundle: Bundle) -> list[Mel]:
    spec, smallest = bundle.manifest.spec, bundle.manifest.receptive_field.smallest_input
    shapes = (1, max(second(spec), smallest)), (BATCH, max(WINDOW, smallest))
    return [np.stack([probe_mel(spec, frames, seed) for seed in range(batch)]) for batch, frames in shapes]


def second(spec: MelSpec) -> int:
    """Return the frames of one second."""
    return round(spec.sample_rate / spec.hop)


def _compile(target: Target, jobs: list[tuple[Kernel, Tile]], processes: int, on_phase: OnPhase) -> tuple[dict[str, list[Code]], int]:
    """Return the candidates of each kernel, the default first, and the number of those that do not compile or spill registers."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_phase("compiling", done, len(jobs))

    codes: dict[str, list[Code]] = {name: [target.default[name]] for name in target.kernels}
    made = Children(processes, Compiler, target.gpu.compute_capability).map("compile", jobs, COMPILE_SECONDS, count)
    for (kernel, tile), code in zip(jobs, made, strict=True):
        if not isinstance(code, ChildError) and code.stack <= target.default[kernel.name][1].stack:
            codes[kernel.name].append((tile, code))
    return codes, len(jobs) - sum(len(found) - 1 for found in codes.values())


class _Measurement:
    """Candidates on the GPU, and what became of them."""

    def __init__(self, target: Target, skipped: int) -> None:
        self._target, self._skipped, self._different = target, skipped, 0
        self._mels = _mels(target.bundle)
        self.bench = Child(TrialBench, target.engine(target.default), "the engine to tune", self._mels)

    def run(self, usable: Mapping[str, list[Code]], on_phase: OnPhase) -> tuple[dict[str, Code], Tuning]:
        """Compare and time all candidates; return the chosen ones and the record."""
        done, total = itertools.count(1), sum(map(len, usable.values()))
        trials = {}
        for name, codes in usable.items():
            equal = self._equal(name, codes, lambda name: on_phase(f"timing {name}", next(done), total))
            trials[name] = self._timed(name, equal)
        chosen = _choose(trials)
        kept = {name: one.codes[chosen[name]] for name, one in trials.items()}
        us = self._networks(kept)
        faster = _pays(us)
        gpu = self._target.gpu
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        mels = tuple(f"{mel.shape[0]} x {mel.shape[2]}" for mel in self._mels)
        timed = sum(len(one.codes) - 1 for one in trials.values())
        kernels = {name: TunedKernel(_text(kept[name][0]), _pairs(one.times[0], one.times[chosen[name]])) for name, one in trials.items()}
        facts = gpu.compute_capability, gpu.name, _driver(), today, mels, timed, self._skipped, self._different
        return kept if faster else dict(self._target.default), Tuning(*facts, us, kernels, faster)

    def _equal(self, name: str, codes: list[Code], on_done: Callable[[str], None]) -> list[Code]:
        """Return the candidates that give the same bits as the default, which is the first."""
        equal = []
        for code in codes:
            try:
                same = self.bench.call("is_equal", name, self._candidate(name, code), seconds=COMPARE_SECONDS)
                equal += [code] if same else []
                self._different += not same
            except ChildError as error:
                if code is codes[0]:
                    raise self._refused(f"run {name} with its default tile ({error})") from error
                self._skipped += 1
            on_done(name)
        if equal[:1] != codes[:1]:
            raise self._refused(f"repeat {name} with its default tile: the second run gives other bits")
        return equal

    def _timed(self, name: str, codes: list[Code]) -> _Trials:
        """Time candidates of a kernel; if that fails, the default alone."""
        reason = ""
        for tried in (codes, codes[:1]):
            try:
                times = self.bench.call("times", name, [self._candidate(name, code) for code in tried], seconds=TIME_SECONDS)
                self._skipped += len(codes) - len(tried)
                return _Trials(tried, times)
            except ChildError as error:
                reason = str(error)
        raise self._refused(f"time {name} with its default tile ({reason})")

    def _networks(self, kept: Mapping[str, Code]) -> Pairs:
        try:
            same, times = self.bench.call("networks", self._target.engine(kept), seconds=TIME_SECONDS)
        except ChildError as error:
            raise self._refused(f"run the tuned network ({error})") from error
        if not same:
            raise self._refused("compute the same bits with the tuned network as with the default tiles")
        return tuple((round(before, 1), round(after, 1)) for before, after in times)

    def _candidate(self, name: str, code: Code) -> Candidate:
        tile, made = code
        return compiled_kernel(self._target.kernels[name], tile, made, 0), made.cubin

    def _refused(self, reason: str) -> EngineBuildError:
        return EngineBuildError(f"{self._target.gpu.name} cannot {reason}. The engine was not built; build it without --tune.")


def _choose(trials: Mapping[str, _Trials]) -> dict[str, int]:
    """Return the index of the best candidate of each kernel: the smallest sum of its shares of the network's times, without a loss."""
    network = [sum(one.times[0][mel] for one in trials.values()) for mel in range(2)]
    chosen = {}
    for name, one in trials.items():
        costs = [
            sum(time / whole for time, whole in zip(times, network, strict=True)) if _loses_nothing(one.times[0], times) else math.inf
            for times in one.times
        ]
        best = int(np.argmin(costs))
        chosen[name] = best if costs[best] < (1 - MIN_GAIN) * costs[0] else 0
    return chosen


def _loses_nothing(before: Times, after: Times) -> bool:
    return all(new <= (1 + MOST_LOSS) * old for old, new in zip(before, after, strict=True))


def _pays(us: Pairs) -> bool:
    """Return whether the tuned network is faster: slower for no mel, and faster by the mean of the ratios."""
    before, after = zip(*us, strict=True)
    return _loses_nothing(before, after) and statistics.mean(new / old for old, new in us) <= 1 - MIN_GAIN


def compiled_kernel(kernel: Kernel, tile: Tile, code: Compiled, offset: int) -> CompiledKernel:
    """Return the entry of a kernel in an engine's header.

    Args:
        kernel: The kernel.
        tile: Its tile.
        code: Its code.
        offset: Place of the code in the payload, in bytes.
    """
    return CompiledKernel(
        code.symbol,
        offset,
        len(code.cubin),
        code.threads,
        code.shared,
        tile.rows,
        tile.columns(kernel),
        code.registers,
        code.stack,
        code.columns,
    )


def _pairs(before: Times, after: Times) -> Pairs:
    return tuple((round(first, 2), round(second, 2)) for first, second in zip(before, after, strict=True))


def _text(tile: Tile) -> str:
    registers = f", at most {tile.registers} registers" if tile.registers else ""
    outputs = f"{tile.outputs} outputs, " if tile.outputs else ""
    return f"{tile.rows} rows, {outputs}{tile.chunk} inputs, {tile.warps} warps, {tile.stages} loads in flight{registers}"


def _driver() -> str:
    """Return the version of the GPU's driver; the version of CUDA that it supports where NVML does not work."""
    try:
        from cuda.core import system

        return ".".join(f"{part:02d}" if place == 2 else str(part) for place, part in enumerate(system.get_kernel_mode_driver_version()))
    except Exception:  # no NVML; the binding's exceptions have no common base
        return f"for CUDA {driver_version()}"
