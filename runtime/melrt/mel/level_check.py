"""Detection of mels in another convention by their level. Such mels sound wrong and raise no error."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from melrt.checks import check_fields, flag, number
from melrt.mel.features import largest_value
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.types import Mel

logger = logging.getLogger(__name__)

# Mean and deviation of speech in log10 of its mel magnitudes. Over 282 stretches of 64 frames of 32 LJSpeech recordings the mean was -3.1
# to -1.9 and the deviation 0.69 to 1.21, whatever the floor.
SPEECH = (-2.4, 0.9)
# One step of distance: the variation of a stretch's mean, in deviations, and of the natural logarithm of its deviation.
_MEAN_STEP, _DEVIATION_STEP = 0.66, 0.35
# A stretch this far from the expected level is suspicious: those 282 were within 1.5 steps; log10 given for ln, the nearest mistake, was
# beyond 2.5 steps in all but one.
SUSPICIOUS = 2.5
# A cause explains a stretch that is this close to the expected level once the cause is undone.
EXPLAINED = 2.0
# A stretch this far away causes a warning even if no cause explains it.
UNEXPLAINED = 6.0
STRETCH_FRAMES = 64
# Frames of one utterance that are searched for a stretch of speech.
MAX_SEARCHED_FRAMES = 512
# Mean and deviation of speech in the usual normalizations: zero mean and unit variance; decibels from -100 to 0 mapped to [-4, 4] with a
# reference of 20 dB and of 0 dB; and to [-1, 1], [0, 1] and [0, 4] with 20 dB.
UNIT_VARIANCE = (0.0, 1.0)
RANGES = ((-1.3, 1.4), (0.3, 1.4), (-0.33, 0.35), (0.34, 0.17), (1.36, 0.7))


@dataclass(frozen=True, slots=True)
class Levels:
    """Level of a mel of speech in a voice's convention, stored at export."""

    mean: float
    """Mean over bands and frames."""
    deviation: float
    """Standard deviation over bands and frames."""
    normalized: bool = False
    """True if the voice takes normalized mels, and its checkpoint did not include the statistics."""

    def __post_init__(self) -> None:
        check_fields(self, {"mean": number(-1e9, 1e9), "deviation": number(0, 1e9, above=True), "normalized": flag()}, "levels")

    @classmethod
    def expected(cls, spec: MelSpec, normalization: Normalization | None = None) -> Levels:
        """Return the level of the training's statistics if they are known, and else that of speech."""
        if normalization is None or len(set(normalization.mean)) == 1:  # equal numbers for all bands are a range, not statistics
            decade = spec.unit * math.log(10) * spec.power
            return cls(SPEECH[0] * decade, SPEECH[1] * decade)
        mean, scale = np.array(normalization.mean), np.array(normalization.scale)
        return cls(float(mean.mean()), float(np.sqrt((scale**2).mean() + mean.var())))

    def distance(self, values: NDArray[np.floating]) -> float:
        """Return the distance of these frames from this level, in steps; speech is rarely more than two steps away."""
        centered = values.ravel(order="K") - self.mean  # so that float32 sums lose nothing near the expected level
        shift = float(centered.sum()) / centered.size
        deviation = math.sqrt(max(float(centered @ centered) / centered.size - shift**2, 1e-12))  # a tenth of the time of numpy's std
        return math.hypot(shift / (_MEAN_STEP * self.deviation), math.log(deviation / self.deviation) / _DEVIATION_STEP)


@dataclass(frozen=True, slots=True, order=True)
class _Cause:
    """Possible cause of a wrong level."""

    distance: float
    """Distance from the expected level once the cause is undone."""
    name: str
    """Completes the sentence "It looks like ..."."""
    remedy: str
    """Sentence that says what to do."""


