"""Checkpoints of other projects, in shapes of all kinds: the exported voice gives what the project's own arithmetic gives.

The references here are written from PyTorch's layers (or, for TensorFlow, from its documented formulas), independent of melrt's generator.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from melrt.bundle import Bundle
from melrt.planning.edges import Edges
from melrt.vocoder import Options, Vocoder
from melrt_export.checkpoints import load_checkpoint
from melrt_export.export import ExportOptions, export_voice
from melrt_export.parity import FP32_MAX_ABS, probe_mel
from melrt_export.tensorrt.build import EngineOptions, build_engine

FP32 = ExportOptions(precisions=("fp32",))
FIXTURES = ("coqui_melgan", "coqui_multiband", "descript", "parallel_wavegan_melgan", "parallel_wavegan_multiband", "seungwonpark")


def every_way(bundle: Bundle, mel: np.ndarray, edges: Edges | None = None) -> list[np.ndarray]:
    """Whole, in a batch of different lengths, and streamed in small pieces."""
    with Vocoder.load(bundle, precision="fp32", options=Options(edges=edges or Edges())) as vocoder:
        pieces = [mel[:, i : i + 5] for i in range(0, mel.shape[1], 5)]
        batch = list(vocoder.batch([mel[:, :-3], mel]))
        return [vocoder(mel), batch[1], np.concatenate(list(vocoder.stream(pieces)))]


@pytest.mark.parametrize("name", FIXTURES)
def test_what_the_project_s_own_code_gave(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "fixtures" / "checkpoints" / name
    case = np.load(folder / "case.npz")
    bundle = export_voice(folder, tmp_path / "x.melrt", FP32)
    manifest = bundle.manifest
    mel = case["mel"]
    if name.startswith("coqui"):  # its case is what its network takes; the voice takes plain decibels
        mel = manifest.normalization.undo(mel.astype(np.float64)).astype(np.float32)
        assert manifest.edges == Edges(2, 2)
        hop = manifest.spec.hop
        expected = case["inference"].reshape(-1)[2 * hop : -2 * hop]
        outputs = every_way(bundle, mel, manifest.edges)
    else:
        expected = case["audio"].reshape(-1)
        outputs = every_way(bundle, mel)
    assert np.abs(expected).max() > 0.05
    for audio in outputs:
        assert np.abs(audio - expected).max() < FP32_MAX_ABS
    if "inference_int16" in case:
        assert manifest.edges == Edges(0, 10, -11.5129)
        for audio in every_way(bundle, mel, manifest.edges):
            integers = np.clip(32768 * audio.astype(np.float64), -32768, 32767).astype(np.int16)
            assert np.abs(integers.astype(int) - case["inference_int16"].reshape(-1)).max() <= 1


@pytest.mark.parametrize("name", ["coqui_melgan", "coqui_multiband"])  # clipping, and a filter bank; the others build too, and take long
def test_an_fp16_engine(shared: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    bundle = export_voice(shared / "fixtures" / "checkpoints" / name, tmp_path / "x.melrt", ExportOptions(precisions=("fp16",)))
    assert build_engine(bundle, EngineOptions(precision="fp16", graph="edge")).size > 10_000


class Shape:
    """A generator's shape, and its layers in PyTorch's own modules."""

    def __init__(self, scales=(4, 2), stacks=2, channels=32, outputs=1, mels=20, kernel=7, stack_kernel=3, slope=0.2, bias=True, tanh=True,
                 pad=nn.ReflectionPad1d) -> None:  # fmt: skip
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})

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
        reach = (self.kernel - 1) // 2
        first = [self.pad(reach), nn.Conv1d(self.mels, self.channels, self.kernel, bias=self.bias)]
        last = [nn.LeakyReLU(self.slope), self.pad(reach), nn.Conv1d(width, self.outputs, self.kernel, bias=self.bias)]
        return first, [*last, nn.Tanh()] if self.tanh else last


class FlatBlock(nn.Module):
    def __init__(self, shape: Shape, width: int, j: int) -> None:
        super().__init__()
        self.stack = shape.block(width, j)
        self.skip_layer = nn.Conv1d(width, width, 1, bias=shape.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x) + self.skip_layer(x)


class NestedStack(nn.Module):
    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(shape.block(width, j) for j in range(shape.stacks))
        self.shortcuts = nn.ModuleList(nn.Conv1d(width, width, 1, bias=shape.bias) for _ in range(shape.stacks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = shortcut(x) + block(x)
        return x


class CausalConv(nn.Module):
    """`CausalConv1d`: padded on both sides and cut to its length, so that the padding before the first sample is what counts."""

    def __init__(self, pad, c_in: int, c_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.pad, self.conv = pad((kernel - 1) * dilation), nn.Conv1d(c_in, c_out, kernel, dilation=dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pad(x))[..., : x.shape[-1]]


class CausalUpsample(nn.Module):
    def __init__(self, c_in: int, c_out: int, scale: int) -> None:
        super().__init__()
        self.scale, self.deconv = scale, nn.ConvTranspose1d(c_in, c_out, 2 * scale, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deconv(F.pad(x, (1, 0), "replicate"))[..., self.scale : -self.scale]


def flat(shape: Shape) -> nn.Sequential:
    first, last = shape.ends()
    layers = first
    for i in range(len(shape.scales)):
        layers += [nn.LeakyReLU(shape.slope), shape.upsample(i)]
        layers += [FlatBlock(shape, shape.channels // 2 ** (i + 1), j) for j in range(shape.stacks)]
    return nn.Sequential(*layers, *last)


def causal(shape: Shape) -> nn.Sequential:
    layers: list[nn.Module] = [CausalConv(shape.pad, shape.mels, shape.channels, shape.kernel)]
    width = shape.channels
    for scale in shape.scales:
        layers += [nn.LeakyReLU(shape.slope), CausalUpsample(width, width // 2, scale)]
        width //= 2
        for j in range(shape.stacks):
            block = FlatBlock(shape, width, j)
            dilated = CausalConv(shape.pad, width, width, shape.stack_kernel, shape.stack_kernel**j)
            block.stack = nn.Sequential(nn.LeakyReLU(shape.slope), dilated, nn.LeakyReLU(shape.slope), nn.Conv1d(width, width, 1))
            layers.append(block)
    return nn.Sequential(*layers, nn.LeakyReLU(shape.slope), CausalConv(shape.pad, width, shape.outputs, shape.kernel), nn.Tanh())


def nested(shape: Shape) -> nn.Sequential:
    first, last = shape.ends()
    layers = first
    for i in range(len(shape.scales)):
        layers += [nn.LeakyReLU(shape.slope), shape.upsample(i), NestedStack(shape, shape.channels // 2 ** (i + 1))]
    return nn.Sequential(*layers, *last)


def network(build: Callable[[Shape], nn.Sequential], shape: Shape, weight_norm: bool = True) -> nn.Sequential:
    """Random weights that keep the signal's level, so that every layer matters to the output."""
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
    """Synthesis as `layers/pqmf.py` writes it: zeros put in, padded, and filtered."""
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


