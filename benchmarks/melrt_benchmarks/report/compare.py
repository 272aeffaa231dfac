"""Two reports, row by row: faster, slower, or the same within what each of them says of its own spread."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from melrt.errors import MelrtError
from melrt.timing import median_interval
from melrt_benchmarks.report.results import Latency, Report

Key = tuple[str, float, int]
Verdict = Literal["same", "faster", "slower", "now wrong", "now right", "gone", "new", "yardstick", "uncertain"]
# A yardstick that moved by more than this is another machine, or a busy one, which slows contenders unequally.
MOVED = 1.25


@dataclass(frozen=True, slots=True)
class Change:
    """One contender at one length and batch in both reports."""

    contender: str
    seconds: float
    batch: int
    ratio: float | None
    """New time over old time, None where only one has the row; relative to the reports' first contender where that is the same in both."""
    verdict: Verdict


def compare(old: Report, new: Report) -> Iterator[Change]:
    """Each row of either report.

    Where both began with the same contender and have another in common, that first one is the yardstick: times are taken relative
    to it, round by round, since a machine that is slower today slows both. A row is faster or slower where the 95 % intervals of the
    two medians do not meet. It is uncertain where times alone say otherwise than times beside the yardstick, or where that moved by
    more than a quarter: a busy machine slows contenders unequally.

    Raises:
        MelrtError: The reports have no row in common.
    """
    before, after = _rows(old), _rows(new)
    if not before.keys() & after.keys():
        raise MelrtError("the reports have no contender, length and batch in common; compare two runs of one command.")
    yardstick = _yardstick(old, new, before.keys() & after.keys())
    for key in {**before, **after}:
        if key in before and key in after:
            yield _change(old, new, key, yardstick)
        else:
            yield Change(*key, None, "gone" if key in before else "new")


def _yardstick(old: Report, new: Report, common: Set[Key]) -> str | None:
    first = old.latencies[0].contender
    others = {name for name, _, _ in common} - {first}
    return first if first == new.latencies[0].contender and others else None


def _change(old: Report, new: Report, key: Key, yardstick: str | None) -> Change:
    was, now = _rows(old)[key], _rows(new)[key]
    alone = [_interval(report, row, None) for report, row in ((old, was), (new, now))]
    verdict = _verdict(was, now, *alone)
    if yardstick is None or was.correct != now.correct:
        return Change(*key, round(alone[1][0] / alone[0][0], 4), verdict)
    if key[0] == yardstick:
        return Change(*key, round(alone[1][0] / alone[0][0], 4), "yardstick")
    beside = [_interval(report, row, yardstick) for report, row in ((old, was), (new, now))]
    certain = _verdict(was, now, *beside) == verdict and _moved(old, new, (yardstick, *key[1:])) <= MOVED
    return Change(*key, round(beside[1][0] / beside[0][0], 4), verdict if certain else "uncertain")


def _moved(old: Report, new: Report, key: Key) -> float:
    times = [median_interval(np.array(_rows(report)[key].milliseconds))[0] for report in (old, new)]
    return max(times) / min(times)


def _rows(report: Report) -> dict[Key, Latency]:
    return {(row.contender, row.seconds, row.batch): row for row in report.latencies}


def _interval(report: Report, row: Latency, relative_to: str | None) -> tuple[float, float, float]:
    times = np.array(row.milliseconds)
    if relative_to:
        first = _rows(report)[relative_to, row.seconds, row.batch]
        times = times / np.array(first.milliseconds)
    return median_interval(times)


def _verdict(was: Latency, now: Latency, old: tuple[float, float, float], new: tuple[float, float, float]) -> Verdict:
    if was.correct != now.correct:
        return "now right" if now.correct else "now wrong"
    if new[1] > old[2]:
        return "slower"
    return "faster" if new[2] < old[1] else "same"
