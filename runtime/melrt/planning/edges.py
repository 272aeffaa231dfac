"""The ends of an utterance: frames added before synthesis, as some projects do at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from melrt.checks import Rule, check_fields, number, optional, whole
from melrt.types import Mel

MAX_EXTENSION = 1000

Ends = Literal["voice", "model"]
"""Ends of an utterance: as the voice's project synthesizes them, or as PyTorch's forward of the network."""
ENDS = Rule(lambda value: value in get_args(Ends), "voice (as the voice's project) or model (as PyTorch's forward)")


@dataclass(frozen=True, slots=True)
class Edges:
    """Frames added at both ends before synthesis. Their audio is cut off again, so that audio and mel stay aligned."""

    left: int = 0
    """Frames added before the first frame; with 0 the network's own padding applies, as in PyTorch's forward."""
    right: int = 0
    """Frames added after the last frame."""
    value: float | None = None
    """Value of the added frames; None repeats the utterance's first and last frame."""

    def __post_init__(self) -> None:
        frames = dict.fromkeys(("left", "right"), whole(0, MAX_EXTENSION))
        check_fields(self, {**frames, "value": optional(number())}, "edges")

    def before(self, mel: Mel) -> Mel:
        """Return the frames to add before this mel (M, T), shape (M, left)."""
        return self._frames(mel[:, :1], self.left)

    def after(self, mel: Mel) -> Mel:
        """Return the frames to add after this mel (M, T), shape (M, right)."""
        return self._frames(mel[:, -1:], self.right)

    def extend(self, mel: Mel) -> Mel:
        """Return the extended mel (M, left + T + right); the same array if nothing is added."""
        return np.concatenate([self.before(mel), mel, self.after(mel)], axis=1) if self.left or self.right else mel

    def _frames(self, end: Mel, count: int) -> Mel:
        frame = end if self.value is None else np.full_like(end, self.value)
        return np.repeat(frame, count, axis=1)
