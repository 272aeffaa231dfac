"""The commands `melrt bench-serving` and `melrt bench-voices`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from melrt import Residency, Voices
from melrt.bundle import Bundle
from melrt.cli.commands import Voice
from melrt.errors import ConfigError, MelrtError
from melrt.scheduling.limits import Limits
from melrt.types import Mel
from melrt.vocoder import Options, Vocoder
from melrt_benchmarks.serving import systems
from melrt_benchmarks.serving.load import RequestRun, Submit, mixed_lengths, run_closed_loop, run_open_loop

console = Console(highlight=False)
# Windows that may wait in this process: about as many as in a server with the default limits. Both refuse more.
MAX_WINDOWS = 256
# Largest difference of a sample between the server's audio and this process's; more is another voice or precision.
MAX_DIFFERENCE = 1e-3


def bench_serving(
    voice: Voice,
    triton: Annotated[str | None, typer.Option(help="gRPC address of a Triton server, such as 127.0.0.1:8001.")] = None,
    http: Annotated[str | None, typer.Option(help="Address of `melrt serve http`, such as 127.0.0.1:8080.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the voice on the server. Default: the bundle's file name.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Number of concurrent clients; repeatable. Default: 1 and 8.")] = None,
    seconds: Annotated[float, typer.Option(help="Duration of each load.", min=0.1)] = 10.0,
    rounds: Annotated[int, typer.Option(help="Interleaved repetitions of each load; the median one is shown.", min=1)] = 3,
    overload: Annotated[float, typer.Option(help="Then send requests at this many times the highest measured rate. 0: off.")] = 0.0,
    overload_seconds: Annotated[float, typer.Option(help="Duration of the overload; one client follows it.", min=0.1)] = 120.0,
) -> None:
    """Compare a voice on a server with `Vocoder` in this process, under the same load of utterances of mixed lengths."""
    if triton is None and http is None:
        raise ConfigError("give the address of a server with --triton or --http.")
    bundle, name = Bundle.open(voice), model or voice.resolve().stem
    mels = mixed_lengths(bundle.probe()[0][0])
    table = Table("system", "load", "requests/s", "p50 ms", "p99 ms", "refused")
    options = Options(edges="voice", limits=Limits(max_windows=MAX_WINDOWS, wait=False))
    with Vocoder.load(bundle, options=options) as vocoder, ExitStack() as opened:
        under_load: dict[str, Submit] = {"Vocoder": vocoder.submit}
        under_load |= {"Triton": systems.triton(triton, name)} if triton else {}
        under_load |= opened.enter_context(systems.http(http, name)) if http else {}
        _check_same_audio(under_load, mels[0])
        highest = 0.0
        for number in clients or [1, 8]:
            for name, run in _interleaved(under_load, mels, number, seconds, rounds).items():
                _add_row(table, name, f"{number} client{'s' * (number > 1)}", run)
                highest = max(highest, run.rate)
        for name, submit in under_load.items() if overload else ():
            rate = overload * highest
            _add_row(table, name, f"{rate:.0f} requests/s", run_open_loop(submit, mels, rate, overload_seconds))
            _add_row(table, name, "1 client, after that", run_closed_loop(submit, mels, 1, seconds))
    console.print(table)
    console.print("Times are from the request to its audio. A refused request found the queue full.")


def bench_voices(
    voice: Voice,
    voices: Annotated[int, typer.Option(help="Number of copies of the voice, each with other weights.", min=3)] = 200,
    memory: Annotated[int, typer.Option(help="Memory limit for all voices in MiB.", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="Duration.", min=1)] = 180.0,
    rounds: Annotated[int, typer.Option(help="Interleaved repetitions of each load.", min=1)] = 4,
) -> None:
    """Load many voices within a memory limit while they come, go and change, compare all audio, and time one voice among them."""
    from melrt_benchmarks.serving.soak import QUIET, Soak, SoakLoad

    limits = Options(limits=Limits(wait_timeout=10.0))
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Bundle.open(voice), Path(folder), SoakLoad(voices))
        residency = Residency(memory=memory << 20, pinned=(QUIET,))
        with Voices(folder, device="cpu", precision="fp32", backend="onnxruntime", options=limits, residency=residency) as opened:
            result = soak.run(opened, seconds, rounds, lambda step: console.print(step))
    table = Table("quiet voice", "calls", "p50 ms", "p99 ms")
    for phase, latencies in result.latencies.items():
        table.add_row(phase, str(len(latencies)), *(f"{1000 * result.percentile(phase, percent):.1f}" for percent in (50, 99)))
    console.print(table)
    console.print(f"Results: {dict(result.outcomes)}. Voices: {dict(result.changes)}, loaded {result.loads} times.")
    console.print(f"Memory: {result.memory >> 20} of {memory} MiB estimated; the process grew by {result.resident >> 20} MiB.")
    if result.wrong:
        raise MelrtError(f'{result.wrong} results were wrong, stale or lost, or failed; see the line "Results".')


def _interleaved(under_load: dict[str, Submit], mels: list[Mel], clients: int, seconds: float, rounds: int) -> dict[str, RequestRun]:
    """Return the round of median throughput of each system."""
    runs: dict[str, list[RequestRun]] = {name: [] for name in under_load}
    for _ in range(rounds):
        for name, submit in under_load.items():
            runs[name].append(run_closed_loop(submit, mels, clients, seconds))
    return {name: sorted(done, key=lambda run: run.rate)[len(done) // 2] for name, done in runs.items()}


def _add_row(table: Table, name: str, load: str, run: RequestRun) -> None:
    table.add_row(name, load, f"{run.rate:.1f}", f"{1000 * run.p50:.0f}", f"{1000 * run.p99:.0f}", str(run.refused))


def _check_same_audio(under_load: dict[str, Submit], mel: Mel) -> None:
    """Check that all systems give the same audio; otherwise their times cannot be compared. 16-bit samples of a loud voice are clipped."""
    local, *others = (np.clip(submit(mel).result(60), -1, 1) for submit in under_load.values())
    for remote in others:
        if local.shape != remote.shape or local.dtype != remote.dtype or np.abs(local - remote).max() > MAX_DIFFERENCE:
            raise MelrtError("the server's audio differs from this voice's. Serve the same bundle at the same precision and sample format.")
