"""Synthesis filters of multi-band generators, as each project designs them.

A filter bank is a Kaiser-windowed low-pass prototype (Lin and Vaidyanathan 1998), modulated by cosines (Nguyen 1994).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.checks import check_fields, even, number
from melrt.errors import CheckpointError
from melrt_export.generator.config import MAX_TAPS

_RULES = {
    "taps": even(2, MAX_TAPS),
    "cutoff_ratio": number(0, 1, above=True, below=True),
    "beta": number(0, 1000, above=True, below=True),
}


@dataclass(frozen=True, slots=True)
class FilterDesign:
    """Parameters of a filter bank; the defaults are those of ParallelWaveGAN (`layers/pqmf.py`, after version 0.4.2)."""

    taps: int = 62
    """Filter length minus one, even."""
    cutoff_ratio: float = 0.142
    """Cutoff frequency of the prototype as a share of half the sample rate."""
    beta: float = 9.0
    """Shape parameter of the Kaiser window."""
    centered: bool = True
    """True if the cosines are centered on the middle tap, taps / 2; false for (taps - 1) / 2."""
    analysis: bool = False
    """True if the analysis filters are used for the synthesis too."""

    def check(self, path: Path) -> None:
        """Raise CheckpointError, which names the file, if a parameter is out of its range."""
        check_fields(self, _RULES, f"{path}: filter bank", CheckpointError)

    def filters(self, subbands: int) -> np.ndarray:
        """Return one filter for each sub-band, shape (S, taps + 1), float32."""
        n = np.arange(self.taps + 1)
        prototype = self.cutoff_ratio * np.sinc(self.cutoff_ratio * (n - self.taps / 2)) * np.kaiser(self.taps + 1, self.beta)
        band = np.arange(subbands)[:, None]
        middle = self.taps / 2 if self.centered else (self.taps - 1) / 2
        phase = (1 if self.analysis else -1) * (-1.0) ** band * np.pi / 4
        return np.asarray(2 * prototype * np.cos((2 * band + 1) * np.pi / (2 * subbands) * (n - middle) + phase), np.float32)
