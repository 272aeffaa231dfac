"""HiFi-GAN checkpoints: an exported voice gives the output of the project's own layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from melrt.errors import CheckpointError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.vocoder import Vocoder
from melrt_export.assets import RECORDING
from melrt_export.checkpoints import load_checkpoint
from melrt_export.export import ExportOptions, export_voice
from melrt_export.parity import FP16_MIN_SNR_DB, FP32_MAX_ABS, probe_mel
from melrt_export.tensorrt.build import EngineOptions, build_engine

V1: dict[str, Any] = {
    "resblock": "1", "upsample_rates": [8, 8, 2, 2], "upsample_kernel_sizes": [16, 16, 4, 4], "upsample_initial_channel": 32,
    "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "num_mels": 80, "n_fft": 1024, "hop_size": 256, "win_size": 1024, "sampling_rate": 22050, "fmin": 0, "fmax": 8000,
    "segment_size": 8192, "num_freq": 1025, "fmax_for_loss": None, "num_gpus": 0, "dist_config": {"world_size": 1},
}  # fmt: skip
V2 = V1 | {"upsample_initial_channel": 16}
V3 = V1 | {
    "resblock": "2", "upsample_rates": [8, 8, 4], "upsample_kernel_sizes": [16, 16, 8], "resblock_kernel_sizes": [3, 5, 7],
    "resblock_dilation_sizes": [[1, 2], [2, 6], [3, 12]],
}  # fmt: skip
OTHER = V1 | {
    "upsample_rates": [6, 4, 10], "upsample_kernel_sizes": [12, 8, 20], "resblock_kernel_sizes": [5, 3], "hop_size": 240,
    "resblock_dilation_sizes": [[1, 2, 4, 8], [7]], "num_mels": 100, "sampling_rate": 24000, "fmax": None,
}  # fmt: skip


class Branch(nn.Module):
    """Residual blocks of one kernel size: `ResBlock1` (convs1, convs2) or `ResBlock2` (convs)."""

    def __init__(self, kind: str, width: int, kernel: int, dilations: list[int]) -> None:
        super().__init__()
        dilated = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in dilations)
        if kind == "2":
            self.convs = dilated
        else:
            self.convs1 = dilated
            self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "convs"):
            for conv in self.convs:
                x = x + conv(F.leaky_relu(x, 0.1))
            return x
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(F.leaky_relu(first(F.leaky_relu(x, 0.1)), 0.1))
        return x


class HifiGan(nn.Module):
    """Generator of HiFi-GAN's models.py, with weights that keep the signal's level, so that every layer affects the output."""

    def __init__(self, h: dict[str, Any]) -> None:
        super().__init__()
        self.kernels, width = len(h["resblock_kernel_sizes"]), h["upsample_initial_channel"]
        self.conv_pre = nn.Conv1d(h["num_mels"], width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(h["upsample_rates"], h["upsample_kernel_sizes"], strict=True):
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            for size, dilations in zip(h["resblock_kernel_sizes"], h["resblock_dilation_sizes"], strict=True):
                self.resblocks.append(Branch(h["resblock"], width, size, dilations))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)
        torch.manual_seed(0)
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                fan = 2 * layer.in_channels if isinstance(layer, nn.ConvTranspose1d) else layer.in_channels * layer.kernel_size[0]
                nn.init.normal_(layer.weight, std=0.5 * fan**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_pre(x)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(branch(x) for branch in self.resblocks[i * self.kernels : (i + 1) * self.kernels]) / self.kernels
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


def save_training(folder: Path, settings: dict[str, Any], file: str = "g_02500000", weight_norm: bool = True) -> HifiGan:
    """Save a folder as a HiFi-GAN training leaves it, with the file of the discriminators, and return the network."""
    net = HifiGan(settings).eval()
    if weight_norm:
        for layer in net.modules():
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                nn.utils.parametrizations.weight_norm(layer)
                layer.parametrizations.weight.original0.data *= torch.linspace(0.8, 1.2, layer.weight.shape[0])[:, None, None]
    names = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
    state = net.state_dict()
    for ours, theirs in names.items():
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    folder.mkdir()
    torch.save({"generator": state}, folder / file)
    torch.save({"mpd": {}, "msd": {}, "steps": 2500000}, folder / "do_02500000")
    (folder / "config.json").write_text(json.dumps(settings))
    return net


CASES = {
    "V1": (V1, "g_02500000", True), "V2": (V2, "generator_v2", True), "V3": (V3, "generator_v3", True),
    "another shape, norm removed": (OTHER, "g_00001000", False),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "file", "weight_norm"), CASES.values(), ids=CASES.keys())
def test_voice_gives_the_output_of_the_project(tmp_path: Path, settings: dict[str, Any], file: str, weight_norm: bool) -> None:
    net = save_training(tmp_path / "LJ", settings, file, weight_norm)
    half = settings in (V2, V3)  # PyTorch's half precision is slow on a CPU, and the other cases have the same two kinds of blocks
    bundle = export_voice(tmp_path / "LJ", tmp_path / "voice.melrt", ExportOptions(("fp32", "fp16") if half else ("fp32",)))
    manifest = bundle.manifest
    assert (manifest.name, manifest.spec.log, manifest.receptive_field.smallest_input) == ("LJ", "ln", 1)
    assert manifest.parameters == sum(tensor.numel() for tensor in HifiGan(settings).parameters())
    halves = [artifact.quality["half_snr_db"] for artifact in manifest.artifacts if artifact.precision == "fp16"]
    assert len(halves) == 2 * half
    assert min(halves, default=999) >= FP16_MIN_SNR_DB
    mel = probe_mel(manifest.spec, 3 * manifest.receptive_field.context + 7, seed=3)
    with torch.inference_mode():
        expected = [net(torch.from_numpy(part)[None])[0, 0].numpy() for part in (mel, mel[:, :-3], mel[:, :1])]
    assert np.abs(expected[0]).max() > 0.05
    with Vocoder.load(bundle, precision="fp32") as vocoder:
        pieces = [mel[:, i : i + 5] for i in range(0, mel.shape[1], 5)]
        whole, shorter, single = vocoder.batch([mel, mel[:, :-3], mel[:, :1]])
        outputs = [(vocoder(mel), 0), (np.concatenate(list(vocoder.stream(pieces))), 0), (whole, 0), (shorter, 1), (single, 2)]
    for audio, case in outputs:
        assert np.abs(audio - expected[case]).max() < FP32_MAX_ABS


def test_fp16_engine_can_be_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    save_training(tmp_path / "LJ", V3)
    bundle = export_voice(tmp_path / "LJ", tmp_path / "voice.melrt", ExportOptions(precisions=("fp16",)))
    assert build_engine(bundle, EngineOptions(precision="fp16", graph="interior")).size > 10_000


def test_mel_equals_that_of_the_project(tmp_path: Path) -> None:
    """The expected mel is `mel_spectrogram` in double precision. Its 1e-9 under the root changes the quietest bands by up to 1 %."""
    save_training(tmp_path / "LJ", V1)
    spec = load_checkpoint(tmp_path / "LJ").spec
    audio = read_audio(RECORDING, 22050)
    padded = F.pad(torch.from_numpy(audio).double()[None], (384, 384), "reflect")
    spectrum = torch.stft(padded, 1024, 256, 1024, torch.hann_window(1024, dtype=torch.float64), center=False, return_complex=True)
    basis = torch.from_numpy(librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0, fmax=8000)).double()
    expected = torch.log(torch.clamp(basis @ torch.sqrt(spectrum.abs() ** 2 + 1e-9), min=1e-5))[0].numpy()
    assert np.abs(mel_from_audio(audio, spec) - expected).max() < 1e-4


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda settings: settings.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("resblock"), "lacks resblock"),
        (lambda s: s.update(gen_istft_n_fft=16), "options that HiFi-GAN's own code does not have: gen_istft_n_fft"),
        (lambda s: s.update(resblock=1), 'resblock is 1; it must be "1" or "2"'),
        (lambda s: s.update(upsample_rates=[5, 5], upsample_kernel_sizes=[11, 11]), r"upsample_kernel_sizes \[11, 11\]"),
        (lambda s: s.update(upsample_rates="8"), "upsample_scales"),
        (lambda s: s.update(resblock_kernel_sizes=[3, 4, 11]), "kernel_sizes is .* odd number"),
        (lambda s: s.update(resblock_kernel_sizes=[3, 7]), "dilations is .* for each of 2 kernel sizes"),
        (lambda s: s.update(resblock_dilation_sizes=[[1], [1], [10**9]]), "dilations is"),
        (lambda s: s.update(resblock_dilation_sizes=[[1, 3]] * 3), r"unexpected resblocks\.0\.convs1\.2"),
        (lambda s: s.update(num_mels=40), r"conv_pre\.weight has shape"),
        (lambda s: s.update(sampling_rate="fast"), "sample_rate"),
    ],
)  # fmt: skip
def test_unsupported_config_raises_an_error(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    save_training(tmp_path / "LJ", V2)
    settings = dict(V2)
    change(settings)
    (tmp_path / "LJ" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "LJ")


def test_native_checkpoint_keeps_the_config(tmp_path: Path) -> None:
    from melrt_export.checkpoints import native

    save_training(tmp_path / "LJ", V3)
    checkpoint = load_checkpoint(tmp_path / "LJ" / "g_02500000")
    native.save(tmp_path / "own", checkpoint)
    assert load_checkpoint(tmp_path / "own").config == checkpoint.config
