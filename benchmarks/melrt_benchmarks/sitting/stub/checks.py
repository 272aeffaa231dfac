"""Checks of the runtime with mels on the host: calls, batches, streams, threads, 16 bits, captured graphs, and the cost on the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from melrt import Vocoder
from melrt.files.audio import to_int16
from melrt.types import Audio, Mel
from melrt.vocoder import Options
from melrt_benchmarks.inference.host import measure_vocoder
from melrt_benchmarks.sitting.stub.bundles import BATCH, WINDOW, Bundles
from melrt_benchmarks.sitting.stub.engine import Counters, expected_audio

LENGTHS = (4, 86, 255, 256, 257, 700, 2000)
CALLERS = 24
Figures = dict[str, Any]


@contextmanager
def loaded(bundles: Bundles, name: str = "plain", **options: Any) -> Iterator[Vocoder]:
    """Open a voice with stub engines; they run, or this raises."""
    with Vocoder.load(bundles.make(name), device="cuda", backend="tensorrt", precision="fp32", options=Options(**options)) as vocoder:
        yield vocoder


def random_mel(vocoder: Vocoder, frames: int, seed: int = 0) -> Mel:
    """Return a mel (M, frames) of multiples of 1/16 that differs in every frame."""
    low = round(16 * vocoder.spec.silence)
    values = np.random.default_rng((seed, frames)).integers(low, low + 96, (vocoder.spec.n_mels, frames))
    return (values / 16).astype(np.float32)


def reference(vocoder: Vocoder, mel: Mel) -> Audio:
    """Return the audio that numpy computes."""
    return expected_audio(mel, vocoder.field, vocoder.spec.hop)


def same(audio: Audio, expected: Audio, what: str) -> None:
    """Raise if two signals differ in any bit; the message says where."""
    if audio.shape != expected.shape:
        raise AssertionError(f"{what}: {audio.shape} samples, expected {expected.shape}")
    wrong = np.flatnonzero(np.asarray(audio).reshape(-1) != expected.reshape(-1))
    if len(wrong):
        at = int(wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {expected.size} samples differ; the first is {at}, {audio.reshape(-1)[at]} instead of "
            f"{expected.reshape(-1)[at]}; the last is {int(wrong[-1])}"
        )


def in_threads(work: Callable[[int], None], count: int = 1) -> None:
    """Call `work` with 0 to `count` - 1, each in a new thread, and raise the first exception of any of them."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def calls_of_many_lengths(bundles: Bundles, figures: Figures) -> str:
    """Compare calls around the window's length, often enough that every slot captures and replays them."""
    with loaded(bundles) as vocoder:
        policy = vocoder.policy
        assert (policy.frames, policy.batch, policy.static) == (WINDOW, BATCH, True), policy
        for _ in range(4 * policy.workers):  # so that every slot captures the shapes, and replays them
            for frames in LENGTHS:
                mel = random_mel(vocoder, frames)
                same(vocoder(mel), reference(vocoder, mel), f"{frames} frames")
        return f"{vocoder.backend.machine}: {', '.join(map(str, LENGTHS))} frames, each {4 * policy.workers} times, all bits equal"


def batches(bundles: Bundles, figures: Figures) -> str:
    """Compare `batch` and an array of more utterances than a run takes."""
    with loaded(bundles) as vocoder:
        mels = [random_mel(vocoder, frames, seed) for seed in range(8) for frames in LENGTHS]
        for index, (mel, audio) in enumerate(zip(mels, vocoder.batch(mels), strict=True)):
            same(audio, reference(vocoder, mel), f"utterance {index}")
        stacked = np.stack([random_mel(vocoder, 700, seed) for seed in range(19)])
        same(vocoder(stacked), np.stack([reference(vocoder, mel) for mel in stacked]), "array of 19 utterances")
        return f"{len(mels)} utterances of mixed lengths and an array of 19, all bits equal; batch fill {vocoder.stats().batch_fill:.2f}"


