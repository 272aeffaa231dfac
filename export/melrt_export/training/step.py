"""One adversarial training step: the losses and optimizer updates of discriminators and generator."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from melrt_export.generator.network import FilterBank, Generator
from melrt_export.training.coarse_losses import CoarseLosses
from melrt_export.training.config import OptimizerConfig, TrainingConfig
from melrt_export.training.discriminator import Discriminator, Features
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.losses import SUBBAND_RESOLUTIONS, StftLoss, adversarial_loss, discriminator_loss, feature_matching_loss
from melrt_export.training.mel import LogMel
from melrt_export.training.voice import TrainableVoice


@dataclass(frozen=True, slots=True)
class SynthesizedBatch:
    """Recordings of a batch, their mels, and the waveforms that the generator made from these mels."""

    mel: Tensor
    """Log-mel frames of the recording, (B, M, T)."""
    recording: Tensor
    """Samples of the recordings, (B, N), N = T·hop."""
    output: Tensor
    """Output of the generator, (B, N), float32, with gradient."""
    bands: Tensor
    """Sub-bands of the output before the filter bank, (B, S, N / S), with gradient; the output itself for a voice without sub-bands."""


ExtraLoss = Callable[[SynthesizedBatch], Tensor]
"""Additional term of the generator's objective, for example a distillation loss: a weighted mean over the batch."""


