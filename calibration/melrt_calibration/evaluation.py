"""The judge: what a graph's synthesis of held-out speech is worth."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from melrt.backends.onnxruntime import OnnxModel
from melrt.errors import CalibrationError
from melrt.mel.spec import MelSpec
from melrt_calibration.data import Piece
from melrt_calibration.metrics import mel_distance, silence_energy

Audio = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one graph on all held-out speech."""

    log_mel_error: float
    """Against the recording, mean over pieces, in the convention's logarithm."""
    silence_db: float
    """Level where the recordings are silent, relative to full scale; NaN if they never are."""

    def above(self, reference: Quality) -> float:
        """By which share the log-mel error is above the reference's."""
        return self.log_mel_error / reference.log_mel_error - 1

    def louder(self, reference: Quality) -> float:
        """By how many dB silence is louder; 0 where nothing is silent."""
        return float(np.nan_to_num(self.silence_db - reference.silence_db))


@dataclass(frozen=True, slots=True)
class Budget:
    """How much quality may be given for speed."""

    log_mel: float = 0.02
    """Share by which the log-mel error against the recording may be above FP32's."""
    silence_db: float = 1.0
    """dB by which silence may be louder than FP32's."""

    def __post_init__(self) -> None:
        if not 0 <= self.log_mel <= 10:
            raise CalibrationError(f"budget is {self.log_mel}; it is a share of FP32's error from 0 to 10: 0.02 is 2 %.")
        if not 0 <= self.silence_db <= 100:
            raise CalibrationError(f"silence budget is {self.silence_db} dB; it lies between 0 and 100.")

    def holds(self, quality: Quality, reference: Quality, share: float = 1.0) -> bool:
        """Whether this is within the given share of the budget."""
        return quality.above(reference) <= share * self.log_mel and quality.louder(reference) <= share * self.silence_db


class Evaluator:
    """Runs edge graphs over whole pieces, a piece per core."""

    def __init__(self, pieces: Sequence[Piece], spec: MelSpec) -> None:
        self.pieces = pieces
        self.spec = spec

    def quality(self, model: onnx.ModelProto) -> Quality:
        """Of an `edge` graph."""
        rows = self._map(model, self._measure)
        silence, count = sum(row[1] for row in rows), sum(row[2] for row in rows)
        level = float(10 * np.log10(silence / count + 1e-20)) if count else float("nan")
        return Quality(float(np.mean([row[0] for row in rows])), level)

    def audio(self, model: onnx.ModelProto) -> list[Audio]:
        """Each piece's synthesis (N,)."""
        return self._map(model, lambda piece, audio: audio)

    def _measure(self, piece: Piece, audio: Audio) -> tuple[float, float, int]:
        return (mel_distance(piece.mel, audio, self.spec), *silence_energy(piece.mel, audio, self.spec))

    def _map(self, model: onnx.ModelProto, of: Callable[[Piece, Audio], T]) -> list[T]:
        session = OnnxModel(model.SerializeToString(), threads=1)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(lambda piece: of(piece, session.run(piece.mel[None])[0]), self.pieces))
