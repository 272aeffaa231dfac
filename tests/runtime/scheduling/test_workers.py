"""Workers that several queues share: order, fairness and lanes."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.echo import constant

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.planning.windows import Policy
from melrt.scheduling.workers import CREDIT, Usage, Workers

ONE = Policy(64, static=False, batch=1, workers=1)


class Logged:
    """A backend that takes 2 ms for a run and notes its name in a log that several backends share."""

    device, precision = "cpu", "fp32"

    def __init__(self, name: str, log: list[str], policy: Policy = ONE) -> None:
        self.name, self.log, self.policy = name, log, policy

    def close(self) -> None:
        self.log.append(f"{self.name} closed")

    def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
        self.log.append(self.name)
        time.sleep(0.002)
        return np.repeat(mel[:, 0], 256, axis=1)


class Waiting:
    """A queue in which one window always waits."""

    lanes, windows_waiting = 1, 1

    def __init__(self, weight: float, run_seconds: float = 0.0) -> None:
        self.run_seconds = run_seconds
        self.deadline = 0.0
        self.usage = Usage()
        self.usage.weight = weight

    def next_deadline(self) -> float:
        return self.deadline

    def take(self) -> list:
        return []

    def ran(self, seconds: float) -> None:
        self.usage.add(seconds, self.usage.window_seconds)


def two(path: Path) -> tuple[list[str], Vocoder, Vocoder]:
    log: list[str] = []
    workers, bundle = Workers(), Bundle.open(path)
    vocoders = [Vocoder(bundle, Logged(name, log), None, workers) for name in ("a", "b")]
    return log, *vocoders


def test_quiet_voice_waits_for_one_run_of_a_flooded_one(tiny_bundle_path: Path) -> None:
    log, flooded, quiet = two(tiny_bundle_path)
    flood = [flooded.submit(constant(index)) for index in range(200)]
    flood[10].result(10)
    for value in range(10):
        before = len(log)
        assert (quiet.submit(constant(value)).result(10) == value).all()
        assert log[before:].index("b") <= 2, "the run in progress, and one that began before the request was queued"
    assert not flood[-1].done()
    assert 0.002 < flooded.queue.usage.window_seconds < 1
    for index, future in enumerate(flood):
        assert (future.result(10) == index).all(), "and the flooded voice loses nothing"
    quiet.close()
    flooded.close()


def test_lone_calls_count_as_lane_time(tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("melrt.scheduling.workers.CREDIT", 0.0)
    log, calling, idle = two(tiny_bundle_path)
    for value in range(5):
        calling(constant(value))
    used = calling.queue.usage.seconds
    assert used >= 5 * 0.002
    calling(constant(5))
    idle(constant(6))
    assert idle.queue.usage.seconds >= used, "a queue without windows saves nothing up"
    assert log == ["a"] * 6 + ["b"]
    idle.close()
    calling.close()


def test_flooded_queues_share_lane_time_by_weight() -> None:
    workers, runs = Workers(), Counter()
    queues = {"heavy": Waiting(3.0, 0.01), "light": Waiting(1.0, 0.01), "slow": Waiting(1.0, 0.02)}
    for queue in queues.values():
        workers.add(queue)
        workers.update(queue)
    for _ in range(900):
        with workers.lock:
            chosen = workers._next()
            workers.take(chosen)
        workers.leave_lane(chosen.run_seconds)
        runs.update(name for name, queue in queues.items() if queue is chosen)
    for name, expected in {"heavy": 600, "light": 200, "slow": 100}.items():
        assert abs(runs[name] - expected) < 5


def test_deadlines_decide_between_voices_within_their_shares(tiny_bundle_path: Path) -> None:
    log, calls, streams = two(tiny_bundle_path)
    blocker = calls.submit(constant(0, 300))
    while not log:
        time.sleep(0.0005)
    waiting = calls.submit(constant(1))
    live = streams.open_stream().submit(constant(2))
    for future in (blocker, waiting, live):
        future.result(10)
    assert log.index("b") < len(log) - 1 - log[::-1].index("a"), "the stream's window is due at once"
    calls.close()
    streams.close()


def test_closing_one_voice_leaves_the_others(tiny_bundle_path: Path) -> None:
    log, first, second = two(tiny_bundle_path)
    pending = first.submit(constant(3, 300))
    first.close()
    assert (pending.result(0) == 3).all()
    assert log[-1] == "a closed"
    assert (second.submit(constant(4)).result(10) == 4).all()
    assert (second(constant(5)) == 5).all()
    second.close()


def test_queue_uses_no_more_lanes_than_its_own(tiny_bundle_path: Path) -> None:
    log: list[str] = []
    workers, bundle = Workers(), Bundle.open(tiny_bundle_path)
    running: list[int] = []

    class Counting(Logged):
        def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
            running.append(workers.runs(vocoders[0].queue))
            return super().run(graph, mel)

    vocoders = [Vocoder(bundle, Counting("a", log), None, workers)]
    vocoders.append(Vocoder(bundle, Logged("b", log, Policy(64, static=False, batch=1, workers=3)), None, workers))
    futures = [vocoder.submit(constant(1)) for _ in range(20) for vocoder in vocoders]
    for future in futures:
        future.result(10)
    assert max(running) == 1
    for vocoder in vocoders:
        vocoder.close()


def test_queue_without_windows_saves_up_little_lane_time() -> None:
    """A voice that was quiet for a long time goes first for the time of its credit, and not at all if it is flooded."""
    for waiting, saved in ((10, 2 * CREDIT), (1000, 0.0)):
        workers = Workers()
        steady, quiet = Waiting(1.0), Waiting(2.0)
        quiet.windows_waiting, quiet.usage.window_seconds = waiting, 0.01
        with workers.lock:
            for one in (steady, quiet):
                workers.add(one)
            steady.usage.add(100.0)
            workers.update(steady)
            workers.take(steady)
            workers.update(quiet)
            assert quiet.usage.seconds == 200.0 - saved
            assert workers._next() is None, "the lane is in use"
        workers.leave_lane(0.1)
        seconds = Counter()
        while not seconds[steady]:
            with workers.lock:
                chosen = workers._next()
                workers.take(chosen)
            workers.leave_lane(0.1)
            seconds[chosen] += 0.1
        assert abs(seconds[quiet] - saved - 0.2) < 0.15


def test_a_run_counts_from_its_end_on() -> None:
    workers = Workers()
    urgent, other = Waiting(1.0), Waiting(1.0)
    urgent.deadline = -1.0
    for one in (urgent, other):
        workers.add(one)
        workers.update(one)
    for expected in (urgent, other, urgent, other):
        with workers.lock:
            assert workers._next() is expected
            workers.take(expected)
        workers.leave_lane(0.1)


def test_a_short_request_goes_before_a_flood() -> None:
    """All windows of a quiet voice run before the next of a flooded one, though both have the same weight."""
    workers = Workers()
    quiet, flooded = Waiting(1.0), Waiting(1.0)
    for one in (flooded, quiet):
        workers.add(one)
    workers.update(flooded)
    for _ in range(100):
        with workers.lock:
            workers.take(workers._next())
        workers.leave_lane(0.02)
    workers.update(quiet)
    order = []
    for _ in range(10):
        with workers.lock:
            order.append(workers._next())
            workers.take(order[-1])
        workers.leave_lane(0.02)
    assert order == [quiet] * 10
