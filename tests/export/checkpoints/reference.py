"""Generators of the family from PyTorch's own layers, and the check that an exported voice gives their audio.

The layer order and the formulas come from each project's code. Nothing here uses melrt's generator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from melrt.bundle import Bundle
from melrt.planning.edges import Edges
from melrt.vocoder import Options, Vocoder
from melrt_export.export import ExportOptions, export_voice
from melrt_export.parity import FP32_MAX_ABS, probe_mel

FP32 = ExportOptions(precisions=("fp32",))


def audio_every_way(bundle: Bundle, mel: np.ndarray, edges: Edges | None = None) -> list[np.ndarray]:
    """Synthesize a mel whole, in a batch of different lengths, and as a stream of 5 frames at a time."""
    with Vocoder.load(bundle, precision="fp32", options=Options(edges=edges or Edges())) as vocoder:
        pieces = [mel[:, i : i + 5] for i in range(0, mel.shape[1], 5)]
        batch = list(vocoder.batch([mel[:, :-3], mel]))
        return [vocoder(mel), batch[1], np.concatenate(list(vocoder.stream(pieces)))]


def check_export(source: Path, reference: Callable[[np.ndarray], torch.Tensor], tmp_path: Path, use_edges: bool = False) -> Bundle:
    """Export a checkpoint and compare the voice with the reference.

    Args:
        source: The checkpoint.
        reference: Returns the project's audio for log-mel frames (1, M, T) that are not normalized.
        tmp_path: Folder for the bundle.
        use_edges: Extend the ends of the utterance as the project does.
    """
    bundle = export_voice(source, tmp_path / "voice.melrt", FP32)
    manifest = bundle.manifest
    edges = manifest.edges if use_edges else Edges()
    mel = probe_mel(manifest.spec, 61, seed=3)
    with torch.inference_mode():
        expected = reference(edges.extend(mel)[None]).numpy().reshape(-1)
    hop = manifest.spec.hop
    expected = expected[edges.left * hop : len(expected) - edges.right * hop]
    assert np.abs(expected).max() > 0.05
    for audio in audio_every_way(bundle, mel, edges):
        assert np.abs(audio - expected).max() < FP32_MAX_ABS
    return bundle


@dataclass
class Shape:
    """The shape of a generator."""

    scales: tuple[int, ...] = (4, 2)
    stacks: int = 2
    channels: int = 32
    outputs: int = 1
    mels: int = 20
    kernel: int = 7
    stack_kernel: int = 3
    slope: float = 0.2
    bias: bool = True
    tanh: bool = True
    pad: Callable[[int], nn.Module] = nn.ReflectionPad1d

    @property
    def hop(self) -> int:
        return int(np.prod(self.scales)) * self.outputs

    def upsample(self, i: int) -> nn.ConvTranspose1d:
        s = self.scales[i]
        width = self.channels // 2**i
        return nn.ConvTranspose1d(width, self.channels // 2 ** (i + 1), 2 * s, s, s // 2 + s % 2, output_padding=s % 2, bias=self.bias)

    def block(self, width: int, j: int) -> nn.Sequential:
        dilation = self.stack_kernel**j
        return nn.Sequential(
            nn.LeakyReLU(self.slope), self.pad(dilation * (self.stack_kernel - 1) // 2),
            nn.Conv1d(width, width, self.stack_kernel, dilation=dilation, bias=self.bias),
            nn.LeakyReLU(self.slope), nn.Conv1d(width, width, 1, bias=self.bias),
        )  # fmt: skip

    def ends(self) -> tuple[list[nn.Module], list[nn.Module]]:
        width = self.channels // 2 ** len(self.scales)
        padding = (self.kernel - 1) // 2
        first = [self.pad(padding), nn.Conv1d(self.mels, self.channels, self.kernel, bias=self.bias)]
        last = [nn.LeakyReLU(self.slope), self.pad(padding), nn.Conv1d(width, self.outputs, self.kernel, bias=self.bias)]
        return first, [*last, nn.Tanh()] if self.tanh else last


class FlatBlock(nn.Module):
    """ParallelWaveGAN's `ResidualStack`: one dilated block and its shortcut."""

    def __init__(self, shape: Shape, width: int, j: int) -> None:
        super().__init__()
        self.stack = shape.block(width, j)
        self.skip_layer = nn.Conv1d(width, width, 1, bias=shape.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x) + self.skip_layer(x)


