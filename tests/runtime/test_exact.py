"""Windows, batches, streams and concurrent requests give the audio of one forward pass over the whole utterance."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import DATA
from tests.runtime.reference import FP32_MAX_ABS, POLICIES, speech_mel, stream_audio, whole_audio

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.errors import ClosedError, MelError
from melrt.planning.edges import Edges
from melrt.planning.windows import Policy
from melrt.vocoder import Options


@pytest.fixture(scope="module")
def bundle(tiny_bundle_path: Path) -> Bundle:
    return Bundle.open(tiny_bundle_path)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_way_gives_pytorch_audio(bundle: Bundle, backend: str, policy: Policy) -> None:
    """One mel has the audio of melgan-neurips's code, and the other that of melrt's generator in PyTorch."""
    case = np.load(DATA / "checkpoints" / "descript" / "case.npz")
    probe_mel, probe_audio = (batch[0] for batch in bundle.probe())
    mels, expected = [case["mel"], probe_mel], [case["audio"].reshape(-1), probe_audio]
    check_every_way(bundle, backend, policy, mels, expected)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_way_is_exact_at_any_length(bundle: Bundle, backend: str, policy: Policy) -> None:
    smallest = bundle.manifest.receptive_field.smallest_input
    mels = [speech_mel(bundle, frames, frames) for frames in (smallest, smallest + 1, 17, 39, 40, 41, 80, 81, 203)]
    check_every_way(bundle, backend, policy, mels, [whole_audio(bundle, mel) for mel in mels])


def check_every_way(bundle: Bundle, backend: str, policy: Policy, mels: list[np.ndarray], expected: list[np.ndarray]) -> None:
    noise = np.random.default_rng(1)
    assert np.abs(expected[-1]).max() > 0.05
    with Vocoder.load(bundle, precision="fp32", backend=backend, options=Options(policy=policy)) as vocoder:
        assert vocoder.backend.name == backend
        for mel, reference, batched in zip(mels, expected, vocoder.batch(iter(mels)), strict=True):
            assert np.abs(batched - reference).max() < FP32_MAX_ABS
            assert np.abs(vocoder(mel) - reference).max() < FP32_MAX_ABS
            for size in (1, 7, 32, None):
                assert np.abs(stream_audio(vocoder, mel, size, noise) - reference).max() < FP32_MAX_ABS


def test_requests_of_many_threads_are_exact(bundle: Bundle, backend: str) -> None:
    options = Options(policy=Policy(48, static=True, batch=8, workers=2))
    with Vocoder.load(bundle, precision="fp32", backend=backend, options=options) as vocoder:
        mels = [speech_mel(bundle, 20 + 23 * seed, seed) for seed in range(16)]
        found: dict[int, list[np.ndarray]] = {}

        def work(index: int) -> None:
            found[index] = [vocoder(mels[index]), stream_audio(vocoder, mels[index], 9, np.random.default_rng(index))]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, mel in enumerate(mels):
            reference = whole_audio(bundle, mel)
            assert all(np.abs(audio - reference).max() < FP32_MAX_ABS for audio in found[index])
        stats = vocoder.stats()
        assert stats.windows > 1.5 * stats.runs, "windows of different requests share runs"
        assert (stats.queue_windows, stats.failed) == (0, 0)


@pytest.mark.parametrize("edges", [Edges(2, 2), Edges(0, 10, -5.0), Edges(3, 1, 0.0)])
def test_extended_ends_are_trimmed(bundle: Bundle, backend: str, edges: Edges) -> None:
    options = Options(edges=edges, policy=POLICIES["dynamic"])
    with Vocoder.load(bundle, precision="fp32", backend=backend, options=options) as vocoder:
        for frames in (1, 30, 150):
            if frames + edges.left + edges.right < vocoder.field.smallest_input:
                continue
            mel = speech_mel(bundle, frames)
            extended = whole_audio(bundle, edges.extend(mel))
            reference = extended[edges.left * 256 : (edges.left + frames) * 256]
            assert np.abs(vocoder(mel) - reference).max() < FP32_MAX_ABS
            for size in (1, 50):
                assert np.abs(stream_audio(vocoder, mel, size, np.random.default_rng(0)) - reference).max() < FP32_MAX_ABS


def test_first_audio_needs_only_the_look_ahead(bundle: Bundle, backend: str) -> None:
    with Vocoder.load(bundle, precision="fp32", backend=backend) as vocoder:
        mel = speech_mel(bundle, 60)
        opened = vocoder.open_stream()
        sizes = [opened.push(mel[:, at : at + 1]).size // 256 for at in range(60)]
        assert sizes.index(8) == 8 + vocoder.field.right - 1
        assert [size for size in sizes if size] == [8, 16], "pieces grow"
        assert opened.flush().size // 256 == 60 - 24


def test_refused_frames_leave_no_gap_in_a_stream(bundle: Bundle, backend: str) -> None:
    with Vocoder.load(bundle, precision="fp32", backend=backend) as vocoder:
        assert vocoder.open_stream().flush().size == 0
        short = vocoder.open_stream()
        short.push(np.zeros((80, 3)))
        with pytest.raises(MelError, match="3 frames; this network needs at least 4"):
            short.flush()
        opened = vocoder.open_stream()
        mel = speech_mel(bundle, 20)
        opened.push(mel[:, :10])
        for wrong, message in (
            (np.zeros((40, 1)), "40 bands"),
            (np.full((80, 1), np.nan), "finite"),
            (np.zeros(80), r"expected \(bands, frames\)"),
        ):
            with pytest.raises(MelError, match=message):
                opened.push(wrong)
        rest = np.concatenate([opened.push(mel[:, 10:]), opened.flush()])
        assert np.abs(rest - vocoder(mel)[-len(rest) :]).max() < FP32_MAX_ABS
        with pytest.raises(ClosedError, match="has ended"):
            opened.push(mel)


def test_asyncio_streams_are_exact(bundle: Bundle, backend: str) -> None:
    async def scenario(vocoder: Vocoder) -> None:
        mel = speech_mel(bundle, 150)

        async def frames():
            for at in range(0, 150, 10):
                await asyncio.sleep(0)
                yield mel[:, at : at + 10]

        async def collect(source) -> np.ndarray:
            return np.concatenate([audio async for audio in vocoder.stream_async(source)])

        whole = await asyncio.wrap_future(vocoder.submit(mel))
        for audio in await asyncio.gather(collect(frames()), collect([mel]), collect(frames())):
            assert np.abs(audio - whole).max() < FP32_MAX_ABS

    with Vocoder.load(bundle, precision="fp32", backend=backend) as vocoder:
        asyncio.run(scenario(vocoder))