class LevelCheck:
    """Observes the frames that a voice is given, and warns once if they are in another convention. Safe from several threads."""

    def __init__(self, spec: MelSpec, levels: Levels | None, normalization: Normalization | None) -> None:
        self._spec, self._levels, self._normalization = spec, levels, normalization
        self._pending: list[Mel] = []
        self._lock = threading.Lock()
        self._done = levels is None
        self._pause = spec.silence + 0.5 * levels.deviation if levels else 0.0
        self._largest = math.inf if levels is None or levels.normalized else largest_value(spec)

    def observe(self, mel: Mel) -> None:
        """Check frames (M, T), and log a warning if they look wrong.

        Short pieces of streams are collected until they make a stretch. Pauses are left out, because they have no level to compare.
        """
        if self._done:
            return
        speech = self._without_pauses(mel[:, :MAX_SEARCHED_FRAMES], STRETCH_FRAMES)
        if not speech.shape[1]:
            return
        with self._lock:
            self._pending.append(speech)
            if sum(frames.shape[1] for frames in self._pending) < STRETCH_FRAMES:
                return
            stretch = np.concatenate(self._pending, axis=1)
            self._pending.clear()
        if (warning := self._warning(stretch)) and not self._done:
            self._done = True
            logger.warning("%s", warning)

    def warning(self, mel: Mel) -> str | None:
        """Return the warning for a stretch (M, T) of speech, or None if its level is as expected."""
        speech = self._without_pauses(mel)
        return self._warning(speech) if self._levels and speech.shape[1] else None

    def _warning(self, mel: Mel) -> str | None:
        """Return the warning for frames without pauses."""
        levels = self._levels
        assert levels is not None
        distance, largest = levels.distance(mel), float(mel.max())
        if distance < SUSPICIOUS and largest <= self._largest:
            return None
        found = (
            f"mel has values about {mel.mean():.3g} ± {mel.std():.2g}; this voice expects about {levels.mean:.3g} ± {levels.deviation:.2g}"
        )
        if largest > self._largest:
            found += f". Its largest value is {largest:.3g}; audio in [-1, 1] gives at most {self._largest:.3g}"
        found += f" ({self._spec.describe()})."
        cause = min(self._causes(mel), default=None)
        if cause and cause.distance < EXPLAINED and (largest > self._largest or cause.distance < 0.7 * distance):
            return f"{found} It looks like {cause.name}. {cause.remedy}"
        if distance > UNEXPLAINED or largest > self._largest:
            return f"{found} Compare the code that made it with the convention that `melrt info` shows."
        return None

    def _without_pauses(self, mel: Mel, frames: int | None = None) -> Mel:
        """Return the frames that are not pauses, at most this many."""
        return mel[:, np.flatnonzero(mel.max(axis=0, initial=-np.inf) > self._pause)[:frames]]

    def _causes(self, mel: Mel) -> Iterator[_Cause]:
        """Yield the causes that are possible for frames (M, T) of speech."""
        assert self._levels is not None
        spec = self._spec
        if self._levels.normalized:
            remedy = "This voice was exported without its training's statistics: put them beside the checkpoint, and export it again."
            yield _Cause(Levels.expected(spec).distance(mel), "a mel that was not normalized", remedy)
            return
        for log in ("ln", "log10", "dB", "linear"):
            source = replace(spec, log=log, gain=1.0)
            if source.unit == spec.unit or (log == "linear" and mel.min() < 0):
                continue
            plain = spec.unit * (mel / source.unit if source.unit else np.log(np.maximum(mel, spec.floor)))
            if plain.max() <= self._largest:
                name = {"linear": "linear magnitudes", "dB": "decibels"}.get(log, f"{log} magnitudes")
                gain = ", gain=1.0" if spec.gain != 1 else ""
                yield _Cause(self._levels.distance(plain), name, _convert(f"--mel-log {log}", f'log="{log}"{gain}'))
        scaled = mel - spec.unit * spec.power * math.log(32768)
        remedy = "Divide the samples by 32768 before the mel is computed."
        yield _Cause(self._levels.distance(scaled), "a mel of 16-bit samples that were not scaled to [-1, 1]", remedy)
        if self._normalization is not None:
            plain = self._normalization.undo(mel.astype(np.float64))
            remedy = _convert("--mel-normalized", "normalization=vocoder.bundle.manifest.normalization")
            yield _Cause(self._levels.distance(plain), "a mel that was normalized already, which this voice does itself", remedy)
        remedy = (
            "This voice takes plain log-mels: undo the normalization with the statistics of the code that made the mel, "
            "or compute the mel with `melrt mel`."
        )
        forms = RANGES if self._normalization is not None else (UNIT_VARIANCE, *RANGES)
        yield _Cause(min(Levels(*form).distance(mel) for form in forms), "a normalized mel", remedy)


def _convert(option: str, change: str) -> str:
    """Return the sentence that shows how to convert such a mel."""
    imports = "from dataclasses import replace; from melrt import convert_mel"
    code = f"{imports}; mel = convert_mel(mel, replace(vocoder.spec, {change}), vocoder.spec)"
    return f"Convert it with `melrt synth {option}`, or in Python with `{code}`."
