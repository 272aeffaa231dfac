"""Per-band mel normalization used in training: an affine map for each band, and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.checks import check_fields, list_of, number, optional
from melrt.errors import ConfigError

MAX_BANDS = 8192
Bands = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Normalization:
    """Clip, subtract the mean, divide by the scale; all numbers are in the units of the plain log-mel."""

    mean: tuple[float, ...]
    """Subtracted from each band, M numbers."""
    scale: tuple[float, ...]
    """Divisor of each band, M numbers above 0."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value of a plain log-mel, applied first; None for no limits."""

    def __post_init__(self) -> None:
        value = number(-1e9, 1e9)
        rules = {"mean": list_of(value, 1, MAX_BANDS), "scale": list_of(number(0, 1e9, above=True), 1, MAX_BANDS)}
        check_fields(self, {**rules, "clip": optional(list_of(value, 2, 2))}, "normalization")
        for field in fields(self):
            if (values := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, tuple(map(float, values)))
        if len(self.mean) != len(self.scale):
            raise ConfigError(f"normalization has {len(self.mean)} means and {len(self.scale)} scales; give one of each per band.")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ConfigError(f"normalization: clip is {list(self.clip)}; give the lower limit first.")

    def apply(self, mel: Bands) -> Bands:
        """Normalize plain log-mels (..., M, T)."""
        if self.clip is not None:
            mel = np.clip(mel, *self.clip)
        return np.asarray((mel - np.array(self.mean)[:, None]) / np.array(self.scale)[:, None])

    def undo(self, mel: Bands) -> Bands:
        """Return the plain log-mels of normalized ones (..., M, T); clipped values stay clipped."""
        return np.asarray(mel * np.array(self.scale)[:, None] + np.array(self.mean)[:, None])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: None if value is None else list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalization:
        """Read the values that `to_dict` returns.

        Raises:
            ConfigError: A missing or unknown field, or a value outside what is allowed.
        """
        if not isinstance(values, Mapping) or not {"mean", "scale"} <= set(values) <= {field.name for field in fields(cls)}:
            raise ConfigError(f"normalization is {values!r:.80}; it must be an object with mean, scale and optionally clip.")
        return cls(**values)
