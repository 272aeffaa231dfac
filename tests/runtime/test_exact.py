"""Whatever way the frames go, whole, windowed, batched, streamed or in flight: the audio is PyTorch's whole-utterance forward."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from melrt import Vocoder
from melrt.errors import ClosedError, MelError
from melrt.planning.edges import Edges
from melrt.planning.windows import Policy, Span, plan
from melrt.scheduling.stream import StreamPace
from melrt.vocoder import Options
from melrt_export.audio_features import mel_from_audio, read_audio
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.demo import DEMO_VOICE, RECORDING
from melrt_export.export import ExportOptions, export_voice
from melrt_export.generator.config import GeneratorConfig
from melrt_export.parity import FP32_MAX_ABS, probe_mel, pytorch_audio

POLICIES = {
    "even": Policy(40, static=False, batch=1, workers=2),
    "static": Policy(40, static=True, batch=4, workers=1),
    "static, two workers": Policy(33, static=True, batch=3, workers=2),
}
FAMILY = {
    "reflection": GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 4)),
    "odd scales": GeneratorConfig(in_channels=8, channels=32, upsample_scales=(5, 3)),
    "multi-band": GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 2), stacks=2, out_channels=4, pqmf_taps=62),
    "zeros": GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 4), padding_mode="zeros"),
    "causal": GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 4), stacks=2, causal=True),
    "causal, replication": GeneratorConfig(
        in_channels=8, channels=32, upsample_scales=(4, 4), stacks=2, causal=True, padding_mode="replicate"
    ),
}


@pytest.fixture(scope="module", params=FAMILY.values(), ids=FAMILY.keys())
def family(request: pytest.FixtureRequest, make_voice, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    return make_voice(request.param, tmp_path_factory.mktemp("voice"))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_generator_and_every_way(family: tuple[Path, Checkpoint], policy: Policy) -> None:
    path, checkpoint = family
    noise = np.random.default_rng(1)
    with Vocoder.load(path, options=Options(policy=policy)) as vocoder:
        smallest = vocoder.field.smallest_input
        mels = [noise.standard_normal((8, n)).astype(np.float32) for n in (smallest, smallest + 1, 17, 39, 40, 41, 80, 81, 203)]
        expected = [pytorch_audio(checkpoint, mel[None])[0] for mel in mels]
        assert np.abs(expected[-1]).max() > 0.05
        for mel, reference, batched in zip(mels, expected, vocoder.batch(iter(mels)), strict=True):
            assert np.abs(batched - reference).max() < FP32_MAX_ABS
            assert np.abs(vocoder(mel) - reference).max() < FP32_MAX_ABS
            for size in (1, 7, 32, None):
                assert np.abs(streamed(vocoder, mel, size, noise) - reference).max() < FP32_MAX_ABS


def test_first_audio_comes_as_early_as_it_can_be_exact(family: tuple[Path, Checkpoint]) -> None:
    path, checkpoint = family
    with Vocoder.load(path, options=Options(policy=POLICIES["even"])) as vocoder:
        mel = np.random.default_rng(2).standard_normal((8, 120)).astype(np.float32)
        opened = vocoder.open_stream(StreamPace(first=1, growth=1))
        pieces = [opened.push(mel[:, at : at + 1]) for at in range(120)]
        first = next(index for index, piece in enumerate(pieces) if piece.size)
        assert first + 1 == max(1 + vocoder.field.right, vocoder.field.edge)
        audio = np.concatenate([*pieces, opened.flush()])
        assert np.abs(audio - pytorch_audio(checkpoint, mel[None])[0]).max() < FP32_MAX_ABS


def streamed(vocoder: Vocoder, mel: np.ndarray, size: int | None, noise: np.random.Generator) -> np.ndarray:
    pieces, at = [], 0
    while at < mel.shape[1]:
        step = size or int(noise.integers(0, 60))
        pieces.append(mel[:, at : at + step])
        at += step
    return np.concatenate(list(vocoder.stream(pieces)))


def test_in_flight_from_many_threads(tiny_bundle_path: Path, tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    options = Options(policy=Policy(48, static=True, batch=8, workers=2))
    with Vocoder.load(tiny_bundle_path, options=options) as vocoder:
        mels = [probe_mel(vocoder.spec, 20 + 23 * seed, seed) for seed in range(16)]
        found: dict[int, list[np.ndarray]] = {}

        def work(index: int) -> None:
            found[index] = [vocoder(mels[index]), streamed(vocoder, mels[index], 9, np.random.default_rng(index))]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, mel in enumerate(mels):
            reference = pytorch_audio(checkpoint, mel[None])[0]
            assert all(np.abs(audio - reference).max() < FP32_MAX_ABS for audio in found[index])
        stats = vocoder.stats()
        assert stats.windows > 1.5 * stats.runs, "windows of different requests share runs"
        assert (stats.queue_windows, stats.failed) == (0, 0)


def seams_stand_out(difference: np.ndarray, vocoder: Vocoder) -> float:
    """Energy of the difference beside the seams over its energy everywhere."""
    frames = len(difference) // vocoder.spec.hop
    seams = [w.keep_stop for w in plan(Span(0, frames, frames, True), vocoder.field, vocoder.policy)][:-1]
    energy = (difference.astype(np.float64).reshape(frames, -1) ** 2).mean(axis=1)
    return float(energy[[frame for seam in seams for frame in (seam - 1, seam)]].mean() / energy.mean())


def test_no_seam_in_a_real_voice(demo_bundle) -> None:
    """The difference from PyTorch has no more energy at the seams than elsewhere."""
    policy = Policy(64, static=False, batch=1, workers=2)
    with Vocoder.load(demo_bundle, options=Options(policy=policy)) as vocoder:
        mel = mel_from_audio(read_audio(RECORDING, vocoder.sample_rate), vocoder.spec)
        difference = vocoder(mel) - pytorch_audio(load_checkpoint(DEMO_VOICE), mel[None])[0]
        assert np.abs(difference).max() < FP32_MAX_ABS
        assert seams_stand_out(difference, vocoder) < 2


def test_ten_recordings_every_way(shared: Path, tmp_path: Path) -> None:
    """The trained voice on real speech: windowed, batched, streamed in four kinds of pieces, and in flight from 16 threads."""
    source = shared / "voices" / "lj"
    checkpoint = load_checkpoint(source)
    noise = np.random.default_rng(0)
    worst: dict[str, float] = {}

    def note(kind: str, audio: np.ndarray, reference: np.ndarray) -> None:
        worst[kind] = max(worst.get(kind, 0.0), float(np.abs(audio - reference).max()))

    with Vocoder.load(export_voice(source, tmp_path / "lj.melrt", ExportOptions(precisions=("fp32",)))) as vocoder:
        files = [shared / "audio" / "ljspeech" / f"LJ001-{number:04d}.wav" for number in range(1, 11)]
        mels = [mel_from_audio(read_audio(file, vocoder.sample_rate), vocoder.spec) for file in files]
        references = [pytorch_audio(checkpoint, mel[None])[0] for mel in mels]
        for audio, reference in zip(vocoder.batch(mels), references, strict=True):
            note("batched", audio, reference)
        seams = []
        for mel, reference in zip(mels, references, strict=True):
            audio = vocoder(mel)
            note("windowed", audio, reference)
            seams.append(seams_stand_out(audio - reference, vocoder))
            for size in (1, 7, 32, None):
                note(f"streamed by {size or 'any'}", streamed(vocoder, mel, size, noise), reference)
        in_flight = [threading.Thread(target=lambda i=i: note("in flight", vocoder(mels[i % 10]), references[i % 10])) for i in range(16)]
        for thread in in_flight:
            thread.start()
        for thread in in_flight:
            thread.join()
    print(worst, "seams over all:", [round(s, 2) for s in seams])
    assert len(worst) == 7
    assert max(worst.values()) < FP32_MAX_ABS
    assert np.mean(seams) < 1.5


@pytest.mark.parametrize("edges", [Edges(2, 2), Edges(0, 10, -5.0), Edges(3, 1, 0.0)])
def test_extended_ends_are_trimmed_and_aligned(tiny_bundle_path: Path, tiny_checkpoint: Path, edges: Edges) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    with Vocoder.load(tiny_bundle_path, options=Options(edges=edges, policy=POLICIES["even"])) as vocoder:
        for frames in (1, 30, 150):
            if frames + edges.left + edges.right < vocoder.field.smallest_input:
                continue
            mel = probe_mel(vocoder.spec, frames)
            extended = pytorch_audio(checkpoint, edges.extend(mel)[None])[0]
            reference = extended[edges.left * 256 : (edges.left + frames) * 256]
            assert np.abs(vocoder(mel) - reference).max() < FP32_MAX_ABS
            for size in (1, 50):
                assert np.abs(streamed(vocoder, mel, size, np.random.default_rng(0)) - reference).max() < FP32_MAX_ABS


def test_first_audio_comes_after_the_first_frames_and_the_look_ahead(tiny_bundle_path: Path) -> None:
    with Vocoder.load(tiny_bundle_path) as vocoder:
        mel = probe_mel(vocoder.spec, 60)
        opened = vocoder.open_stream()
        sizes = [opened.push(mel[:, at : at + 1]).size // 256 for at in range(60)]
        assert sizes.index(8) == 8 + vocoder.field.right - 1
        assert [size for size in sizes if size] == [8, 16], "pieces grow"
        assert opened.flush().size // 256 == 60 - 24


def test_streams_that_end_badly(tiny_bundle_path: Path) -> None:
    with Vocoder.load(tiny_bundle_path) as vocoder:
        assert vocoder.open_stream().flush().size == 0
        short = vocoder.open_stream()
        short.push(np.zeros((80, 3)))
        with pytest.raises(MelError, match="3 frames; this network needs at least 4"):
            short.flush()
        opened = vocoder.open_stream()
        mel = probe_mel(vocoder.spec, 20)
        opened.push(mel[:, :10])
        for wrong, message in (
            (np.zeros((40, 1)), "40 bands"),
            (np.full((80, 1), np.nan), "finite"),
            (np.zeros(80), r"expected \(bands, frames\)"),
        ):
            with pytest.raises(MelError, match=message):
                opened.push(wrong)
        rest = np.concatenate([opened.push(mel[:, 10:]), opened.flush()])
        assert np.abs(rest - vocoder(mel)[-len(rest) :]).max() < FP32_MAX_ABS, "refused frames leave no gap"
        with pytest.raises(ClosedError, match="has ended"):
            opened.push(mel)


def test_asyncio(tiny_bundle_path: Path) -> None:
    async def scenario(vocoder: Vocoder) -> None:
        mel = probe_mel(vocoder.spec, 150)

        async def frames():
            for at in range(0, 150, 10):
                await asyncio.sleep(0)
                yield mel[:, at : at + 10]

        async def listen(source) -> np.ndarray:
            return np.concatenate([audio async for audio in vocoder.stream_async(source)])

        whole = await asyncio.wrap_future(vocoder.submit(mel))
        for audio in await asyncio.gather(listen(frames()), listen([mel]), listen(frames())):
            assert np.abs(audio - whole).max() < FP32_MAX_ABS

    with Vocoder.load(tiny_bundle_path) as vocoder:
        asyncio.run(scenario(vocoder))
