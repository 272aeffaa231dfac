"""The `melrt bench` command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from melrt.errors import MelrtError
from melrt.files import whole_file

console = Console(highlight=False)


def bench(
    voice: Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")],
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint that it was exported from, for PyTorch and the plain export.")],
    seconds: Annotated[str, typer.Option(help="Lengths of audio, comma-separated.")] = "1,4,10",
    rounds: Annotated[int, typer.Option(help="Counted rounds; each runs every contender once.")] = 15,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every contender; default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time a voice against PyTorch and a plain ONNX export on the CPU: one interleaved run, medians, outputs checked."""
    from melrt_benchmarks.bench import run_bench

    lengths = _lengths("seconds", seconds)
    if rounds < 3:
        raise MelrtError(f"--rounds is {rounds}; it is at least 3, or there is no spread to tell of.")
    with _steps() as bar:
        task = bar.add_task("loading", total=None)
        report = run_bench(voice, checkpoint, lengths, rounds, threads or len(os.sched_getaffinity(0)),
                           lambda step: bar.update(task, description=step))  # fmt: skip
    _write(json_file, report)
    table = Table("audio s", "contender", "median ms", "p90 ms", "real-time factor", "times real time", "against PyTorch", "max abs")
    for row in report["results"]:
        wrong = "" if row["correct"] else " [bold red]WRONG[/]"
        table.add_row(
            f"{row['seconds']:.2f}", row["contender"], f"{row['median_ms']:.1f}", f"{row['p90_ms']:.1f}", f"{row['real_time_factor']:.4f}",
            f"{row['times_real_time']:.1f}", f"{row['speedup']:.2f}x", f"{row['max_abs']:.0e}{wrong}",
        )  # fmt: skip
    console.print(table)
    machine = report["environment"]
    console.print(f"{machine['cpu']}, {machine['threads']} threads, {rounds} rounds, load {machine['load_1min']}", markup=False)


def bench_streams(
    voice: Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")],
    chunk: Annotated[int, typer.Option(help="Frames that come at once.")] = 16,
    buffer: Annotated[float, typer.Option(help="Seconds of audio that a listener has in hand.")] = 0.2,
    seconds: Annotated[float, typer.Option(help="How long each listener listens.")] = 8.0,
    step: Annotated[int, typer.Option(help="By how many streams the load rises.")] = 2,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Find how many real-time streams this machine holds without underrun, with in-flight batching and without."""
    from melrt_benchmarks.bench import environment
    from melrt_benchmarks.streams import Load, most_streams

    if chunk < 8 or not 0 < buffer < 60 or not 0 < seconds <= 600 or step < 1:
        raise MelrtError("--chunk is at least 8 frames, --buffer and --seconds above 0, --step at least 1.")
    with _steps() as bar:
        task = bar.add_task("loading", total=None)
        rows = most_streams(str(voice), Load(chunk, buffer, seconds), step, threads, lambda text: bar.update(task, description=text))
    used = threads or len(os.sched_getaffinity(0))
    _write(
        json_file,
        {"schema": 1, "load": {"chunk": chunk, "buffer": buffer, "seconds": seconds}, "environment": environment(used), "results": rows},
    )
    table = Table("streams", "", "late", "of", "latency p50 ms", "p99", "first audio p50 ms", "p99", "")
    for row in rows:
        kind, verdict = ("in flight" if row["in_flight"] else "each alone"), ("held" if row["held"] else "[red]too many[/]")
        numbers = (row["streams"], kind, row["underruns"], row["pushes"], *row["latency_ms"], *row["first_audio_ms"])
        table.add_row(*map(str, numbers), verdict)
    console.print(table)


def bench_memory(
    voice: Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle.")],
    windowed: Annotated[str, typer.Option(help="Lengths for melrt synth, seconds, comma-separated.")] = "30,1800",
    whole: Annotated[str, typer.Option(help="Lengths for one run over the whole utterance, seconds.")] = "30,60,120",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Measure the peak memory of a synthesis against its length, in windows and whole; each in a process of its own."""
    from melrt_benchmarks.bench import environment
    from melrt_benchmarks.memory import peak_memory

    rows = []
    table = Table("audio s", "", "peak MiB")
    with _steps() as bar:
        task = bar.add_task("measuring", total=None)
        for kind, lengths in (("windows", _lengths("windowed", windowed)), ("whole", _lengths("whole", whole))):
            for seconds in lengths:
                bar.update(task, description=f"{seconds:g} s, {kind}")
                peak = round(peak_memory(voice, seconds, whole=kind == "whole"), 1)
                rows.append({"seconds": seconds, "kind": kind, "peak_mib": peak})
                table.add_row(f"{seconds:g}", kind, f"{peak:.0f}")
    _write(json_file, {"schema": 1, "environment": environment(len(os.sched_getaffinity(0))), "results": rows})
    console.print(table)


def bench_training(
    channels: Annotated[int, typer.Option(help="Width of the generator: 512 is the published one.")] = 512,
    batch: Annotated[int, typer.Option(help="Segments of 8192 samples in a step.")] = 16,
    rounds: Annotated[int, typer.Option(help="Counted steps of each contender.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads of both; default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time training steps on the CPU against a plain loop of the same networks: one interleaved run, medians, first losses compared."""
    from melrt_benchmarks.training import TrainingBench, run_training_bench

    if rounds < 3 or batch < 1:
        raise MelrtError(f"--rounds is {rounds} and --batch {batch}; they are at least 3 and 1.")
    options = TrainingBench(channels, batch, rounds=rounds, threads=threads or len(os.sched_getaffinity(0)))
    with _steps() as bar:
        task = bar.add_task("making the networks", total=None)
        report = run_training_bench(options, lambda step: bar.update(task, description=step))
    _write(json_file, report)
    table = Table("contender", "steps/s", "median s", "p90 s", "against the plain loop", "same losses")
    for row in report["results"]:
        figures = [f"{row[name]:.3f}" for name in ("steps_per_second", "median_s", "p90_s", "speedup")]
        table.add_row(row["contender"], *figures, "yes" if row["correct"] else "NO")
    console.print(table)


def _lengths(option: str, text: str) -> list[float]:
    try:
        lengths = [float(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or not all(0 < length <= 7200 for length in lengths):
        raise MelrtError(f"--{option} is {text!r}; it is lengths in seconds, above 0 and up to 7200, as in 1,4,10.")
    return lengths


def _write(json_file: Path | None, report: object) -> None:
    if json_file:
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")


def _steps() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True)
