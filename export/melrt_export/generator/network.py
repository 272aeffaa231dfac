"""The generator in PyTorch: the reference for every exported artifact.

It follows the papers (MelGAN: Kumar et al., NeurIPS 2019, figure 1 and appendix A; HiFi-GAN: Kong et al., NeurIPS 2020, figure 1) and the
shapes of the published models. It has no weight norm: the norm is folded when a checkpoint is read, and training adds it to this network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig

_TORCH_PAD = {"reflect": "reflect", "replicate": "replicate", "zeros": "constant"}


class Conv(nn.Conv1d):
    """Convolution that keeps the length: (B, C_in, T) to (B, C_out, T)."""

    def __init__(self, config: GeneratorConfig, c_in: int, c_out: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__(c_in, c_out, kernel_size, dilation=dilation, bias=config.bias)
        span = (kernel_size - 1) * dilation
        self.sides = (span, 0) if config.causal else (span // 2, span // 2)
        self.mode = _TORCH_PAD[config.padding_mode]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.sides, self.mode) if any(self.sides) else x)


class Upsample(nn.ConvTranspose1d):
    """Transposed convolution that multiplies the length by its stride: (B, C_in, T) to (B, C_out, T·scale)."""

    def __init__(self, config: GeneratorConfig, c_in: int, c_out: int, scale: int) -> None:
        # The kernel size is 2·scale, and the output is cropped to exactly T·scale samples (melgan-neurips, mel2wav/modules.py).
        crop = config.crop_before(scale)
        super().__init__(c_in, c_out, 2 * scale, stride=scale, padding=crop, output_padding=max(2 * crop - scale, 0), bias=config.bias)
        self.causal = config.causal

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        scale = self.stride[0]
        if not self.causal:
            return super().forward(x, output_size)[..., : x.shape[-1] * scale]
        return super().forward(F.pad(x, (1, 0), "replicate"))[..., scale:-scale]


class ResidualBlock(nn.Module):
    """Residual block of MelGAN: shortcut(x) + pointwise(lrelu(dilated(lrelu(x)))), (B, C, T) to (B, C, T)."""

    def __init__(self, config: GeneratorConfig, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilated = Conv(config, channels, channels, config.stack_kernel_size, dilation)
        self.pointwise = Conv(config, channels, channels, 1)
        self.shortcut = Conv(config, channels, channels, 1)
        self.slope = config.negative_slope

    def forward(self, x: Tensor) -> Tensor:
        h = self.dilated(F.leaky_relu(x, self.slope))
        return cast(Tensor, self.shortcut(x) + self.pointwise(F.leaky_relu(h, self.slope)))


class MrfBlock(nn.Module):
    """Residual block of HiFi-GAN: x + plain(lrelu(dilated(lrelu(x)))), or x + dilated(lrelu(x)); (B, C, T) to (B, C, T)."""

    def __init__(self, config: GeneratorConfig, channels: int, kernel_size: int, dilation: int, paired: bool) -> None:
        super().__init__()
        self.dilated = Conv(config, channels, channels, kernel_size, dilation)
        self.plain = Conv(config, channels, channels, kernel_size) if paired else None
        self.slope = config.negative_slope

    def forward(self, x: Tensor) -> Tensor:
        h = self.dilated(F.leaky_relu(x, self.slope))
        return x + (h if self.plain is None else cast(Tensor, self.plain(F.leaky_relu(h, self.slope))))


class MrfBranches(nn.ModuleList):
    """Mean over branches of different kernel sizes, each applied to the same input: (B, C, T) to (B, C, T)."""

    def __init__(self, config: GeneratorConfig, mrf: MrfConfig, channels: int) -> None:
        super().__init__(
            nn.Sequential(*(MrfBlock(config, channels, kernel, dilation, mrf.paired) for dilation in dilations))
            for kernel, dilations in zip(mrf.kernel_sizes, mrf.dilations, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, sum(branch(x) for branch in self) / len(self))


class Stage(nn.Module):
    """Stage of LeakyReLU, upsampling and the residual part: (B, C, T) to (B, C/2, T·scale)."""

    def __init__(self, config: GeneratorConfig, index: int) -> None:
        super().__init__()
        before, after = config.stage_channels[index : index + 2]
        self.upsample = Upsample(config, before, after, config.upsample_scales[index])
        if config.mrf:
            self.blocks: nn.Module = MrfBranches(config, config.mrf, after)
        else:
            self.blocks = nn.Sequential(*(ResidualBlock(config, after, d) for d in config.dilations))
        self.slope = config.negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.blocks(self.upsample(F.leaky_relu(x, self.slope))))


class FilterBank(nn.Module):
    """Synthesis side of a pseudo-quadrature mirror filter bank (Nguyen 1994): sub-bands (B, S, T) to one signal (B, 1, T·S).

    It inserts zeros between the samples of each band, filters each band and sums them, like ParallelWaveGAN's `layers/pqmf.py`. The
    filters are part of the checkpoint, because they differ between projects and their versions.
    """

    def __init__(self, subbands: int, taps: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(subbands, taps + 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(Tensor, self.weight)
        subbands = len(weight)
        spread = x.new_zeros(*x.shape[:2], x.shape[2] * subbands)
        spread[..., ::subbands] = subbands * x
        return F.conv1d(spread, weight[None], padding=weight.shape[1] // 2)

    def split(self, audio: Tensor) -> Tensor:
        """Return the sub-bands (B, S, N / S) of a signal (B, 1, N). The filters of the analysis are those of the synthesis, mirrored."""
        weight = cast(Tensor, self.weight)
        return F.conv1d(audio, weight.flip(1)[:, None], stride=len(weight), padding=weight.shape[1] // 2)


class Normalize(nn.Module):
    """Normalization of a plain mel (B, M, T), as far as it is not folded into the first convolution."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.clip = config.input_clip
        if config.input_affine:
            self.register_buffer("mean", torch.zeros(config.in_channels))
            self.register_buffer("scale", torch.ones(config.in_channels))

    def forward(self, mel: Tensor) -> Tensor:
        if self.clip:
            mel = mel.clamp(*self.clip)
        if hasattr(self, "mean"):
            mel = (mel - cast(Tensor, self.mean)[:, None]) / cast(Tensor, self.scale)[:, None]
        return mel