def check(source: Path, expected_of: Callable[[np.ndarray], torch.Tensor], tmp_path: Path, edges: bool = False) -> Bundle:
    """The exported voice on plain log-mels against the reference on the same."""
    bundle = export_voice(source, tmp_path / "voice.melrt", FP32)
    manifest = bundle.manifest
    habit = manifest.edges if edges else Edges()
    mel = probe_mel(manifest.spec, 61, seed=3)
    with torch.inference_mode():
        expected = expected_of(habit.extend(mel)[None]).numpy().reshape(-1)
    hop = manifest.spec.hop
    expected = expected[habit.left * hop : len(expected) - habit.right * hop]
    assert np.abs(expected).max() > 0.05
    for audio in every_way(bundle, mel, habit):
        assert np.abs(audio - expected).max() < FP32_MAX_ABS
    return bundle


def statistics(bands: int) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(5)
    return (-2 + 0.5 * noise.standard_normal(bands)).astype(np.float32), noise.uniform(0.4, 1.5, bands).astype(np.float32)


WAVEGAN = {
    "v1, no statistics": (Shape(scales=(8, 2), stacks=3), {}, "none"),
    "large, five stages": (Shape(scales=(4, 2, 2, 2, 2), stacks=2, channels=64), {}, "h5"),
    "multi-band, odd scales, new filters": (Shape(scales=(5, 3), stacks=2, outputs=4), {"version": "0.5.3"}, "npy"),
    "multi-band, filters of its own": (Shape(outputs=4), {"pqmf_params": {"cutoff_ratio": 0.2}, "version": "0.4.0"}, "npy"),
    "two bands, old filters": (Shape(outputs=2), {}, "h5"),
    "no bias, no tanh, wide kernels": (Shape(kernel=5, stack_kernel=5, bias=False, tanh=False), {}, "npy"),
    "zero padding, ReLU": (Shape(pad=lambda n: nn.ConstantPad1d(n, 0.0), slope=0.0), {}, "h5"),
    "replication": (Shape(pad=nn.ReplicationPad1d, slope=0.1), {}, "npy"),
    "causal": (Shape(scales=(4, 3)), {}, "npy"),
    "weight norm removed": (Shape(), {}, "h5"),
}


