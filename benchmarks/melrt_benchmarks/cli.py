"""The commands `melrt bench` and `melrt bench-host`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from melrt.cli.progress import Steps
from melrt.errors import ConfigError
from melrt.system import usable_cores
from melrt_benchmarks.report.results import milliseconds, speed

if TYPE_CHECKING:
    from melrt_benchmarks.inference.host import HostCost
    from melrt_benchmarks.inference.plan import BenchPlan
    from melrt_benchmarks.report.results import Report

console = Console(highlight=False)
# Options that only the measurement `time` uses.
TIME_OPTIONS = ("checkpoint", "seconds", "batch", "concurrency", "only", "speech", "rounds")


def bench(
    context: typer.Context,
    voice: Annotated[Path | None, typer.Argument(metavar="VOICE.melrt", help="The bundle.")] = None,
    measure: Annotated[
        str,
        typer.Option(
            help="Measurements, comma-separated. time: every contender. profile: each operation against its limit. "
            "start-up: in fresh processes. memory: peaks by length (minutes). "
            "streams: how many run in real time, with the first backend and precision (minutes)."
        ),
    ] = "time,profile,start-up",
    checkpoint: Annotated[Path | None, typer.Option(help="Its checkpoint. PyTorch, plain ONNX, OpenVINO and others need it.")] = None,
    precisions: Annotated[str, typer.Option(help="Precisions of melrt, comma-separated: fp32, tf32, fp16, bf16, int8.")] = "fp32",
    backends: Annotated[str, typer.Option(help="Backends, comma-separated: onnxruntime, openvino, tensorrt, fused.")] = "onnxruntime",
    only: Annotated[str, typer.Option(help="Time only contenders whose name contains one of these, comma-separated.")] = "",
    seconds: Annotated[str, typer.Option(help="Lengths of audio in seconds, comma-separated.")] = "1,4,10",
    batch: Annotated[str, typer.Option(help="Numbers of utterances in one call, comma-separated.")] = "1",
    concurrency: Annotated[str, typer.Option(help="Numbers of concurrent callers, comma-separated. Default: not measured.")] = "",
    speech: Annotated[
        list[Path] | None, typer.Option(help="Recordings of the voice, or a folder, to measure the log-mel error on. Repeat for several.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds, at least 3. Each round runs every contender once.")] = 15,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every contender. Default: all cores.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with plots to this file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="Compare two JSON files instead of measuring.")
    ] = None,
) -> None:
    """Time a voice in melrt, PyTorch, a plain ONNX export and others, interleaved on the same mels, and check every output.

    Begin with `melrt bench voice.melrt --checkpoint best_netG.pt --html report.html`. Later,
    `melrt bench --compare old.json new.json` shows what became faster or slower.
    The exit code is 1 if an output is wrong or melrt fails, or if the comparison finds a contender that became slower or wrong.
    """
    _check_options(context, _words(measure))
    if compare is not None:
        raise typer.Exit(_compare(*compare))
    if voice is None:
        raise ConfigError("give a VOICE.melrt to measure, or --compare OLD.json NEW.json.")
    from melrt_benchmarks.inference.plan import BenchPlan

    plan = BenchPlan(
        voice, checkpoint, _words(precisions), _words(backends), _numbers("seconds", seconds, float), _numbers("batch", batch, int),
        _numbers("concurrency", concurrency, int), rounds, threads or usable_cores(), _words(only), tuple(speech or ()),
        _words(measure), " ".join(["melrt", *sys.argv[1:]]),
    )  # fmt: skip
    raise typer.Exit(_measure(plan, json_file, html_file))


def _check_options(context: typer.Context, measure: tuple[str, ...]) -> None:
    """Refuse options that nothing would use."""
    given = [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    options = {name: "VOICE.melrt" if name == "voice" else f"--{name.removesuffix('_file')}" for name in given}
    if others := [option for name, option in options.items() if "compare" in given and name != "compare"]:
        raise ConfigError(f"--compare reads two files and measures nothing; leave out {', '.join(others)}.")
    if "time" not in measure and (unused := [option for name, option in options.items() if name in TIME_OPTIONS]):
        raise ConfigError(f"{', '.join(unused)}: only the measurement `time` uses this; leave it out, or write --measure time,...")


def bench_host(voice: Annotated[Path, typer.Argument(metavar="VOICE.melrt", help="The bundle; its network is not run.")]) -> None:
    """Measure the host cost of a call, a pushed chunk, bulk synthesis and scheduling, with a backend that computes nothing.

    `melrt bench-host demo/lj.melrt` takes about ten seconds. These costs are what remains of the latency when the GPU is fast.
    """
    from melrt.bundle import Bundle
    from melrt_benchmarks.inference.host import STREAMS, measure_host_cost

    with Steps(2) as steps:
        costs = measure_host_cost(Bundle.open(voice), steps)
    table = Table("cost", *(cost.policy for cost in costs), box=SIMPLE_HEAD)

    def add(name: str, value: Callable[[HostCost], str]) -> None:
        table.add_row(name, *map(value, costs))

    add("call, 1 s of audio: p50, p90", lambda cost: "{:.3f}, {:.3f} ms".format(*cost.call_ms))
    add("pushed chunk, one stream: mean, p90", lambda cost: "{:.0f}, {:.0f} µs".format(*cost.push_us))
    add(f"pushed chunk, {STREAMS:,} streams: CPU time", lambda cost: f"{cost.stream_us:.0f} µs")
    add("bulk, 64 utterances of 10 s", lambda cost: f"{cost.bulk_times_real_time:,.0f} x real time")
    for waiting in costs[0].choose_us:
        add(f"choosing windows, {waiting:,} waiting", lambda cost, waiting=waiting: f"{cost.choose_us[waiting]:.1f} µs")  # type: ignore[misc]
    for voices in costs[0].voice_us:
        add(f"choosing a voice of {voices:,}: CPU time", lambda cost, voices=voices: f"{cost.voice_us[voices]:.1f} µs")  # type: ignore[misc]
    console.print(table)


def _measure(plan: BenchPlan, json_file: Path | None, html_file: Path | None) -> int:
    """Measure, show and write the figures, and return the exit code."""
    from melrt_benchmarks.inference.bench import run_bench

    with Steps(plan.steps) as steps:
        report = run_bench(plan, steps, steps.detail)
    _show(report)
    _write(report, json_file, html_file)
    ours = any(skipped.failed and skipped.contender.startswith("melrt") for skipped in report.skipped)
    return 1 if ours or not all(row.correct for row in report.latencies) else 0


def _write(report: Report, json_file: Path | None, html_file: Path | None) -> None:
    if json_file:
        report.save(json_file)
        _say(f"Wrote {json_file}. Compare it with a later run: melrt bench --compare {json_file} NEW.json")
    if html_file:
        from melrt_benchmarks.report.html import write_html

        write_html(report, html_file)
        _say(f"Wrote {html_file}. Open it in a browser; it needs no network.")
    if not (json_file or html_file):
        _say("Nothing was written. Add --html report.html for a report, --json figures.json to compare runs.")


def _show(report: Report) -> None:
    for seconds, batch in dict.fromkeys((row.seconds, row.batch) for row in report.latencies):
        console.print(_latency_table(report, seconds, batch))
    if report.latencies:
        _explain(report)
    if report.throughputs:
        table = _table("concurrent callers", "contender", "callers", "x real time", "p50 ms", "p99 ms")
        for row in report.throughputs:
            table.add_row(row.contender, str(row.concurrency), f"{row.times_real_time:.1f}", f"{row.p50_ms:.0f}", f"{row.p99_ms:.0f}")
        console.print(table)
    _show_memory_and_streams(report)
    if report.skipped:
        console.print("\n[bold yellow]Contenders that did not run:[/]")
    for skipped in report.skipped:
        _say(f"  {skipped.contender}: {skipped.reason}")
    record = report.environment
    rounds = f", {report.rounds} rounds" if report.latencies else ""
    _say(f"\n{record['cpu']}, {record['threads']} threads{rounds}, load average {record['load_1min']}.")
    if report.noise:
        console.print(report.noise, markup=False, soft_wrap=True, style="yellow")


def _explain(report: Report) -> None:
    _say("RTF, the real-time factor, is compute time divided by audio time; x real time is its inverse.")
    _say("The speedup is over the first contender, as the median of the rounds.")
    if any(row.loop_ms is not None for row in report.latencies):
        _say("loop x: calls that follow each other without a pause. GPU ms and x: by the GPU's clock, with mels and audio in its memory.")
    if report.qualities:
        _say(f"log-mel: increase of the log-mel error on {report.qualities[0].recordings} recordings over that of the reference.")


def _show_memory_and_streams(report: Report) -> None:
    for row in report.memory:
        _say(f"Peak memory for {row['seconds']:g} s of audio, {row['kind']}: {row['peak_mib']:.0f} MiB.")
    sustained: dict[bool, int] = {row["shared_queue"]: row["streams"] for row in report.streams if row["sustained"]}
    if report.streams:
        _say(f"Real-time streams sustained: {sustained.get(True, 0)} in the shared queue, {sustained.get(False, 0)} in separate threads.")


def _latency_table(report: Report, seconds: float, batch: int) -> Table:
    title = f"{seconds:.2f} s of audio" + (f", batch {batch}" if batch > 1 else "")
    on_gpu = any(row.loop_ms is not None for row in report.latencies)
    table = _table(
        title, "contender", "p50 ms", "p90 ms", "RTF", "x real time", "speedup", "max abs", *(("log-mel",) if report.qualities else ()),
        *(("loop x", "GPU ms", "GPU x") if on_gpu else ()),
    )  # fmt: skip
    for row in report.latencies:
        if (row.seconds, row.batch) == (seconds, batch):
            wrong = "" if row.correct else " [bold red]WRONG[/]"
            table.add_row(
                row.contender, milliseconds(row.p50_ms), milliseconds(row.p90_ms), f"{row.real_time_factor:.4f}",
                f"{row.times_real_time:.1f}", f"{row.speedup[0]:.2f}", f"{row.max_abs:.0e}{wrong}",
                *((report.log_mel_of(row.contender),) if report.qualities else ()),
                *((speed(row, row.loop_ms), milliseconds(row.device_ms), speed(row, row.device_ms)) if on_gpu else ()),
            )  # fmt: skip
    return table


def _table(title: str, first: str, *heads: str) -> Table:
    """Return a table with text on the left and numbers on the right, narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column(first)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _compare(old: Path, new: Path) -> int:
    """Show the comparison and return the exit code."""
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
    _say(f"{worse} rows became slower or wrong." if worse else "No row became slower or wrong.")
    return 1 if worse else 0


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--{option} is {text!r}; it must be numbers separated by commas, such as 1,4,10.") from None
