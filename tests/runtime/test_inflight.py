"""The queue: urgent first, one failure alone, cancellation frees, limits hold, and nothing hangs."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import numpy as np
import pytest
import torch

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.errors import BackendError, ClosedError, MelError, OverdueError, QueueFullError
from melrt.planning.windows import Policy
from melrt.scheduling.limits import Limits
from melrt.vocoder import Options


class Echo:
    """A backend whose every sample says which frame it stands for; it can be held, and fails on frames that hold 99."""

    name, device, precision = "echo", "cpu", "fp32"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.go = threading.Event()
        self.go.set()
        self.runs: list[tuple[int, int]] = []
        self.first: list[float] = []
        self.started = threading.Semaphore(0)

    def close(self) -> None:
        pass

    def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
        self.runs.append((len(mel), mel.shape[2]))
        self.first.append(float(mel[0, 0, 0]))
        self.started.release()
        assert self.go.wait(10)
        if (mel == 99).any():
            raise RuntimeError("the planted failure")
        return np.repeat(mel[:, 0], 256, axis=1)


def load(bundle: Path, policy: Policy, **limits: object) -> tuple[Vocoder, Echo]:
    echo = Echo(policy)
    return Vocoder(Bundle.open(bundle), echo, Options(limits=Limits(**limits))), echo


ONE = Policy(64, static=False, batch=1, workers=1)
BATCHED = Policy(64, static=True, batch=4, workers=1)


def constant(value: float, frames: int = 20) -> np.ndarray:
    return np.full((80, frames), value, np.float32)


def test_urgent_windows_go_first(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE)
    echo.go.clear()
    blocker = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    slow = [vocoder.submit(constant(value)) for value in (1, 2)]
    opened = vocoder.open_stream()
    live = opened.submit(constant(3))
    echo.go.set()
    for future in (blocker, *slow, live):
        future.result(5)
    assert echo.first == [0, 3, 1, 2], "the stream overtakes, the others keep their order"
    vocoder.close()


def test_windows_of_one_shape_share_a_run(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, BATCHED, max_batch_delay=0)
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


def test_a_held_run_waits_for_mates_but_not_for_ever(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, BATCHED, max_batch_delay=60)
    futures = [vocoder.submit(constant(value)) for value in range(4)]
    for future in futures:
        future.result(10)  # a full batch is not held
    assert echo.runs == [(4, 20)]
    vocoder.inflight.limits = Limits(max_batch_delay=0.01)
    vocoder.submit(constant(5)).result(10)
    assert echo.runs[-1] == (1, 20)
    vocoder.close()


def test_one_failure_touches_no_other(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, BATCHED, max_batch_delay=0.2)
    futures = [vocoder.submit(constant(value)) for value in (1, 99, 2)]
    with pytest.raises(RuntimeError, match="planted"):
        futures[1].result(5)
    assert (futures[0].result(5) == 1).all()
    assert (futures[2].result(5) == 2).all()
    assert (vocoder(constant(3)) == 3).all(), "the worker lives on"
    opened = vocoder.open_stream()
    with pytest.raises(RuntimeError, match="planted"):
        opened.push(constant(99))
    with pytest.raises(ClosedError):
        opened.push(constant(1))
    assert vocoder.stats().failed == 2
    vocoder.close()


def test_samples_that_are_not_finite_are_an_error(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE)
    echo.run = lambda graph, mel: np.full((1, mel.shape[2] * 256), np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"not finite; is fp32 enough"):
        vocoder(constant(1))
    echo.run = lambda graph, mel: np.zeros((1, 17), np.float32)  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"shape \(1, 17\) where \(1, 5120\) was due"):
        vocoder(constant(1))
    vocoder.close()


def test_cancellation_frees_the_windows(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE)
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
    assert len(echo.runs) == 2, "of the cancelled requests only the window that was running ran"
    assert (vocoder.stats().cancelled, vocoder.stats().queue_windows) == (4, 0)
    vocoder.close()


def test_a_full_queue_pushes_back(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE, max_windows=2, wait=False)
    echo.go.clear()
    futures = [vocoder.submit(constant(0))]
    assert echo.started.acquire(timeout=5)
    futures += [vocoder.submit(constant(value)) for value in (1, 2)]
    with pytest.raises(QueueFullError, match=r"2 windows are waiting, the limit is 2; try again later"):
        vocoder.submit(constant(3))
    opened = vocoder.open_stream()
    with pytest.raises(QueueFullError):
        opened.push(constant(4))
    echo.go.set()
    for future in futures:
        future.result(5)
    audio = np.concatenate([opened.push(constant(4, 0)), opened.flush()])
    assert audio.shape == (20 * 256,), "a refused push keeps its frames"
    assert vocoder.stats().rejected == 2
    vocoder.close()


def test_a_task_waits_for_room_and_the_event_loop_does_not(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE, max_windows=1)
    echo.go.clear()

    async def scenario() -> None:
        running = asyncio.create_task(vocoder.call_async(constant(0)))
        await asyncio.to_thread(echo.started.acquire, timeout=5)
        waiting = asyncio.create_task(vocoder.call_async(constant(1)))
        listener = asyncio.create_task(listen())
        given_up = asyncio.create_task(vocoder.call_async(constant(3)))
        await asyncio.sleep(0.05)  # the loop runs on, though the queue is full
        assert vocoder.stats().queue_windows == 1
        given_up.cancel()
        echo.go.set()
        assert (await running == 0).all()
        assert (await waiting == 1).all()
        assert (await listener == 2).all()
        with pytest.raises(asyncio.CancelledError):
            await given_up

    async def listen() -> np.ndarray:
        return np.concatenate([audio async for audio in vocoder.stream_async([constant(2), constant(2, 300)])])

    asyncio.run(scenario())
    assert vocoder.stats().rejected == 0
    vocoder.close()


def test_a_caller_that_waits_for_room_waits_no_longer_than_it_said(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE, max_windows=1, wait_timeout=0.05)
    echo.go.clear()
    futures = [vocoder.submit(constant(0))]
    assert echo.started.acquire(timeout=5)
    futures.append(vocoder.submit(constant(1)))
    with pytest.raises(QueueFullError):
        vocoder.submit(constant(2))
    late: list[Future[np.ndarray]] = []
    vocoder.inflight.limits = Limits(max_windows=1)
    waiter = threading.Thread(target=lambda: late.append(vocoder.submit(constant(3))))
    waiter.start()
    echo.go.set()
    waiter.join(5)
    assert (late[0].result(5) == 3).all()
    vocoder.close()


@pytest.mark.parametrize("drain", [True, False])
def test_close_drains_or_cancels_as_asked(tiny_bundle_path: Path, drain: bool) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE)
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


def test_a_dropped_vocoder_lets_its_workers_go(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE)
    vocoder(constant(1))
    (worker,) = vocoder.inflight._threads
    last = vocoder.submit(constant(2, 300))
    del vocoder
    worker.join(5)
    assert not worker.is_alive()
    assert (last.result(0) == 2).all(), "what was asked of it is done first"
    opened = load(tiny_bundle_path, ONE)[0].open_stream()
    gc.collect()
    assert np.concatenate([opened.push(constant(3)), opened.flush()]).shape == (20 * 256,), "a stream keeps its voice"


def test_a_generator_is_read_only_as_far_as_needed(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE)
    read: list[int] = []

    def source():
        for value in range(100):
            read.append(value)
            yield constant(value)

    audio = vocoder.batch(source())
    assert (next(audio) == 0).all()
    assert len(read) <= 4
    audio.close()
    assert vocoder.stats().queue_windows == 0
    vocoder.close()


def _in_child(vocoder: Vocoder, answers) -> None:
    try:
        vocoder(constant(1))
    except BackendError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_clearly(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE)
    vocoder(constant(1))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_child, args=(vocoder, answers))
    child.start()
    assert "did not survive the fork. Load one here." in answers.get(timeout=20)
    child.join(20)
    assert child.exitcode == 0
    vocoder.close()


def test_underruns_are_counted(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE)
    opened = vocoder.open_stream()
    assert opened.push(constant(1)).size == 14 * 256  # 163 ms to play
    opened.push(constant(1, 16))
    assert vocoder.stats().underruns == 0
    time.sleep(0.5)
    opened.push(constant(1, 64))
    assert vocoder.stats().underruns == 1, "counted before the listener has its audio"
    vocoder.close()


def test_what_a_stream_lost_closes_it_before_the_listener_hears_of_it(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE)
    opened = vocoder.open_stream()
    with pytest.raises(RuntimeError, match="planted"):
        opened.submit(constant(99)).result(5)
    with pytest.raises(ClosedError, match="has ended"):
        opened.submit(constant(1))
    vocoder.close()


def test_a_callback_on_a_worker_never_waits_for_room(tiny_bundle_path: Path) -> None:
    """It would wait for itself."""
    vocoder, echo = load(tiny_bundle_path, ONE, max_windows=1)
    echo.go.clear()
    found: list[object] = []

    def again(_: Future) -> None:
        try:
            vocoder.submit(constant(2))
        except QueueFullError as error:
            found.append(error)

    running = vocoder.submit(constant(0))
    running.add_done_callback(again)
    assert echo.started.acquire(timeout=5)
    waiting = vocoder.submit(constant(1))
    echo.go.set()
    assert (waiting.result(5) == 1).all()
    assert "1 windows are waiting, the limit is 1" in str(found[0])
    vocoder.close()


def test_a_batch_gives_what_it_can_and_names_what_it_cannot(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE)
    read: list[int] = []

    def source():
        for index in range(9):
            read.append(index)
            yield constant(index) if index != 4 else np.zeros((40, 20))

    batch = vocoder.batch(source())
    assert [float(next(batch)[0]) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(MelError, match="utterance 4: mel has 40 bands"):
        next(batch)
    assert read == [0, 1, 2, 3, 4]
    vocoder.close()


class Instant:
    """A backend that returns at once, or always fails: what meets in the queue, meets here."""

    name, device, precision = "instant", "cpu", "fp32"
    policy = Policy(64, static=False, batch=1, workers=4)
    failing = False

    def close(self) -> None:
        pass

    def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
        if self.failing:
            raise RuntimeError("the planted failure")
        return np.zeros((len(mel), mel.shape[2] * 256), np.float32)


def test_workers_survive_whatever_meets(tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instant results, simultaneous failures and cancellations from many threads: every future ends, every worker lives."""
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
    assert all(worker.is_alive() for worker in vocoder.inflight._threads)
    vocoder.close()


