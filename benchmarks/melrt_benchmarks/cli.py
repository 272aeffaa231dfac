"""The `melrt bench` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from melrt.errors import MelrtError
from melrt.files.atomic import atomic_write
from melrt_benchmarks.measure.progress import steps

if TYPE_CHECKING:
    from melrt_benchmarks.report.results import Report

console = Console(highlight=False)
# Lengths in seconds that memory is measured at: in windows, and in one run over the whole.
MEMORY = {"windows": (30.0, 1800.0), "whole": (30.0, 60.0, 120.0)}


def bench(
    voice: Annotated[Path | None, typer.Argument(metavar="VOICE.melrt", help="The bundle.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="What it was exported from, for PyTorch and the plain export.")] = None,
    precisions: Annotated[str, typer.Option(help="Of melrt, comma-separated: fp32, tf32, fp16, int8.")] = "fp32",
    backends: Annotated[str, typer.Option(help="Of melrt, comma-separated: onnxruntime, tensorrt.")] = "onnxruntime",
    seconds: Annotated[str, typer.Option(help="Lengths of audio, comma-separated.")] = "1,4,10",
    batch: Annotated[str, typer.Option(help="Utterances in one call, comma-separated.")] = "1",
    concurrency: Annotated[str, typer.Option(help="Callers at once, comma-separated; none: not measured.")] = "",
    only: Annotated[str, typer.Option(help="Run only contenders whose name holds one of these, comma-separated.")] = "",
    rounds: Annotated[int, typer.Option(help="Counted rounds; each runs every contender once.")] = 15,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every contender; default: all cores.")] = None,
    streams: Annotated[bool, typer.Option("--streams", help="Also find how many real-time streams are held (minutes).")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Also measure peak memory against length (minutes).")] = False,
    profile: Annotated[bool, typer.Option("--profile/--no-profile", help="Time each operation against its own limit.")] = True,
    start_up: Annotated[bool, typer.Option("--start-up/--no-start-up", help="Time starts, each in a process of its own.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with pictures here, one file.")] = None,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Write the pictures here, a folder of PNGs.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="Compare two JSON files instead of measuring.")
    ] = None,
) -> None:
    """Time a voice against PyTorch, a plain ONNX export and others: one interleaved run, medians, outputs checked.

    `melrt bench voice.melrt --checkpoint best_netG.pt --html report.html` tells most. The real-time factor is compute time over audio time;
    its inverse is how many times faster than real time. `melrt bench --compare old.json new.json` says what became faster or slower, and
    exits with 1 if anything became slower or wrong; so does a run in which an output is wrong.
    """
    if compare is not None:
        raise typer.Exit(_compare(*compare))
    if voice is None:
        raise MelrtError("give a VOICE.melrt to measure, or --compare OLD.json NEW.json.")
    from melrt_benchmarks.inference.bench import Plan, run_bench

    with steps() as tell:
        plan = Plan(
            voice, checkpoint, _words(precisions), _words(backends), _numbers("seconds", seconds, float), _numbers("batch", batch, int),
            _numbers("concurrency", concurrency, int), rounds, threads or len(os.sched_getaffinity(0)), _words(only), profile, start_up,
            " ".join(["melrt", *sys.argv[1:]]), tell,
        )  # fmt: skip
        report = run_bench(plan)
        if streams:
            report = replace(report, streams=_measure_streams(voice, plan.threads, tell))
        if memory:
            report = replace(report, memory=_measure_memory(voice, tell))
    _show(report)
    _write(report, json_file, html_file, pictures)
    if not all(row.correct for row in report.latencies):
        raise typer.Exit(1)


def _measure_streams(voice: Path, threads: int, tell: Callable[[str], None]) -> tuple[dict[str, Any], ...]:
    from melrt_benchmarks.inference.streams import Load, most_streams

    return tuple(most_streams(str(voice), Load(), threads=threads, on_step=tell))


def _measure_memory(voice: Path, tell: Callable[[str], None]) -> tuple[dict[str, Any], ...]:
    from melrt_benchmarks.inference.memory import peak_memory

    rows = []
    for kind, lengths in MEMORY.items():
        for seconds in lengths:
            tell(f"memory of {seconds:g} s, {kind}")
            rows.append({"seconds": seconds, "kind": kind, "peak_mib": round(peak_memory(voice, seconds, whole=kind == "whole"), 1)})
    return tuple(rows)


def _write(report: Report, json_file: Path | None, html_file: Path | None, pictures: Path | None) -> None:
    if json_file:
        report.save(json_file)
    if html_file:
        from melrt_benchmarks.report.html import write_html

        write_html(report, html_file)
    if pictures:
        from melrt_benchmarks.report.plots import draw

        pictures.mkdir(parents=True, exist_ok=True)
        for title, picture in draw(report).items():
            with atomic_write(pictures / f"{title.split(',')[0].lower().replace(' ', '-')}.png") as temporary:
                temporary.write_bytes(picture)


def _show(report: Report) -> None:
    for seconds, batch in dict.fromkeys((row.seconds, row.batch) for row in report.latencies):
        title = f"{seconds:.2f} s of audio" + (f", {batch} at once" if batch > 1 else "")
        table = _table(title, "contender", "p50 ms", "p90 ms", "RTF", "x real time", "x first", "max abs")
        for row in report.latencies:
            if (row.seconds, row.batch) == (seconds, batch):
                wrong = "" if row.correct else " [bold red]WRONG[/]"
                table.add_row(
                    row.contender, f"{row.p50_ms:.1f}", f"{row.p90_ms:.1f}", f"{row.real_time_factor:.4f}", f"{row.times_real_time:.1f}",
                    f"{row.speedup[0]:.2f}", f"{row.max_abs:.0e}{wrong}",
                )  # fmt: skip
        console.print(table)
    console.print("RTF: compute time over audio time, and its inverse; x first: times as fast as the first, median of the rounds.")
    if report.throughputs:
        table = _table("several callers at once", "contender", "callers", "x real time", "p50 ms", "p99 ms")
        for load in report.throughputs:
            table.add_row(load.contender, str(load.concurrency), f"{load.times_real_time:.1f}", f"{load.p50_ms:.0f}", f"{load.p99_ms:.0f}")
        console.print(table)
    for one in report.skipped:
        console.print(f"not run: {one.contender}: {one.reason}", markup=False)
    record = report.environment
    console.print(f"{record['cpu']}, {record['threads']} threads, {report.rounds} rounds, load {record['load_1min']}", markup=False)
    if report.noise:
        console.print(report.noise, markup=False)


def _table(title: str, first: str, *heads: str) -> Table:
    """Texts on the left and numbers on the right, narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column(first)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _compare(old: Path, new: Path) -> int:
    from melrt_benchmarks.report.compare import compare
    from melrt_benchmarks.report.results import Report

    table = _table("", "contender", "audio s", "batch", "new / old time", "verdict")
    worse = 0
    for change in compare(Report.load(old), Report.load(new)):
        bad = change.verdict in ("slower", "now wrong")
        worse += bad
        table.add_row(change.contender, f"{change.seconds:.2f}", str(change.batch), "" if change.ratio is None else f"{change.ratio:.3f}",
                      f"[bold red]{change.verdict}[/]" if bad else change.verdict)  # fmt: skip
    console.print(table)
    return 1 if worse else 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise MelrtError(f"--{option} is {text!r}; it is numbers with commas between, as in 1,4,10.") from None
