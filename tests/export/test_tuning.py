"""Tuning of fused engines: candidates with planted times and faults on the fake GPU, and children that crash or hang."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.torch_voices import random_voice

from melrt.backends.fused.program import Program
from melrt.backends.fused.tuning import Tuning
from melrt.bundle import Bundle
from melrt.errors import BundleError, EngineBuildError
from melrt.system import Gpu
from melrt_export.generator.config import GeneratorConfig
from melrt_export.graph.deploy import deploy_graph

pytest.importorskip("triton", reason="the kernels need the extra `fused-build`")
from tests.export.fake_fused import FusedDriver, compile_fake, install_fused
from tests.export.fragile import Fragile
from tests.export.test_fused import random_weights

from melrt_export.fused import children
from melrt_export.fused.build import FusedOptions, build_fused
from melrt_export.fused.candidates import candidates
from melrt_export.fused.children import Child, ChildError
from melrt_export.fused.compile import Capability, Compiled
from melrt_export.fused.lower import Kernel, lower
from melrt_export.fused.tiles import Tile, default_tile

CONFIG = GeneratorConfig(in_channels=8, channels=16, kernel_size=5, upsample_scales=(3,), stacks=2)
GPU = Gpu("a GPU", "9.0", 1)
# Loads in flight tell the planted candidates of a kernel from each other: they compute alike.
FAST, FASTER_BUT_DIFFERENT, REFUSED, SPILLS, BROKEN, SLOW, NO_FASTER, SLOWER_IN_BULK = range(10, 18)


COIN = itertools.cycle((False, True))


def flip(result: torch.Tensor) -> None:
    """Change a bit of what a kernel wrote."""
    result.view(torch.uint8)[0] ^= 1


class ThreadProcess(threading.Thread):
    """A child that runs here, where the fake GPU is."""

    exitcode = None

    def kill(self) -> None:
        """Leave it to the closed connection."""


def start_thread(target: Callable[..., None], arguments: tuple[Any, ...]) -> ThreadProcess:
    own = os.dup(arguments[0].fileno())  # the caller closes its copy of the child's end, as it must for a process
    thread = ThreadProcess(target=children.serve, args=(type(arguments[0])(own), *arguments[1:]), daemon=True)
    thread.start()
    thread.join = lambda timeout=None: None  # type: ignore[method-assign]
    return thread


def count_up(kernel: Kernel, constants: object, grid: tuple[int, ...], arguments: list[Any]) -> None:
    """Stand in for a kernel, which takes the interpreter 20 ms: write the first bytes that it reads, each increased by one."""
    memory = [argument for argument in arguments if not isinstance(argument, int)]
    memory[-1][:64] = memory[0][:64] + 1


def milliseconds(tile: Tile, batch: int) -> float:
    """Return the planted time of a launch for one utterance of a batch."""
    if tile.stages == SLOWER_IN_BULK:
        return 0.02 if batch == 1 else 0.0715
    return {FAST: 0.02, FASTER_BUT_DIFFERENT: 0.01, SLOW: 0.09, NO_FASTER: 0.0697}.get(tile.stages, 0.07)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FusedDriver:
    def compile_planted(kernel: Kernel, tile: Tile, capability: Capability) -> Compiled:
        if tile.stages == BROKEN:
            raise EngineBuildError("no such instruction")
        return replace(compile_fake(kernel, tile, capability), stack=8 if tile.stages == SPILLS else 0)

    def plant(kernel: Kernel, default: Tile) -> list[Tile]:
        others = (FASTER_BUT_DIFFERENT, REFUSED, SPILLS, BROKEN, SLOW) if kernel.function == "block" else ()
        best = (NO_FASTER, SLOWER_IN_BULK) if kernel.function == "last" else (FAST,)
        return [default, *(replace(default, stages=n) for n in (*others, *best))]

    fused = install_fused(monkeypatch)
    monkeypatch.setattr("tests.export.fake_fused.interpret", count_up)
    monkeypatch.setattr("melrt_export.fused.build.check_on_gpu", lambda *_: {"snr_db": 61.0})
    monkeypatch.setattr(children, "start_process", start_thread)
    for module in ("build", "tuning"):
        monkeypatch.setattr(f"melrt_export.fused.{module}.compile_kernel", compile_planted)
    monkeypatch.setattr("melrt_export.fused.build.find_gpu", lambda: GPU)
    monkeypatch.setattr("melrt_export.fused.build.default_tile", lambda kernel, capability: default_tile(kernel, capability, 256))
    monkeypatch.setattr("melrt_export.fused.tuning.candidates", plant)
    for name, value in (("tuning.WINDOW", 24), ("tuning.BATCH", 2), ("tuning.usable_cores", lambda: 2), ("trial_bench.ROUNDS", 1),
                        ("trial_bench.MOST_LAUNCHES", 1), ("tuning.second", lambda spec: 11)):  # fmt: skip
        monkeypatch.setattr(f"melrt_export.fused.{name}", value)
    fused.cost = lambda kernel, tile, grid: milliseconds(tile, grid[2]) * grid[2]
    fused.refuse = lambda tile: tile.stages == REFUSED
    fused.spoil = lambda launched, tile, result: tile.stages == FASTER_BUT_DIFFERENT and flip(result)
    return fused


@pytest.fixture
def voice(tmp_path: Path) -> Bundle:
    return Bundle.open(random_voice(CONFIG, tmp_path)[0])


def test_the_fastest_tiles_with_the_same_bits_are_kept(melrt, driver: FusedDriver, voice: Bundle) -> None:
    code, out, err = melrt("build", voice.path, "--engine", "fused", "--gpus", "8.0,9.0", "--tune")
    assert code == 0, err
    (entry,) = Bundle.open(voice.path).find("engine")
    tuning = Tuning.of(entry)
    assert tuning is not None
    program = Program.loads(Bundle.open(voice.path).read(entry), entry.file)
    kernels, launches = len(tuning.kernels), Counter(launch.kernel for launch in program.launches)
    assert f"step 2 of 3: compiling {kernels + 6} candidate tiles of {kernels} kernels in 2 processes" in err
    assert f"step 3 of 3: timing {kernels + 4} candidates on a GPU" in err
    assert (tuning.compute_capability, tuning.gpu, tuning.mels) == ("9.0", "a GPU", ["1 x 11", "2 x 24"])
    assert (tuning.timed, tuning.skipped, tuning.different) == (kernels + 2, 3, 1)
    assert tuning.kept
    before, after = 70.0 * launches.total(), 20.0 * (launches.total() - 1) + 70
    assert tuning.us == [[before, after], [2 * before, 2 * after]], "all launches but the last one take 20 us, not 70"
    for name, kernel in tuning.kernels.items():
        default, best, loads = 70 * launches[name], *((70, 3) if name == "last" else (20 * launches[name], FAST))
        assert kernel.us == [[default, best], [2 * default, 2 * best]]
        assert f"{loads} loads in flight" in kernel.tile
    assert f"1 x 11 frames {before:.1f} -> {after:.1f} µs" in out
    assert "its signal-to-noise ratio is 61.0 dB (a GPU)" in out
    info = melrt("info", voice.path)[1]
    assert all(line in info for line in tuning.lines())
    stages = {
        capability: {name: json.loads(program.cubin(kernel))["tile"]["stages"] for name, kernel in kernels.items()}
        for capability, kernels in program.gpus.items()
    }
    assert max(stages["8.0"].values()) == 3, "the default"
    assert stages["9.0"] == {name: 3 if name == "last" else FAST for name in launches}


def test_the_default_tiles_stay_where_the_network_is_not_faster(melrt, driver: FusedDriver, voice: Bundle) -> None:
    """A tile is fast after a launch of its own kernel, whose weights are in the cache, and slow after another one."""
    before = ""

    def cost(kernel: Kernel, tile: Tile, grid: tuple[int, ...]) -> float:
        nonlocal before
        before, last = kernel.name, before
        return (0.09 if tile.stages == FAST and last != kernel.name else milliseconds(tile, grid[2])) * grid[2]

    driver.cost = cost
    code, out, err = melrt("build", voice.path, "--engine", "fused", "--gpus", "9.0", "--tune")
    assert code == 0, err
    (entry,) = Bundle.open(voice.path).find("engine")
    program, tuning = Program.loads(Bundle.open(voice.path).read(entry), entry.file), Tuning.of(entry)
    assert tuning is not None
    assert not tuning.kept
    launches = Counter(launch.kernel for launch in program.launches)
    repeated = launches.total() - len(launches)
    default, tuned = 70.0 * launches.total(), 90.0 * (len(launches) - 1) + 20 * repeated + 70
    assert tuning.us == [[default, tuned], [2 * default, 2 * tuned]], "both are recorded"
    assert max(json.loads(program.cubin(kernel))["tile"]["stages"] for kernel in program.gpus["9.0"].values()) == 3, "the default"
    assert "default tiles kept, the network was not faster" in " ".join(out.split())
    assert next(tuning.lines()) in melrt("info", voice.path)[1]


def test_without_a_suitable_gpu_nothing_is_tuned(melrt, driver: FusedDriver, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*options: str) -> str:
        code, _, err = melrt("build", voice.path, "--tune", *options)
        assert (code, Bundle.open(voice.path).manifest) == (2, voice.manifest)
        return err

    assert "--engine tensorrt does not take --tune" in refused()
    elsewhere = refused("--engine", "fused", "--gpus", "8.0")
    assert "a GPU of compute capability 9.0; the engine is built for 8.0. Add 9.0 to --gpus" in elsewhere
    with monkeypatch.context() as changed:
        changed.setattr("melrt_export.fused.build.find_gpu", lambda: None)
        assert "it has none that works (`melrt doctor`). Build without it." in refused("--engine", "fused")
    with monkeypatch.context() as changed:
        changed.setattr("melrt_export.fused.build.version", lambda name: metadata.version("no such package"))
        assert 'pip install "melrt[fused-build]"' in refused("--engine", "fused")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"refuse": lambda tile: True}, "cannot run f.* with its default tile"),
        ({"spoil": lambda launched, tile, result: next(COIN) and flip(result)}, "the second run gives other bits"),
        ({"spoil": lambda launched, tile, result: launched.integers[1:2] == [3] and tile.stages >= FAST and flip(result)},
         "cannot compute the same bits with the tuned network"),
    ],
)  # fmt: skip
def test_a_gpu_that_computes_otherwise_ends_the_build(driver: FusedDriver, voice: Bundle, fault: dict[str, Any], message: str) -> None:
    for name, value in fault.items():
        setattr(driver, name, value)
    with pytest.raises(EngineBuildError, match=f"^a GPU .*{message}.*The engine was not built"):
        build_fused(voice, FusedOptions(("9.0",), tune=True))
    assert Bundle.open(voice.path).manifest == voice.manifest
    assert {file.name for file in voice.path.iterdir()} == {"manifest.json", *(entry.file for entry in voice.manifest.artifacts)}


def test_a_child_that_ends_or_hangs_is_replaced() -> None:
    child = Child(Fragile)
    ends = "it ended its process with exit code 9"
    for call, message in (("crash", ends), ("hang", "it took more than 0.2 s"), ("fail", "OSError: no space")):
        with pytest.raises(ChildError, match=message):
            child.call(call, seconds=0.2 if call == "hang" else 20.0)
        assert child.call("double", 21, seconds=20.0) == 42
    child.close()
    with pytest.raises(EngineBuildError, match="could not start: ValueError: no device"):
        Child(Fragile, False).call("double", 1, seconds=1.0)


def test_candidates_are_few_and_can_be_compiled() -> None:
    config = GeneratorConfig()
    kernels = lower(config, deploy_graph(config, random_weights(config)).SerializeToString()).kernels
    found = {name: candidates(kernel, default_tile(kernel, "9.0")) for name, kernel in kernels.items()}
    assert 400 < sum(map(len, found.values())) < 800
    for name, tiles in found.items():
        constants = kernels[name].constants
        assert len(set(tiles)) == len(tiles)
        assert tiles[0] == default_tile(kernels[name], "9.0")
        for tile in tiles:
            if tile.outputs and "CP" in constants:
                assert int(constants["CP"]) % tile.chunk == int(constants.get("W", constants["CP"])) % tile.outputs == 0


def test_a_damaged_record_is_refused(driver: FusedDriver, voice: Bundle) -> None:
    entry, _ = build_fused(voice, FusedOptions(("9.0",), tune=True))
    record = entry.target["tuning"]
    kernels = {"x": {"tile": "t"}}
    for damaged in ([], *({**record, **change} for change in ({"us": 3}, {"kernels": kernels}, {"new": 1}, {"gpu": 1}, {"kept": 1}))):
        with pytest.raises(BundleError, match="tun"):
            Tuning.of(replace(entry, target={"tuning": damaged}))
