"""Workers that several queues share: order, fairness and lanes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from tests.runtime.echo import constant

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.planning.windows import Policy
from melrt.scheduling.workers import Workers

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


def two(path: Path, *, weights: tuple[float, float] = (1, 1)) -> tuple[list[str], Vocoder, Vocoder]:
    log: list[str] = []
    workers, bundle = Workers(), Bundle.open(path)
    vocoders = [Vocoder(bundle, Logged(name, log), None, workers) for name in ("a", "b")]
    for vocoder, weight in zip(vocoders, weights, strict=True):
        vocoder.queue.usage.weight = weight
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
    for index, future in enumerate(flood):
        assert (future.result(10) == index).all(), "and the flooded voice loses nothing"
    quiet.close()
    flooded.close()


def test_flooded_voices_share_by_weight(tiny_bundle_path: Path) -> None:
    log, heavy, light = two(tiny_bundle_path, weights=(3, 1))
    futures = [vocoder.submit(constant(1)) for _ in range(200) for vocoder in (heavy, light)]
    futures[0].result(10)
    while len(log) < 160:
        time.sleep(0.005)
    assert 2 < log[:160].count("a") / log[:160].count("b") < 4
    for vocoder in (heavy, light):
        vocoder.close(drain=False)


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
