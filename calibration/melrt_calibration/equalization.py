"""Equalization: bring the channels of a tensor to similar ranges, exactly, so that one scale suits all of them.

LeakyReLU is positively homogeneous: lrelu(s·x) = s·lrelu(x) for s > 0. Each channel of a tensor between two convolutions can therefore be
divided by a factor that the next convolutions multiply back (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", 4.1). In this network the same holds for the residual stream: both terms of a sum are divided alike, and the next block
applies the factor in its shortcut and in its dilated convolution. The range moves into weights, which have a scale for each channel.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from melrt.errors import CalibrationError
from melrt_calibration.statistics import Statistics
from melrt_export.int8_plan import MERGED, Int8Plan

POINTWISE, SHORTCUT = ".pointwise", ".shortcut"

# Name of the filter bank of a multi-band voice. It follows the tanh and stays in float32 in every precision.
FILTER_BANK = "pqmf"
# Largest ratio of two factors: a channel far below the others must not be amplified to their noise.
MAX_FACTOR_RATIO = 1e3
# Powers of a channel's range by which it may be divided: 0 leaves it, 1 brings all channels to one range. 1/2 is a compromise, since
# rounding noise returns multiplied by the factor, and loud channels are not always the audible ones.
POWERS = (0.0, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class SharedTensor:
    """Tensor between convolutions."""

    producers: tuple[str, ...]
    """Convolutions whose outputs add up to the tensor."""
    consumers: tuple[str, ...]
    """Convolutions with the tensor as their input; the input range of the first is the tensor's range."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Divisors of a convolution's channels; None leaves the channels unchanged."""

    input: NDArray[np.float64] | None = None
    """Divisors of the input, (C_in,)."""
    output: NDArray[np.float64] | None = None
    """Divisors of the output, (C_out,)."""


def equalizing_factors(statistics: Mapping[str, Statistics], powers: Mapping[str, float]) -> dict[str, Factors]:
    """Compute the factors of every convolution from the observed ranges.

    Args:
        statistics: Statistics of every convolution.
        powers: Power of each tensor, by the name of its first consumer.
    """
    peaks = _channel_peaks(statistics)
    found = dict.fromkeys(peaks, Factors())
    levels: dict[str, float] = {}
    for tensor in shared_tensors(peaks):
        name = tensor.consumers[0]
        power = powers.get(name, 0.0)
        ranges = np.maximum(peaks[name], 1e-12)
        factors = ranges**power / np.exp(np.log(ranges**power).mean())
        factors = np.clip(factors, factors.max() / MAX_FACTOR_RATIO, None)
        levels[name] = (ranges / factors).max()
        if name.endswith(POINTWISE):  # h comes to the level of x, since both halves of [h; x] have one grid
            factors = factors * levels[name] / levels[name.removesuffix(POINTWISE) + SHORTCUT]
        if power or name.endswith(POINTWISE):
            _divide(found, tensor, factors)
    return found


def _channel_peaks(statistics: Mapping[str, Statistics]) -> dict[str, NDArray[np.float64]]:
    """Return the largest magnitude of each input channel, by convolution of the graph before merging."""
    found: dict[str, NDArray[np.float64]] = {}
    for name, layer in statistics.items():
        peaks = np.asarray(layer.peaks, np.float64)
        if name.endswith(MERGED):
            block = name.removesuffix(MERGED)
            found[block + POINTWISE], found[block + SHORTCUT] = np.split(peaks, 2)
        else:
            found[name] = peaks
    return found


def layer_factors(name: str, factors: Mapping[str, Factors]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the divisors of a layer's input and output channels, empty for none; a merged layer has those of [h; x]."""
    if not name.endswith(MERGED):
        return _as_tuple(factors[name].input), _as_tuple(factors[name].output)
    h, x = (factors[name.removesuffix(MERGED) + part] for part in (POINTWISE, SHORTCUT))
    if h.input is None:
        return (), _as_tuple(x.output)
    return _as_tuple(h.input) + (_as_tuple(x.input) or (1.0,) * len(h.input)), _as_tuple(x.output)


def _as_tuple(factors: NDArray[np.float64] | None) -> tuple[float, ...]:
    return () if factors is None else tuple(map(float, factors))


