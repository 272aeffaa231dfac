"""Interrupts, exits and calls from callbacks: every request ends, every lane is freed, and nothing waits for itself."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.echo import BATCHED, ONE, constant, load_echo

from melrt import ClosedError
from melrt.errors import BackendError, OverdueError
from melrt.planning.windows import Window
from melrt.scheduling import at_exit
from melrt.scheduling.request import HostRequest, OutputFormat
from melrt.scheduling.waiting import WaitingWindows


@pytest.fixture
def interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on SIGVTALRM."""

    def raises(*_: object) -> None:
        raise KeyboardInterrupt

    before, callbacks = signal.signal(signal.SIGVTALRM, raises), gc.callbacks[:]
    gc.callbacks.clear()  # Python swallows an exception that is raised in one; hypothesis has one
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)
    gc.callbacks[:] = callbacks


def test_exit_of_a_backend_fails_its_request_alone(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    original = echo.run

    def exits(graph: str, mel: np.ndarray) -> np.ndarray:
        raise SystemExit(3)

    echo.run = exits  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="echo raised SystemExit: 3"):
        vocoder.submit(constant(1)).result(5)
    echo.run = original  # type: ignore[method-assign]
    assert (vocoder.submit(constant(2)).result(5) == 2).all()
    vocoder.close()


def test_exit_in_a_callback_does_not_end_the_worker(tiny_bundle_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)

    def exits(_: Future) -> None:
        raise SystemExit

    vocoder.submit(constant(1)).add_done_callback(exits)
    assert (vocoder.submit(constant(2)).result(5) == 2).all()
    assert "a callback of a future" in caplog.text
    vocoder.close()


