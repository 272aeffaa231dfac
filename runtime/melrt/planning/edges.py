"""The ends of an utterance: as the network treats them, or extended before and trimmed after, as some projects do at inference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from melrt.errors import BundleError

Frames = NDArray[np.float32]
MAX_EXTENSION = 1000


@dataclass(frozen=True, slots=True)
class Edges:
    """Frames put at both ends before synthesis; their audio is not given out, so that audio and mel stay aligned."""

    left: int = 0
    """Frames before the first; 0: the network's own padding, as PyTorch's forward."""
    right: int = 0
    """Frames after the last."""
    value: float | None = None
    """What they hold; None repeats the utterance's first and last frame."""

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= MAX_EXTENSION:
                raise BundleError(f"edges: {name} is {value!r}; it is a number of frames from 0 to {MAX_EXTENSION}.")
        if self.value is not None and (type(self.value) not in (int, float) or not np.isfinite(self.value)):
            raise BundleError(f"edges: value is {self.value!r}; it is a finite number, or null to repeat the end's frame.")

    def before(self, mel: Frames) -> Frames:
        """The frames before this one's first, (M, left)."""
        return self._frames(mel[:, :1], self.left)

    def after(self, mel: Frames) -> Frames:
        """The frames after this one's last, (M, right)."""
        return self._frames(mel[:, -1:], self.right)

    def extend(self, mel: Frames) -> Frames:
        """(M, left + T + right); the same array if nothing is added."""
        return np.concatenate([self.before(mel), mel, self.after(mel)], axis=1) if self.left or self.right else mel

    def _frames(self, end: Frames, count: int) -> Frames:
        frame = end if self.value is None else np.full_like(end, self.value)
        return np.repeat(frame, count, axis=1)
