"""The request queue: order, shared runs, failures, cancellation, closing."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.echo import BATCHED, ONE, constant, load_echo

from melrt import Stream, Vocoder
from melrt.bundle import Bundle
from melrt.errors import BackendError, ClosedError, OverdueError
from melrt.planning.windows import Policy


def test_windows_of_streams_go_first(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.go.clear()
    blocker = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    slow = [vocoder.submit(constant(value)) for value in (1, 2)]
    opened = vocoder.open_stream()
    live = opened.submit(constant(3))
    echo.go.set()
    for future in (blocker, *slow, live):
        future.result(5)
    assert echo.first == [0, 3, 1, 2], "the stream's window is first, the others keep their order"
    vocoder.close()


def test_windows_of_one_shape_share_a_run(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, BATCHED)
    echo.go.clear()
    first = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    mels = [constant(value, frames) for value, frames in ((1, 100), (2, 130), (3, 64), (4, 7))]
    futures = [vocoder.submit(mel) for mel in mels]
    echo.go.set()
    for mel, future in zip(mels, futures, strict=True):
        assert (future.result(5) == mel[0, 0]).all()
    first.result(5)
    assert sorted(echo.runs) == [(1, 7), (1, 20), (2, 12), (2, 64), (4, 12), (4, 64)]
    assert vocoder.stats().batch_fill == pytest.approx(14 / 24)
    vocoder.close()


def test_lone_request_runs_at_once_in_the_callers_thread(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, BATCHED)
    threads: list[threading.Thread] = []
    original = echo.run

    def run(graph: str, mel: np.ndarray) -> np.ndarray:
        threads.append(threading.current_thread())
        return original(graph, mel)

    echo.run = run  # type: ignore[method-assign]
    assert (vocoder(constant(1)) == 1).all()
    assert threads == [threading.current_thread()]
    assert vocoder.stats().batch_fill == 1 / 4
    assert (vocoder(np.stack([constant(1), constant(2)])) == np.array([[1], [2]])).all()
    assert threading.current_thread() not in threads[1:], "several utterances share the workers' runs"
    vocoder.close()


def test_a_lone_call_past_the_queue_is_counted_and_passes_nothing_that_waits(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE, timeout=5)
    assert (vocoder(constant(1)) == 1).all()
    stats = vocoder.stats()
    assert (stats.requests, stats.runs, stats.windows, stats.queue_windows, stats.failed) == (1, 1, 1, 0, 0)
    assert stats.latency_seconds[0] > 0
    assert not vocoder.queue.busy
    late = vocoder._synthesizer.utterance(constant(2))
    late.arrival -= 6
    with pytest.raises(OverdueError):
        vocoder.queue.submit(late, run_here=True).result(0)
    with vocoder.queue._lock:  # the worker cannot take the first one yet, though its lane is free
        first = vocoder.submit(constant(3))
        second = vocoder.queue.submit(vocoder._synthesizer.utterance(constant(4)), run_here=True)
        assert echo.first == [1]
    assert (first.result(5) == 3).all()
    assert (second.result(5) == 4).all()
    assert echo.first == [1, 3, 4]
    vocoder.close()
    with pytest.raises(ClosedError):
        vocoder(constant(5))
    assert len(echo.runs) == 3


def test_a_vocoder_closed_during_a_lone_call_closes_its_backend(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    closed = threading.Event()
    echo.close = closed.set  # type: ignore[method-assign]
    echo.go.clear()
    with ThreadPoolExecutor(1) as threads:
        audio = threads.submit(vocoder, constant(1))
        assert echo.started.acquire(timeout=5)
        vocoder.queue.stop(drain=True)
        assert not closed.is_set()
        echo.go.set()
        assert (audio.result(5) == 1).all()
    assert closed.is_set()
    assert vocoder.queue.ended


def test_batches_form_while_the_lanes_are_busy(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, BATCHED)
    echo.go.clear()
    with ThreadPoolExecutor(5) as callers:
        first = callers.submit(vocoder, constant(9))
        assert echo.started.acquire(timeout=5)
        others = [callers.submit(vocoder, constant(value)) for value in range(4)]
        while vocoder.stats().queue_requests < 4:
            time.sleep(0.001)
        echo.go.set()
        assert (first.result(5) == 9).all()
        assert all((other.result(5) == value).all() for value, other in enumerate(others))
    assert echo.runs == [(1, 20), (4, 20)]
    vocoder.close()


def test_interrupted_caller_frees_its_lane(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    original = echo.run

    def interrupted(graph: str, mel: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    echo.run = interrupted  # type: ignore[method-assign]
    for frames in (20, 200):
        with pytest.raises(KeyboardInterrupt):
            vocoder(constant(1, frames))
        assert not vocoder.queue.inside
    echo.run = original  # type: ignore[method-assign]
    assert (vocoder(constant(2)) == 2).all()
    assert vocoder.stats().queue_windows == 0
    vocoder.close()


def test_close_waits_for_callers_that_run_their_own_windows(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.go.clear()
    with ThreadPoolExecutor(2) as threads:
        audio = threads.submit(vocoder, constant(1))
        assert echo.started.acquire(timeout=5)
        closed = threads.submit(vocoder.close)
        time.sleep(0.05)
        assert not closed.done()
        echo.go.set()
        closed.result(5)
        assert (audio.result(5) == 1).all()


def test_failed_request_does_not_fail_its_batch(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, BATCHED)
    echo.go.clear()
    blocker = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    futures = [vocoder.submit(constant(value)) for value in (1, 99, 2)]
    echo.go.set()
    blocker.result(5)
    with pytest.raises(RuntimeError, match="planted"):
        futures[1].result(5)
    assert (futures[0].result(5) == 1).all()
    assert (futures[2].result(5) == 2).all()
    assert (vocoder(constant(3)) == 3).all(), "the worker is alive"
    opened = vocoder.open_stream()
    with pytest.raises(RuntimeError, match="planted"):
        opened.push(constant(99))
    with pytest.raises(ClosedError):
        opened.push(constant(1))
    assert vocoder.stats().failed == 2
    vocoder.close()


def test_wrong_samples_of_a_backend_are_errors(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.run = lambda graph, mel: np.full((1, mel.shape[2] * 256), np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="not finite. Is fp32 precise enough"):
        vocoder(constant(1))
    echo.run = lambda graph, mel: np.zeros((1, 17), np.float32)  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"shape \(1, 17\) instead of \(1, 5120\)"):
        vocoder(constant(1))
    vocoder.close()


def test_cancellation_frees_windows(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.go.clear()
    running = vocoder.submit(constant(0, 500))
    assert echo.started.acquire(timeout=5)
    waiting = [vocoder.submit(constant(1, 500)) for _ in range(3)]
    before = vocoder.stats().queue_windows
    assert all(future.cancel() for future in waiting)
    assert vocoder.stats().queue_windows == before - 3 * 10
    assert running.cancel()
    echo.go.set()
    with pytest.raises(CancelledError):
        running.result(5)
    assert (vocoder(constant(2)) == 2).all()
    assert len(echo.runs) == 2, "of the cancelled requests, only the window that was running has run"
    assert (vocoder.stats().cancelled, vocoder.stats().queue_windows) == (4, 0)
    vocoder.close()


@pytest.mark.parametrize("drain", [True, False])
def test_close_completes_or_cancels_requests(tiny_bundle_path: Path, drain: bool) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.go.clear()
    running = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    waiting = vocoder.submit(constant(1))
    closer = threading.Thread(target=lambda: vocoder.close(drain=drain))
    closer.start()
    time.sleep(0.05)
    with pytest.raises(ClosedError, match="load it again"):
        vocoder.submit(constant(2))
    echo.go.set()
    closer.join(5)
    assert not closer.is_alive()
    assert (running.result(0) == 0).all()
    if drain:
        assert (waiting.result(0) == 1).all()
    else:
        with pytest.raises(ClosedError):
            waiting.result(0)


def test_workers_of_a_deleted_vocoder_end(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)
    vocoder.submit(constant(1)).result()
    (worker,) = vocoder.queue._workers.threads
    last = vocoder.submit(constant(2, 300))
    del vocoder
    worker.join(5)
    assert not worker.is_alive()
    assert (last.result(0) == 2).all(), "pending requests complete first"
    opened = load_echo(tiny_bundle_path, ONE)[0].open_stream()
    gc.collect()
    assert np.concatenate([opened.push(constant(3)), opened.flush()]).shape == (20 * 256,), "an open stream keeps its vocoder"


def _in_child(vocoder: Vocoder, stream: Stream, answers) -> None:
    mel = constant(1)
    calls = (
        lambda: vocoder(mel), lambda: vocoder.submit(mel), lambda: next(vocoder.batch([mel])), vocoder.open_stream, vocoder.stats,
        lambda: vocoder.open_streams, lambda: next(vocoder.stream([mel])), lambda: asyncio.run(vocoder.call_async(mel)),
        lambda: stream.push(mel), stream.flush, lambda: stream.submit(mel),
    )  # fmt: skip
    for call in calls:
        try:
            call()
            answers.put("not refused")
        except BackendError as error:
            answers.put(str(error))
    stream.close()
    vocoder.close()
    answers.put("end")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_after_a_fork_is_refused(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)
    vocoder(constant(1))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    stream = vocoder.open_stream()
    child = context.Process(target=_in_child, args=(vocoder, stream, answers))
    held, forked = threading.Event(), threading.Event()

    def hold_the_lock() -> None:
        with vocoder.queue._lock, vocoder._synthesizer.level_check._lock, vocoder._streams._lock:
            held.set()
            forked.wait(10)

    holder = threading.Thread(target=hold_the_lock)
    holder.start()
    held.wait(10)
    child.start()
    forked.set()
    holder.join()
    refused = list(iter(lambda: answers.get(timeout=20), "end"))
    assert len(refused) == 11
    assert all("did not survive the fork. Load one here." in answer for answer in refused)
    child.join(20)
    assert child.exitcode == 0
    vocoder.close()


class Instant:
    """A backend that returns or fails at once, so that events in the queue coincide."""

    name, device, precision = "instant", "cpu", "fp32"
    policy = Policy(64, static=False, batch=1, workers=4)
    failing = False

    def close(self) -> None:
        pass

    def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
        if self.failing:
            raise RuntimeError("the planted failure")
        return np.zeros((len(mel), mel.shape[2] * 256), np.float32)


def test_workers_survive_simultaneous_events(tiny_bundle_path: Path) -> None:
    """Results, failures and cancellations coincide in many threads. Every future ends and every worker stays alive."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    backend, problems = Instant(), []
    vocoder = Vocoder(Bundle.open(tiny_bundle_path), backend)

    def work(seed: int) -> None:
        for turn in range(150):
            backend.failing = (turn // 30) % 2 == 1
            try:
                future = vocoder.submit(constant(seed, 200))
                if turn % 7 == 0:
                    future.cancel()
                if not wait([future], timeout=10).done:
                    problems.append("a future that never ends")
            except Exception as error:
                problems.append(repr(error))

    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert problems == []
    assert all(worker.is_alive() for worker in vocoder.queue._workers.threads)
    vocoder.close()


def test_request_cancelled_as_a_worker_takes_it_ends(tiny_bundle_path: Path) -> None:
    """The worker drops the request before the callback of the cancellation runs, and the callback finds it gone."""
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.go.clear()
    blocker = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    request = vocoder._synthesizer.utterance(constant(1))
    future, dropped = request.future, threading.Event()
    future.add_done_callback(lambda _: dropped.wait(5))
    vocoder.queue.submit(request)
    gone = weakref.ref(request)
    del request
    canceller = threading.Thread(target=future.cancel)
    canceller.start()
    while not future.cancelled():
        time.sleep(0.001)
    echo.go.set()
    blocker.result(5)
    while gone() is not None:
        gc.collect()
        time.sleep(0.001)
    dropped.set()
    canceller.join()
    assert future in wait([future], timeout=5).done
    vocoder.close()


def test_exit_with_pending_requests_is_clean(tiny_bundle_path: Path) -> None:
    code = f"import numpy, melrt; v = melrt.Vocoder.load({str(tiny_bundle_path)!r}); f = v.submit(numpy.zeros((80, 60000)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_underruns_are_counted(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)
    opened = vocoder.open_stream()
    assert opened.push(constant(1)).size == 14 * 256  # 163 ms to play
    opened.push(constant(1, 16))
    assert vocoder.stats().underruns == 0
    time.sleep(0.5)
    opened.push(constant(1, 64))
    assert vocoder.stats().underruns == 1, "counted before the caller has the audio"
    vocoder.close()


def test_failed_piece_closes_its_stream_first(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)
    opened = vocoder.open_stream()
    with pytest.raises(RuntimeError, match="planted"):
        opened.submit(constant(99)).result(5)
    with pytest.raises(ClosedError, match="has ended"):
        opened.submit(constant(1))
    vocoder.close()
