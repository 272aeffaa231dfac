"""Equalization: each channel brought to the same range, exactly, so that one scale for a tensor serves all its channels.

LeakyReLU is positively homogeneous: lrelu(s·x) = s·lrelu(x) for s > 0. So each channel of any tensor between two convolutions can be
divided by a factor that the convolutions after it put back (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", 4.1). In this network that holds for the residual stream too: both terms of a sum are divided alike, and the block after
it takes the factor in its shortcut and in its dilated convolution. The range moves into weights, which have a scale for each channel.
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
from melrt_export.int8_plan import Plan

# The filter bank of a multi-band voice, after the tanh, stays in float32 in every precision.
FILTER_BANK = "pqmf"
# A channel far under the others must not be blown up to their noise: factors span at most this much.
MOST = 1e3
# Powers of a channel's range by which it may be divided: 0 leaves it, 1 brings all to one range, 1/2 lies between, since rounding
# noise comes back multiplied by the factor and loud channels are not always the ones that are heard.
POWERS = (0.0, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What lies between convolutions."""

    makers: tuple[str, ...]
    """Convolutions whose sum it is."""
    takers: tuple[str, ...]
    """Convolutions that take it; the first one's input has its range."""


@dataclass(frozen=True, slots=True)
class Factors:
    """What the channels of a convolution are divided by; None: nothing."""

    input: NDArray[np.float64] | None = None
    output: NDArray[np.float64] | None = None


def equalizing_factors(statistics: Mapping[str, Statistics], powers: Mapping[str, float]) -> dict[str, Factors]:
    """What to divide by, for every convolution.

    Args:
        statistics: What flows through the graph.
        powers: Of each tensor, named by its first taker.
    """
    found = dict.fromkeys(statistics, Factors())
    for tensor in tensors(statistics):
        power = powers.get(tensor.takers[0], 0.0)
        if not power:
            continue
        ranges = np.maximum(np.asarray(statistics[tensor.takers[0]].peaks, np.float64), 1e-12) ** power
        factors = ranges / np.exp(np.log(ranges).mean())
        factors = np.clip(factors, factors.max() / MOST, None)
        _divide(found, tensor, factors)
    return found


def planned_factors(plan: Plan, convolutions: Iterable[str]) -> dict[str, Factors]:
    """What a plan divides by, for every convolution of the graph: what it says of one side of a tensor holds for the other."""
    found = dict.fromkeys(convolutions, Factors())
    layers = {layer.name: layer for layer in plan.layers}
    for tensor in tensors(found):
        told = [layers[name].output_factors for name in tensor.makers if name in layers]
        told += [layers[name].input_factors for name in tensor.takers if name in layers]
        factors = np.array(next(filter(None, told), ()))
        if len(factors):
            _divide(found, tensor, factors)
    return found


def _divide(found: dict[str, Factors], tensor: Tensor, factors: NDArray[np.float64]) -> None:
    found |= {maker: replace(found[maker], output=factors) for maker in tensor.makers}
    found |= {taker: replace(found[taker], input=factors) for taker in tensor.takers}


def equalized(model: onnx.ModelProto, factors: Mapping[str, Factors]) -> onnx.ModelProto:
    """A deploy graph, in float32 or float16, of the same function whose tensors have closer ranges in their channels."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    for node in made.graph.node:
        by = factors.get(node.name, Factors())
        if by.output is not None:
            _scale(constants, node, 1 / by.output, axis=0)
        if by.input is not None:
            _scale(constants, node, by.input, axis=1)
    return made


def tensors(convolutions: Mapping[str, object]) -> list[Tensor]:
    """Every tensor of a MelGAN between its first and its last convolution, by the deploy graph's names; none of another architecture.

    A convolution that is in no tensor would take what was divided as if it were not: then nothing may be equalized.
    """
    found = list(_melgan(convolutions))
    known = {name for tensor in found for name in (*tensor.makers, *tensor.takers)}
    return found if known == set(convolutions) - {FILTER_BANK} else []


def _melgan(convolutions: Mapping[str, object]) -> Iterator[Tensor]:
    makers: tuple[str, ...] = ("first",)
    i = 0
    while (upsample := f"stages.{i}.upsample") in convolutions:
        yield Tensor(makers, (upsample,))
        makers = (upsample,)
        j = 0
        while (block := f"stages.{i}.blocks.{j}") and f"{block}.dilated" in convolutions:
            yield Tensor(makers, (f"{block}.shortcut", f"{block}.dilated"))
            yield Tensor((f"{block}.dilated",), (f"{block}.pointwise",))
            makers = (f"{block}.pointwise", f"{block}.shortcut")
            j += 1
        i += 1
    yield Tensor(makers, ("last",))


def _scale(constants: Mapping[str, onnx.TensorProto], node: onnx.NodeProto, factors: NDArray[np.float64], axis: int) -> None:
    """Multiply a convolution's output (0) or input (1) channels; an upsampler gives each channel once for each phase."""
    for name in node.input[1:2] if axis else node.input[1:3]:
        value = numpy_helper.to_array(constants[name])
        if value.shape[axis] % len(factors):
            raise CalibrationError(f"{len(factors)} factors of equalization for {node.name}, which has {value.shape[axis]} channels.")
        by = np.repeat(factors, value.shape[axis] // len(factors)).reshape([-1 if i == axis else 1 for i in range(value.ndim)])
        constants[name].CopyFrom(numpy_helper.from_array((value * by).astype(value.dtype), name))
