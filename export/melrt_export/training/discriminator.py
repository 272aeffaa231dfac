"""The multi-scale, window-based discriminator (Kumar et al., NeurIPS 2019, section 2.2 and appendix A)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from melrt_export.training.config import DiscriminatorConfig
from melrt_export.training.weight_norm import add_weight_norm

NEGATIVE_SLOPE = 0.2

Features = list[list[Tensor]]
"""Output of each layer for each scale, (B, C, T). The last layer's output is the score, (B, 1, T)."""


class ScaleDiscriminator(nn.Module):
    """Discriminator of one scale.

    Maps a waveform (B, 1, N) to the output of each layer. The last output is the score of each window, (B, 1, N / 256) with the
    published shape.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        stride = config.downsampling
        width = config.channels
        # reflection padding in the first layer and zeros in the others, as in melgan-neurips (mel2wav/modules.py, NLayerDiscriminator)
        layers = [nn.Conv1d(1, width, 15, padding=7, padding_mode="reflect")]
        for _ in range(config.layers):
            before, width = width, min(width * stride, config.max_channels)
            layers.append(nn.Conv1d(before, width, 10 * stride + 1, stride, padding=5 * stride, groups=before // 4))
        before, width = width, min(2 * width, config.max_channels)
        layers.append(nn.Conv1d(before, width, 5, padding=2))
        layers.append(nn.Conv1d(width, 1, 3, padding=1))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), NEGATIVE_SLOPE)
            features.append(x)
        return [*features, self.layers[-1](x)]


class Discriminator(nn.Module):
    """Discriminators of all scales.

    Maps a waveform (B, 1, N) to the features of each scale. The scales have the same architecture, separate weights, and a waveform of
    N, N/2, N/4, ... samples.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        scales = [ScaleDiscriminator(config) for _ in range(config.scales)]
        self.scales = nn.ModuleList(scales)
        # The padding is left out of each mean; zeros there would lower the amplitude at both ends of every segment.
        self.halve = nn.AvgPool1d(4, stride=2, padding=1, count_include_pad=False)
        if config.deviation:
            for layer in (layer for scale in scales for layer in scale.layers):
                nn.init.normal_(cast(nn.Conv1d, layer).weight, 0.0, config.deviation)
        add_weight_norm(self)

    def forward(self, audio: Tensor) -> Features:
        features = []
        for i, scale in enumerate(self.scales):
            audio = self.halve(audio) if i else audio
            features.append(scale(audio))
        return features