@pytest.mark.parametrize("case", WAVEGAN)
def test_parallel_wavegan(tmp_path: Path, case: str) -> None:
    shape, extra, stats = WAVEGAN[case]
    net = network(causal if case == "causal" else flat, shape, weight_norm="removed" not in case)
    folder = tmp_path / "voice"
    folder.mkdir()
    params = {"in_channels": shape.mels, "out_channels": shape.outputs, "channels": shape.channels, "kernel_size": shape.kernel,
              "upsample_scales": list(shape.scales), "stacks": shape.stacks, "stack_kernel_size": shape.stack_kernel, "bias": shape.bias,
              "use_final_nonlinear_activation": shape.tanh, "use_causal_conv": case == "causal",
              "nonlinear_activation_params": {"negative_slope": shape.slope}}  # fmt: skip
    if "ReLU" in case:
        params |= {"pad": "ConstantPad1d", "pad_params": {"value": 0.0}, "nonlinear_activation": "ReLU", "nonlinear_activation_params": {}}
    if case == "replication":
        params["pad"] = "ReplicationPad1d"
    hop = int(np.prod(shape.scales)) * shape.outputs
    config = {"sampling_rate": 500 * hop, "fft_size": 4 * hop, "hop_size": hop, "win_length": None, "num_mels": shape.mels, "fmin": None,
              "fmax": None, "generator_type": "MelGANGenerator", "generator_params": params, **extra}  # fmt: skip
    (folder / "config.yml").write_text(yaml.dump(config))
    scheduler = {"milestones": Counter({100: 1})}  # MultiStepLR's, a class of the standard library
    state = prefixed(net, "melgan")
    torch.save({"model": {"generator": state}, "scheduler": {"generator": scheduler}, "steps": 1}, folder / "checkpoint-1steps.pkl")
    mean, scale = (np.zeros(shape.mels), np.ones(shape.mels)) if stats == "none" else statistics(shape.mels)
    if stats == "h5":
        with h5py.File(folder / "stats.h5", "w") as file:
            file["mean"], file["scale"] = mean, scale
    elif stats == "npy":
        np.save(folder / "stats.npy", np.stack([mean, scale]))
    cutoff = {"0.5.3": 0.142, "0.4.0": 0.2}.get(extra.get("version"), 0.15)

    def reference(mel: np.ndarray) -> torch.Tensor:
        out = net(torch.from_numpy(((mel - mean[:, None]) / scale[:, None]).astype(np.float32)))
        return pqmf(out, cutoff) if shape.outputs > 1 else out

    manifest = check(folder, reference, tmp_path).manifest
    assert (manifest.spec.log, manifest.spec.floor, manifest.spec.framing) == ("log10", 1e-10, "center")
    assert manifest.levels.normalized == (stats == "none")