def layer_of(convolution: str) -> str:
    """Return the layer of a plan that a convolution of the graph before merging belongs to."""
    return re.sub(r"\.(pointwise|shortcut)$", MERGED, convolution)


def planned_factors(plan: Int8Plan, convolutions: Iterable[str]) -> dict[str, Factors]:
    """Take the factors of every convolution from a plan; the factors of one side of a tensor apply to its other side as well."""
    found = dict.fromkeys(convolutions, Factors())
    inputs, outputs = _planned_sides(plan)
    for tensor in shared_tensors(found):
        known = [outputs.get(name, ()) for name in tensor.producers] + [inputs.get(name, ()) for name in tensor.consumers]
        factors = np.array(next(filter(None, known), ()))
        if len(factors):
            _divide(found, tensor, factors)
    return found


def _planned_sides(plan: Int8Plan) -> tuple[dict[str, tuple[float, ...]], dict[str, tuple[float, ...]]]:
    """Return the factors of the inputs and outputs of a plan's layers, by convolution of the graph before merging."""
    inputs, outputs = ({layer.name: getattr(layer, f"{side}_factors") for layer in plan.layers} for side in ("input", "output"))
    for block in plan.merged_blocks:
        both = inputs[block + MERGED]
        inputs[block + POINTWISE], inputs[block + SHORTCUT] = both[: len(both) // 2], both[len(both) // 2 :]
        outputs[block + SHORTCUT] = outputs[block + MERGED]
    return inputs, outputs


def _divide(found: dict[str, Factors], tensor: SharedTensor, factors: NDArray[np.float64]) -> None:
    found |= {name: replace(found[name], output=factors) for name in tensor.producers}
    found |= {name: replace(found[name], input=factors) for name in tensor.consumers}


def equalize_graph(model: onnx.ModelProto, factors: Mapping[str, Factors]) -> onnx.ModelProto:
    """Return a deploy graph in float32 or float16 that computes the same function with divided channels."""
    equalized = onnx.ModelProto()
    equalized.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in equalized.graph.initializer}
    for node in equalized.graph.node:
        by = factors.get(node.name, Factors())
        if by.output is not None:
            _scale(constants, node, 1 / by.output, axis=0)
        if by.input is not None:
            _scale(constants, node, by.input, axis=1)
    return equalized


def shared_tensors(convolutions: Collection[str]) -> list[SharedTensor]:
    """Return every tensor between the first and the last convolution of a MelGAN, by the names of the deploy graph.

    The list is empty for another architecture: a convolution outside all of these tensors might have a divided input without
    multiplying it back, so that nothing may be equalized.
    """
    found = list(_melgan_tensors(convolutions))
    known = {name for tensor in found for name in (*tensor.producers, *tensor.consumers)}
    return found if known == set(convolutions) - {FILTER_BANK} else []


def _melgan_tensors(convolutions: Collection[str]) -> Iterator[SharedTensor]:
    producers: tuple[str, ...] = ("first",)
    i = 0
    while (upsample := f"stages.{i}.upsample") in convolutions:
        yield SharedTensor(producers, (upsample,))
        producers = (upsample,)
        j = 0
        while (block := f"stages.{i}.blocks.{j}") and f"{block}.dilated" in convolutions:
            yield SharedTensor(producers, (f"{block}.shortcut", f"{block}.dilated"))
            yield SharedTensor((f"{block}.dilated",), (f"{block}.pointwise",))
            producers = (f"{block}.pointwise", f"{block}.shortcut")
            j += 1
        i += 1
    yield SharedTensor(producers, ("last",))


def _scale(constants: Mapping[str, onnx.TensorProto], node: onnx.NodeProto, factors: NDArray[np.float64], axis: int) -> None:
    """Multiply the output (axis 0) or input (axis 1) channels of a convolution; an upsampler has each output channel once per phase."""
    for name in node.input[1:2] if axis else node.input[1:3]:
        value = numpy_helper.to_array(constants[name])
        if value.shape[axis] % len(factors):
            raise CalibrationError(
                f"The plan has {len(factors)} equalization factors for {node.name}, which has {value.shape[axis]} channels; "
                "calibrate the voice again."
            )
        by = np.repeat(factors, value.shape[axis] // len(factors)).reshape([-1 if i == axis else 1 for i in range(value.ndim)])
        constants[name].CopyFrom(numpy_helper.from_array((value * by).astype(value.dtype), name))