class NestedStack(nn.Module):
    """The `ResidualStack` of Coqui TTS and `ResStack` of seungwonpark/melgan: all blocks of one stage."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(shape.block(width, j) for j in range(shape.stacks))
        self.shortcuts = nn.ModuleList(nn.Conv1d(width, width, 1, bias=shape.bias) for _ in range(shape.stacks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = shortcut(x) + block(x)
        return x


def flat(shape: Shape) -> nn.Sequential:
    """Build a generator whose residual blocks are members of the main sequence, as in ParallelWaveGAN."""
    first, last = shape.ends()
    layers = first
    for i in range(len(shape.scales)):
        layers += [nn.LeakyReLU(shape.slope), shape.upsample(i)]
        layers += [FlatBlock(shape, shape.channels // 2 ** (i + 1), j) for j in range(shape.stacks)]
    return nn.Sequential(*layers, *last)


def nested(shape: Shape) -> nn.Sequential:
    """Build a generator with one module for each stage's residual blocks, as in Coqui TTS and seungwonpark/melgan."""
    first, last = shape.ends()
    layers = first
    for i in range(len(shape.scales)):
        layers += [nn.LeakyReLU(shape.slope), shape.upsample(i), NestedStack(shape, shape.channels // 2 ** (i + 1))]
    return nn.Sequential(*layers, *last)


def network(build: Callable[[Shape], nn.Sequential], shape: Shape, weight_norm: bool = True) -> nn.Sequential:
    """Build a network with random weights that keep the signal's level, so that every layer matters to the output."""
    torch.manual_seed(0)
    net = build(shape).eval()
    for layer in net.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            fan = 2 * layer.in_channels if isinstance(layer, nn.ConvTranspose1d) else layer.in_channels * layer.kernel_size[0]
            nn.init.normal_(layer.weight, std=fan**-0.5)
            if weight_norm:
                nn.utils.parametrizations.weight_norm(layer)
                layer.parametrizations.weight.original0.data *= torch.linspace(0.8, 1.2, layer.weight.shape[0])[:, None, None]
    return net


def prefixed(net: nn.Module, prefix: str) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((f"{prefix}.{name}", value) for name, value in net.state_dict().items())


def pqmf(x: torch.Tensor, cutoff: float, middle: float = 31.0, sign: int = -1) -> torch.Tensor:
    """Join sub-bands as ParallelWaveGAN's `layers/pqmf.py` does: insert zeros, pad, and filter.

    The first filter bank of TensorFlowTTS synthesizes with the analysis filters (sign 1), centered at (taps - 1) / 2 (middle 30.5).
    """
    bands = x.shape[1]
    n = np.arange(63)
    with np.errstate(invalid="ignore"):
        ideal = np.sin(np.pi * cutoff * (n - 31)) / (np.pi * (n - 31))
    ideal[31] = cutoff
    prototype = ideal * np.kaiser(63, 9.0)
    rows = [2 * prototype * np.cos((2 * k + 1) * np.pi / (2 * bands) * (n - middle) + sign * (-1) ** k * np.pi / 4) for k in range(bands)]
    spread = torch.zeros(len(x), bands, bands * x.shape[2])
    spread[..., ::bands] = bands * x
    return F.conv1d(F.pad(spread, (31, 31)), torch.from_numpy(np.stack(rows)).float()[None])


def statistics(bands: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random means and scales of a training, each (M,) float32."""
    noise = np.random.default_rng(5)
    return (-2 + 0.5 * noise.standard_normal(bands)).astype(np.float32), noise.uniform(0.4, 1.5, bands).astype(np.float32)
