"""The report as one HTML file that opens offline: tables, plots and environment."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from melrt.files.atomic import atomic_write
from melrt_benchmarks.report.page import section as _section
from melrt_benchmarks.report.page import whole_page
from melrt_benchmarks.report.plots import draw_plots
from melrt_benchmarks.report.results import Latency, Report, milliseconds, speed

# Layers shown one by one; the others share the last row.
MAX_LAYERS = 20


def write_html(report: Report, path: Path) -> None:
    """Write the page atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(_page(report), encoding="utf-8")


def _page(report: Report) -> str:
    title = f"{report.voice}: benchmark"
    skipped = f"Contenders that did not run: {len(report.skipped)}. The table below the latencies gives the reasons and the commands."
    sections = [
        f"<h1>{escape(title)}</h1>", *(f'<p class="quiet">{escape(line)}</p>' for line in _summary(report)),
        f'<p class="note">{escape(report.noise)}</p>' if report.noise else "",
        f'<p class="note">{skipped}</p>' if report.skipped else "",
        _latencies(report), _gpu_times(report), _skipped(report), _plots(report), _throughputs(report), _start_ups(report),
        _streams(report), _memory(report), _layers(report), _artifacts(report), _environment(report),
    ]  # fmt: skip
    return whole_page(title, sections)


def _summary(report: Report) -> tuple[str, str]:
    record = report.environment
    gpu = "" if record.get("gpu", "none") == "none" else f", {record['gpu']}"
    where = f"{record['date']}, {record['cpu']}, {record['threads']} of {record['cores']} cores{gpu}, {report.rounds} rounds."
    return where, report.command


def _latencies(report: Report) -> str:
    latencies = report.latencies
    heads = ["contender", "audio", "first call ms", "p50 ms", "p90", "p95", "p99", "worst", "real-time factor", "times real time",
             "speedup", "max abs", "SNR dB"]  # fmt: skip
    if report.qualities:
        heads.append("log-mel error")
    rows = [(*_latency_cells(row), *((report.log_mel_of(row.contender),) if report.qualities else ())) for row in latencies]
    text = (
        "Times are from the call to the result on the host. Each contender ran once per round, in changing order, after its output had "
        "been compared with the reference. The speedup is over the first contender, with its 95 % interval. The real-time factor is "
        "compute time divided by audio time. The first call of a shape is not counted: many contenders prepare it then."
    )
    if report.qualities:
        text += (
            f" The log-mel error is that of {report.qualities[0].recordings} recordings, as its increase over the error of the reference."
        )
    return _section("Latency", heads, rows, text)


def _latency_cells(row: Latency) -> tuple[str, ...]:
    times = row.first_ms, row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms, row.worst_ms
    return (
        row.contender, _audio(row), *map(milliseconds, times),
        f"{row.real_time_factor:.4f}", f"{row.times_real_time:.1f}", "{:.2f} ({:.2f} to {:.2f})".format(*row.speedup),
        f"{row.max_abs:.0e}", f"{row.snr_db:.0f}" if row.correct else "WRONG",
    )  # fmt: skip


def _audio(row: Latency) -> str:
    return f"{row.seconds:.2f} s" + (f" × {row.batch}" if row.batch > 1 else "")


def _gpu_times(report: Report) -> str:
    rows = [
        (row.contender, _audio(row), milliseconds(row.loop_ms), milliseconds(row.loop_p90_ms), speed(row, row.loop_ms),
         milliseconds(row.device_ms), milliseconds(row.device_p90_ms), speed(row, row.device_ms),
         "" if row.joules is None else f"{row.joules:.2g}")
        for row in report.latencies
        if row.loop_ms is not None
    ]  # fmt: skip
    text = (
        "The loop ran calls one after another without a pause, from host to host. GPU times are between two events on the GPU, with mels "
        "and audio in its memory, and include its waiting for launches. The energy is that of the whole board, for one call of the loop."
    )
    heads = ("contender", "audio", "loop ms", "p90", "times real time", "GPU ms", "p90", "times real time", "joules")
    return _section("On the GPU", heads, rows, text)


