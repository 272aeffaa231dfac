"""The report of a sitting as one HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from melrt_benchmarks.report.page import Raw, section, whole_page
from melrt_benchmarks.sitting.runner import Result

# Longer values belong in the JSON.
MOST_VALUE = 400
# Parts of a benchmark's JSON that `versions` tells better, or that no reader compares here.
LEFT_OUT = ("environment", "artifacts", "layers", "schema", "command")
# Facts of the GPU in the first lines; the table of `versions` has all of them.
DESCRIBED = {"name": "{}", "compute_cap": "compute capability {}", "driver_version": "driver {}", "memory.total": "{} MiB of memory"}


def page(results: list[Result], began: str) -> str:
    """Return the page: a table of the steps, then what each one found."""
    counts: dict[str, int] = {}
    for result in results:
        counts[result.outcome] = counts.get(result.outcome, 0) + 1
    summary = f"{began}. Steps: {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}."
    gpu: dict[str, str] = next((result.data.get("gpu", {}) for result in results if result.name == "versions"), {})
    described = ", ".join(text.format(gpu[key]) for key, text in DESCRIBED.items() if key in gpu)
    rows = [(one.title, _outcome(one.outcome), f"{one.seconds:.1f} s", f"of {one.limit} s", one.reason) for one in results]
    sections = [
        f"<h1>GPU sitting</h1><p>{escape(summary)}</p>", f'<p class="quiet">{escape(described)}</p>',
        section("Steps", ("step", "outcome", "time", "limit", "reason"), rows, css="text sentences"), *map(_step, results),
    ]  # fmt: skip
    return whole_page("GPU sitting", sections)


def _outcome(outcome: str) -> str | Raw:
    return Raw(f'<span class="wrong">{escape(outcome)}</span>') if outcome in ("failed", "timed out") else outcome


def _step(result: Result) -> str:
    """Return the tables of a step, and the end of its output."""
    if result.outcome in ("skipped", "not begun"):
        return ""
    data = {name: value for name, value in result.data.items() if name not in LEFT_OUT}
    parts = [_checks(data.pop("rows", data.pop("tests", []))), _latencies(data.pop("latencies", [])), _kernels(data.pop("shapes", {}))]
    for name, rows in [(name, _rows(value)) for name, value in data.items()]:
        if rows:
            parts.append(_table(name, rows, "text" if isinstance(data[name], list) else ""))
            del data[name]
    figures = [(name, str(value)) for name, value in _flat(data) if len(str(value)) <= MOST_VALUE]
    parts.append(section("", ("figure", "value"), figures, css="text"))
    tail = escape("\n".join(result.tail))
    opened = " open" if result.outcome != "passed" else ""
    output = f"<details{opened}><summary>Command and the end of its output</summary><pre>{escape(result.command)}\n\n{tail}</pre></details>"
    return f"<h2>{escape(result.title)}</h2>" + "".join(parts) + output


def _checks(checks: list[dict[str, Any]]) -> str:
    rows = [(check["name"], _outcome(check["outcome"]), f"{check['seconds']:.2f} s", check["detail"]) for check in checks]
    return section("", ("check", "outcome", "time", "detail"), rows, css="text sentences")


def _rows(value: object) -> list[dict[str, Any]]:
    """Return the rows of a list of dictionaries, or of a dictionary of dictionaries that have the same keys; no rows for another value."""
    if isinstance(value, dict):
        value = [{"": key, **row} if isinstance(row, dict) else None for key, row in value.items()]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return []
    return value if all(list(row) == list(value[0]) for row in value) else []


def _table(name: str, rows: list[dict[str, Any]], css: str) -> str:
    """Return a table of rows that have the same keys; each column is a key."""
    heads = list(rows[0])
    cells = [[_number(row.get(head)) or str(row.get(head, "")) for head in heads] for row in rows]
    return f"<h3>{escape(name.replace('_', ' '))}</h3>" + section("", [head.replace("_", " ") for head in heads], cells, css=css)


def _kernels(shapes: dict[str, Any]) -> str:
    """Return the times of a fused engine: a row for the network and for each layer, a column for each shape."""
    if not shapes:
        return ""
    rows = [("network", *(f"{shape['us']:,.1f}" for shape in shapes.values()))]
    rows.append(("times real time", *(f"{shape['times_real_time']:,.0f}" for shape in shapes.values())))
    for layer in next(iter(shapes.values()))["layers"]:
        rows.append((layer, *(_microseconds(shape["layers"][layer]) for shape in shapes.values())))
    text = "Microseconds by the GPU's clock for batch x frames, and in parentheses the bound of each kernel."
    return section("", ("", *shapes), rows, text)


def _microseconds(layer: dict[str, Any]) -> str:
    return f"{layer['us']:,.1f}" + (f" ({layer['bound_us']:,.1f})" if layer["bound_us"] else "")


def _latencies(latencies: list[dict[str, Any]]) -> str:
    heads = {"first_ms": "first call ms", "p50_ms": "p50 ms", "p90_ms": "p90 ms", "times_real_time": "times real time",
             "loop_ms": "loop ms", "device_ms": "GPU ms", "max_abs": "max abs", "snr_db": "SNR dB", "correct": "correct"}  # fmt: skip
    rows = [
        (f"{row['contender']}, {row['seconds']:.2f} s × {row['batch']}", *(_number(row.get(key)) for key in heads)) for row in latencies
    ]
    return section("", ("contender", *heads.values()), rows)


def _number(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return ""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _flat(data: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested dictionaries and lists with their paths."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        name = f"{prefix}{key}"
        if isinstance(value, list) and not any(isinstance(one, dict | list) for one in value):
            value = ", ".join(_number(one) or str(one) for one in value)
        if isinstance(value, dict | list) and value:
            yield from _flat(value, f"{name} / ")
        elif value not in ({}, [], "", None):
            yield name, _number(value) if isinstance(value, float) else value
