"""Log-mels in PyTorch, on the training device and with gradients."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from melrt.mel.features import mel_filters
from melrt.mel.spec import MelSpec


class LogMel(nn.Module):
    """Maps audio (B, N) to log-mel frames (B, M, T); equal to `melrt.mel.features.mel_from_audio` within 1e-4."""

    filters: Tensor
    window: Tensor

    def __init__(self, spec: MelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("filters", torch.from_numpy(mel_filters(spec)), persistent=False)
        self.register_buffer("window", torch.hann_window(spec.win_length), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        spec = self.spec
        pad = (spec.n_fft - spec.hop) // 2 if spec.framing == "same" else spec.n_fft // 2
        if spec.preemphasis:
            audio = torch.cat([audio[:, :1], audio[:, 1:] - spec.preemphasis * audio[:, :-1]], dim=1)
        padded = F.pad(audio[:, None], (pad, pad), spec.padding)[:, 0]
        spectrum = torch.stft(padded, spec.n_fft, spec.hop, spec.win_length, self.window, center=False, return_complex=True)
        magnitude = (spectrum.abs() ** 2 + spec.epsilon).sqrt() if spec.epsilon else spectrum.abs()
        return self._logarithm(self.filters @ magnitude**spec.power)

    def frames(self, audio: Tensor) -> Tensor:
        """Return one frame for each hop of audio, (B, M, N // hop), for the generator. The last frame of centered framing is dropped."""
        return cast(Tensor, self(audio))[..., : audio.shape[-1] // self.spec.hop]

    def _logarithm(self, bands: Tensor) -> Tensor:
        bands = bands.clamp(min=self.spec.floor)
        return bands.log() * self.spec.unit if self.spec.unit else bands * self.spec.gain
