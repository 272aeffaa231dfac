"""Equalization: bring the channels of a tensor to similar ranges, exactly, so that one scale suits all of them.

LeakyReLU is positively homogeneous: lrelu(s·x) = s·lrelu(x) for s > 0. Each channel of a tensor between two convolutions can therefore be
divided by a factor that the next convolutions multiply back (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", 4.1). In this network the same holds for the residual stream: both terms of a sum are divided alike, and the next block
applies the factor in its shortcut and in its dilated convolution. The range moves into weights, which have a scale for each channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from melrt.errors import CalibrationError
from melrt_calibration.statistics import Statistics
from melrt_export.int8_plan import Int8Plan

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
    found = dict.fromkeys(statistics, Factors())
    for tensor in shared_tensors(statistics):
        power = powers.get(tensor.consumers[0], 0.0)
        if not power:
            continue
        ranges = np.maximum(np.asarray(statistics[tensor.consumers[0]].peaks, np.float64), 1e-12) ** power
        factors = ranges / np.exp(np.log(ranges).mean())
        _divide(found, tensor, np.clip(factors, factors.max() / MAX_FACTOR_RATIO, None))
    return found


def planned_factors(plan: Int8Plan, convolutions: Iterable[str]) -> dict[str, Factors]:
    """Take the factors of every convolution from a plan; the factors of one side of a tensor apply to its other side as well."""
    found = dict.fromkeys(convolutions, Factors())
    layers = {layer.name: layer for layer in plan.layers}
    for tensor in shared_tensors(found):
        known = [layers[name].output_factors for name in tensor.producers if name in layers]
        known += [layers[name].input_factors for name in tensor.consumers if name in layers]
        factors = np.array(next(filter(None, known), ()))
        if len(factors):
            _divide(found, tensor, factors)
    return found


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


def shared_tensors(convolutions: Mapping[str, object]) -> list[SharedTensor]:
    """Return every tensor between the first and the last convolution of a MelGAN, by the names of the deploy graph.

    The list is empty for another architecture: a convolution outside all of these tensors might have a divided input without
    multiplying it back, so that nothing may be equalized.
    """
    found = list(_melgan_tensors(convolutions))
    known = {name for tensor in found for name in (*tensor.producers, *tensor.consumers)}
    return found if known == set(convolutions) - {FILTER_BANK} else []


def _melgan_tensors(convolutions: Mapping[str, object]) -> Iterator[SharedTensor]:
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
