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

    try:
        lengths = [float(part) for part in seconds.split(",")]
    except ValueError:
        raise MelrtError(f"--seconds is {seconds!r}; it is lengths in seconds, as in 1,4,10.") from None
    if not all(0 < length <= 600 for length in lengths) or rounds < 3:
        raise MelrtError(f"--seconds {seconds} --rounds {rounds}: lengths lie above 0 and up to 600 s, and there are at least 3 rounds.")
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("loading", total=None)
        report = run_bench(voice, checkpoint, lengths, rounds, threads or len(os.sched_getaffinity(0)),
                           lambda step: bar.update(task, description=step))  # fmt: skip
    if json_file:
        with whole_file(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
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
