"""The report as one HTML file that opens offline: tables, pictures, and what the figures depend on."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from melrt.files.atomic import atomic_write
from melrt_benchmarks.report.plots import draw
from melrt_benchmarks.report.results import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; white-space: nowrap }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd } th { border-bottom: 2px solid #888 }
th:first-child, td:first-child { text-align: left } .wrong { color: #b00020; font-weight: bold }
img { max-width: min(100%, 62rem); height: auto }
.quiet { color: #555 } .note { background: #fff3cd; padding: .6rem 1rem; border-radius: 4px }
"""
# Of the profile; the rest is one line.
MOST_LAYERS = 20


def write_html(report: Report, path: Path) -> None:
    """Write the page; it appears whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(_page(report), encoding="utf-8")


def _page(report: Report) -> str:
    title = f"{report.voice}: measured"
    sections = [
        f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(_where(report))}</p>',
        f'<p class="note">{escape(report.noise)}</p>' if report.noise else "",
        _latencies(report), _pictures(report), _throughputs(report), _start_ups(report), _streams(report), _memory(report), _layers(report),
        _skipped(report), _artifacts(report), _environment(report),
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def _where(report: Report) -> str:
    record = report.environment
    gpu = "" if record.get("gpu", "none") == "none" else f", {record['gpu']}"
    return (
        f"{record['date']}, {record['cpu']}, {record['threads']} of {record['cores']} cores{gpu}, {report.rounds} rounds. {report.command}"
    )


def _latencies(report: Report) -> str:
    heads: tuple[str, ...] = (
        "contender",
        "audio",
        "p50 ms",
        "p90",
        "p95",
        "p99",
        "worst",
        "real-time factor",
        "times real time",
        "against the first",
        "max abs",
        "SNR dB",
    )
    rows: list[tuple[str, ...]] = [
        (
            row.contender, f"{row.seconds:.2f} s" + (f" × {row.batch}" if row.batch > 1 else ""), f"{row.p50_ms:.1f}", f"{row.p90_ms:.1f}",
            f"{row.p95_ms:.1f}", f"{row.p99_ms:.1f}", f"{row.worst_ms:.1f}", f"{row.real_time_factor:.4f}", f"{row.times_real_time:.1f}",
            "{:.2f} ({:.2f} to {:.2f})".format(*row.speedup), f"{row.max_abs:.0e}", f"{row.snr_db:.0f}" if row.correct else "WRONG",
        )
        for row in report.latencies
    ]  # fmt: skip
    if any(row.device_ms is not None for row in report.latencies):
        heads += ("GPU ms", "joules")
        rows = [
            (*cells, "" if row.device_ms is None else f"{row.device_ms:.2f}", "" if row.joules is None else f"{row.joules:.2g}")
            for cells, row in zip(rows, report.latencies, strict=True)
        ]
    text = "From the call to the result on the host. Each contender ran once a round, in changing order; outputs were compared first."
    return _section("Latency", heads, rows, text)


def _pictures(report: Report) -> str:
    tags = (
        f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for title, picture in draw(report).items()
    )
    return "\n".join(tags)


def _throughputs(report: Report) -> str:
    rows = [
        (row.contender, str(row.concurrency), f"{row.seconds:g} s", str(row.requests), f"{row.times_real_time:.1f}", f"{row.p50_ms:.1f}",
         f"{row.p99_ms:.1f}")
        for row in report.throughputs
    ]  # fmt: skip
    return _section("Throughput", ("contender", "callers", "each", "requests", "times real time", "p50 ms", "p99 ms"), rows)


def _start_ups(report: Report) -> str:
    heads = ("contender", "import ms", "load ms", "load again ms", "first second of audio ms", "peak MiB", "GPU MiB")
    rows = [
        (
            row.contender,
            f"{row.import_ms:.0f}",
            f"{row.load_ms:.0f}",
            f"{row.reload_ms:.0f}",
            f"{row.first_audio_ms:.0f}",
            f"{row.peak_mib:.0f}",
            f"{row.device_mib:.0f}",
        )
        for row in report.start_ups
    ]
    return _section("Start-up", heads, rows, "Each in a process of its own, medians.")


def _streams(report: Report) -> str:
    heads = ("streams", "", "late", "of", "latency p50 ms", "p99", "first audio p50 ms", "p99", "")
    rows = [
        (
            str(row["streams"]), "one queue" if row["in_flight"] else "each alone", str(row["underruns"]), str(row["pushes"]),
            *(f"{value:g}" for value in (*row["latency_ms"], *row["first_audio_ms"])), "held" if row["held"] else "too many",
        )
        for row in report.streams
    ]  # fmt: skip
    return _section("Real-time streams", heads, rows)


def _memory(report: Report) -> str:
    rows = [(f"{row['seconds']:g} s", row["kind"], f"{row['peak_mib']:.0f}") for row in report.memory]
    return _section("Memory of a synthesis", ("audio", "", "peak MiB"), rows)


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    rows = [
        (layer.name, layer.kind, f"{layer.microseconds:.0f}", f"{100 * layer.share:.1f} %", f"{layer.mflop:.1f}" if layer.mflop else "",
         f"{layer.kilobytes:.0f}" if layer.mflop else "",
         f"{100 * layer.limit_microseconds / layer.microseconds:.0f} %" if layer.limit_microseconds else "")
        for layer in report.layers[:MOST_LAYERS]
    ]  # fmt: skip
    rest = report.layers[MOST_LAYERS:]
    rows.append(
        (f"{len(rest)} more", "", f"{sum(x.microseconds for x in rest):.0f}", f"{100 * sum(x.share for x in rest):.1f} %", "", "", "")
    )
    heads = ("operation", "kind", "µs", "share", "MFLOP", "kB", "of its limit")
    return _section(
        "Where the time goes: one window on one thread", heads, rows, "Operations under the names that ONNX Runtime gives them."
    )


def _skipped(report: Report) -> str:
    return _section("Not run", ("contender", "why"), [(row.contender, row.reason) for row in report.skipped])


def _artifacts(report: Report) -> str:
    rows = [
        (str(row["file"]), str(row["precision"]), f"{row['bytes'] / 1e6:.2f}") for row in report.artifacts if row["kind"] != "reference"
    ]
    return _section("Files of the voice", ("file", "precision", "MB"), rows)


def _environment(report: Report) -> str:
    values: Mapping[str, object] = report.environment
    rows = [
        (key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)) for key, value in values.items()
    ]
    return _section("Environment", ("", ""), rows)


def _section(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], text: str = "") -> str:
    rows = list(rows)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    said = f'<p class="quiet">{escape(text)}</p>' if text else ""
    return f'<h2>{escape(title)}</h2>{said}<div class="scroll"><table><tr>{head}</tr>\n{body}\n</table></div>'


def _cell(value: str) -> str:
    return f'<td class="wrong">{value}</td>' if value == "WRONG" else f"<td>{escape(value)}</td>"
