"""Quantization-aware training: fake quantization in the generator, which adapts the weights to the rounding of INT8.

`melrt calibrate` writes an INT8 plan into the bundle. Every convolution of the plan rounds its input, its weights and, in the CPU's form,
its output as the Q/DQ graph does. Gradients pass through the rounding unchanged and are zero where a range clips (Jacob et al. 2018,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from melrt.errors import TrainingError
from melrt_export.generator.network import Generator
from melrt_export.int8_plan import SIGNED_MAX, UNSIGNED_MAX, Int8Plan, LayerPlan, Range
from melrt_export.training.config import Int8Form
from melrt_export.training.losses import StftLoss
from melrt_export.training.step import SynthesizedBatch
from melrt_export.training.voice import TrainableVoice
from melrt_export.training.weight_norm import folded_weights


def quantize(voice: TrainableVoice, plan: Int8Plan, form: Int8Form) -> Generator:
    """Add fake quantization to the voice's generator, in place. Its checkpoints still hold plain float weights.

    Args:
        voice: Voice with the architecture that the plan was made for.
        plan: Layers and ranges.
        form: `cpu` has unsigned inputs and rounds outputs too; `tensorrt` is symmetric.

    Returns:
        A frozen copy of the generator without quantization, the teacher of a distillation.

    Raises:
        TrainingError: The plan is for another network.
    """
    teacher = Generator.from_weights(
        voice.config, {name: torch.from_numpy(value) for name, value in folded_weights(voice.generator).items()}
    )
    convolutions = {name: layer for name, layer in voice.generator.named_modules() if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)}
    for layer in plan.layers:
        if layer.name not in convolutions:
            raise TrainingError(
                f"the INT8 plan has a layer {layer.name}; this generator has {', '.join(convolutions)}. "
                "Take the checkpoint that the bundle was exported from as start_from."
            )
        _quantize_layer(convolutions[layer.name], layer, form)
    return teacher.requires_grad_(False)


def _quantize_layer(conv: nn.Conv1d | nn.ConvTranspose1d, layer: LayerPlan, form: Int8Form) -> None:
    phases = conv.stride[0] if isinstance(conv, nn.ConvTranspose1d) else 1
    expected = {"weight_scales": conv.out_channels * phases, "input_factors": conv.in_channels, "output_factors": conv.out_channels}
    for name, channels in expected.items():
        given = len(getattr(layer, name))
        if given != channels and (given or name == "weight_scales"):
            raise TrainingError(
                f"the INT8 plan has {given} {name} for {layer.name}, which has {channels} such channels. "
                "Take the checkpoint that the bundle was exported from as start_from."
            )
    parametrize.register_parametrization(
        conv, "weight", _FakeQuantizedWeight(layer, phases if isinstance(conv, nn.ConvTranspose1d) else None)
    )
    conv.add_module("rounded_input", _FakeQuantizedActivation(layer.input, layer.input_factors, form))
    conv.register_forward_pre_hook(lambda module, inputs: (module.rounded_input(inputs[0]), *inputs[1:]))
    if form == "cpu":
        conv.add_module("rounded_output", _FakeQuantizedActivation(layer.output, layer.output_factors, form))
        conv.register_forward_hook(lambda module, _, output: module.rounded_output(output))


class _FakeQuantizedActivation(nn.Module):
    """Rounds an activation (B, C, T) to the values that its bytes can represent."""

    scale: Tensor
    zero: Tensor

    def __init__(self, values: Range, factors: Sequence[float], form: Int8Form) -> None:
        super().__init__()
        scale, zero = values.affine if form == "cpu" else (values.symmetric_scale, 0)
        self.limits = (0, UNSIGNED_MAX) if form == "cpu" else (-SIGNED_MAX, SIGNED_MAX)
        # dividing a channel by a factor, rounding, and multiplying again equals rounding in steps that are larger by this factor
        self.register_buffer("scale", scale * torch.tensor(factors or [1.0]), persistent=False)
        self.register_buffer("zero", torch.full((len(self.scale),), zero, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if len(self.scale) == 1:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, *self.limits)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero, 1, *self.limits)


class _FakeQuantizedWeight(nn.Module):
    """Rounds a weight to the values that its bytes can represent.

    Each output channel of the deploy graph has a scale of its own, which follows the channel's largest weight.
    """

    factors: Tensor

    def __init__(self, layer: LayerPlan, phases: int | None) -> None:
        super().__init__()
        self.phases = phases
        input_factors, output_factors = (torch.tensor(factors or [1.0]) for factors in (layer.input_factors, layer.output_factors))
        factors = input_factors / output_factors[:, None] if phases is None else (input_factors[:, None] / output_factors)[:, :, None]
        self.register_buffer("factors", factors[..., None], persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        value = weight.detach()
        if self.phases is None:
            grouped, axes = value, (1, 2)  # (C_out, C_in, K)
        else:
            grouped, axes = value.reshape(*value.shape[:2], 2, self.phases), (0, 2)  # a scale for each channel and phase
        equalized = grouped * self.factors
        scale = equalized.abs().amax(axes, keepdim=True).clamp(min=1e-8) / SIGNED_MAX
        rounded = (equalized / scale).round() * scale / self.factors
        return weight + (rounded.reshape(value.shape) - value)


class DistillationLoss:
    """Distance to the teacher's output: multi-resolution STFT loss, plus the waveform error relative to the teacher's amplitude."""

    def __init__(self, teacher: Generator, weight: float) -> None:
        self.teacher = teacher
        self.weight = weight
        self._stft = StftLoss().to(teacher.first.weight.device)

    def __call__(self, batch: SynthesizedBatch) -> Tensor:
        with torch.no_grad():
            target: Tensor = self.teacher(batch.mel).squeeze(1)
        wave = (batch.output - target).abs().mean() / target.abs().mean().clamp(min=1e-3)
        return self.weight * (cast(Tensor, self._stft(target, batch.output)) + wave)
