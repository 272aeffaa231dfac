"""Limits: a full queue, waiting for room, long utterances, open streams, overdue requests."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.echo import ONE, constant, load_echo

from melrt.errors import ConfigError, MelError, OverdueError, QueueFullError
from melrt.scheduling.limits import Limits


def test_full_queue_refuses_requests(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE, max_windows=2, wait=False)
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


def test_waiting_for_room_does_not_block_the_event_loop(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE, max_windows=1)
    echo.go.clear()

    async def scenario() -> None:
        running = asyncio.create_task(vocoder.call_async(constant(0)))
        await asyncio.to_thread(echo.started.acquire, timeout=5)
        waiting = asyncio.create_task(vocoder.call_async(constant(1)))
        streamed = asyncio.create_task(collect())
        given_up = asyncio.create_task(vocoder.call_async(constant(3)))
        await asyncio.sleep(0.05)  # the loop runs although the queue is full
        assert vocoder.stats().queue_windows == 1
        given_up.cancel()
        echo.go.set()
        assert (await running == 0).all()
        assert (await waiting == 1).all()
        assert (await streamed == 2).all()
        with pytest.raises(asyncio.CancelledError):
            await given_up

    async def collect() -> np.ndarray:
        return np.concatenate([audio async for audio in vocoder.stream_async([constant(2), constant(2, 300)])])

    asyncio.run(scenario())
    assert vocoder.stats().rejected == 0
    vocoder.close()


def test_wait_for_room_has_a_time_limit(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE, max_windows=1, wait_timeout=0.05)
    echo.go.clear()
    futures = [vocoder.submit(constant(0))]
    assert echo.started.acquire(timeout=5)
    futures.append(vocoder.submit(constant(1)))
    with pytest.raises(QueueFullError):
        vocoder.submit(constant(2))
    late: list[Future[np.ndarray]] = []
    vocoder.queue.limits = Limits(max_windows=1)
    waiter = threading.Thread(target=lambda: late.append(vocoder.submit(constant(3))))
    waiter.start()
    echo.go.set()
    waiter.join(5)
    assert (late[0].result(5) == 3).all()
    vocoder.close()


def test_callback_on_a_worker_does_not_wait_for_room(tiny_bundle_path: Path) -> None:
    """It would wait for room that only its own worker can make."""
    vocoder, echo = load_echo(tiny_bundle_path, ONE, max_windows=1)
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


def test_too_long_utterance_is_refused_every_way(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE, max_frames=40)
    assert (vocoder(constant(1, 40)) == 1).all()
    for way in (vocoder, vocoder.submit, lambda mel: list(vocoder.batch([mel])), lambda mel: list(vocoder.stream([mel]))):
        with pytest.raises(MelError, match="41 frames; at most 40"):
            way(constant(1, 41))
    with vocoder.open_stream() as opened:
        first = opened.push(constant(1, 30))
        with pytest.raises(MelError, match="60 frames; at most 40"):
            opened.push(constant(1, 30))
        assert len(np.concatenate([first, opened.flush()])) == 30 * 256, "the stream continues without the refused frames"
    vocoder.close()


def test_too_long_utterance_is_refused_before_it_is_converted(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE, max_frames=40)
    endless = np.broadcast_to(np.float64(-1), (80, 1 << 50))
    for way in (vocoder, vocoder.submit, lambda mel: list(vocoder.batch([mel])), lambda mel: list(vocoder.stream([mel]))):
        with pytest.raises(MelError, match="1125899906842624 frames; at most 40"):
            way(endless)
    vocoder.close()


def test_open_streams_are_counted_and_limited(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE, max_streams=2)
    flushed, dropped = vocoder.open_stream(), vocoder.open_stream()
    with pytest.raises(QueueFullError, match="2 streams are open"):
        vocoder.open_stream()
    flushed.flush()
    del dropped
    gc.collect()
    assert vocoder.open_streams == 0
    assert (np.concatenate(list(vocoder.stream([constant(4)]))) == 4).all()
    vocoder.close()


def test_overdue_requests_are_dropped(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE, timeout=0.2)
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
    assert set(echo.first) == {0, 3}, "the overdue requests were not computed"
    assert vocoder.stats().queue_windows == 0
    vocoder.close()


def test_limit_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="timeout is 0; it must be a finite number above 0"):
        Limits(timeout=0)