class AdversarialStep:
    """Both networks with their optimizers. A call makes one step of each.

    The order is that of melgan-neurips: the generator runs once, the discriminators are updated, and then the generator is updated with
    the updated discriminators, but with features of the recording from before their update. Recording and synthesis go through the
    discriminators in one pass, and the generator's update computes no gradient of the discriminators' weights.
    """

    def __init__(self, config: TrainingConfig, voice: TrainableVoice, processes: ProcessGroup, extra: Mapping[str, ExtraLoss]) -> None:
        self.config = config
        self.extra = dict(extra)
        device = processes.device
        self.log_mel = LogMel(voice.spec).to(device)
        self.stft_loss = StftLoss(config.losses.stft_sizes).to(device)
        self.subband_stft_loss = StftLoss(SUBBAND_RESOLUTIONS).to(device)
        self.coarse = CoarseLosses(voice.spec.hop).to(device)
        self.generator = voice.generator.to(device)
        self.average = copy.deepcopy(self.generator).requires_grad_(False) if config.optimizer.average else None
        self.discriminator = _random_discriminator(config).to(device)
        if config.machine.compile:
            self.generator.compile()
            self.discriminator.compile()
        rates = config.optimizer
        self.generator_optimizer = _optimizer(self.generator, rates.learning_rate, rates)
        self.discriminator_optimizer = _optimizer(self.discriminator, rates.discriminator_learning_rate, rates)
        # The range of float16 is too small for gradients, so they are scaled. Other precisions are not scaled.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.machine.precision == "float16")
        self._parallel_generator: nn.Module = self.generator
        self._parallel_discriminator: nn.Module = self.discriminator
        self._processes = processes

    @property
    def generators(self) -> dict[str, Generator]:
        """Generators to validate and keep: `weights` and, if the config asks for one, their `average`."""
        return {"weights": self.generator} | ({"average": self.average} if self.average is not None else {})

    def parallelize(self) -> None:
        """Copy the weights of rank 0 to all processes, and average gradients over all processes from then on."""
        if self._processes.world_size > 1:
            self._parallel_generator, self._parallel_discriminator = (
                DistributedDataParallel(network, broadcast_buffers=False) for network in (self.generator, self.discriminator)
            )

    def __call__(self, recording: Tensor, step: int) -> dict[str, Tensor]:
        """Train on a batch of segments.

        Args:
            recording: Samples, shape (B, N), on the networks' device.
            step: Number of the step, from 0, which sets the learning rates and selects the terms.

        Returns:
            Unweighted value of each term, without gradient.
        """
        self._set_learning_rates(step)
        losses = self.config.losses
        mel = self.log_mel.frames(recording)
        with self._autocast():
            bands = self._parallel_generator(mel, split=True)
        output = self.generator.pqmf(bands)  # not in autocast
        batch = SynthesizedBatch(mel, recording, output.squeeze(1), bands)
        values: dict[str, Tensor] = {}
        real: Features | None = None
        if losses.uses_discriminator and step >= losses.discriminator_from:
            real, values["discriminator"] = self._train_discriminator(batch)
        terms = dict(self._terms(batch, real if step >= losses.adversarial_from else None))
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        self._update(total, self.generator_optimizer, self.config.optimizer.gradient_limit)
        self.scaler.update()
        self._update_average(step)
        return values | {name: value.detach() for name, (_, value) in terms.items()} | {"generator": total.detach()}

    def _train_discriminator(self, batch: SynthesizedBatch) -> tuple[Features, Tensor]:
        both = torch.cat([batch.recording, batch.output.detach()])[:, None]
        with self._autocast():
            features = self._parallel_discriminator(both)
        half = len(both) // 2
        real, fake = ([[layer[part] for layer in scale] for scale in features] for part in (slice(half), slice(half, None)))
        loss = discriminator_loss(real, fake, self.config.losses.adversarial_form)
        self._update(loss, self.discriminator_optimizer, self.config.optimizer.discriminator_gradient_limit)
        return [[layer.detach() for layer in scale] for scale in real], loss.detach()

    def _terms(self, batch: SynthesizedBatch, real: Features | None) -> Iterator[tuple[str, tuple[float, Tensor]]]:
        """Yield name, weight and value of each term of the generator's objective."""
        losses = self.config.losses
        if real is not None:
            self.discriminator.requires_grad_(False)
            with self._autocast():
                fake = self.discriminator(batch.output[:, None])
            self.discriminator.requires_grad_(True)
            yield "adversarial", (losses.adversarial, adversarial_loss(fake, losses.adversarial_form))
            yield "feature_matching", (losses.feature_matching, feature_matching_loss(real, fake, losses.feature_scale))
        if losses.stft:
            yield "stft", (losses.stft, self.stft_loss(batch.recording, batch.output))
        if losses.subband_stft:
            split = cast(FilterBank, self.generator.pqmf).split(batch.recording[:, None])
            yield "subband_stft", (losses.subband_stft, self.subband_stft_loss(split, batch.bands))
        if losses.mel:
            yield "mel", (losses.mel, F.l1_loss(self.log_mel.frames(batch.output), batch.mel))
        for name in ("energy", "level", "comb"):
            if weight := getattr(losses, name):
                yield name, (weight, getattr(self.coarse, name)(batch.recording, batch.output))
        for name, extra in self.extra.items():
            yield name, (1.0, extra(batch))

    def _update(self, loss: Tensor, optimizer: torch.optim.Optimizer, limit: float) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        if limit:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)
        self.scaler.step(optimizer)

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """Move the average towards the weights. At first it is their plain mean, so the initial weights do not stay in it."""
        if self.average is not None:
            share = max(1 - self.config.optimizer.average, 1 / (step + 1))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), share)

    def _set_learning_rates(self, step: int) -> None:
        rates = self.config.optimizer
        # ParallelWaveGAN moves the discriminators' schedule only in steps that train them (bin/train.py)
        own = step - self.config.losses.discriminator_from if rates.milestones else step
        for optimizer, rate, done in (
            (self.generator_optimizer, rates.learning_rate, step),
            (self.discriminator_optimizer, rates.discriminator_learning_rate, own),
        ):
            optimizer.param_groups[0]["lr"] = rate * rates.rate_factor(done)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        precision = self.config.machine.precision
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._processes.device.type, torch.bfloat16 if precision == "bfloat16" else torch.float16)


def _random_discriminator(config: TrainingConfig) -> Discriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return Discriminator(config.discriminator)


def _optimizer(network: nn.Module, rate: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    if config.algorithm == "radam":
        return torch.optim.RAdam(parameters, rate, config.betas, config.epsilon)
    # fused: one kernel for all tensors instead of several for each tensor; the published networks have 400 tensors
    return torch.optim.Adam(parameters, rate, config.betas, config.epsilon, amsgrad=config.amsgrad, fused=True)
