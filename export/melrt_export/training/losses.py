"""Losses of the generator and the discriminators.

Hinge loss and feature matching after Kumar et al. (NeurIPS 2019, equations 1, 2 and 4), least squares after Mao et al. (ICCV 2017,
equation 9), multi-resolution STFT after Yamamoto et al. (ICASSP 2020). All are means over the batch, so the
averaged gradients of several processes equal those of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melrt_export.quality import RESOLUTIONS
from melrt_export.training.config import AdversarialForm, FeatureScale
from melrt_export.training.discriminator import Features

# Smaller energies are raised to this value, because the slope of the logarithm has no bound near zero (ParallelWaveGAN's value).
SMALLEST_ENERGY = 1e-7
# Hop and window of the sub-bands' STFT loss for each FFT size, in samples of a sub-band (ParallelWaveGAN, multi_band_melgan.v2.yaml).
SUBBAND_RESOLUTIONS = {384: (30, 150), 683: (60, 300), 171: (10, 60)}
# Root mean square of white noise at -40 dB, relative to full scale 1. Spectral convergence is a relative error. In a pause its
# denominator is nearly zero, so that one such segment outweighs a batch (measured: means of 32 over ten steps, where speech has 3).
# The denominator is therefore at least that of this noise.
QUIET_RMS = 0.01


def discriminator_loss(real: Features, fake: Features, form: AdversarialForm = "hinge") -> Tensor:
    """Return the discriminators' loss from their scores.

    Args:
        real: Features of the recording.
        fake: Features of the synthesis.
        form: `hinge`: mean max(0, 1 - D(recording)) + mean max(0, 1 + D(synthesis)), summed over scales. Equation 1 of the paper has
            min where max is meant: with min the minimized loss would have no lower bound. `least_squares`:
            mean (D(recording) - 1)^2 + mean D(synthesis)^2, averaged over scales, as in ParallelWaveGAN.
    """
    scores = [(r[-1].float(), f[-1].float()) for r, f in zip(real, fake, strict=True)]
    if form == "hinge":
        return torch.stack([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in scores]).sum()
    return torch.stack([(r - 1).square().mean() + f.square().mean() for r, f in scores]).mean()


def adversarial_loss(fake: Features, form: AdversarialForm = "hinge") -> Tensor:
    """Return the generator's loss from the discriminators' scores.

    Args:
        fake: Features of the synthesis.
        form: `hinge`: -mean D(synthesis), summed over scales; `least_squares`: mean (D(synthesis) - 1)^2, averaged over scales.
    """
    scores = [scale[-1].float() for scale in fake]
    if form == "hinge":
        return torch.stack([-score.mean() for score in scores]).sum()
    return torch.stack([(score - 1).square().mean() for score in scores]).mean()


def feature_matching_loss(real: Features, fake: Features, scale: FeatureScale) -> Tensor:
    """Return the mean absolute difference of the features, summed over scales and over all layers except the score.

    Args:
        real: Features of the recording; they get no gradient.
        fake: Features of the synthesis.
        scale: `paper` for that sum; `neurips` for that sum times 4 / (strided layers + 1) / scales (melgan-neurips, scripts/train.py);
            `mean` for the mean over layers and scales (ParallelWaveGAN, losses/feat_match_loss.py).
    """
    terms = [
        F.l1_loss(f.float(), r.detach().float()) for rs, fs in zip(real, fake, strict=True) for r, f in zip(rs[:-1], fs[:-1], strict=True)
    ]
    if scale == "mean":
        return torch.stack(terms).mean()
    total = torch.stack(terms).sum()
    strided = len(real[0]) - 3  # all but the first layer, the last but one, and the score
    return total * (4 / (strided + 1) / len(real)) if scale == "neurips" else total


class StftLoss(nn.Module):
    """Spectral convergence plus log-magnitude distance of two signals (B, N), or of their sub-bands (B, S, N), averaged over resolutions.

    Spectral convergence is computed for each signal of the batch, over all its sub-bands, and averaged. ParallelWaveGAN computes it over
    the whole batch at once, which several processes could not do together.

    Args:
        sizes: FFT sizes, which are keys of `RESOLUTIONS` or `SUBBAND_RESOLUTIONS`.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        super().__init__()
        self.resolutions = [(size, *(RESOLUTIONS | SUBBAND_RESOLUTIONS)[size]) for size in sizes]
        for n_fft, _, window in self.resolutions:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(window), persistent=False)

    def forward(self, recording: Tensor, synthesis: Tensor) -> Tensor:
        terms = []
        for resolution in self.resolutions:
            real, fake = (self._magnitude(signal, *resolution) for signal in (recording, synthesis))
            taper = cast(Tensor, getattr(self, f"window_{resolution[0]}"))
            quiet = QUIET_RMS * taper.norm() * real[0].numel() ** 0.5  # norm of the spectrum of white noise
            norm = torch.linalg.vector_norm
            convergence = (norm(real - fake, dim=(1, 2)) / norm(real, dim=(1, 2)).clamp(min=quiet)).mean()
            terms.append(convergence + F.l1_loss(fake.log(), real.log()))
        return torch.stack(terms).mean()

    def _magnitude(self, signal: Tensor, n_fft: int, hop: int, window: int) -> Tensor:
        """Return the magnitude spectrum, (B, S * (n_fft // 2 + 1), T)."""
        taper = cast(Tensor, getattr(self, f"window_{n_fft}"))
        spectrum = torch.stft(signal.flatten(0, -2), n_fft, hop, window, taper, return_complex=True)
        energy = torch.view_as_real(spectrum).square().sum(-1).reshape(len(signal), -1, spectrum.shape[-1])
        return energy.clamp(min=SMALLEST_ENERGY).sqrt()
