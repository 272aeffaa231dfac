"""The `melrt bench-training` command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from melrt.errors import MelrtError
from melrt.files.atomic import atomic_write
from melrt_benchmarks.measure.progress import steps

console = Console(highlight=False)


def bench_training(
    channels: Annotated[int, typer.Option(help="Width of the generator: 512 is the published one.")] = 512,
    batch: Annotated[int, typer.Option(help="Segments of 8192 samples in a step.")] = 16,
    rounds: Annotated[int, typer.Option(help="Counted steps of each contender.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads of both; default: all cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Time training steps on the CPU against a plain loop of the same networks: one interleaved run, medians, first losses compared."""
    from melrt_benchmarks.training.bench import TrainingBench, run_training_bench

    if rounds < 3 or batch < 1:
        raise MelrtError(f"--rounds is {rounds} and --batch {batch}; they are at least 3 and 1.")
    options = TrainingBench(channels, batch, rounds=rounds, threads=threads or len(os.sched_getaffinity(0)))
    with steps() as tell:
        report = run_training_bench(options, tell)
    if json_file:
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("contender", "steps/s", "median s", "p90 s", "against the plain loop", "same losses")
    for row in report["results"]:
        figures = [f"{row[name]:.3f}" for name in ("steps_per_second", "median_s", "p90_s", "speedup")]
        table.add_row(row["contender"], *figures, "yes" if row["correct"] else "NO")
    console.print(table)
