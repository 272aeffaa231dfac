"""Quantization-aware training: the generator computes as its INT8 graph will, so that its weights learn to live with the rounding.

Every convolution of a plan (`melrt calibrate` writes it into the bundle) takes its input, its weights and, in the CPU's form, its output
rounded as the Q/DQ graph rounds them. Gradients pass through rounding unchanged, and stop where a range clips (Jacob et al. 2018,
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
from melrt_export.int8_plan import SIGNED_MAX, UNSIGNED_MAX, LayerPlan, Plan, Range
from melrt_export.training.config import Int8Form
from melrt_export.training.losses import StftLoss
from melrt_export.training.step import Synthesis
from melrt_export.training.voice import TrainableVoice
from melrt_export.training.weight_norm import folded_weights


def quantize(voice: TrainableVoice, plan: Plan, form: Int8Form) -> Generator:
    """Let the voice's generator, weight norm and all, compute in INT8 from now on; what a checkpoint keeps stays plain float weights.

    Args:
        voice: Of the architecture that the plan was made for.
        plan: Layers and ranges.
        form: `cpu` rounds outputs too, and has unsigned inputs; `tensorrt` is symmetric.

    Returns:
        The generator as it was, frozen: the teacher.

    Raises:
        TrainingError: The plan is for another network.
    """
    teacher = Generator.from_weights(
        voice.config, {name: torch.from_numpy(value) for name, value in folded_weights(voice.generator).items()}
    )
    convolutions = {name: layer for name, layer in voice.generator.named_modules() if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)}
    for layer in plan.layers:
        if layer.name not in convolutions:
            raise TrainingError(f"the INT8 plan has a layer {layer.name}; this generator has {', '.join(convolutions)}.")
        _quantize(convolutions[layer.name], layer, form)
    return teacher.requires_grad_(False)


def _quantize(conv: nn.Conv1d | nn.ConvTranspose1d, layer: LayerPlan, form: Int8Form) -> None:
    phases = conv.stride[0] if isinstance(conv, nn.ConvTranspose1d) else 1
    expected = {"weight_scales": conv.out_channels * phases, "input_factors": conv.in_channels, "output_factors": conv.out_channels}
    for name, channels in expected.items():
        given = len(getattr(layer, name))
        if given != channels and (given or name == "weight_scales"):
            raise TrainingError(f"the INT8 plan has {given} {name} for {layer.name}, which has {channels} such channels.")
    parametrize.register_parametrization(conv, "weight", _RoundedWeight(layer, phases if isinstance(conv, nn.ConvTranspose1d) else None))
    conv.add_module("rounded_input", _Rounded(layer.input, layer.input_factors, form))
    conv.register_forward_pre_hook(lambda module, inputs: (module.rounded_input(inputs[0]), *inputs[1:]))
    if form == "cpu":
        conv.add_module("rounded_output", _Rounded(layer.output, layer.output_factors, form))
        conv.register_forward_hook(lambda module, _, output: module.rounded_output(output))


class _Rounded(nn.Module):
    """An activation (B, C, T) as its bytes say it."""

    scale: Tensor
    zero: Tensor

    def __init__(self, values: Range, factors: Sequence[float], form: Int8Form) -> None:
        super().__init__()
        scale, zero = values.affine if form == "cpu" else (values.symmetric_scale, 0)
        self.limits = (0, UNSIGNED_MAX) if form == "cpu" else (-SIGNED_MAX, SIGNED_MAX)
        # a channel that was divided by a factor and rounded, and is multiplied again, is one that was rounded in steps so much larger
        self.register_buffer("scale", scale * torch.tensor(factors or [1.0]), persistent=False)
        self.register_buffer("zero", torch.full((len(self.scale),), zero, dtype=torch.int32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if len(self.scale) == 1:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, *self.limits)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero, 1, *self.limits)


class _RoundedWeight(nn.Module):
    """A weight as its bytes say it, with a scale for each output channel of the deploy graph that follows the largest weight."""

    factors: Tensor

    def __init__(self, layer: LayerPlan, phases: int | None) -> None:
        super().__init__()
        self.phases = phases
        before, after = (torch.tensor(factors or [1.0]) for factors in (layer.input_factors, layer.output_factors))
        factors = before / after[:, None] if phases is None else (before[:, None] / after)[:, :, None]
        self.register_buffer("factors", factors[..., None], persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        value = weight.detach()
        if self.phases is None:
            grouped, over = value, (1, 2)  # (C_out, C_in, K)
        else:
            grouped, over = value.reshape(*value.shape[:2], 2, self.phases), (0, 2)  # a channel for each phase
        equal = grouped * self.factors
        scale = equal.abs().amax(over, keepdim=True).clamp(min=1e-8) / SIGNED_MAX
        rounded = (equal / scale).round() * scale / self.factors
        return weight + (rounded.reshape(value.shape) - value)


class Distillation:
    """How far the synthesis is from the float generator's: multi-resolution STFT, and the waveform itself, relative to the teacher's."""

    def __init__(self, teacher: Generator, weight: float) -> None:
        self.teacher = teacher
        self.weight = weight
        self._stft = StftLoss().to(teacher.first.weight.device)

    def __call__(self, synthesis: Synthesis) -> Tensor:
        with torch.no_grad():
            taught: Tensor = self.teacher(synthesis.mel).squeeze(1)
        wave = (synthesis.output - taught).abs().mean() / taught.abs().mean().clamp(min=1e-3)
        return self.weight * (cast(Tensor, self._stft(taught, synthesis.output)) + wave)
