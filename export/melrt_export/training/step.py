"""One step of the game: the discriminators learn to tell synthesis from recording, the generator to be taken for one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from melrt_export.training.config import TrainingConfig
from melrt_export.training.discriminator import Discriminator, Features
from melrt_export.training.distributed import Processes
from melrt_export.training.losses import StftLoss, adversarial_loss, discriminator_loss, feature_matching_loss
from melrt_export.training.mel import LogMel
from melrt_export.training.voice import TrainableVoice


@dataclass(frozen=True, slots=True)
class Synthesis:
    """A batch and what the generator made of it."""

    mel: Tensor
    """Log-mel frames of the recording, (B, M, T)."""
    recording: Tensor
    """(B, N), N = T·hop."""
    output: Tensor
    """The generator's waveform, (B, N), float32, with its gradient."""


ExtraLoss = Callable[[Synthesis], Tensor]
"""A term of the generator's objective, already weighted; a distillation, say. It is a mean over the batch."""


class AdversarialStep:
    """Both networks with their optimizers; a call is one step of each.

    As melgan-neurips: the generator runs once; the discriminators learn first; the generator then follows the discriminators just
    updated, while the recording's features are those from before the update. Both halves of the discriminators' batch, recording and
    synthesis, go through in one pass, and no gradient of their weights is computed while the generator learns.
    """

    def __init__(self, config: TrainingConfig, voice: TrainableVoice, processes: Processes, extra: Mapping[str, ExtraLoss]) -> None:
        self.config = config
        self.extra = dict(extra)
        device = processes.device
        self.log_mel = LogMel(voice.spec).to(device)
        self.stft_loss = StftLoss().to(device)
        self.generator = voice.generator.to(device)
        self.discriminator = _first_discriminator(config).to(device)
        if config.machine.compile:
            self.generator.compile()
            self.discriminator.compile()
        rates = config.optimizer
        self.generator_optimizer = _adam(self.generator, rates.learning_rate, rates.betas)
        self.discriminator_optimizer = _adam(self.discriminator, rates.discriminator_learning_rate, rates.betas)
        # float16 has too small a range for gradients; they are scaled into it. The other precisions pass through unchanged.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.machine.precision == "float16")
        self._shared_generator: nn.Module = self.generator
        self._shared_discriminator: nn.Module = self.discriminator
        self._processes = processes

    def share(self) -> None:
        """Let gradients be averaged over all processes from now on; the first process's weights go to all."""
        if self._processes.count > 1:
            self._shared_generator, self._shared_discriminator = (
                DistributedDataParallel(network, broadcast_buffers=False) for network in (self.generator, self.discriminator)
            )

    def __call__(self, recording: Tensor, step: int) -> dict[str, Tensor]:
        """Train on a batch of segments.

        Args:
            recording: Shape (B, N), on the networks' device.
            step: Number of the step, from 0: decides rates and which terms take part.

        Returns:
            Each term's value, unweighted and without gradient.
        """
        self._set_rates(step)
        losses = self.config.losses
        mel = self.log_mel.frames(recording)
        with self._precision():
            output = self._shared_generator(mel)
        synthesis = Synthesis(mel, recording, output.squeeze(1).float())
        values: dict[str, Tensor] = {}
        real: Features | None = None
        if losses.uses_discriminator and step >= losses.discriminator_from:
            real, values["discriminator"] = self._train_discriminator(synthesis)
        terms = dict(self._terms(synthesis, real if step >= losses.adversarial_from else None))
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        self._descend(total, self.generator_optimizer)
        self.scaler.update()
        return values | {name: value.detach() for name, (_, value) in terms.items()} | {"generator": total.detach()}

    def _train_discriminator(self, synthesis: Synthesis) -> tuple[Features, Tensor]:
        both = torch.cat([synthesis.recording, synthesis.output.detach()])[:, None]
        with self._precision():
            features = self._shared_discriminator(both)
        half = len(both) // 2
        real, fake = ([[layer[part] for layer in scale] for scale in features] for part in (slice(half), slice(half, None)))
        loss = discriminator_loss(real, fake)
        self._descend(loss, self.discriminator_optimizer)
        return [[layer.detach() for layer in scale] for scale in real], loss.detach()

    def _terms(self, synthesis: Synthesis, real: Features | None) -> Iterator[tuple[str, tuple[float, Tensor]]]:
        """Name, weight and value of each term of the generator's objective."""
        losses = self.config.losses
        if real is not None:
            self.discriminator.requires_grad_(False)
            with self._precision():
                fake = self.discriminator(synthesis.output[:, None])
            self.discriminator.requires_grad_(True)
            yield "adversarial", (losses.adversarial, adversarial_loss(fake))
            yield "feature_matching", (losses.feature_matching, feature_matching_loss(real, fake, losses.feature_scale))
        if losses.stft:
            yield "stft", (losses.stft, self.stft_loss(synthesis.recording, synthesis.output))
        if losses.mel:
            yield "mel", (losses.mel, F.l1_loss(self.log_mel.frames(synthesis.output), synthesis.mel))
        for name, extra in self.extra.items():
            yield name, (1.0, extra(synthesis))

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(optimizer)

    def _set_rates(self, step: int) -> None:
        rates = self.config.optimizer
        factor = rates.factor(step)
        for optimizer, rate in (
            (self.generator_optimizer, rates.learning_rate),
            (self.discriminator_optimizer, rates.discriminator_learning_rate),
        ):
            optimizer.param_groups[0]["lr"] = rate * factor

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        precision = self.config.machine.precision
        if precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._processes.device.type, torch.bfloat16 if precision == "bfloat16" else torch.float16)


def _first_discriminator(config: TrainingConfig) -> Discriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return Discriminator(config.discriminator)


def _adam(network: nn.Module, rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    # fused: one kernel for all tensors instead of several for each; a step of the published networks has 400 tensors
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], rate, betas, fused=True)
