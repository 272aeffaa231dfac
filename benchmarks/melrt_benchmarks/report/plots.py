"""The report's pictures, as PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from melrt_benchmarks.report.results import Report

# Okabe and Ito's palette: told apart by every kind of sight.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def draw(report: Report) -> dict[str, bytes]:
    """Every picture that the report has figures for, by title."""
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        pictures = {
            "Times real time, by length": _speeds(report) if report.latencies else None,
            "Latency of each run": _distribution(report) if report.latencies else None,
            "Throughput under several callers": _throughput(report) if report.throughputs else None,
            "Streams against latency": _streams(report) if report.streams else None,
            "Roofline of one thread": _roofline(report) if report.layers else None,
        }
    return {title: picture for title, picture in pictures.items() if picture}


def _figure(height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots()


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis 20, 50, 100 and not in powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def _names(report: Report) -> list[str]:
    return list(dict.fromkeys(row.contender for row in report.latencies))


def _speeds(report: Report) -> bytes:
    figure, axes = _figure()
    shapes = list(dict.fromkeys((row.seconds, row.batch) for row in report.latencies))
    names = _names(report)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = {(row.seconds, row.batch): row for row in report.latencies if row.contender == name}
        heights = [rows[shape].times_real_time if shape in rows else 0 for shape in shapes]
        axes.bar(np.arange(len(shapes)) + width * (index - (len(names) - 1) / 2), heights, width, color=_COLORS[index % 8], label=name)
    labels = [f"{seconds:.2g} s" + (f" × {batch}" if batch > 1 else "") for seconds, batch in shapes]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_ylabel("times real time")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def _distribution(report: Report) -> bytes:
    """Cumulative distribution of each contender's runs at the longest length."""
    figure, axes = _figure()
    longest = max(row.seconds for row in report.latencies)
    for index, row in enumerate(row for row in report.latencies if row.seconds == longest and row.batch == report.latencies[0].batch):
        values = np.sort(row.milliseconds)
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=_COLORS[index % 8], label=row.contender)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.set_xlabel(f"milliseconds for {longest:.2g} s of audio")
    axes.set_ylabel("part of the runs")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def _throughput(report: Report) -> bytes:
    figure, axes = _figure()
    for index, name in enumerate(dict.fromkeys(row.contender for row in report.throughputs)):
        rows = sorted((row for row in report.throughputs if row.contender == name), key=lambda row: row.concurrency)
        axes.plot([r.concurrency for r in rows], [r.times_real_time for r in rows], "o-", color=_COLORS[index % 8], label=name)
    axes.set_xlabel("callers at once")
    axes.set_ylabel("times real time, all together")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def _streams(report: Report) -> bytes:
    figure, axes = _figure()
    for index, (in_flight, label) in enumerate(((True, "one queue"), (False, "each alone"))):
        rows = [row for row in report.streams if row["in_flight"] == in_flight]
        for which, style in ((0, "--"), (1, "-")):
            values = [row["latency_ms"][which] for row in rows]
            axes.plot(
                [row["streams"] for row in rows], values, style, marker="o", color=_COLORS[index], label=f"{label}, p{(50, 99)[which]}"
            )
    axes.set_xlabel("real-time streams at once")
    axes.set_ylabel("ms from frames to audio")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _png(figure)


def _roofline(report: Report) -> bytes:
    figure, axes = _figure(4.2)
    gflops, gbytes = report.ceilings["gflops"], report.ceilings["gbytes"]
    layers = [layer for layer in report.layers if layer.mflop]
    intensity = np.array([1000 * layer.mflop / layer.kilobytes for layer in layers])
    rate = np.array([1000 * layer.mflop / layer.microseconds for layer in layers])
    span = np.geomspace(intensity.min() / 2, intensity.max() * 2, 200)
    axes.plot(span, np.minimum(gflops, span * gbytes), color="black", linewidth=1.5)
    axes.scatter(intensity, rate, s=[max(1500 * layer.share, 8) for layer in layers], color=_COLORS[0], alpha=0.5)
    points = list(zip(layers, intensity, rate, strict=True))
    longest = sorted(points, key=lambda point: -point[0].share)[:1]
    furthest = sorted(points, key=lambda point: point[0].limit_microseconds / point[0].microseconds)[:2]
    for layer, x, y in {point[0].name: point for point in (*longest, *furthest)}.values():
        axes.annotate(layer.name, (x, y), fontsize=8, xytext=(6, -14), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("billions of operations a second")
    axes.set_title(f"ceilings: {gflops:g} GFLOP/s of a matrix product, {gbytes:g} GB/s of a copy; area is share of the time", fontsize=9)
    return _png(figure)
