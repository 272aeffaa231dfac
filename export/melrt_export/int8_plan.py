"""The plan: which convolutions run in INT8 and with which scales. What calibration decides, and what a training in INT8 starts from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.bundle import Bundle
from melrt.errors import CalibrationError

# 2: with the factors of equalization.
SCHEMA = 2
# A symmetric signed byte: -128 is not used, so that a value and its negative are both exact.
SIGNED_MAX = 127
UNSIGNED_MAX = 255


def read_plan(bundle: Bundle) -> Plan:
    """The INT8 plan of a calibrated voice.

    Raises:
        CalibrationError: It has none, or it is damaged.
    """
    entries = bundle.find("plan", precision="int8")
    if not entries:
        raise CalibrationError(
            f"{bundle.path} has no INT8 plan: melrt calibrate {bundle.path} SPEECH makes one; a larger --budget puts more layers into it, "
            "for a training to mend."
        )
    return Plan.loads(bundle.read(entries[0]))


@dataclass(frozen=True, slots=True)
class Range:
    """What a tensor's byte can say; values outside are clipped."""

    low: float
    """At most 0: zero is always exact, since the interior graph pads with it."""
    high: float
    """At least 0."""
    method: str
    """How it was chosen: `minmax`, `percentile`, `entropy` or `mse`."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low <= 0 <= self.high and self.low < self.high):
            raise CalibrationError(f"a range from {self.low!r} to {self.high!r}; it is finite, holds 0 and more than 0.")

    @property
    def symmetric_scale(self) -> float:
        """Of a signed byte with zero point 0: TensorRT's."""
        return max(-self.low, self.high) / SIGNED_MAX

    @property
    def affine(self) -> tuple[float, int]:
        """Scale and zero point of an unsigned byte: the CPU's."""
        scale = (self.high - self.low) / UNSIGNED_MAX
        return scale, int(np.clip(round(-self.low / scale), 0, UNSIGNED_MAX))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One convolution in INT8."""

    name: str
    """Of the convolution, as in the deploy graph: `stages.2.blocks.0.dilated`."""
    input: Range
    """Of what it convolves."""
    output: Range
    """Of what it gives, before whatever follows; only the CPU form rounds there (ONNX Runtime's integer convolution gives bytes)."""
    weight_scales: tuple[float, ...]
    """One for each output channel of the deploy graph; signed, zero point 0."""
    input_factors: tuple[float, ...] = ()
    """What equalization divided each input channel by (C_in,); empty: nothing. Ranges and scales are those after it."""
    output_factors: tuple[float, ...] = ()
    """What it divided each output channel by, (C_out,), an upsampling's once for all its phases; empty: nothing."""

    def __post_init__(self) -> None:
        if not self.weight_scales or not all(np.isfinite(s) and s > 0 for s in self.weight_scales):
            raise CalibrationError(f"{self.name}: weight scales are finite and above 0, one for each output channel.")
        if not all(np.isfinite(f) and f > 0 for f in (*self.input_factors, *self.output_factors)):
            raise CalibrationError(f"{self.name}: factors of equalization are finite and above 0, one for each channel.")

    def quantize(self, weight: NDArray[np.floating]) -> NDArray[np.int8]:
        """The nearest bytes of a weight (C_out, ...)."""
        scales = np.array(self.weight_scales).reshape(-1, *[1] * (weight.ndim - 1))
        return np.asarray(np.clip(np.rint(weight / scales), -SIGNED_MAX, SIGNED_MAX), np.int8)


@dataclass(frozen=True, slots=True)
class Plan:
    """All INT8 layers of a voice; both forms, for TensorRT and for the CPU, are made from it."""

    layers: tuple[LayerPlan, ...]
    """In the order of the network; what is not named stays in floating point."""
    repairs: tuple[str, ...] = ()
    """What else was done to the graph: `equalization`, `bias correction`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the INT8 layers."""
        return tuple(layer.name for layer in self.layers)

    def only(self, names: frozenset[str]) -> Plan:
        """The same plan for fewer layers."""
        return Plan(tuple(layer for layer in self.layers if layer.name in names), self.repairs)

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps({"schema": SCHEMA} | asdict(self), indent=1, allow_nan=False)

    @classmethod
    def loads(cls, text: str | bytes) -> Plan:
        """Read `dumps`'s form.

        Raises:
            CalibrationError: Not a plan, or one of a newer schema.
        """
        try:
            values: Mapping[str, Any] = json.loads(text)
            if values["schema"] != SCHEMA:
                raise CalibrationError(f"plan of schema {values['schema']!r}; this melrt reads {SCHEMA}.")
            layers = tuple(
                LayerPlan(
                    str(v["name"]), Range(**v["input"]), Range(**v["output"]),
                    *(tuple(map(float, v[key])) for key in ("weight_scales", "input_factors", "output_factors")),
                )
                for v in values["layers"]
            )  # fmt: skip
            return cls(layers, tuple(map(str, values["repairs"])))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CalibrationError(f"not an INT8 plan: {error!r}") from error
