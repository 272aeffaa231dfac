"""Evaluation of a graph on speech, the quality budget, and the decision whether INT8 pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from melrt.backends.onnxruntime import OnnxModel
from melrt.checks import check_fields, number
from melrt.mel.spec import MelSpec
from melrt.system import usable_cores
from melrt.types import FloatAudio
from melrt_calibration.data import Piece
from melrt_calibration.metrics import cell_errors, silence_levels
from melrt_export.int8_plan import MIN_SPEEDUP
from melrt_export.quality import perceptual_metrics

T = TypeVar("T")
# Resamples of the recordings for an interval; its ends then vary by about a hundredth of its width.
RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one graph on all pieces of an evaluator."""

    log_mel_error: float
    """Log-mel error against the recordings in the convention's logarithm, mean over pieces."""
    silence_db: float
    """Median level in dB of full scale of the frames where the recordings are silent; NaN if they never are."""
    errors: tuple[float, ...] = ()
    """Log-mel error of each recording, mean over its pieces."""
    bands: tuple[float, ...] = ()
    """Log-mel error of each mel band, mean over pieces."""
    quiet: float = 0.0
    """Part of the log-mel error that is in quiet cells of the recordings, mean over pieces."""

    def error_increase(self, reference: Quality) -> float:
        """Return the relative increase of the log-mel error over the reference's; 0.02 is 2 %."""
        return self.log_mel_error / reference.log_mel_error - 1

    def quiet_share(self, reference: Quality) -> float:
        """Return the share of the error's increase over the reference's that is in quiet cells; NaN if the error does not increase."""
        increase = self.log_mel_error - reference.log_mel_error
        return (self.quiet - reference.quiet) / increase if increase > 0 else float("nan")

    def increase_interval(self, reference: Quality) -> tuple[float, float]:
        """Return the 95 % interval of `error_increase` over recordings, by a percentile bootstrap (Efron 1979) with a fixed seed."""
        errors, references = np.array(self.errors), np.array(reference.errors)
        drawn = np.random.default_rng(0).integers(len(errors), size=(RESAMPLES, len(errors)))
        increases = errors[drawn].sum(axis=1) / references[drawn].sum(axis=1) - 1
        low, high = np.quantile(increases, (0.025, 0.975))
        return float(low), float(high)

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


class _PieceQuality(NamedTuple):
    """Quality of one piece; fields as in `Quality`."""

    error: float
    silence: NDArray[np.float64]
    bands: NDArray[np.float64]
    quiet: float


class Evaluator:
    """Runs `edge` graphs over whole pieces, one piece per CPU core at a time."""

    def __init__(self, pieces: Sequence[Piece], spec: MelSpec) -> None:
        self.pieces = pieces
        self.spec = spec

    def quality(self, model: onnx.ModelProto) -> Quality:
        """Measure the quality of a graph."""
        rows = self._map(model, self._measure)
        recordings: dict[str, list[float]] = {}
        for piece, row in zip(self.pieces, rows, strict=True):
            recordings.setdefault(piece.recording, []).append(row.error)
        levels = np.concatenate([row.silence for row in rows])
        silence = float(np.median(levels)) if len(levels) else float("nan")
        errors = tuple(float(np.mean(one)) for one in recordings.values())
        bands = np.mean([row.bands for row in rows], axis=0)
        error, quiet = (float(np.mean([getattr(row, name) for row in rows])) for name in ("error", "quiet"))
        return Quality(error, silence, errors, tuple(map(float, bands)), quiet)

    def audio(self, model: onnx.ModelProto) -> list[FloatAudio]:
        """Synthesize each piece, (N,) each."""
        return self._map(model, lambda piece, audio: audio)

    def _measure(self, piece: Piece, audio: FloatAudio) -> _PieceQuality:
        bands, quiet = cell_errors(piece.mel, audio, self.spec)
        return _PieceQuality(float(bands.mean()), silence_levels(piece.mel, audio, self.spec), bands, quiet)

    def _map(self, model: onnx.ModelProto, function: Callable[[Piece, FloatAudio], T]) -> list[T]:
        session = OnnxModel(model.SerializeToString(), threads=1)
        with ThreadPoolExecutor(usable_cores()) as pool:
            return list(pool.map(lambda piece: function(piece, session.run(piece.mel[None])[0]), self.pieces))


def perceptual_facts(evaluator: Evaluator, fp32: onnx.ModelProto, int8: onnx.ModelProto) -> str:
    """Return the mean STOI and wideband PESQ of INT8's audio against FP32's as text for the verdict; empty if neither is installed."""
    rate = evaluator.spec.sample_rate
    pairs = zip(evaluator.audio(fp32), evaluator.audio(int8), strict=True)
    rows = [perceptual_metrics(reference, output, rate) for reference, output in pairs]
    return "".join(f", {name.upper()} {np.mean([row[name] for row in rows]):.3f} against FP32" for name in rows[0])


def decide(qualities: Mapping[str, Quality], budget: Budget, speedup: float, *, found: bool, perceptual: str = "") -> tuple[bool, str]:
    """Decide whether INT8 pays.

    Args:
        qualities: Quality of `fp32`, `int8` and, if there is one, the `control` on the evaluation speech.
        budget: Allowed loss of quality.
        speedup: FP32's time over INT8's.
        found: Whether the search found a set of layers within the budget.
        perceptual: Text of `perceptual_facts`, for the sentence.

    Returns:
        The decision, and a sentence with its reason.
    """
    fp32, int8 = qualities["fp32"], qualities["int8"]
    low, high = (100 * end for end in int8.increase_interval(fp32))
    facts = (
        f"{speedup:.2f} times FP32's speed on this CPU, mean log-mel error {100 * int8.error_increase(fp32):+z.1f} % (the figure that the "
        f"budget limits; 95 % interval over {len(fp32.errors)} recordings {low:+z.1f} to {high:+z.1f} %), "
        f"median silent frame {int8.silence_increase(fp32):+z.1f} dB{perceptual}"
    )
    if "control" in qualities:
        facts += f"; FP32 trained as long has {100 * qualities['control'].error_increase(fp32):+z.1f} % of log-mel error"
    if not found:
        return False, f"No set of INT8 layers is faster than FP32 within the budget. All layers in INT8: {facts}."
    if speedup < MIN_SPEEDUP:
        return False, f"INT8 does not pay on this machine: {facts}."
    if not budget.allows(int8, fp32):
        return False, f"INT8 exceeds the budget on the evaluation speech: {facts}."
    return True, f"INT8 pays: {facts}."
