"""Terms, optimizer and schedule of ParallelWaveGAN's recipes, against its formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from melrt.errors import ConfigError, TrainingError
from melrt.files.audio import read_audio
from melrt_export.assets import RECORDING
from melrt_export.generator.config import GeneratorConfig
from melrt_export.training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimizerConfig, TrainingConfig
from melrt_export.training.discriminator import Discriminator
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.losses import feature_matching_loss
from melrt_export.training.step import AdversarialStep
from melrt_export.training.voice import create_voice

BANDS = 4
MULTI_BAND = GeneratorConfig(channels=32, upsample_scales=(8, 4, 2), stacks=1, out_channels=BANDS, pqmf_taps=62)


@pytest.fixture(scope="module")
def segments() -> torch.Tensor:
    audio = read_audio(RECORDING, 22050)
    return torch.from_numpy(np.ascontiguousarray(audio[8192:16384].reshape(1, 8192)))


def make_step(generator: GeneratorConfig = MULTI_BAND, **sections) -> AdversarialStep:
    values = {"discriminator": DiscriminatorConfig(scales=1, channels=4, layers=1), "losses": LossConfig(stft=1.0)} | sections
    config = TrainingConfig("", DataConfig(""), generator=generator, **values)
    return AdversarialStep(config, create_voice(config), ProcessGroup(torch.device("cpu")), {})


def analyze(audio: np.ndarray) -> np.ndarray:
    """Return the sub-bands (S, N / S) of a signal (N,): `PQMF.analysis` of layers/pqmf.py."""
    n = np.arange(63)
    with np.errstate(invalid="ignore"):
        prototype = np.sin(np.pi * 0.142 * (n - 31)) / (np.pi * (n - 31))
    prototype[31] = 0.142
    prototype *= np.kaiser(63, 9.0)
    filters = [2 * prototype * np.cos((2 * k + 1) * np.pi / 8 * (n - 31) + (-1) ** k * np.pi / 4) for k in range(BANDS)]
    return np.stack([np.correlate(np.pad(audio, 31), each, "valid")[::BANDS] for each in filters])


def stft_loss(output: torch.Tensor, recording: torch.Tensor, sizes: list[int], hops: list[int], windows: list[int]) -> float:
    """Return the loss of signals (S, N): `MultiResolutionSTFTLoss` of losses/stft_loss.py, both parts together."""
    total = 0.0
    for size, hop, window in zip(sizes, hops, windows, strict=True):
        y, x = (
            torch.stft(s, size, hop, window, torch.hann_window(window), return_complex=True).abs().square().clamp(min=1e-7).sqrt()
            for s in (output, recording)
        )
        total += float((x - y).norm() / x.norm() + F.l1_loss(x.log(), y.log()))
    return total / len(sizes)


def test_sub_bands_and_their_loss_are_those_of_the_source(segments: torch.Tensor) -> None:
    step = make_step(losses=LossConfig(adversarial=0, feature_matching=0, stft=0.5, subband_stft=0.5))
    bands = torch.from_numpy(analyze(segments[0].numpy())).float()
    split = step.generator.pqmf.split(segments[:, None])[0]
    assert (split - bands).abs().max() < 1e-5 * bands.abs().max()
    joined = step.generator.pqmf(split[None])[0, 0]
    error = (joined - segments[0])[64:-64]
    assert error.square().mean() < 1e-6 * segments.square().mean(), "the filter bank reconstructs the signal to 60 dB"
    with torch.no_grad():
        mel = step.log_mel.frames(segments)
        output, own_bands = step.generator(mel)[:, 0], step.generator(mel, split=True)[0]
    full = stft_loss(output, segments, [1024, 2048, 512], [120, 240, 50], [600, 1200, 240])
    sub = stft_loss(own_bands, bands, [384, 683, 171], [30, 60, 10], [150, 300, 60])
    values = step(segments, 0)
    assert [float(values[name]) for name in ("stft", "subband_stft")] == pytest.approx([full, sub], rel=1e-3)
    assert float(values["generator"]) == pytest.approx(0.5 * (full + sub), rel=1e-3)


def test_a_voice_without_sub_bands_has_no_loss_of_them() -> None:
    with pytest.raises(TrainingError, match="subband_stft is set, but the voice has no sub-bands"):
        make_step(GeneratorConfig(channels=32), losses=LossConfig(subband_stft=1.0))


def test_feature_matching_is_the_mean_over_layers_and_scales() -> None:
    real = [[torch.zeros(2, 4), torch.zeros(2, 2), torch.zeros(2, 1)] for _ in range(3)]
    fake = [[torch.full((2, 4), 1.0 + i), torch.full((2, 2), 3.0 + i), torch.full((2, 1), 99.0)] for i in range(3)]
    assert float(feature_matching_loss(real, fake, "mean")) == pytest.approx(3.0)


def test_the_discriminators_begin_with_normal_weights() -> None:
    weight = Discriminator(DiscriminatorConfig(scales=1, deviation=0.02)).scales[0].layers[-2].weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.01)
    assert float(weight.abs().max()) > 0.06, "a uniform distribution of this deviation ends at 0.035"


def radam(gradients: list[np.ndarray], rate: float, epsilon: float) -> np.ndarray:
    """Return the sum of the steps of optimizers/radam.py with its default betas."""
    first = second = total = np.zeros_like(gradients[0])
    longest = 2 / (1 - 0.999) - 1
    for t, gradient in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
        size = rate / (1 - 0.9**t)
        if length >= 5:
            size *= math.sqrt((1 - 0.999**t) * (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2))
            total = total - size * first / (np.sqrt(second) + epsilon)
        else:
            total = total - size * first
    return total


def test_radam_makes_the_steps_of_the_source() -> None:
    """The first five steps are those of plain momentum; rectified ones follow. Epsilon is as large as the gradients."""
    step = make_step(optimizer=OptimizerConfig(algorithm="radam", learning_rate=1e-2, betas=(0.9, 0.999), epsilon=0.01))
    parameter = step.generator.first.bias
    before = parameter.detach().numpy().copy()
    noise = np.random.default_rng(0)
    gradients = [noise.normal(0, 0.01, before.shape) for _ in range(9)]
    for gradient in gradients:
        step.generator_optimizer.zero_grad()
        parameter.grad = torch.from_numpy(gradient).float()
        step.generator_optimizer.step()
    expected = radam(gradients, 1e-2, 0.01)
    assert np.abs(parameter.detach().numpy() - before - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(ConfigError, match="RAdam does not have it"):
        OptimizerConfig(algorithm="radam", amsgrad=True)


def test_the_milestones_of_the_discriminators_count_from_their_first_step(segments: torch.Tensor) -> None:
    """The source moves their schedule only in steps that train them."""
    step = make_step(
        optimizer=OptimizerConfig(1e-3, 2e-3, milestones=(10, 30)),
        losses=LossConfig(stft=1.0, discriminator_from=20, adversarial_from=20),
    )
    rates = []
    for at in (9, 10, 20, 29, 30, 50):
        step(segments[:, :4096], at)
        rates.append([step.generator_optimizer.param_groups[0]["lr"] / 1e-3, step.discriminator_optimizer.param_groups[0]["lr"] / 2e-3])
    assert rates[:2] == [[1, 1], [0.5, 1]]
    assert rates[2:] == [[0.5, 1], [0.5, 1], [0.25, 0.5], [0.25, 0.25]]
