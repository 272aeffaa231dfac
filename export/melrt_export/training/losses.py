"""What the two networks minimize.

Hinge loss and feature matching after Kumar et al. (NeurIPS 2019, equations 1, 2 and 4), multi-resolution STFT after Yamamoto et al.
(ICASSP 2020). All are means over the batch, so that the gradients of several processes, averaged, are those of one with their joint batch.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melrt_export.training.discriminator import Features

# Transform, hop and window of each resolution, samples: ParallelWaveGAN's, after Yamamoto et al., table 1.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
# Energies below this are one: the logarithm's slope grows without bound towards zero (ParallelWaveGAN's value).
SMALLEST_ENERGY = 1e-7
# Root mean square, full scale 1. In a pause the relative error of spectral convergence is divided by next to nothing, and one such
# segment outweighs a batch (measured: means of 32 over ten steps, where speech has 3). What is quieter counts as noise of -40 dB.
QUIET = 0.01


def discriminator_loss(real: Features, fake: Features) -> Tensor:
    """Hinge loss, summed over scales: mean max(0, 1 - D(recording)) + mean max(0, 1 + D(synthesis)).

    The paper's equation 1 prints min where it minimizes; with it the loss would have no bound below.
    """
    terms = [F.relu(1 - r[-1].float()).mean() + F.relu(1 + f[-1].float()).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(terms).sum()


def adversarial_loss(fake: Features) -> Tensor:
    """What the generator gains by the discriminators' scores, summed over scales: -mean D(synthesis)."""
    return torch.stack([-scale[-1].float().mean() for scale in fake]).sum()


def feature_matching_loss(real: Features, fake: Features, scale: Literal["neurips", "paper"]) -> Tensor:
    """Mean absolute difference of each layer's features but the score, summed over layers and scales.

    Args:
        real: Features of the recording; no gradient flows to them.
        fake: Features of the synthesis.
        scale: `paper` is that sum; `neurips` multiplies it by 4 / (strided layers + 1) / scales (scripts/train.py).
    """
    terms = [
        F.l1_loss(f.float(), r.detach().float()) for rs, fs in zip(real, fake, strict=True) for r, f in zip(rs[:-1], fs[:-1], strict=True)
    ]
    total = torch.stack(terms).sum()
    strided = len(real[0]) - 3  # the others: the first layer, the last but one, the score
    return total * (4 / (strided + 1) / len(real)) if scale == "neurips" else total


class StftLoss(nn.Module):
    """Spectral convergence and log-magnitude distance of two signals (B, N), averaged over resolutions.

    Spectral convergence is taken for each signal of the batch and averaged, where ParallelWaveGAN takes it over the whole batch at once,
    which several processes could not do together.
    """

    def __init__(self) -> None:
        super().__init__()
        for n_fft, _, window in RESOLUTIONS:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(window), persistent=False)

    def forward(self, recording: Tensor, synthesis: Tensor) -> Tensor:
        terms = []
        for resolution in RESOLUTIONS:
            real, fake = (self._magnitude(signal, *resolution) for signal in (recording, synthesis))
            taper = cast(Tensor, getattr(self, f"window_{resolution[0]}"))
            quiet = QUIET * taper.norm() * real[0].numel() ** 0.5  # the norm of white noise's magnitudes
            norm = torch.linalg.vector_norm
            convergence = (norm(real - fake, dim=(1, 2)) / norm(real, dim=(1, 2)).clamp(min=quiet)).mean()
            terms.append(convergence + F.l1_loss(fake.log(), real.log()))
        return torch.stack(terms).mean()

    def _magnitude(self, signal: Tensor, n_fft: int, hop: int, window: int) -> Tensor:
        """Magnitude spectrum, (B, n_fft // 2 + 1, T)."""
        taper = cast(Tensor, getattr(self, f"window_{n_fft}"))
        spectrum = torch.view_as_real(torch.stft(signal, n_fft, hop, window, taper, return_complex=True))
        return spectrum.square().sum(-1).clamp(min=SMALLEST_ENERGY).sqrt()