def test_callback_may_synthesize_and_stream(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.go.clear()
    results: list[np.ndarray] = []

    def nested(_: Future) -> None:
        results.append(vocoder(constant(7, 200)))
        with vocoder.open_stream() as stream:
            results.append(np.concatenate([stream.push(constant(8)), stream.flush()]))
        results.extend(vocoder.batch([constant(9)]))
        results.extend(vocoder(np.stack([constant(10)])))

    future = vocoder.submit(constant(1))
    future.add_done_callback(nested)
    echo.go.set()
    future.result(5)
    while len(results) < 4:
        time.sleep(0.001)
    assert [float(audio[0]) for audio in results] == [7, 8, 9, 10]
    assert [len(audio) for audio in results] == [200 * 256, 20 * 256, 20 * 256, 20 * 256]
    vocoder.close()


def test_callback_that_waits_for_a_future_is_refused(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.go.clear()
    submitted, found = [], []

    def waits(_: Future) -> None:
        submitted.append(vocoder.submit(constant(2)))
        for wait in (submitted[0].result, submitted[0].exception):
            try:
                wait()
            except BackendError as error:
                found.append(str(error))

    vocoder.submit(constant(1)).add_done_callback(waits)
    echo.go.set()
    while not submitted:
        time.sleep(0.001)
    assert (submitted[0].result(5) == 2).all(), "the worker continues"
    assert len(found) == 2
    assert "waits for audio that its own thread may have to compute" in found[0]
    vocoder.close()


def test_close_ends_although_the_backend_hangs(tiny_bundle_path: Path) -> None:
    """Requests that run or wait end too, and the backend is closed if it returns after all."""
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    closed = threading.Event()
    echo.close = closed.set  # type: ignore[method-assign]
    echo.go.clear()
    futures = [vocoder.submit(constant(value)) for value in (1, 2)]
    assert echo.started.acquire(timeout=5)
    start = time.monotonic()
    with pytest.raises(BackendError, match="echo on cpu has not ended a run for 0.2 s"):
        vocoder.close(timeout=0.2)
    assert time.monotonic() - start < 5
    for future in futures:
        assert isinstance(future.exception(0), BackendError)
    assert vocoder.queue not in at_exit.queues, "the exit does not wait for it again"
    assert not closed.is_set()
    echo.go.set()
    assert closed.wait(5)
    assert len(echo.runs) == 1


def test_close_waits_as_long_as_runs_end(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    original = echo.run

    def slow(graph: str, mel: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        return original(graph, mel)

    echo.run = slow  # type: ignore[method-assign]
    futures = [vocoder.submit(constant(value)) for value in range(8)]
    vocoder.close(timeout=0.5)
    assert [float(future.result(0)[0]) for future in futures] == list(range(8))


def test_callback_may_close_the_vocoder(tiny_bundle_path: Path) -> None:
    """The backend is closed once the queue is empty, and not under the requests that still wait."""
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    closed: list[int] = []
    echo.close = lambda: closed.append(len(echo.runs))  # type: ignore[method-assign]
    echo.go.clear()
    futures = [vocoder.submit(constant(value)) for value in range(4)]
    for future in futures[:2]:
        future.add_done_callback(lambda _: vocoder.close())
    echo.go.set()
    assert [float(future.result(5)[0]) for future in futures] == [0, 1, 2, 3]
    for worker in vocoder.queue._workers.threads:
        worker.join(5)
        assert not worker.is_alive()
    assert closed == [4]
    with pytest.raises(ClosedError):
        vocoder(constant(1))


def test_signal_handler_may_close_while_the_main_thread_runs_windows(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    original, closed = echo.run, threading.Event()
    echo.close = closed.set  # type: ignore[method-assign]

    def run(graph: str, mel: np.ndarray) -> np.ndarray:
        signal.raise_signal(signal.SIGUSR1)
        assert not closed.is_set(), "the backend is not closed under its own run"
        return original(graph, mel)

    echo.run = run  # type: ignore[method-assign]
    before = signal.signal(signal.SIGUSR1, lambda *_: vocoder.close())
    try:
        assert (vocoder(constant(1, 300)) == 1).all()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert closed.wait(5)


@pytest.mark.usefixtures("interrupt")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_leave_no_lock_lane_or_window(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    echo.run = lambda graph, mel: np.repeat(mel[:, 0], 256, axis=1)  # type: ignore[method-assign]  # without locks of its own
    vocoder(constant(1))
    interrupts, until, noise = 0, time.monotonic() + 30, np.random.default_rng(0)  # the timer counts processor time: slow if busy
    while interrupts <= 200 and time.monotonic() < until:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, float(noise.uniform(2e-5, 4e-4)))
            for _ in range(200):  # then again, because an interrupt in a callback of the garbage collector is lost
                vocoder(constant(2, 100))
        except KeyboardInterrupt:
            interrupts += 1
    with contextlib.suppress(KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    assert interrupts > 100
    free = threading.Thread(target=lambda: vocoder.queue._lock.acquire() and vocoder.queue._lock.release())
    free.start()
    free.join(5)
    assert not free.is_alive(), "the lock is held"
    assert (vocoder.submit(constant(3)).result(5) == 3).all()
    assert vocoder.queue._workers.runners == {}
    assert vocoder.stats().queue_windows == 0
    vocoder.close()


def test_cancellation_in_the_middle_of_a_choice_is_postponed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A garbage collection or a signal handler may cancel a future while its own thread chooses the next windows."""
    waiting = WaitingWindows()
    mel, windows = np.zeros((1, 4), np.float32), [Window("interior", 0, 4, 0, 4)] * 3
    made = [HostRequest(mel, 0, windows, OutputFormat(1), 0.0) for _ in range(3)]
    for one in made:
        waiting.add(one)
    original, cancelled = WaitingWindows._drop_stale, [made[0], made[1]]

    def interrupted(self: WaitingWindows, heap: list) -> None:
        original(self, heap)
        while cancelled:
            self.remove(cancelled.pop())

    monkeypatch.setattr(WaitingWindows, "_drop_stale", interrupted)
    assert len(waiting.take(2)) == 2
    assert (waiting.windows, waiting.requests) == (3, 1)
    assert [request for request, _ in waiting.take(9)] == [made[2]] * 3
    assert waiting.windows == 0


def test_error_of_one_request_keeps_no_other_alive(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, BATCHED)
    echo.go.clear()
    blocker = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    bad, good = (vocoder._synthesizer.utterance(constant(value)) for value in (99, 5))
    futures = [vocoder.queue.submit(request) for request in (bad, good)]
    kept = weakref.ref(good)
    del bad, good
    echo.go.set()
    error = futures[0].exception(5)
    futures[1].result(5)
    blocker.result(5)
    del futures, blocker
    vocoder.submit(constant(1)).result(5)
    for _ in range(100):
        gc.collect()
        if kept() is None:
            break
        time.sleep(0.01)
    assert error is not None
    assert kept() is None, "the kept error refers to its batch"
    vocoder.close()


def test_request_that_waited_for_room_behind_a_younger_one_is_overdue(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE, timeout=0.3)
    echo.go.clear()
    old = vocoder._synthesizer.utterance(constant(1))
    time.sleep(0.4)
    blocker = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    young = vocoder.submit(constant(2))
    late = vocoder.queue.submit(old)
    echo.go.set()
    blocker.result(5)
    young.result(5)
    with pytest.raises(OverdueError):
        late.result(5)
    vocoder.close()
