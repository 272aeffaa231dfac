"""Memory of results, and utterances that are submitted together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.echo import BATCHED, ONE, Echo, constant, load_echo

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.errors import QueueFullError
from melrt.scheduling.limits import Limits
from melrt.scheduling.memory import SMALLEST, ResultMemory
from melrt.types import Mel
from melrt.vocoder import Options

SAMPLES = SMALLEST  # of four bytes each


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_serves_again_once_no_view_of_it_is_left() -> None:
    memory = ResultMemory(1 << 24)
    first = memory.empty((SAMPLES,), np.float32)
    first[...], place, view = 1, address(first), first[::2].reshape(2, -1)
    del first
    other = memory.empty((SAMPLES,), np.float32)
    other[...] = 2
    assert (view == 1).all(), "a view keeps the memory"
    del view
    again = memory.empty((2, SAMPLES // 2 - 9), np.float32)
    assert address(again) == place, "an array of nearly the same size takes it"
    assert (again.shape, again.dtype, again.flags.writeable) == ((2, SAMPLES // 2 - 9), np.float32, True)


def test_memory_that_is_kept_is_bounded() -> None:
    memory = ResultMemory(5 * 4 * SAMPLES)
    arrays = [memory.empty((SAMPLES,), np.float32) for _ in range(20)]
    arrays.clear()
    assert memory.free_bytes == 5 * 4 * SAMPLES
    late = memory.empty((SAMPLES,), np.float32)
    memory.close()
    del late
    assert memory.free_bytes == 0, "nothing is kept after the end"


def test_threads_never_share_memory() -> None:
    memory, mixed = ResultMemory(1 << 22), []

    def work(number: int) -> None:
        for turn in range(200):
            array = memory.empty((SAMPLES + 1000 * (turn % 7),), np.int32)
            array[...] = number
            if not (array == number).all():
                mixed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed


class EchoBeside(Echo):
    """An echo that lends its audio, as a backend beside the processor does."""

    def run_windows(self, graph, windows, meanwhile, keep) -> None:
        meanwhile()
        keep(self.run(graph, np.stack(windows)))


def beside(path: Path, **limits: object) -> tuple[Vocoder, EchoBeside]:
    echo = EchoBeside(BATCHED)
    return Vocoder(Bundle.open(path), echo, Options(limits=Limits(**limits))), echo


def test_results_that_callers_keep_are_not_overwritten(tiny_bundle_path: Path) -> None:
    vocoder, _ = beside(tiny_bundle_path)
    frames = SAMPLES // vocoder.spec.hop + 1
    with vocoder:
        kept = vocoder(constant(0, frames))
        for value in range(1, 5):
            audio = vocoder(constant(value, frames))
            assert (audio == value).all()
            size = audio.nbytes
            del audio
            assert vocoder._memory.free_bytes >= size, "dropped memory serves again"
        assert (kept == 0).all()


def test_rows_of_an_array_fill_full_runs(tiny_bundle_path: Path) -> None:
    vocoder, _ = beside(tiny_bundle_path)
    with vocoder:
        mels = np.stack([constant(value, 40) for value in range(8)])
        audio = vocoder(mels)
        assert audio.shape == (8, 40 * vocoder.spec.hop)
        assert (audio == np.arange(8, dtype=np.float32)[:, None]).all()
        assert [row[0] for row in vocoder.batch(list(mels))] == list(range(8))
        assert vocoder.stats().batch_fill == 1.0
        assert vocoder(mels[:1]).shape == (1, 40 * vocoder.spec.hop)


def test_generator_is_not_held_up_for_a_full_run(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, BATCHED)

    def mels() -> Iterator[Mel]:
        yield constant(1)
        assert echo.started.acquire(timeout=5), "the first utterance runs before the second one exists"
        yield constant(2)

    with vocoder:
        assert [audio[0] for audio in vocoder.batch(mels())] == [1, 2]


def test_group_larger_than_the_queue_waits_for_room_or_leaves_nothing(tiny_bundle_path: Path) -> None:
    mels = np.stack([constant(value, 40) for value in range(12)])
    vocoder, _ = beside(tiny_bundle_path, max_windows=2)
    with vocoder:
        assert (vocoder(mels)[:, 0] == np.arange(12)).all()
    vocoder, echo = beside(tiny_bundle_path, max_windows=2, wait=False)
    with vocoder:
        echo.go.clear()
        blocker = vocoder.submit(constant(0, 40))
        assert echo.started.acquire(timeout=5)
        with pytest.raises(QueueFullError):
            vocoder(mels)
        assert vocoder.queue.windows_waiting == 0
        echo.go.set()
        blocker.result(5)


def test_failure_of_one_row_leaves_no_other_waiting(tiny_bundle_path: Path) -> None:
    vocoder, echo = load_echo(tiny_bundle_path, ONE)
    run = echo.run

    def fail_then_wait(graph: str, mel: np.ndarray) -> np.ndarray:
        try:
            return run(graph, mel)
        except RuntimeError:
            echo.go.clear()
            raise

    echo.run = fail_then_wait
    mels = np.stack([constant(value, 40) for value in (99, 1, 2, 3)])
    with pytest.raises(RuntimeError, match="the planted failure"):
        vocoder(mels)
    assert vocoder.queue.windows_waiting == 0
    echo.go.set()
    vocoder.close()