class Generator(nn.Module):
    """Generator: mel frames (B, M, T) to a waveform (B, 1, T·hop), or to (B, out_channels, T·hop) without a filter bank."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.input = Normalize(config)
        self.first = Conv(config, config.in_channels, config.channels, config.kernel_size)
        self.stages = nn.Sequential(*(Stage(config, i) for i in range(len(config.upsample_scales))))
        self.last = Conv(config, config.stage_channels[-1], config.out_channels, config.kernel_size)
        self.pqmf = FilterBank(config.out_channels, config.pqmf_taps) if config.pqmf_taps else nn.Identity()

    @classmethod
    def from_weights(cls, config: GeneratorConfig, weights: Mapping[str, Tensor | np.ndarray]) -> Generator:
        """Create a generator in evaluation mode with these folded weights (`GeneratorConfig.tensors` names them)."""
        generator = cls(config)
        generator.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
        return generator.eval()

    def forward(self, mel: Tensor, split: bool = False) -> Tensor:
        """Return the waveform, or with `split` the sub-bands before the filter bank, (B, S, T·hop/S)."""
        x = F.leaky_relu(self.stages(self.first(self.input(mel))), self.config.resolved_last_slope)
        if not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)):
            return self._waveform(x, split)
        # Every rounding here is in the waveform. On two voices this raised the SNR of bfloat16 from 35.5 to 35.7 and 42.8 to 43.4 dB.
        with torch.autocast(x.device.type, enabled=False):
            return self._waveform(x.float(), split)

    def _waveform(self, x: Tensor, split: bool) -> Tensor:
        x = self.last(x)
        x = torch.tanh(x) if self.config.final_tanh else x
        return x if split else cast(Tensor, self.pqmf(x))