def test_leaving_with_work_in_flight_is_no_crash(tiny_bundle_path: Path) -> None:
    code = f"import numpy, melrt; v = melrt.Vocoder.load({str(tiny_bundle_path)!r}); f = v.submit(numpy.zeros((80, 60000)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_refilled_array_does_not_change_what_was_asked(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE)
    buffer = constant(0)

    def source():
        for value in range(5):
            buffer[:] = value
            yield buffer

    assert [float(audio[0]) for audio in vocoder.batch(source())] == [0, 1, 2, 3, 4]
    assert [float(audio[0]) for audio in vocoder.batch(torch.from_numpy(one) for one in source())] == [0, 1, 2, 3, 4]
    vocoder.close()


def test_an_utterance_longer_than_the_limit_is_refused_every_way(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE, max_frames=40)
    assert (vocoder(constant(1, 40)) == 1).all()
    for way in (vocoder, vocoder.submit, lambda mel: list(vocoder.batch([mel])), lambda mel: list(vocoder.stream([mel]))):
        with pytest.raises(MelError, match="41 frames; at most 40"):
            way(constant(1, 41))
    with vocoder.open_stream() as opened:
        first = opened.push(constant(1, 30))
        with pytest.raises(MelError, match="60 frames; at most 40"):
            opened.push(constant(1, 30))
        assert len(np.concatenate([first, opened.flush()])) == 30 * 256, "the stream goes on without the refused frames"
    vocoder.close()


