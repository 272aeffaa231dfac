"""TensorFlowTTS: Keras weights of `TFMelGANGenerator` and `TFMBMelGANGenerator`."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from tests.export.checkpoints.reference import Shape, check_export, pqmf, statistics
from torch.nn import functional as F


class KerasGenerator:
    """The Keras layers of `TFMelGANGenerator` by their formulas. A "SAME" transposed convolution begins at sample stride // 2."""

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
        """Make a layer's weights, store them as Keras does, and return them in PyTorch's order."""
        fan = 2 * c_in if stride else c_in * kernel
        form = (kernel, 1, c_out, c_in) if stride else (kernel, c_in, c_out)
        v = self.noise.standard_normal(form) / fan**0.5
        axis = 2  # the output channels, in both forms
        weight = v
        self.stored.append((f"{name}/kernel:0", v))
        if self.weight_norm:
            others = tuple(i for i in range(v.ndim) if i != axis)
            norm = np.sqrt((v**2).sum(axis=others, keepdims=True))
            g = norm * self.noise.uniform(0.7, 1.3, norm.shape)
            weight = v / norm * g
            self.stored.append((f"weight_normalization_{name}/g:0", g.reshape(-1)))
        bias = np.zeros(c_out)
        if self.bias or stride:  # TFConvTranspose1d has a bias even if use_bias is false
            bias = 0.1 * self.noise.standard_normal(c_out)
            self.stored.append((f"{name}/bias:0", bias))
        weight = weight[:, 0].transpose(2, 1, 0) if stride else weight.transpose(2, 1, 0)
        return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()

    def save(self, path: Path) -> None:
        """Write the file that Keras's `save_weights` writes: a group for each layer, with the order of its weights in an attribute."""
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
            padding = dilation * (weight.shape[2] - 1) // 2
            return F.conv1d(F.pad(x, (padding, padding), "reflect") if padding else x, weight, bias, dilation=dilation)

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
        (Shape(scales=(4, 2), mels=80), True, "melgan_generator_params"),
        (Shape(scales=(5, 3), mels=80, outputs=4), False, "multiband_melgan_generator_params"),
        (Shape(scales=(2, 4), mels=80, outputs=4), False, "generator_params"),
    ],
)
def test_tensorflow_tts(tmp_path: Path, shape: Shape, weight_norm: bool, section: str) -> None:
    net = KerasGenerator(shape, weight_norm, bias=section != "melgan_generator_params")
    folder = tmp_path / "voice"
    folder.mkdir()
    net.save(folder / "generator-940000.h5")
    hop = shape.hop
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

    check_export(folder, reference, tmp_path)
