"""The synthesis filters of multi-band generators, as each project designs them.

A Kaiser-windowed low-pass prototype (Lin and Vaidyanathan 1998), modulated by cosines (Nguyen 1994).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.generator.config import MAX_TAPS


@dataclass(frozen=True, slots=True)
class FilterDesign:
    """How a project makes its filters; the defaults are ParallelWaveGAN's (`layers/pqmf.py`, after version 0.4.2)."""

    taps: int = 62
    """Length less one, even."""
    cutoff_ratio: float = 0.142
    """Of the prototype, as a part of half the sample rate."""
    beta: float = 9.0
    """Of the Kaiser window."""
    centerd: bool = True
    """Cosines turn about the middle tap, taps / 2; else about (taps - 1) / 2."""
    analysis: bool = False
    """The analysis filters are used for the synthesis too."""

    def check(self, path: Path) -> None:
        """Raise CheckpointError, naming the file, if a number of these cannot be."""
        if type(self.taps) is not int or not 2 <= self.taps <= MAX_TAPS or self.taps % 2:
            raise CheckpointError(f"{path}: the filter bank has {self.taps!r} taps; that is an even number from 2 to {MAX_TAPS}.")
        for name, value, limit in (("cutoff_ratio", self.cutoff_ratio, 1), ("beta", self.beta, 1000)):
            if type(value) not in (int, float) or not 0 < value < limit:
                raise CheckpointError(f"{path}: the filter bank's {name} is {value!r}; it is a number above 0 and below {limit}.")

    def filters(self, subbands: int) -> np.ndarray:
        """One filter per sub-band, shape (S, taps + 1), float32."""
        n = np.arange(self.taps + 1)
        prototype = self.cutoff_ratio * np.sinc(self.cutoff_ratio * (n - self.taps / 2)) * np.kaiser(self.taps + 1, self.beta)
        band = np.arange(subbands)[:, None]
        middle = self.taps / 2 if self.centerd else (self.taps - 1) / 2
        phase = (1 if self.analysis else -1) * (-1.0) ** band * np.pi / 4
        return np.asarray(2 * prototype * np.cos((2 * band + 1) * np.pi / (2 * subbands) * (n - middle) + phase), np.float32)
