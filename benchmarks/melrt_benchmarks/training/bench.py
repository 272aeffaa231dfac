"""Training steps per second: melrt against a plain loop with the same networks, interleaved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melrt.mel.spec import MelSpec
from melrt.timing import interleave
from melrt_benchmarks.measure.environment import environment
from melrt_export.generator.config import GeneratorConfig
from melrt_export.training.config import DataConfig, TrainingConfig
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.step import AdversarialStep
from melrt_export.training.voice import create_voice

OURS, PLAIN = "melrt", "plain loop"
# Both make one step from the same weights on the same batch. Adam's first step moves every weight by the full learning rate, so
# rounding of the smallest gradients can flip the direction of whole steps.
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class TrainingBench:
    """Sizes of the benchmark. The discriminators have the published shape."""

    channels: int = 512
    """Channels after the generator's first convolution."""
    batch: int = 16
    """Segments in one step, which are already in memory."""
    segment: int = 8192
    """Length of a segment in samples."""
    rounds: int = 9
    """Timed steps of each contender."""
    threads: int = 1
    """Number of CPU threads."""


def run_training_bench(options: TrainingBench, on_stage: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Time both contenders, and compare the losses of their first step to show that they run the same training.

    Args:
        options: Sizes and rounds.
        on_stage: Function that receives the name of each stage as it begins.

    Returns:
        Environment and one row for each contender, as JSON values.
    """
    torch.set_num_threads(options.threads)
    data = DataConfig(train="", batch=options.batch, segment=options.segment)
    config = TrainingConfig(run="", data=data, generator=GeneratorConfig(channels=options.channels))
    step = AdversarialStep(config, create_voice(config), ProcessGroup(torch.device("cpu")), {})
    plain = PlainLoop(copy.deepcopy(step.generator), copy.deepcopy(step.discriminator), config.mel)
    noise = np.random.default_rng(0).standard_normal((options.batch, options.segment))
    batch = torch.from_numpy((0.1 * noise).astype(np.float32))
    on_stage("comparing the losses of the first step")
    ours = step(batch, 0)
    theirs = plain(batch)
    differences = {name: abs(float(ours[name]) - value) / max(abs(value), 1.0) for name, value in theirs.items()}
    on_stage("timing training steps")
    timings = interleave({OURS: lambda: step(batch, 1), PLAIN: lambda: plain(batch)}, options.rounds)
    rows = [
        {
            "contender": name, "channels": options.channels, "batch": options.batch, "segment": options.segment,
            "steps_per_second": round(1 / timing.median, 4), "median_s": round(timing.median, 4), "p90_s": round(timing.percentile(90), 4),
            "speedup": round(timings[PLAIN].ratio_to(timing)[0], 3), "correct": max(differences.values()) <= LOSS_TOLERANCE,
        }
        for name, timing in timings.items()
    ]  # fmt: skip
    return {"schema": 1, "environment": environment(options.threads), "rounds": options.rounds, "results": rows}


class PlainLoop:
    """Training loop written directly from the paper, in the order of melgan-neurips's `scripts/train.py`."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module, spec: MelSpec) -> None:
        from melrt.mel.features import mel_filters

        self.generator = generator
        self.discriminator = discriminator
        self.generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.5, 0.9))
        self.discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-4, betas=(0.5, 0.9))
        self.spec = spec
        self.filters = torch.from_numpy(mel_filters(spec))
        self.window = torch.hann_window(spec.win_length)

    def __call__(self, audio: Tensor) -> dict[str, float]:
        x = audio[:, None]
        fake = self.generator(self.mel(x))
        fake_scores = self.discriminator(fake.detach())
        real_scores = self.discriminator(x)
        loss_d = torch.zeros(())
        for scale in fake_scores:
            loss_d = loss_d + F.relu(1 + scale[-1]).mean()
        for scale in real_scores:
            loss_d = loss_d + F.relu(1 - scale[-1]).mean()
        self.discriminator.zero_grad()
        torch.autograd.backward(loss_d)
        self.discriminator_optimizer.step()

        fake_scores = self.discriminator(fake)
        loss_g = torch.zeros(())
        for scale in fake_scores:
            loss_g = loss_g - scale[-1].mean()
        matching = torch.zeros(())
        for ours, theirs in zip(fake_scores, real_scores, strict=True):
            for f, r in zip(ours[:-1], theirs[:-1], strict=True):
                matching = matching + 4 / 5 / 3 * F.l1_loss(f, r.detach())
        self.generator.zero_grad()
        torch.autograd.backward(loss_g + 10 * matching)
        self.generator_optimizer.step()
        return {"discriminator": loss_d.item(), "adversarial": loss_g.item(), "feature_matching": matching.item()}

    def mel(self, x: Tensor) -> Tensor:
        """Return log-mel frames in the published convention, (B, M, T), from samples (B, 1, N)."""
        spec = self.spec
        pad = (spec.n_fft - spec.hop) // 2
        padded = F.pad(x, (pad, pad), "reflect").squeeze(1)
        spectrum = torch.stft(padded, spec.n_fft, spec.hop, spec.win_length, self.window, center=False, return_complex=True)
        return torch.log10(torch.clamp(self.filters @ spectrum.abs(), min=spec.floor))