def test_streams_that_are_open_are_counted_and_limited(tiny_bundle_path: Path) -> None:
    vocoder, _ = load(tiny_bundle_path, ONE, max_streams=2)
    flushed, dropped = vocoder.open_stream(), vocoder.open_stream()
    with pytest.raises(QueueFullError, match="2 streams are open"):
        vocoder.open_stream()
    flushed.flush()
    del dropped
    gc.collect()
    assert vocoder.open_streams == 0
    assert (np.concatenate(list(vocoder.stream([constant(4)]))) == 4).all()
    vocoder.close()


def test_a_request_past_its_time_is_dropped_and_the_others_go_on(tiny_bundle_path: Path) -> None:
    vocoder, echo = load(tiny_bundle_path, ONE, timeout=0.2)
    echo.go.clear()
    running = vocoder.submit(constant(0))
    assert echo.started.acquire(timeout=5)
    late = [vocoder.submit(constant(value, 500)) for value in (1, 2)]
    time.sleep(0.3)
    echo.go.set()
    running.result(5)
    for future in late:
        with pytest.raises(OverdueError, match="within 0.2 s"):
            future.result(5)
    assert (vocoder(constant(3)) == 3).all()
    assert set(echo.first) == {0, 3}, "nothing was computed for those that nobody waited for"
    assert vocoder.stats().queue_windows == 0
    vocoder.close()
    with pytest.raises(BackendError, match="above 0"):
        Limits(timeout=0)