def streams_in_uneven_pieces(bundles: Bundles, figures: Figures) -> str:
    """Compare streams whose pushes have random sizes."""
    pieces = 0
    with loaded(bundles) as vocoder:
        for seed, frames in enumerate(LENGTHS):
            mel, rng = random_mel(vocoder, frames), np.random.default_rng(seed)
            for step in (1, 3, 16, 100):
                cuts = np.unique(np.minimum(np.cumsum(rng.integers(1, 2 * step + 1, frames)), frames))
                chunks = np.split(mel, cuts[:-1], axis=1)
                pieces += len(chunks)
                audio = np.concatenate(list(vocoder.stream(chunks)))
                same(audio, reference(vocoder, mel), f"{frames} frames in {len(chunks)} pieces")
    return f"{pieces} pushes, all bits equal"


def many_threads_at_once(bundles: Bundles, figures: Figures) -> str:
    """Compare calls of many threads."""
    with loaded(bundles) as vocoder:
        mels = [random_mel(vocoder, LENGTHS[index % len(LENGTHS)], index) for index in range(CALLERS)]
        expected = [reference(vocoder, mel) for mel in mels]
        barrier = threading.Barrier(CALLERS)

        def work(index: int) -> None:
            barrier.wait()
            for _ in range(10):
                same(vocoder(mels[index]), expected[index], f"caller {index}")

        in_threads(work, CALLERS)
    return f"{CALLERS} callers, 10 calls each, all bits equal"


def audio_of_16_bits(bundles: Bundles, figures: Figures) -> str:
    """Compare 16-bit audio, clipped samples included."""
    clipped = 0
    with loaded(bundles, sample_format="int16") as vocoder:
        for frames in LENGTHS * 3:
            mel = random_mel(vocoder, frames)
            expected = reference(vocoder, mel)
            clipped += int((np.abs(expected) > 1).sum())
            audio = vocoder(mel)
            assert audio.dtype == np.int16, audio.dtype
            same(audio, to_int16(expected), f"{frames} frames")
    assert clipped, "no sample was beyond full scale, so clipping was not shown"
    return f"all bits equal; {clipped} samples clipped"


def captured_graphs_are_used(bundles: Bundles, figures: Figures) -> str:
    """Count the engine's executions: a replayed graph makes none."""
    with loaded(bundles) as vocoder:
        mels = [random_mel(vocoder, frames) for frames in (86, 700)]
        for _ in range(6 * vocoder.policy.workers):
            for mel in mels:
                vocoder(mel)
        before = Counters.executions
        for _ in range(200):
            for mel in mels:
                same(vocoder(mel), reference(vocoder, mel), "replayed")
        executions = Counters.executions - before
        failed = vocoder.backend.failed_captures  # type: ignore[attr-defined]  # an engine backend
        assert not failed, f"{failed} captures failed"
        # a slot that had no turn so far captures its shapes now: four shapes, two executions and a capture each
        assert executions <= 12 * vocoder.policy.workers, f"{executions} executions in 400 calls: the graphs are not used"
    return f"{executions} executions of the engine outside graphs in 400 calls, 0 failed captures"


def host_cost(bundles: Bundles, figures: Figures) -> str:
    """Measure what a call, a push and bulk synthesis take with an engine that costs next to nothing."""
    with loaded(bundles) as vocoder:
        call, push, bulk = measure_vocoder(vocoder)
    figures["host_cost"] = {"call_1s_ms_p50_p90": call, "push_us_mean_p90": push, "bulk_times_real_time": bulk}
    return (
        f"call of 1 s {1e3 * call[0]:.0f} / {1e3 * call[1]:.0f} us (p50 / p90), push of 16 frames {push[0]:.0f} / {push[1]:.0f} us "
        f"(mean / p90), bulk {bulk:,.0f} x real time"
    )


CHECKS = (
    calls_of_many_lengths, batches, streams_in_uneven_pieces, many_threads_at_once, audio_of_16_bits, captured_graphs_are_used, host_cost,
)  # fmt: skip
