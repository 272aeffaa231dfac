"""Every generator of the family, and trained voices: the runtime gives PyTorch's forward pass over the whole utterance."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtime.reference import POLICIES, stream_audio

from melrt import Vocoder
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.planning.windows import Policy, Span, plan
from melrt.scheduling.stream import StreamPace
from melrt.vocoder import Options
from melrt_export.assets import DEMO_VOICE, RECORDING
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.export import ExportOptions, export_voice
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.reference import PyTorchReference
from melrt_export.parity import FP32_MAX_ABS

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
def test_every_generator_is_exact_every_way(family: tuple[Path, Checkpoint], policy: Policy) -> None:
    path, checkpoint = family
    noise = np.random.default_rng(1)
    with Vocoder.load(path, options=Options(policy=policy)) as vocoder:
        smallest = vocoder.field.smallest_input
        mels = [noise.standard_normal((8, n)).astype(np.float32) for n in (smallest, smallest + 1, 17, 39, 40, 41, 80, 81, 203)]
        pytorch = PyTorchReference(checkpoint.config, checkpoint.weights)
        expected = [pytorch.audio(mel[None])[0] for mel in mels]
        assert np.abs(expected[-1]).max() > 0.05
        for mel, reference, batched in zip(mels, expected, vocoder.batch(iter(mels)), strict=True):
            assert np.abs(batched - reference).max() < FP32_MAX_ABS
            assert np.abs(vocoder(mel) - reference).max() < FP32_MAX_ABS
            for size in (1, 7, 32, None):
                assert np.abs(stream_audio(vocoder, mel, size, noise) - reference).max() < FP32_MAX_ABS


def test_first_audio_is_as_early_as_exactness_allows(family: tuple[Path, Checkpoint]) -> None:
    path, checkpoint = family
    with Vocoder.load(path, options=Options(policy=POLICIES["dynamic"])) as vocoder:
        mel = np.random.default_rng(2).standard_normal((8, 120)).astype(np.float32)
        opened = vocoder.open_stream(StreamPace(first=1, growth=1))
        pieces = [opened.push(mel[:, at : at + 1]) for at in range(120)]
        first = next(index for index, piece in enumerate(pieces) if piece.size)
        assert first + 1 == max(1 + vocoder.field.right, vocoder.field.edge)
        audio = np.concatenate([*pieces, opened.flush()])
        reference = PyTorchReference(checkpoint.config, checkpoint.weights).audio(mel[None])[0]
        assert np.abs(audio - reference).max() < FP32_MAX_ABS


def test_torch_tensor_may_be_refilled_during_a_batch(tiny_bundle_path: Path) -> None:
    with Vocoder.load(tiny_bundle_path) as vocoder:
        buffer = torch.zeros(80, 20)
        expected = [vocoder(np.full((80, 20), value, np.float32)) for value in range(3)]
        for audio, reference in zip(vocoder.batch(buffer.fill_(value) for value in range(3)), expected, strict=True):
            assert np.abs(audio - reference).max() < FP32_MAX_ABS


def relative_energy_at_seams(difference: np.ndarray, vocoder: Vocoder) -> float:
    """Energy of the difference in the frames beside the seams over its energy in all frames.

    Both are geometric means: the rounding of a few loud frames has 100 times the mean energy, and says nothing about seams.
    """
    frames = len(difference) // vocoder.spec.hop
    seams = [w.keep_stop for w in plan(Span(0, frames, frames, True), vocoder.field, vocoder.policy)][:-1]
    energy = np.log((difference.astype(np.float64).reshape(frames, -1) ** 2).mean(axis=1) + 1e-30)
    return float(np.exp(energy[[frame for seam in seams for frame in (seam - 1, seam)]].mean() - energy.mean()))


def test_demo_voice_has_no_seams(demo_bundle) -> None:
    """The difference from PyTorch has no more energy at the seams than elsewhere."""
    policy = Policy(64, static=False, batch=1, workers=2)
    with Vocoder.load(demo_bundle, options=Options(policy=policy)) as vocoder:
        mel = mel_from_audio(read_audio(RECORDING, vocoder.sample_rate), vocoder.spec)
        checkpoint = load_checkpoint(DEMO_VOICE)
        difference = vocoder(mel) - PyTorchReference(checkpoint.config, checkpoint.weights).audio(mel[None])[0]
        assert np.abs(difference).max() < FP32_MAX_ABS
        assert relative_energy_at_seams(difference, vocoder) < 2


def test_ten_recordings_are_exact_every_way(shared: Path, tmp_path: Path) -> None:
    """A full-size trained voice on speech: windowed, batched, streamed in four sizes of pieces, and from 16 threads at once."""
    source = shared / "voices" / "lj"
    checkpoint = load_checkpoint(source)
    noise = np.random.default_rng(0)
    worst: dict[str, float] = {}

    def note(kind: str, audio: np.ndarray, reference: np.ndarray) -> None:
        worst[kind] = max(worst.get(kind, 0.0), float(np.abs(audio - reference).max()))

    with Vocoder.load(export_voice(source, tmp_path / "lj.melrt", ExportOptions(precisions=("fp32",)))) as vocoder:
        files = [shared / "audio" / "ljspeech" / f"LJ001-{number:04d}.wav" for number in range(1, 11)]
        mels = [mel_from_audio(read_audio(file, vocoder.sample_rate), vocoder.spec) for file in files]
        pytorch = PyTorchReference(checkpoint.config, checkpoint.weights)
        references = [pytorch.audio(mel[None])[0] for mel in mels]
        for audio, reference in zip(vocoder.batch(mels), references, strict=True):
            note("batched", audio, reference)
        seams = []
        for mel, reference in zip(mels, references, strict=True):
            audio = vocoder(mel)
            note("windowed", audio, reference)
            seams.append(relative_energy_at_seams(audio - reference, vocoder))
            for size in (1, 7, 32, None):
                note(f"streamed by {size or 'any'}", stream_audio(vocoder, mel, size, noise), reference)
        threads = [threading.Thread(target=lambda i=i: note("threads", vocoder(mels[i % 10]), references[i % 10])) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(worst, "energy at seams over all:", [round(s, 2) for s in seams])
    assert len(worst) == 7
    assert max(worst.values()) < FP32_MAX_ABS
    assert np.mean(seams) < 1.5
