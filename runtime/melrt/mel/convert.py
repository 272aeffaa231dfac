"""From one mel convention to another, where single values tell enough."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from melrt.errors import MelError
from melrt.mel.spec import MelSpec

# What a map of single values can change; all else is in the frames for good.
_MAPPED = {"log", "floor", "gain", "normalization"}
# A value this near a limit, in natural logarithms, was cut off by it: float32 of -160 dB is exact to 1e-6 of that.
_TOUCHING = 1e-4


def convert(target: MelSpec, mel: NDArray[np.float32], source: MelSpec) -> NDArray[np.float32]:
    """See `MelSpec.convert`.

    Args:
        target: What is wanted.
        mel: Checked frames (..., M, T) in the convention `source`.
        source: What they are.
    """
    if target == source:
        return mel
    differing = [name for name in (field.name for field in fields(MelSpec)) if getattr(target, name) != getattr(source, name)]
    if fixed := [name for name in differing if name not in _MAPPED]:
        pairs = ", ".join(f"{name} {getattr(source, name)} for {getattr(target, name)}" for name in fixed)
        raise MelError(
            f"these mels cannot be converted exactly: they have {pairs}. A logarithm, floor, gain or normalization can be changed "
            "afterwards, these cannot; compute the mels anew from audio with `melrt mel`."
        )
    values = mel.astype(np.float64)
    if source.normalization is not None:
        values = source.normalization.undo(values)
    logs = values / source.unit if source.unit else np.log(np.maximum(values / source.gain, np.finfo(np.float64).tiny))
    _check_limits(logs, target, source)
    magnitude = np.maximum(logs, np.log(target.floor))
    result = magnitude * target.unit if target.unit else np.exp(magnitude) * target.gain
    return np.asarray(target.normalization.apply(result) if target.normalization else result, np.float32)


def _check_limits(logs: NDArray[np.float64], target: MelSpec, source: MelSpec) -> None:
    """Refuse values that the source cut off and the target tells apart."""
    low, high = _limits(source)
    lowest, highest = _limits(target)
    for limit, wanted, beyond, name in (
        (low, lowest, logs <= low + _TOUCHING, "smallest"),
        (high, highest, logs >= high - _TOUCHING, "largest"),
    ):
        kept_apart = wanted < limit - _TOUCHING if name == "smallest" else wanted > limit + _TOUCHING
        if kept_apart and (count := int(beyond.sum())):
            raise MelError(
                f"these mels cannot be converted exactly: {count} values stand at their convention's {name} magnitude, "
                f"{np.exp(limit):.3g}, and what they were is lost; this convention goes on to {np.exp(wanted):.3g}. "
                "Compute the mels anew with `melrt mel`."
            )


def _limits(spec: MelSpec) -> tuple[float, float]:
    """Natural logarithms of the smallest and the largest magnitude that a convention keeps."""
    low, high = float(np.log(spec.floor)), float("inf")
    if spec.normalization is not None and spec.normalization.clip is not None and spec.unit:
        clip = spec.normalization.clip
        low, high = max(low, clip[0] / spec.unit), clip[1] / spec.unit
    return low, high
