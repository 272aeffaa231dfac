"""Losses between coarse measures of recording and synthesis: energy in cells of the spectrogram, level, and comb.

The mean error of a log-mel is smallest if every bin that cannot be predicted is too quiet, because the mean of logarithms is below
the logarithm of the mean. Energy and level add power before they take the logarithm, so they measure the missing energy. The comb
measures tones at multiples of the frame rate, which a log-mel of 80 bands averages away.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Smallest power of one cell, of a stretch's mean square (-60 dB of full scale) and of one bin, so that logarithms in pauses have a bound.
SMALLEST_CELL, SMALLEST_LEVEL, SMALLEST_BIN = 1e-4, 1e-6, 1e-5
# A cell has this many bins and frames of an FFT of 1,024 points every 256: 172 Hz by 93 ms at 22,050 Hz. The cells overlap by half.
CELL = 8
# Samples of the stretches whose level is compared.
STRETCH = 4096
# Hops in the FFT that measures the comb. Neighboring multiples of the frame rate are as many bins apart.
HOPS = 16
# Bins above a multiple that are not the multiple's own: a Hann window's main lobe has two bins on either side.
BETWEEN = slice(5, 12)


class CoarseLosses(nn.Module):
    """Mean absolute differences of coarse measures of recordings and syntheses, (B, N). Each signal is measured alone."""

    def __init__(self, hop: int) -> None:
        """Prepare the windows.

        Args:
            hop: Samples of each frame.
        """
        super().__init__()
        self.size = HOPS * hop
        self.register_buffer("cell_window", torch.hann_window(1024), persistent=False)
        self.register_buffer("comb_window", torch.hann_window(self.size), persistent=False)

    def energy(self, recording: Tensor, synthesis: Tensor) -> Tensor:
        """Return the difference of natural log energies of cells."""
        return F.l1_loss(self._cells(synthesis), self._cells(recording))

    def level(self, recording: Tensor, synthesis: Tensor) -> Tensor:
        """Return the difference of the natural log power of stretches."""
        return F.l1_loss(_levels(synthesis), _levels(recording))

    def comb(self, recording: Tensor, synthesis: Tensor) -> Tensor:
        """Return the difference of how far each multiple of the frame rate rises above the bins beside it, in natural log power."""
        return F.l1_loss(self._rises(synthesis), self._rises(recording))

    def _cells(self, signal: Tensor) -> Tensor:
        power = _power(signal, 1024, 256, cast(Tensor, self.cell_window), center=True)
        return F.avg_pool2d(power[:, None], CELL, CELL // 2).clamp(min=SMALLEST_CELL).log()

    def _rises(self, signal: Tensor) -> Tensor:
        """Return the rise above the spectrum beside it of each multiple from the second on, from the mean log spectrum, (B, multiples)."""
        signal = F.pad(signal, (0, max(self.size - signal.shape[1], 0)))
        power = _power(signal, self.size, self.size // 4, cast(Tensor, self.comb_window), center=False)
        logs = power.clamp(min=SMALLEST_BIN).log().mean(2)
        multiples = logs[:, : logs.shape[1] // HOPS * HOPS].reshape(len(logs), -1, HOPS)
        return (multiples[:, :, 0] - multiples[:, :, BETWEEN].mean(2))[:, 2:]


def _power(signal: Tensor, size: int, hop: int, window: Tensor, *, center: bool) -> Tensor:
    """Return the power spectrum, (B, size // 2 + 1, T)."""
    return torch.view_as_real(torch.stft(signal, size, hop, size, window, center=center, return_complex=True)).square().sum(-1)


def _levels(signal: Tensor) -> Tensor:
    stretch = min(STRETCH, signal.shape[1])
    return F.avg_pool1d(signal.square()[:, None], stretch, max(stretch // 2, 1)).clamp(min=SMALLEST_LEVEL).log()
