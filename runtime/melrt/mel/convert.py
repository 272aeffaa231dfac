"""Conversion of mels between conventions that differ only in a map of single values."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from melrt.errors import MelError
from melrt.mel.spec import MelSpec
from melrt.types import Mel

# Fields that a map of single values can change. All others shape the frames themselves.
_MAPPED = {"log", "floor", "gain", "normalization"}
# Distance, in natural logarithms, below which a value counts as cut off at a limit; float32 keeps -160 dB to 1e-6 of that value.
_CUT_OFF = 1e-4


def convert_mel(mel: ArrayLike, source: MelSpec, target: MelSpec) -> Mel:
    """Convert frames to another logarithm, floor, gain or normalization, exactly.

    `convert_mel(mel, replace(vocoder.spec, log="ln"), vocoder.spec)` makes natural logarithms fit a log10 voice.

    Args:
        mel: Frames in the convention `source`, shape (M, T) or (B, M, T).
        source: Convention of the given frames.
        target: Convention of the result.

    Returns:
        The same frames in the convention `target`, float32.

    Raises:
        MelError: The conventions differ in more than a map of single values, or `source` cut off values that `target` distinguishes.
    """
    frames = source.check_frames(mel, axes=(2, 3))
    if target == source:
        return frames
    differing = [name for name in (field.name for field in fields(MelSpec)) if getattr(target, name) != getattr(source, name)]
    if fixed := [name for name in differing if name not in _MAPPED]:
        pairs = ", ".join(f"{name} {getattr(source, name)} for {getattr(target, name)}" for name in fixed)
        raise MelError(
            f"these mels cannot be converted exactly: they have {pairs}. Only the logarithm, floor, gain and normalization can be changed "
            "afterwards. Compute the mels again from audio with `melrt mel`."
        )
    values = frames.astype(np.float64)
    if source.normalization is not None:
        values = source.normalization.undo(values)
    logs = values / source.unit if source.unit else np.log(np.maximum(values / source.gain, np.finfo(np.float64).tiny))
    _check_limits(logs, source, target)
    logs = np.maximum(logs, np.log(target.floor))
    result = logs * target.unit if target.unit else np.exp(logs) * target.gain
    return np.asarray(target.normalization.apply(result) if target.normalization else result, np.float32)


def _check_limits(logs: NDArray[np.float64], source: MelSpec, target: MelSpec) -> None:
    """Raise MelError for values that the source cut off and the target distinguishes."""
    low, high = _limits(source)
    target_low, target_high = _limits(target)
    for limit, target_limit, wider, cut_off, name in (
        (low, target_low, target_low < low - _CUT_OFF, logs <= low + _CUT_OFF, "smallest"),
        (high, target_high, target_high > high + _CUT_OFF, logs >= high - _CUT_OFF, "largest"),
    ):
        if wider and (count := int(cut_off.sum())):
            raise MelError(
                f"these mels cannot be converted exactly: {count} values are at the {name} magnitude of their convention, "
                f"{np.exp(limit):.3g}, so their true size is lost; the target convention continues to {np.exp(target_limit):.3g}. "
                "Compute the mels again with `melrt mel`."
            )


def _limits(spec: MelSpec) -> tuple[float, float]:
    """Return the natural logarithms of the smallest and the largest magnitude that a convention keeps."""
    low, high = float(np.log(spec.floor)), float("inf")
    if spec.normalization is not None and spec.normalization.clip is not None and spec.unit:
        clip = spec.normalization.clip
        low, high = max(low, clip[0] / spec.unit), clip[1] / spec.unit
    return low, high
