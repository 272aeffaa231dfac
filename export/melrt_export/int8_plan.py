"""The INT8 plan: which convolutions run in INT8, and with which scales. Calibration writes it, and training in INT8 starts from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.bundle import Bundle
from melrt.checks import check_fields, text
from melrt.errors import CalibrationError

SCHEMA = 2
# INT8 must be at least this many times as fast to be worth its noise. Two runs of one graph can differ by less.
MIN_SPEEDUP = 1.05
# Suffix of the one convolution over [h; x] that replaces `pointwise`, `shortcut` and their sum in a residual block that is in INT8.
MERGED = ".merged"
# Signed bytes are symmetric: -128 is not used, so that a value and its negative are both exact.
SIGNED_MAX = 127
UNSIGNED_MAX = 255


def read_plan(bundle: Bundle) -> Int8Plan:
    """Read the INT8 plan of a calibrated voice.

    Raises:
        CalibrationError: The voice has no INT8 plan, or it is damaged.
    """
    entries = bundle.find("plan", precision="int8")
    if not entries:
        raise CalibrationError(
            f"{bundle.path} has no INT8 plan. Make one with `melrt calibrate {bundle.path} SPEECH`; a larger --budget puts more layers "
            "into it, and training in INT8 then reduces their rounding error."
        )
    return Int8Plan.loads(bundle.read(entries[0]), bundle.path)


def check_int8(bundle: Bundle) -> None:
    """Refuse INT8 that an older melrt made, whose graphs sum in float or have scales that TensorRT does not take for one tensor.

    Raises:
        CalibrationError: The bundle has a plan of an older melrt, or a damaged one. The message has the command that makes it again.
    """
    if bundle.find("plan", precision="int8"):
        read_plan(bundle)


@dataclass(frozen=True, slots=True)
class Range:
    """Range of values that a tensor's bytes represent; values outside are clipped."""

    low: float
    """Lowest value, at most 0. Zero is always exact, because the interior graph pads with it."""
    high: float
    """Highest value, at least 0."""
    method: str
    """Method that chose the range: `minmax`, `percentile`, `entropy` or `mse`."""

    def __post_init__(self) -> None:
        check_fields(self, {"method": text()}, "a range", CalibrationError)
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low <= 0 <= self.high and self.low < self.high):
            raise CalibrationError(f"a range goes from {self.low!r} to {self.high!r}; it must be finite, contain 0 and not be empty.")

    @property
    def symmetric_scale(self) -> float:
        """Scale of a signed byte with zero point 0, as TensorRT uses it."""
        return max(-self.low, self.high) / SIGNED_MAX

    @property
    def affine(self) -> tuple[float, int]:
        """Scale and zero point of an unsigned byte, as the CPU uses them."""
        scale = (self.high - self.low) / UNSIGNED_MAX
        return scale, int(np.clip(round(-self.low / scale), 0, UNSIGNED_MAX))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One convolution in INT8."""

    name: str
    """Name of the convolution in the deploy graph, such as `stages.2.blocks.0.dilated`; `merged` stands for `pointwise` and `shortcut`."""
    input: Range
    """Range of the convolution's input; a merged convolution has one for both halves of [h; x]."""
    output: Range
    """Range of the convolution's output. Only the CPU form rounds it, because ONNX Runtime's integer convolution returns bytes."""
    weight_scales: tuple[float, ...]
    """Weight scale of each output channel of the deploy graph; the bytes are signed, with zero point 0."""
    input_factors: tuple[float, ...] = ()
    """Factors by which equalization divided the input channels (C_in,), empty for none. Ranges and scales are those after equalization."""
    output_factors: tuple[float, ...] = ()
    """Factors by which equalization divided the output channels (C_out,), empty for none. An upsampling has one for all its phases."""

    def __post_init__(self) -> None:
        if not self.weight_scales or not all(np.isfinite(s) and s > 0 for s in self.weight_scales):
            raise CalibrationError(f"{self.name}: weight scales must be finite and above 0, one for each output channel.")
        if not all(np.isfinite(f) and f > 0 for f in (*self.input_factors, *self.output_factors)):
            raise CalibrationError(f"{self.name}: equalization factors must be finite and above 0, one for each channel.")

    def quantize(self, weight: NDArray[np.floating]) -> NDArray[np.int8]:
        """Round a weight (C_out, ...) to the nearest bytes."""
        scales = np.array(self.weight_scales).reshape(-1, *[1] * (weight.ndim - 1))
        return np.asarray(np.clip(np.rint(weight / scales), -SIGNED_MAX, SIGNED_MAX), np.int8)


@dataclass(frozen=True, slots=True)
class Int8Plan:
    """All INT8 layers of a voice; the graphs for TensorRT and for the CPU are both made from it."""

    layers: tuple[LayerPlan, ...]
    """INT8 layers in the order of the network; all other layers stay in floating point."""
    repairs: tuple[str, ...] = ()
    """Corrections that were also applied to the graph: `equalization`, `bias correction`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the INT8 layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def merged_blocks(self) -> tuple[str, ...]:
        """Names of the residual blocks whose `pointwise` and `shortcut` are one INT8 convolution."""
        return tuple(name.removesuffix(MERGED) for name in self.names if name.endswith(MERGED))

    def only(self, names: frozenset[str]) -> Int8Plan:
        """Return this plan for some of its layers."""
        return Int8Plan(tuple(layer for layer in self.layers if layer.name in names), self.repairs)

    def dumps(self) -> str:
        """Return the plan as JSON."""
        return json.dumps({"schema": SCHEMA} | asdict(self), indent=1, allow_nan=False)

    @classmethod
    def loads(cls, text: str | bytes, voice: object = "VOICE.melrt") -> Int8Plan:
        """Read the JSON text that `dumps` returns.

        Args:
            text: The JSON text.
            voice: Path of its bundle, for messages.

        Raises:
            CalibrationError: The text is not a plan, or its schema is not the one that this melrt reads.
        """
        try:
            values: Mapping[str, Any] = json.loads(text)
            schema = values["schema"]
            layers = tuple(_layer(value) for value in values["layers"]) if schema == SCHEMA else ()
            repairs = tuple(map(str, values["repairs"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CalibrationError(f"not an INT8 plan: {error!r}") from error
        if schema != SCHEMA:
            raise CalibrationError(
                f"the INT8 of {voice} was made by another version of melrt: its plan has schema {schema!r}, this melrt reads {SCHEMA}. "
                f"Make it again with `melrt calibrate {voice} SPEECH`."
            )
        return cls(layers, repairs)


def _layer(values: Mapping[str, Any]) -> LayerPlan:
    factors = (tuple(map(float, values[key])) for key in ("weight_scales", "input_factors", "output_factors"))
    return LayerPlan(str(values["name"]), Range(**values["input"]), Range(**values["output"]), *factors)
