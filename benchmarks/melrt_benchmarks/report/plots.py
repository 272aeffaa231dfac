"""Plots of a report, as PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from melrt_benchmarks.report.results import Report

# Palette of Okabe and Ito, which people with any kind of color vision can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# Letters of 12 points in a figure 6 inches wide are still legible on a telephone, where the page shows it 3.6 inches wide.
_STYLE: Any = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
# Log-mel errors of the same function differ by less than this, in %.
SAME_ERROR = 0.01
_WIDTH = 6.0
_DPI = 160


def draw_plots(report: Report) -> dict[str, bytes]:
    """Draw every plot that the report has figures for, by title."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        plots = {
            "Times real time, by length": _speeds(report) if report.latencies else None,
            "Speed against log-mel error": _front(report) if report.qualities else None,
            "Latency of each run": _distribution(report) if report.latencies else None,
            "Throughput under several callers": _throughput(report) if report.throughputs else None,
            "Streams against latency": _streams(report) if report.streams else None,
            "Roofline of one thread": _roofline(report) if report.layers else None,
        }
    return {title: plot for title, plot in plots.items() if plot}


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any, entries: int = 0) -> bytes:
    """Render a figure with a legend of so many entries below the axes, and with room for them."""
    columns = 2
    if entries:
        figure.set_figheight(figure.get_figheight() + 0.28 * -(-entries // columns))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=11, columnspacing=1, handlelength=1.2)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI)
    return stream.getvalue()


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 20, 50, 100 rather than with powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _speeds(report: Report) -> bytes:
    figure, axes = _figure()
    shapes = list(dict.fromkeys((row.seconds, row.batch) for row in report.latencies))
    names = list(dict.fromkeys(row.contender for row in report.latencies))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = {(row.seconds, row.batch): row for row in report.latencies if row.contender == name}
        heights = [rows[shape].times_real_time if shape in rows else 0 for shape in shapes]
        axes.bar(np.arange(len(shapes)) + width * (index - (len(names) - 1) / 2), heights, width, color=_COLORS[index % 8], label=name)
    labels = [f"{seconds:.2g} s" + (f" × {batch}" if batch > 1 else "") for seconds, batch in shapes]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_ylabel("times real time")
    axes.grid(visible=False, axis="x")
    return _png(figure, len(names))


def _distribution(report: Report) -> bytes:
    """Plot the cumulative distribution of each contender's runs at the longest length."""
    figure, axes = _figure()
    longest = max(row.seconds for row in report.latencies)
    rows = [row for row in report.latencies if row.seconds == longest and row.batch == report.latencies[0].batch]
    for index, row in enumerate(rows):
        values = np.sort(row.milliseconds)
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=_COLORS[index % 8], label=row.contender)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.set_xlabel(f"milliseconds for {longest:.2g} s of audio")
    axes.set_ylabel("share of the runs")
    return _png(figure, len(rows))


def _front(report: Report) -> bytes:
    """Plot speed at the longest length against the increase of the log-mel error, and the contenders that no other beats in both."""
    from matplotlib.ticker import FuncFormatter

    figure, axes = _figure()
    longest = max(row.seconds for row in report.latencies)
    speeds = {row.contender: row.times_real_time for row in report.latencies if row.seconds == longest and row.batch == 1}
    points = sorted(
        (-speeds[row.contender], 100 * row.above_reference, row.contender) for row in report.qualities if row.contender in speeds
    )
    best = np.inf
    front = []
    for index, (speed, error, name) in enumerate(points):
        axes.plot(error, -speed, "o", markersize=9, color=_COLORS[index % 8], label=name)
        if error < best - SAME_ERROR:
            best = error
            front.append((error, -speed))
    axes.plot(*zip(*front, strict=True), color="#888888", linewidth=1, zorder=0)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("increase of the log-mel error, %")
    axes.set_ylabel(f"times real time, {longest:.2g} s of audio")
    axes.set_ylim(bottom=0)
    return _png(figure, len(points))


def _throughput(report: Report) -> bytes:
    figure, axes = _figure()
    names = list(dict.fromkeys(row.contender for row in report.throughputs))
    for index, name in enumerate(names):
        rows = sorted((row for row in report.throughputs if row.contender == name), key=lambda row: row.concurrency)
        axes.plot([r.concurrency for r in rows], [r.times_real_time for r in rows], "o-", color=_COLORS[index % 8], label=name)
    axes.set_xlabel("concurrent callers")
    axes.set_ylabel("times real time, all callers")
    axes.set_ylim(bottom=0)
    return _png(figure, len(names))


def _streams(report: Report) -> bytes:
    figure, axes = _figure()
    for index, (shared_queue, label) in enumerate(((True, "shared queue"), (False, "separate threads"))):
        rows = [row for row in report.streams if row["shared_queue"] == shared_queue]
        for which, style in ((0, "--"), (1, "-")):
            values = [row["latency_ms"][which] for row in rows]
            name = f"{label}, p{(50, 99)[which]}"
            axes.plot([row["streams"] for row in rows], values, style, marker="o", color=_COLORS[index], label=name)
    axes.set_xlabel("concurrent real-time streams")
    axes.set_ylabel("ms from frames to audio")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    return _png(figure, 4)


def _roofline(report: Report) -> bytes:
    figure, axes = _figure()
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
        side = -1 if x > np.sqrt(span[0] * span[-1]) else 1  # labels point towards the middle
        line = {"arrowstyle": "-", "color": "#888888"}
        place = {"xytext": (10 * side, -30), "textcoords": "offset points", "ha": "left" if side > 0 else "right", "arrowprops": line}
        axes.annotate(layer.name, (x, y), fontsize=10, **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=rate.min() / 3)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("billion operations per second")
    title = f"Limits: {gflops:g} GFLOP/s (matrix product), {gbytes:g} GB/s (copy).\nThe area of a point is its share of the time."
    axes.set_title(title, fontsize=11, loc="left")
    return _png(figure)