def _skipped(report: Report) -> str:
    rows = [(row.contender, row.reason) for row in report.skipped]
    return _section("Contenders that did not run", ("contender", "reason"), rows, css="text")


def _plots(report: Report) -> str:
    images = ((escape(title), base64.b64encode(plot).decode()) for title, plot in draw_plots(report).items())
    sections = (f'<section><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{image}"></section>' for title, image in images)
    return f'<div class="plots">{"".join(sections)}</div>'


def _throughputs(report: Report) -> str:
    rows = [
        (row.contender, str(row.concurrency), f"{row.seconds:g} s", str(row.requests), f"{row.times_real_time:.1f}", f"{row.p50_ms:.1f}",
         f"{row.p99_ms:.1f}")
        for row in report.throughputs
    ]  # fmt: skip
    heads = ("contender", "callers", "audio each", "requests", "times real time", "p50 ms", "p99 ms")
    return _section("Throughput with concurrent callers", heads, rows)


def _start_ups(report: Report) -> str:
    rows = [
        (row.contender, *(f"{value:.0f}" for value in
         (row.import_ms, row.load_ms, row.reload_ms, row.first_audio_ms, row.peak_mib, row.device_mib)))
        for row in report.start_ups
    ]  # fmt: skip
    heads = ("contender", "import ms", "first load ms", "second load ms", "first second of audio ms", "peak MiB", "GPU MiB")
    return _section("Start-up", heads, rows, "Medians; each start is a fresh process.")


def _streams(report: Report) -> str:
    rows = [
        (
            str(row["streams"]), "shared queue" if row["shared_queue"] else "separate threads", f"{row['underruns']} of {row['pushes']}",
            *(f"{value:g}" for value in (*row["latency_ms"], *row["first_audio_ms"])), "yes" if row["sustained"] else "no",
        )
        for row in report.streams
    ]  # fmt: skip
    heads = ("streams", "through", "late pushes", "latency p50 ms", "p99", "first audio p50 ms", "p99", "sustained")
    return _section("Real-time streams", heads, rows, "A number of streams is sustained if at most one push in a hundred is late.")


def _memory(report: Report) -> str:
    rows = [(f"{row['seconds']:g} s", row["kind"], f"{row['peak_mib']:.0f}") for row in report.memory]
    return _section("Memory of a synthesis", ("audio", "computed", "peak MiB"), rows)


def _layers(report: Report) -> str:
    rows = [
        (layer.name, layer.kind, f"{layer.microseconds:.0f}", f"{100 * layer.share:.1f} %", f"{layer.mflop:.1f}" if layer.mflop else "",
         f"{layer.kilobytes:.0f}" if layer.mflop else "",
         f"{100 * layer.limit_microseconds / layer.microseconds:.0f} %" if layer.limit_microseconds else "")
        for layer in report.layers[:MAX_LAYERS]
    ]  # fmt: skip
    if others := report.layers[MAX_LAYERS:]:
        time, share = sum(layer.microseconds for layer in others), sum(layer.share for layer in others)
        rows.append((f"{len(others)} more", "", f"{time:.0f}", f"{100 * share:.1f} %", "", "", ""))
    heads = ("operation", "kind", "µs", "share", "MFLOP", "kB", "of its limit")
    text = "Operations have the names that ONNX Runtime gives them. 100 % of its limit is the highest speed this machine allows."
    return _section("Time of each operation: one window on one thread", heads, rows, text)


def _artifacts(report: Report) -> str:
    rows = [
        (str(row["file"]), str(row["precision"]), f"{row['bytes'] / 1e6:.2f}") for row in report.artifacts if row["kind"] != "reference"
    ]
    return _section("Files of the voice", ("file", "precision", "MB"), rows)


def _environment(report: Report) -> str:
    rows = [
        (key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
        for key, value in report.environment.items()
        if value not in ("", {})
    ]
    return _section("Environment", ("setting", "value"), rows, css="text")