def test_a_published_archive(tmp_path: Path) -> None:
    """ParallelWaveGAN publishes tar.gz; the voice has its name."""
    test_parallel_wavegan(tmp_path, "multi-band, odd scales, new filters")
    with tarfile.open(tmp_path / "csmsc.v2.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "voice", "exp/train/csmsc.v2")
    packed, plain = load_checkpoint(tmp_path / "csmsc.v2.tar.gz"), load_checkpoint(tmp_path / "voice")
    assert (packed.config, packed.source.name, packed.name) == (plain.config, "csmsc.v2.tar.gz", "csmsc")
    assert all(np.array_equal(packed.weights[name], value) for name, value in plain.weights.items())


RANGE = {"signal_norm": True, "min_level_db": -100, "ref_level_db": 20, "max_norm": 4.0, "clip_norm": True, "symmetric_norm": True}
COQUI = {
    "melgan, new": (Shape(), RANGE, "new"),
    "fullband, legacy": (Shape(scales=(4, 2, 2), stacks=3), {**RANGE, "symmetric_norm": False, "max_norm": 1.0}, "legacy"),
    "multi-band, statistics": (Shape(outputs=4), {"signal_norm": True, "stats_path": "/data/elsewhere/scale_stats.npy"}, "new"),
    "not normalized, natural": (Shape(), {"signal_norm": False, "log_func": "np.log", "spec_gain": 1.0, "preemphasis": 0.98}, "legacy"),
    "clipped where speech is": (Shape(), {**RANGE, "min_level_db": -60, "ref_level_db": -20}, "new"),
}


def write_coqui(folder: Path, shape: Shape, audio: dict, layout: str, state: dict) -> None:
    """Config with a comment and a web address, weights in either layout, and statistics as numpy pickles them."""
    kind = "multiband_melgan_generator" if shape.outputs > 1 else "fullband_melgan_generator" if shape.stacks > 2 else "melgan_generator"
    params = {"upsample_factors": list(shape.scales), "num_res_blocks": shape.stacks}
    config = json.dumps({"generator_model": kind, "generator_model_params": params, "audio": audio, "url": "http://x//y"}, indent=1)
    (folder / "config.json").write_text(config.replace('"audio"', '// the "audio"\n "audio"', 1))
    model = {**{f"model_g.{k}": v for k, v in state.items()}, "model_d.x": torch.zeros(2)} if layout == "new" else state
    torch.save({"model": model, "step": 1} | ({"model_disc": {}} if layout == "legacy" else {}), folder / "best_model.pth.tar")
    if audio["stats_path"]:
        mean, scale = (20 * values for values in statistics(shape.mels))
        stats = {"mel_mean": mean, "mel_std": scale, "linear_mean": mean, "linear_std": scale, "audio_config": audio}
        np.save(folder / "scale_stats.npy", np.array(stats, dtype=object), allow_pickle=True)


def coqui_normalize(mel: np.ndarray, audio: dict) -> np.ndarray:
    """`AudioProcessor.normalize`."""
    if not audio["signal_norm"]:
        return mel
    if audio["stats_path"]:
        mean, scale = (20 * values[:, None] for values in statistics(len(mel[0])))
        return (mel - mean) / scale
    unit = (mel - audio["ref_level_db"] - audio["min_level_db"]) / -audio["min_level_db"]
    top = audio["max_norm"]
    return np.clip(2 * top * unit - top, -top, top) if audio["symmetric_norm"] else np.clip(top * unit, 0, top)


@pytest.mark.parametrize("case", COQUI)
def test_coqui(tmp_path: Path, case: str) -> None:
    shape, audio, layout = COQUI[case]
    net = network(nested, shape)
    folder = tmp_path / "voice"
    folder.mkdir()
    hop = int(np.prod(shape.scales)) * shape.outputs
    audio = {"sample_rate": 500 * hop, "fft_size": 4 * hop, "win_length": 4 * hop, "hop_length": hop, "num_mels": shape.mels,
             "mel_fmin": 0.0, "mel_fmax": None, "spec_gain": 20, "log_func": "np.log10", "preemphasis": 0.0, "stats_path": None,
             **audio}  # fmt: skip
    state = prefixed(net, "layers")
    bank = torch.randn(1, 4, 63) / 8
    if shape.outputs > 1:
        state |= {"pqmf_layer.G": bank, "pqmf_layer.H": bank.transpose(0, 1), "pqmf_layer.updown_filter": torch.zeros(4, 4, 4)}
    write_coqui(folder, shape, audio, layout, state)

    def reference(mel: np.ndarray) -> torch.Tensor:
        out = net(torch.from_numpy(coqui_normalize(mel.astype(np.float64), audio).astype(np.float32)))
        if shape.outputs == 1:
            return out
        spread = torch.zeros(1, 4, 4 * out.shape[2])
        spread[..., ::4] = 4 * out
        return F.conv1d(spread, bank, padding=31)

    manifest = check(folder, reference, tmp_path, edges=True).manifest
    assert (manifest.edges, manifest.spec.floor) == (Edges(2, 2), 1e-8)
    assert (manifest.spec.log, manifest.spec.preemphasis) == (("ln", 0.98) if "natural" in case else ("dB", 0.0))
    if "clipped" in case:
        assert manifest.normalization.clip == (-80.0, -20.0)


@pytest.mark.parametrize("shape", [Shape(scales=(8, 8, 2, 2), stacks=3, channels=64, mels=80), Shape(scales=(4, 3), stacks=4)])
def test_seungwonpark(tmp_path: Path, shape: Shape) -> None:
    net = network(nested, shape)
    hop = int(np.prod(shape.scales))
    settings = f"data:\n  train: ''\n---\naudio:\n  n_mel_channels: {shape.mels}\n  filter_length: {4 * hop}\n  hop_length: {hop}\n"
    settings += f"  win_length: {4 * hop}\n  sampling_rate: {100 * hop}\n  mel_fmin: 0.0\n  mel_fmax: {50.0 * hop}\n"
    file = tmp_path / "lj_aca5990_6400.pt"
    torch.save({"model_g": prefixed(net, "generator"), "model_d": {}, "epoch": 6400, "hp_str": settings}, file)

    def reference(mel: np.ndarray) -> torch.Tensor:
        return net((torch.from_numpy(mel) + 5.0) / 5.0)

    manifest = check(tmp_path, reference, tmp_path, edges=True).manifest
    assert (manifest.name, manifest.spec.log, manifest.spec.hop) == ("lj_aca5990_6400", "ln", hop)


class TensorFlow:
    """The Keras layers of `TFMelGANGenerator` by their formulas: "SAME" transposed convolutions begin at sample stride // 2."""

    def __init__(self, shape: Shape, weight_norm: bool, bias: bool) -> None:
        self.shape, self.weight_norm, self.bias = shape, weight_norm, bias
        self.noise = np.random.default_rng(0)
        self.stored: list[tuple[str, np.ndarray]] = []
        self.layers = list(self._layers())

    def _layers(self):
        shape = self.shape
        yield self._conv("conv1d", shape.mels, shape.channels, shape.kernel)
        for i, scale in enumerate(shape.scales):
            width = shape.channels // 2 ** (i + 1)
            yield self._conv(f"conv_transpose_._{i}/conv2d_transpose", 2 * width, width, 2 * scale, scale)
            for j in range(shape.stacks):
                name = f"residual_stack_._{i}._._{j}"
                yield self._conv(f"{name}/conv1d_{j}a", width, width, shape.stack_kernel)
                yield self._conv(f"{name}/conv1d_{j}b", width, width, 1)
                yield self._conv(f"{name}/shortcut", width, width, 1)
        yield self._conv("conv1d_9", width, shape.outputs, shape.kernel)

    def _conv(self, name: str, c_in: int, c_out: int, kernel: int, stride: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        fan = 2 * c_in if stride else c_in * kernel
        form = (kernel, 1, c_out, c_in) if stride else (kernel, c_in, c_out)
        v = self.noise.standard_normal(form) / fan**0.5
        axis = 2  # output channels, in both forms
        weight = v
        self.stored.append((f"{name}/kernel:0", v))
        if self.weight_norm:
            others = tuple(i for i in range(v.ndim) if i != axis)
            norm = np.sqrt((v**2).sum(axis=others, keepdims=True))
            g = norm * self.noise.uniform(0.7, 1.3, norm.shape)
            weight = v / norm * g
            self.stored.append((f"weight_normalization_{name}/g:0", g.reshape(-1)))
        bias = np.zeros(c_out)
        if self.bias or stride:  # TFConvTranspose1d has a bias whatever use_bias says
            bias = 0.1 * self.noise.standard_normal(c_out)
            self.stored.append((f"{name}/bias:0", bias))
        weight = weight[:, 0].transpose(2, 1, 0) if stride else weight.transpose(2, 1, 0)
        return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()

    def save(self, path: Path) -> None:
        """As Keras's `save_weights`: groups for the layers, and the order of their weights in attributes."""
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = [b"sequential", b"pqmf"]
            group = file.create_group("sequential")
            group.attrs["weight_names"] = [f"tf_mel_gan/{name}".encode() for name, _ in self.stored]
            for name, value in self.stored:
                group[f"tf_mel_gan/{name}"] = value.astype(np.float32)
            file.create_group("pqmf").attrs["weight_names"] = np.array([], "S1")

    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        layers = iter(self.layers)

        def conv(x: torch.Tensor, dilation: int = 1) -> torch.Tensor:
            weight, bias = next(layers)
            reach = dilation * (weight.shape[2] - 1) // 2
            return F.conv1d(F.pad(x, (reach, reach), "reflect") if reach else x, weight, bias, dilation=dilation)

        x = conv(mel)
        for scale in self.shape.scales:
            weight, bias = next(layers)
            full = F.conv_transpose1d(F.leaky_relu(x, 0.2), weight, bias, stride=scale)
            x = full[..., scale // 2 : scale // 2 + x.shape[2] * scale]
            for j in range(self.shape.stacks):
                h = conv(F.leaky_relu(x, 0.2), self.shape.stack_kernel**j)
                h = conv(F.leaky_relu(h, 0.2))
                x = conv(x) + h
        return torch.tanh(conv(F.leaky_relu(x, 0.2)))


@pytest.mark.parametrize(
    ("shape", "weight_norm", "section"),
    [
        (Shape(scales=(4, 2)), True, "melgan_generator_params"),
        (Shape(scales=(5, 3), outputs=4), False, "multiband_melgan_generator_params"),
        (Shape(scales=(2, 4), outputs=4), False, "generator_params"),
    ],
)
def test_tensorflow_tts(tmp_path: Path, shape: Shape, weight_norm: bool, section: str) -> None:
    shape.mels = 80
    net = TensorFlow(shape, weight_norm, bias=section != "melgan_generator_params")
    folder = tmp_path / "voice"
    folder.mkdir()
    net.save(folder / "generator-940000.h5")
    hop = int(np.prod(shape.scales)) * shape.outputs
    params = {"filters": shape.channels, "out_channels": shape.outputs, "upsample_scales": list(shape.scales), "stacks": shape.stacks,
              "is_weight_norm": weight_norm, "kernel_size": 7, "stack_kernel_size": 3, "use_bias": net.bias}  # fmt: skip
    config = {"sampling_rate": 1000 * hop, "hop_size": hop, "fft_size": 2048, "fmin": 0, "fmax": 500 * hop, section: params}
    (folder / "config.yml").write_text(yaml.dump(config))
    mean, scale = statistics(80)
    np.save(folder / "stats.npy", np.stack([mean, scale]))

    def reference(mel: np.ndarray) -> torch.Tensor:
        out = net(torch.from_numpy((mel - mean[:, None]) / scale[:, None]))
        if shape.outputs == 1:
            return out
        return pqmf(out, 0.15, 30.5, sign=1) if section == "generator_params" else pqmf(out, 0.142)

    check(folder, reference, tmp_path)
