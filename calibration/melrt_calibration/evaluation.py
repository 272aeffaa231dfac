"""Evaluation of a graph on speech, the quality budget, and the decision whether INT8 pays."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx

from melrt.backends.onnxruntime import OnnxModel
from melrt.checks import check_fields, number
from melrt.mel.features import mel_distance
from melrt.mel.spec import MelSpec
from melrt.types import FloatAudio
from melrt_calibration.data import Piece
from melrt_calibration.metrics import silence_energy

T = TypeVar("T")
# Smallest speedup that counts: two runs of one graph can differ by less.
MIN_SPEEDUP = 1.05


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one graph on all pieces of an evaluator."""

    log_mel_error: float
    """Log-mel error against the recordings in the convention's logarithm, mean over pieces."""
    silence_db: float
    """Level in dB of full scale where the recordings are silent; NaN if they never are."""

    def error_increase(self, reference: Quality) -> float:
        """Return the relative increase of the log-mel error over the reference's; 0.02 is 2 %."""
        return self.log_mel_error / reference.log_mel_error - 1

    def silence_increase(self, reference: Quality) -> float:
        """Return the increase of the silence level over the reference's in dB; 0 if nothing is silent."""
        return float(np.nan_to_num(self.silence_db - reference.silence_db))


@dataclass(frozen=True, slots=True)
class Budget:
    """Loss of quality that INT8 may cause."""

    log_mel: float = 0.02
    """Largest relative increase of the log-mel error over FP32's, from 0 to 10; 0.02 is 2 %."""
    silence_db: float = 1.0
    """Largest increase of the silence level over FP32's in dB, from 0 to 100."""

    def __post_init__(self) -> None:
        rules = {"log_mel": number(0, 10), "silence_db": number(0, 100)}
        check_fields(self, rules, "INT8 budget, where a log_mel of 0.02 is 2 % of FP32's error")

    def allows(self, quality: Quality, reference: Quality, share: float = 1.0) -> bool:
        """Return whether the quality is within the given share of the budget."""
        error, silence = quality.error_increase(reference), quality.silence_increase(reference)
        return error <= share * self.log_mel and silence <= share * self.silence_db


class Evaluator:
    """Runs `edge` graphs over whole pieces, one piece per CPU core at a time."""

    def __init__(self, pieces: Sequence[Piece], spec: MelSpec) -> None:
        self.pieces = pieces
        self.spec = spec

    def quality(self, model: onnx.ModelProto) -> Quality:
        """Measure the quality of a graph."""
        rows = self._map(model, self._measure)
        silence, count = sum(row[1] for row in rows), sum(row[2] for row in rows)
        level = float(10 * np.log10(silence / count + 1e-20)) if count else float("nan")
        return Quality(float(np.mean([row[0] for row in rows])), level)

    def audio(self, model: onnx.ModelProto) -> list[FloatAudio]:
        """Synthesize each piece, (N,) each."""
        return self._map(model, lambda piece, audio: audio)

    def _measure(self, piece: Piece, audio: FloatAudio) -> tuple[float, float, int]:
        return (mel_distance(piece.mel, audio, self.spec), *silence_energy(piece.mel, audio, self.spec))

    def _map(self, model: onnx.ModelProto, function: Callable[[Piece, FloatAudio], T]) -> list[T]:
        session = OnnxModel(model.SerializeToString(), threads=1)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(lambda piece: function(piece, session.run(piece.mel[None])[0]), self.pieces))


def decide(qualities: Mapping[str, Quality], budget: Budget, speedup: float, *, found: bool) -> tuple[bool, str]:
    """Decide whether INT8 pays.

    Args:
        qualities: Quality of `fp32` and `int8` on the evaluation speech.
        budget: Allowed loss of quality.
        speedup: FP32's time over INT8's.
        found: Whether the search found a set of layers within the budget.

    Returns:
        The decision, and a sentence with its reason.
    """
    fp32, int8 = qualities["fp32"], qualities["int8"]
    facts = (
        f"{speedup:.2f} times FP32's speed on this CPU, log-mel error {100 * int8.error_increase(fp32):+z.1f} %, "
        f"silence {int8.silence_increase(fp32):+z.1f} dB"
    )
    if not found:
        return False, f"No set of INT8 layers is faster than FP32 within the budget. All layers in INT8: {facts}."
    if speedup < MIN_SPEEDUP:
        return False, f"INT8 does not pay on this machine: {facts}."
    if not budget.allows(int8, fp32):
        return False, f"INT8 exceeds the budget on the evaluation speech: {facts}."
    return True, f"INT8 pays: {facts}."
