"""What a training took off its log-mels: an affine map per band, and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.errors import BundleError

MAX_BANDS = 8192
Bands = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Normalization:
    """Clip, subtract the mean, divide by the scale; all numbers are in the units of the plain log-mel."""

    mean: tuple[float, ...]
    """Subtracted from each band, M numbers."""
    scale: tuple[float, ...]
    """Divides each band, M numbers above 0."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value of a plain log-mel, applied first."""

    def __post_init__(self) -> None:
        for name in ("mean", "scale", *(["clip"] if self.clip is not None else [])):
            object.__setattr__(self, name, _numbers(getattr(self, name), name))
        if len(self.mean) != len(self.scale):
            raise BundleError(f"normalization has {len(self.mean)} means and {len(self.scale)} scales; it has one of each per band.")
        if min(self.scale) <= 0:
            raise BundleError(f"normalization has a scale of {min(self.scale)}; each is above 0.")
        if self.clip is not None and (len(self.clip) != 2 or not self.clip[0] < self.clip[1]):
            raise BundleError(f"normalization clips to {self.clip}; that is two numbers, the lower first.")

    def apply(self, mel: Bands) -> Bands:
        """Plain log-mels (..., M, T) to normalized ones."""
        if self.clip is not None:
            mel = np.clip(mel, *self.clip)
        return np.asarray((mel - np.array(self.mean)[:, None]) / np.array(self.scale)[:, None])

    def undo(self, mel: Bands) -> Bands:
        """Normalized mels (..., M, T) to plain ones; what was clipped stays clipped."""
        return np.asarray(mel * np.array(self.scale)[:, None] + np.array(self.mean)[:, None])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: None if value is None else list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Normalization:
        """Read `to_dict`'s form.

        Raises:
            BundleError: A missing or unknown field, or a value out of its range.
        """
        if not isinstance(values, Mapping) or not {"mean", "scale"} <= set(values) <= {field.name for field in fields(cls)}:
            raise BundleError("normalization is not an object with mean, scale and perhaps clip.")
        return cls(**values)


def _numbers(values: Any, name: str) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or not 0 < len(values) <= MAX_BANDS:
        raise BundleError(f"normalization: {name} is no list of numbers, one per band.")
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in values):
        raise BundleError(f"normalization: {name} holds something else than finite numbers under 1e9.")
    return tuple(float(value) for value in values)
