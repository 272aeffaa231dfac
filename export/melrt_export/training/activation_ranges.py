"""Rounding of activations in a training in INT8, with the ranges of a plan or with ranges that are trained from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from melrt_export.checkpoints.reading import read_metadata
from melrt_export.int8_plan import SIGNED_MAX, UNSIGNED_MAX, Int8Plan, Range
from melrt_export.training.config import Int8Form

# Growth of a range's logarithm for each unit of its parameter. Adam moves a parameter by the learning rate per step, so that at 1e-4 an
# end of a range can move by 0.1 % per step: over a thousand steps of a falling rate it can grow or shrink by 40 %.
RANGE_RATE = 10.0
# Key of the trained plan in the header of a checkpoint's weights.
PLAN_KEY = "melrt.int8_plan"


def trained_plan(generator: nn.Module, plan: Int8Plan) -> Int8Plan:
    """Return the plan with the ranges that the generator has learned; the plan itself if it learns none."""
    growth = dict(generator.named_parameters()).get(ActivationRanges.PARAMETER)
    if growth is None:
        return plan
    factors = (RANGE_RATE * growth.detach().cpu().double()).exp().tolist()
    grown = {
        values: Range(values.low * low, values.high * high, "trained")
        for values, (low, high) in zip(_distinct_ranges(plan), factors, strict=True)
    }
    layers = (replace(layer, input=grown[layer.input], output=grown[layer.output]) for layer in plan.layers)
    return Int8Plan(tuple(layers), plan.repairs)


def read_trained_plan(weights: Path) -> Int8Plan | None:
    """Return the plan that was saved with these weights, a `model.safetensors`; None if there is none.

    Raises:
        CalibrationError: It is damaged.
        CheckpointError: The file is damaged.
    """
    text = read_metadata(weights).get(PLAN_KEY) if weights.suffix == ".safetensors" else None
    return Int8Plan.loads(text, weights) if text else None


def _distinct_ranges(plan: Int8Plan) -> list[Range]:
    """Return the ranges of a plan. Tensors that have one range in the plan share bytes in the graph, so they keep one range."""
    return list(dict.fromkeys(values for layer in plan.layers for values in (layer.input, layer.output)))


class ActivationRanges:
    """Ranges of a plan's activations, which the generator learns if it is given."""

    PARAMETER = "int8_ranges"

    def __init__(self, plan: Int8Plan, form: Int8Form, generator: nn.Module | None) -> None:
        self.form = form
        self._index = {values: i for i, values in enumerate(_distinct_ranges(plan))}
        self.growth = None
        if generator is not None and self._index:
            self.growth = nn.Parameter(torch.zeros(len(self._index), 2))
            generator.register_parameter(self.PARAMETER, self.growth)

    def activation(self, values: Range, factors: Sequence[float]) -> FakeQuantizedActivation:
        if self.growth is None:
            return FakeQuantizedActivation(values, factors, self.form)
        return _LearnedActivation(values, factors, self.form, partial(self._factors, self._index[values]))

    def _factors(self, index: int) -> Tensor:
        """Return the growth of both ends of a range, (2,)."""
        assert self.growth is not None
        return (RANGE_RATE * self.growth[index]).exp()


class FakeQuantizedActivation(nn.Module):
    """Rounds an activation (B, C, T), whose channels were divided by factors, to the values that its bytes can represent."""

    factors: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, values: Range, factors: Sequence[float], form: Int8Form) -> None:
        super().__init__()
        scale, zero = values.affine if form == "cpu" else (values.symmetric_scale, 0)
        self.limits = (0, UNSIGNED_MAX) if form == "cpu" else (-SIGNED_MAX, SIGNED_MAX)
        self.register_buffer("factors", torch.tensor(factors or [1.0])[:, None], persistent=False)
        self.register_buffer("scale", torch.tensor([scale]), persistent=False)
        self.register_buffer("zero", torch.tensor([zero], dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _rounded(x.float(), self.factors, self.scale, self.zero, self.limits)


def _rounded(x: Tensor, factors: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int]) -> Tensor:
    """Round channels on one grid after a division by their factors, (C, 1) or (1, 1).

    PyTorch's function with a scale for each channel would wait for the GPU twice in each call, to check the zero points.
    """
    return torch.fake_quantize_per_tensor_affine(x / factors, scale, zero, *limits) * factors


class _LearnedActivation(FakeQuantizedActivation):
    """Rounds an activation (B, C, T) on a grid whose range is trained."""

    ends: Tensor

    def __init__(self, values: Range, factors: Sequence[float], form: Int8Form, growth: Callable[[], Tensor]) -> None:
        super().__init__(values, factors, form)
        self.growth = growth
        self.symmetric = form != "cpu"
        self.register_buffer("ends", torch.tensor([values.low, values.high]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.ends * self.growth()
        scale = torch.maximum(-low, high) / SIGNED_MAX if self.symmetric else (high - low) / UNSIGNED_MAX
        zero = torch.zeros_like(scale) if self.symmetric else -low / scale
        rounded = _LearnedRounding.apply(x.float(), self.factors, scale, zero, self.limits)  # type: ignore[no-untyped-call]
        return cast(Tensor, rounded)


class _LearnedRounding(torch.autograd.Function):
    """Rounding with gradients of the input, the scale and the zero point.

    Esser et al. 2020, "Learned Step Size Quantization", equation 3; with a zero point Bhalgat et al. 2020, "LSQ+", equations 4 and 5.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int]) -> Tensor:
        zero = zero.round()
        rounded = _rounded(x, factors, scale, zero.int(), limits)
        ctx.save_for_backward(x, rounded, factors, scale, zero)
        ctx.limits = limits
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, rounded, factors, scale, zero = ctx.saved_tensors
        (gradient,) = gradients
        low, high = ((limit - zero) * scale * factors for limit in ctx.limits)
        through = gradient * ((x >= low) & (x <= high))
        by_scale = (gradient * rounded - through * x).sum() / scale
        by_zero = -scale * ((gradient - through) * factors).sum()
        return through, None, by_scale, by_zero, None
