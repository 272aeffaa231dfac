"""Comparison of two reports, row by row: faster, slower, or the same within the spread that each of them measured."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from melrt.errors import MelrtError
from melrt.timing import median_interval
from melrt_benchmarks.report.results import Latency, Report

Key = tuple[str, float, int]
Verdict = Literal["same", "faster", "slower", "now wrong", "now right", "gone", "new", "baseline", "uncertain"]
# A baseline that moved by more than this ran on another machine, or on a busy one, which slows contenders unequally.
MAX_BASELINE_CHANGE = 1.25


@dataclass(frozen=True, slots=True)
class Change:
    """Difference between two reports for one contender at one length and batch."""

    contender: str
    seconds: float
    """Seconds of audio in each utterance."""
    batch: int
    ratio: float | None
    """New time divided by old time, relative to the baseline where the reports share one; None if only one report has the row."""
    verdict: Verdict


def compare(old: Report, new: Report) -> Iterator[Change]:
    """Compare each row of either report.

    If both reports begin with the same contender and share another one, the first contender is the baseline. Times are then divided by
    the baseline's time of the same round, because a machine that is slower today slows both. A row is faster or slower if the 95 %
    intervals of the two medians don't overlap. It is uncertain if the plain times and the times relative to the baseline give different
    verdicts, or if the baseline moved by more than a quarter.

    Raises:
        MelrtError: The reports have no row in common.
    """
    old_rows, new_rows = _rows(old), _rows(new)
    common = old_rows.keys() & new_rows.keys()
    if not common:
        raise MelrtError("the reports have no contender, length and batch in common; compare two runs of the same command.")
    baseline = _baseline(old, new, common)
    for key in {**old_rows, **new_rows}:
        if key in common:
            yield _change(old, new, key, baseline)
        else:
            yield Change(*key, None, "gone" if key in old_rows else "new")


def _baseline(old: Report, new: Report, common: Set[Key]) -> str | None:
    first = old.latencies[0].contender
    others = {name for name, _, _ in common} - {first}
    return first if first == new.latencies[0].contender and others else None


def _change(old: Report, new: Report, key: Key, baseline: str | None) -> Change:
    old_row, new_row = _rows(old)[key], _rows(new)[key]
    plain = [_interval(report, row, None) for report, row in ((old, old_row), (new, new_row))]
    verdict = _verdict(old_row, new_row, *plain)
    if baseline is None or old_row.correct != new_row.correct:
        return Change(*key, round(plain[1][0] / plain[0][0], 4), verdict)
    if key[0] == baseline:
        return Change(*key, round(plain[1][0] / plain[0][0], 4), "baseline")
    relative = [_interval(report, row, baseline) for report, row in ((old, old_row), (new, new_row))]
    steady = _change_factor(old, new, (baseline, *key[1:])) <= MAX_BASELINE_CHANGE
    certain = steady and _verdict(old_row, new_row, *relative) == verdict
    return Change(*key, round(relative[1][0] / relative[0][0], 4), verdict if certain else "uncertain")


def _change_factor(old: Report, new: Report, key: Key) -> float:
    """Ratio of the two medians, at least 1."""
    times = [median_interval(np.array(_rows(report)[key].milliseconds))[0] for report in (old, new)]
    return max(times) / min(times)


def _rows(report: Report) -> dict[Key, Latency]:
    return {(row.contender, row.seconds, row.batch): row for row in report.latencies}


def _interval(report: Report, row: Latency, baseline: str | None) -> tuple[float, float, float]:
    times = np.array(row.milliseconds)
    if baseline:
        times = times / np.array(_rows(report)[baseline, row.seconds, row.batch].milliseconds)
    return median_interval(times)


def _verdict(old_row: Latency, new_row: Latency, old: tuple[float, float, float], new: tuple[float, float, float]) -> Verdict:
    if old_row.correct != new_row.correct:
        return "now right" if new_row.correct else "now wrong"
    if new[1] > old[2]:
        return "slower"
    return "faster" if new[2] < old[1] else "same"
