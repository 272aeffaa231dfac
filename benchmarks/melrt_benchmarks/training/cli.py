"""The `melrt bench-training` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from melrt.cli.progress import Steps
from melrt.errors import MelrtError
from melrt.files.atomic import atomic_write
from melrt.system import usable_cores

console = Console(highlight=False)


def bench_training(
    channels: Annotated[int, typer.Option(help="Channels after the generator's first convolution; the published generator has 512.")] = 512,
    batch: Annotated[int, typer.Option(help="Segments in one step; each has 8192 samples.")] = 16,
    rounds: Annotated[int, typer.Option(help="Timed steps of each contender, at least 3.")] = 9,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each contender. The default is one for each core.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
) -> None:
    """Time melrt's training steps on the CPU against a plain loop with the same networks.

    The steps of both are interleaved, and the table shows medians. The losses of the first step are compared.
    """
    from melrt_benchmarks.training.bench import TrainingBench, run_training_bench

    if rounds < 3 or batch < 1:
        raise MelrtError(f"--rounds is {rounds} and --batch is {batch}; they must be at least 3 and 1.")
    options = TrainingBench(channels, batch, rounds=rounds, threads=threads or usable_cores())
    with Steps(2) as step:
        report = run_training_bench(options, step)
    if json_file:
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("contender", "steps/s", "median s", "p90 s", "speed against the plain loop", "same losses")
    for row in report["results"]:
        figures = [f"{row[name]:.3f}" for name in ("steps_per_second", "median_s", "p90_s", "speedup")]
        table.add_row(row["contender"], *figures, "yes" if row["correct"] else "NO")
    console.print(table)
    if json_file:
        console.print(f"Wrote the result to {json_file}.", markup=False)
