"""Quantization-aware training: fake quantization in the generator, which adapts the weights to the rounding of INT8.

`melrt calibrate` writes an INT8 plan into the bundle. Every convolution of the plan rounds its input, its weights and, in the CPU's form,
its output as the Q/DQ graph does. Gradients pass through the rounding unchanged and are zero where a range clips (Jacob et al. 2018,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from melrt.errors import TrainingError
from melrt_export.generator.network import Generator
from melrt_export.int8_plan import MERGED, SIGNED_MAX, Int8Plan, LayerPlan
from melrt_export.training.activation_ranges import ActivationRanges
from melrt_export.training.config import Int8Form, LossConfig
from melrt_export.training.losses import StftLoss
from melrt_export.training.step import SynthesizedBatch
from melrt_export.training.voice import TrainableVoice
from melrt_export.training.weight_norm import folded_weights


def quantize(voice: TrainableVoice, plan: Int8Plan, form: Int8Form, *, learn_ranges: bool = False) -> Generator:
    """Add fake quantization to the voice's generator, in place. Its checkpoints still hold plain float weights.

    Args:
        voice: Voice with the architecture that the plan was made for.
        plan: Layers and ranges.
        form: `cpu` has unsigned inputs and rounds outputs too; `tensorrt` is symmetric.
        learn_ranges: Train the ranges of the activations as well.

    Returns:
        A frozen copy of the generator without quantization, the teacher of a distillation.

    Raises:
        TrainingError: The plan is for another network.
    """
    teacher = Generator.from_weights(
        voice.config, {name: torch.from_numpy(value) for name, value in folded_weights(voice.generator).items()}
    )
    modules = dict(voice.generator.named_modules())
    ranges = ActivationRanges(plan, form, voice.generator if learn_ranges else None)
    for layer in plan.layers:
        _quantize_layer(modules, layer, ranges)
    return teacher.requires_grad_(False)


def _quantize_layer(modules: Mapping[str, nn.Module], layer: LayerPlan, ranges: ActivationRanges) -> None:
    """Quantize one convolution, or the two of a residual block that INT8 merges into one over [h; x] with one rounded sum."""
    block = layer.name.removesuffix(MERGED)
    merged = block != layer.name
    owner = modules.get(block)
    convolutions = [getattr(owner, part, None) for part in ("pointwise", "shortcut")] if merged else [owner]
    parts = [conv for conv in convolutions if isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)]
    if owner is None or len(parts) < len(convolutions):
        known = ", ".join(name for name, module in modules.items() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d))
        raise TrainingError(
            f"the INT8 plan has a layer {layer.name}; this generator has {known}. "
            "Take the checkpoint that the bundle was exported from as start_from."
        )
    _check_channels(layer, parts)
    width = len(layer.input_factors) // len(parts)
    weights = [_FakeQuantizedWeight(layer, layer.input_factors[i * width : (i + 1) * width], conv) for i, conv in enumerate(parts)]
    for conv, weight, other in zip(parts, weights, reversed(weights), strict=True):
        factors = weight.input_factors
        weight.others = (other,) if merged else ()
        parametrize.register_parametrization(conv, "weight", weight)
        conv.add_module("rounded_input", ranges.activation(layer.input, factors))
        conv.register_forward_pre_hook(lambda module, inputs: (module.rounded_input(inputs[0]), *inputs[1:]))
    if ranges.form == "cpu":
        owner.add_module("rounded_output", ranges.activation(layer.output, layer.output_factors))
        owner.register_forward_hook(lambda module, _, output: module.rounded_output(output))


def _check_channels(layer: LayerPlan, parts: Sequence[nn.Conv1d | nn.ConvTranspose1d]) -> None:
    """Raise an error if the plan has another number of values for a layer than the layer has channels."""
    conv = parts[0]
    expected = {
        "weight_scales": conv.out_channels * _phases(conv), "input_factors": conv.in_channels * len(parts),
        "output_factors": conv.out_channels,
    }  # fmt: skip
    for name, channels in expected.items():
        given = len(getattr(layer, name))
        if given != channels and (given or name == "weight_scales"):
            raise TrainingError(
                f"the INT8 plan has {given} {name} for {layer.name}, which has {channels} such channels. "
                "Take the checkpoint that the bundle was exported from as start_from."
            )


def _phases(conv: nn.Conv1d | nn.ConvTranspose1d) -> int:
    return conv.stride[0] if isinstance(conv, nn.ConvTranspose1d) else 1


class _FakeQuantizedWeight(nn.Module):
    """Rounds a weight to the values that its bytes can represent.

    Each output channel of the deploy graph has a scale of its own, which follows the channel's largest weight. The two convolutions of a
    merged one share this scale.
    """

    factors: Tensor

    def __init__(self, layer: LayerPlan, input_factors: Sequence[float], conv: nn.Conv1d | nn.ConvTranspose1d) -> None:
        super().__init__()
        self.input_factors = tuple(input_factors)
        self.phases = _phases(conv) if isinstance(conv, nn.ConvTranspose1d) else None
        self.float_weight = partial(_float_weight, conv)
        self.others: tuple[_FakeQuantizedWeight, ...] = ()
        by_input, by_output = (torch.tensor(factors or [1.0]) for factors in (self.input_factors, layer.output_factors))
        factors = by_input / by_output[:, None] if self.phases is None else (by_input[:, None] / by_output)[:, :, None]
        self.register_buffer("factors", factors[..., None], persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        value = weight.detach()
        equalized = self._equalized(value)
        scale = self._largest(equalized)
        for other in self.others:
            scale = torch.maximum(scale, other._largest(other._equalized(other.float_weight().detach())))
        scale = scale.clamp(min=1e-8) / SIGNED_MAX
        rounded = (equalized / scale).round() * scale / self.factors
        return weight + (rounded.reshape(value.shape) - value)

    def _equalized(self, value: Tensor) -> Tensor:
        """Return the weight of the equalized network, (C_out, C_in, K) or, if transposed, (C_in, C_out, 2, phases)."""
        return (value if self.phases is None else value.reshape(*value.shape[:2], 2, self.phases)) * self.factors

    def _largest(self, equalized: Tensor) -> Tensor:
        """Return the largest weight of each output channel of the deploy graph."""
        return equalized.abs().amax((1, 2) if self.phases is None else (0, 2), keepdim=True)


def _float_weight(conv: nn.Conv1d | nn.ConvTranspose1d) -> Tensor:
    """Return the weight of a fake-quantized convolution before it is rounded."""
    if not parametrize.is_parametrized(conv, "weight"):
        return conv.weight
    chain = cast(parametrize.ParametrizationList, cast(nn.ModuleDict, conv.parametrizations)["weight"])
    return cast(Tensor, chain[0](chain.original0, chain.original1) if hasattr(chain, "original0") else chain.original)


class DistillationLoss:
    """Distance to the teacher's output: multi-resolution STFT loss, plus the waveform error relative to the teacher's amplitude."""

    def __init__(self, teacher: Generator, weight: float) -> None:
        self.teacher = teacher
        self.weight = weight
        self._stft = StftLoss(LossConfig().stft_sizes).to(teacher.first.weight.device)

    def __call__(self, batch: SynthesizedBatch) -> Tensor:
        with torch.no_grad():
            target: Tensor = self.teacher(batch.mel).squeeze(1)
        wave = (batch.output - target).abs().mean() / target.abs().mean().clamp(min=1e-3)
        return self.weight * (cast(Tensor, self._stft(target, batch.output)) + wave)
