"""Telling a mel of another convention by its level: the classic mistake, which sounds wrong and raises nothing."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from melrt.errors import BundleError
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec

logger = logging.getLogger(__name__)

# Level of speech as the decimal logarithm of its mel magnitudes: a mean of -3.1 to -1.9 (middle -2.4) and a deviation of 0.69 to 1.21
# (middle 0.9) in each of 282 stretches of 64 frames of 32 LJSpeech recordings, whatever the floor.
SPEECH = (-2.4, 0.9)
# How far a stretch's mean and the logarithm of its deviation stray from that: one step of `_distance` each.
_MEAN_STEP, _DEVIATION_STEP = 0.66, 0.35
# Those 282 lie within 1.5 steps; log10 taken for ln, the nearest of the mistakes, in all but one beyond 2.5.
FAR = 2.5
NEAR = 2.0
NOWHERE = 6.0
STRETCH = 64
# Of one utterance, frames that are looked at for so many that are spoken.
MOST_SEEN = 512


@dataclass(frozen=True, slots=True)
class Levels:
    """What a mel of speech amounts to in a voice's convention, stored at export."""

    mean: float
    """Over bands and frames."""
    deviation: float
    """About that mean, over bands and frames."""
    normalized: bool = False
    """The voice takes normalized mels, and its checkpoint did not say how they are made."""

    def __post_init__(self) -> None:
        numbers = all(type(value) in (int, float) and abs(value) < 1e9 for value in (self.mean, self.deviation))
        if not numbers or self.deviation <= 0 or type(self.normalized) is not bool:
            raise BundleError(f"levels of a mean of {self.mean!r} and a deviation of {self.deviation!r}; two numbers, the second above 0.")

    @classmethod
    def of(cls, spec: MelSpec, normalization: Normalization | None = None) -> Levels:
        """Those of the training's statistics if they are known, or those of speech."""
        if normalization is None or len(set(normalization.mean)) == 1:  # one number for all bands is a range, no statistics
            decade = spec.unit * math.log(10) * spec.power
            return cls(SPEECH[0] * decade, SPEECH[1] * decade)
        mean, scale = np.array(normalization.mean), np.array(normalization.scale)
        return cls(float(mean.mean()), float(np.sqrt((scale**2).mean() + mean.var())))

    def distance(self, values: NDArray[np.floating]) -> float:
        """How far these frames are from such levels, in steps that speech seldom takes more than two of."""
        spread = max(float(values.std()), 1e-6)
        shift = (float(values.mean()) - self.mean) / (_MEAN_STEP * self.deviation)
        return math.hypot(shift, math.log(spread / self.deviation) / _DEVIATION_STEP)


class LevelCheck:
    """Looks at the frames that a voice is given, and warns once if they are of another convention. Safe from several threads."""

    def __init__(self, spec: MelSpec, levels: Levels | None, normalization: Normalization | None) -> None:
        self._spec, self._levels, self._normalization = spec, levels, normalization
        self._held: list[NDArray[np.float32]] = []
        self._lock = threading.Lock()
        self._done = levels is None
        self._pause = spec.silence + 0.5 * levels.deviation if levels else 0.0

    def look(self, mel: NDArray[np.float32]) -> None:
        """Take notice of frames (M, T); a few of a stream at a time add up to a stretch. Pauses have no level to go by and are left out."""
        if self._done:
            return
        spoken = self._spoken(mel[:, :MOST_SEEN])[:, :STRETCH]
        if not spoken.shape[1]:
            return
        with self._lock:
            self._held.append(spoken)
            if sum(frames.shape[1] for frames in self._held) < STRETCH:
                return
            stretch = np.concatenate(self._held, axis=1)
            self._held.clear()
        if (warning := self.judge(stretch)) and not self._done:
            self._done = True
            logger.warning("%s", warning)

    def judge(self, mel: NDArray[np.float32]) -> str | None:
        """The warning that these frames deserve, if any.

        Args:
            mel: A stretch (M, T) of speech.
        """
        levels, spec = self._levels, self._spec
        mel = self._spoken(mel)
        if levels is None or not mel.shape[1] or (far := levels.distance(mel)) < FAR:
            return None
        found = (
            f"mel has values about {mel.mean():.3g} ± {mel.std():.2g}; this voice expects about {levels.mean:.3g} ± {levels.deviation:.2g}"
        )
        nearest, cause, remedy = min(self._suspects(mel), default=(NOWHERE, "", ""))
        if nearest < min(NEAR, 0.7 * far):
            return f"{found} ({spec.describe()}). It looks like {cause}. {remedy}"
        return f"{found} ({spec.describe()}). Compare how it was made with `melrt info`." if far > NOWHERE else None

    def _spoken(self, mel: NDArray[np.float32]) -> NDArray[np.float32]:
        return mel[:, mel.max(axis=0, initial=-np.inf) > self._pause]

    def _suspects(self, mel: NDArray[np.float32]) -> Iterator[tuple[float, str, str]]:
        """Distance from the expected levels if the frames are such, what they are called, and what mends them."""
        assert self._levels is not None
        spec = self._spec
        if self._levels.normalized:
            plain = Levels.of(spec).distance(mel)
            remedy = "This voice was exported without its training's statistics: put them beside the checkpoint, and export it anew."
            yield plain, "a mel that was not normalized", remedy
            return
        for log in ("ln", "log10", "dB", "linear"):
            source = replace(spec, log=log, gain=1.0)
            if source.unit == spec.unit or (log == "linear" and mel.min() < 0):
                continue
            logs = mel / source.unit if source.unit else np.log(np.maximum(mel, spec.floor))
            name = {"linear": "linear magnitudes", "dB": "decibels"}.get(log, f"{log} magnitudes")
            gain = ", gain=1.0" if spec.gain != 1 else ""
            yield self._levels.distance(logs * spec.unit), name, f'Mend it with spec.convert(mel, replace(spec, log="{log}"{gain})).'
        if self._normalization is not None:
            pending_blocks = self._normalization.undo(mel.astype(np.float64))
            remedy = "Mend it with spec.convert(mel, replace(spec, normalization=bundle.manifest.normalization))."
            yield self._levels.distance(pending_blocks), "a mel that was normalized already, which this voice does itself", remedy
