"""ParallelWaveGAN: every shape and option of `MelGANGenerator`."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from tests.export.checkpoints.reference import FlatBlock, Shape, check_export, flat, network, pqmf, prefixed, statistics
from torch import nn
from torch.nn import functional as F

from melrt_export.checkpoints import load_checkpoint


class CausalConv(nn.Module):
    """`CausalConv1d`: pads both sides and cuts the end, so that only the padding before the first sample matters."""

    def __init__(self, pad, c_in: int, c_out: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.pad, self.conv = pad((kernel - 1) * dilation), nn.Conv1d(c_in, c_out, kernel, dilation=dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pad(x))[..., : x.shape[-1]]


class CausalUpsample(nn.Module):
    """`CausalConvTranspose1d`."""

    def __init__(self, c_in: int, c_out: int, scale: int) -> None:
        super().__init__()
        self.scale, self.deconv = scale, nn.ConvTranspose1d(c_in, c_out, 2 * scale, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.deconv(F.pad(x, (1, 0), "replicate"))[..., self.scale : -self.scale]


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


# Shape, additional settings of config.yml, and the file that holds the statistics.
CASES = {
    "v1, no statistics": (Shape(scales=(8, 2), stacks=3), {}, "none"),
    "large, five stages": (Shape(scales=(4, 2, 2, 2, 2), stacks=2, channels=64), {}, "h5"),
    "multi-band, odd scales, new filters": (Shape(scales=(5, 3), stacks=2, outputs=4), {"version": "0.5.3"}, "npy"),
    "multi-band, filters in the config": (Shape(outputs=4), {"pqmf_params": {"cutoff_ratio": 0.2}, "version": "0.4.0"}, "npy"),
    "two bands, old filters": (Shape(outputs=2), {}, "h5"),
    "no bias, no tanh, wide kernels": (Shape(kernel=5, stack_kernel=5, bias=False, tanh=False), {}, "npy"),
    "zero padding, ReLU": (Shape(pad=lambda n: nn.ConstantPad1d(n, 0.0), slope=0.0), {}, "h5"),
    "replication": (Shape(pad=nn.ReplicationPad1d, slope=0.1), {}, "npy"),
    "causal": (Shape(scales=(4, 3)), {}, "npy"),
    "weight norm removed": (Shape(), {}, "h5"),
}


def write_checkpoint(folder: Path, case: str, net: nn.Sequential) -> tuple[np.ndarray, np.ndarray]:
    """Write the training's folder and return the mean and scale of its statistics."""
    shape, extra, stats = CASES[case]
    folder.mkdir()
    params = {"in_channels": shape.mels, "out_channels": shape.outputs, "channels": shape.channels, "kernel_size": shape.kernel,
              "upsample_scales": list(shape.scales), "stacks": shape.stacks, "stack_kernel_size": shape.stack_kernel, "bias": shape.bias,
              "use_final_nonlinear_activation": shape.tanh, "use_causal_conv": case == "causal",
              "nonlinear_activation_params": {"negative_slope": shape.slope}}  # fmt: skip
    if "ReLU" in case:
        params |= {"pad": "ConstantPad1d", "pad_params": {"value": 0.0}, "nonlinear_activation": "ReLU", "nonlinear_activation_params": {}}
    if case == "replication":
        params["pad"] = "ReplicationPad1d"
    hop = shape.hop
    config = {"sampling_rate": 500 * hop, "fft_size": 4 * hop, "hop_size": hop, "win_length": None, "num_mels": shape.mels, "fmin": None,
              "fmax": None, "generator_type": "MelGANGenerator", "generator_params": params, **extra}  # fmt: skip
    (folder / "config.yml").write_text(yaml.dump(config))
    scheduler = {"milestones": Counter({100: 1})}  # MultiStepLR keeps a Counter, a class that the reader must accept
    state = prefixed(net, "melgan")
    torch.save({"model": {"generator": state}, "scheduler": {"generator": scheduler}, "steps": 1}, folder / "checkpoint-1steps.pkl")
    mean, scale = (np.zeros(shape.mels), np.ones(shape.mels)) if stats == "none" else statistics(shape.mels)
    if stats == "h5":
        with h5py.File(folder / "stats.h5", "w") as file:
            file["mean"], file["scale"] = mean, scale
    elif stats == "npy":
        np.save(folder / "stats.npy", np.stack([mean, scale]))
    return mean, scale


@pytest.mark.parametrize("case", CASES)
def test_parallel_wavegan(tmp_path: Path, case: str) -> None:
    shape, extra, stats = CASES[case]
    net = network(causal if case == "causal" else flat, shape, weight_norm="removed" not in case)
    mean, scale = write_checkpoint(tmp_path / "voice", case, net)
    cutoff = {"0.5.3": 0.142, "0.4.0": 0.2}.get(extra.get("version"), 0.15)

    def reference(mel: np.ndarray) -> torch.Tensor:
        out = net(torch.from_numpy(((mel - mean[:, None]) / scale[:, None]).astype(np.float32)))
        return pqmf(out, cutoff) if shape.outputs > 1 else out

    manifest = check_export(tmp_path / "voice", reference, tmp_path).manifest
    assert (manifest.spec.log, manifest.spec.floor, manifest.spec.framing) == ("log10", 1e-10, "center")
    assert manifest.levels.normalized == (stats == "none")


def test_tar_archive_reads_like_its_folder(tmp_path: Path) -> None:
    """ParallelWaveGAN publishes tar.gz files. The voice takes the archive's name."""
    case = "multi-band, odd scales, new filters"
    write_checkpoint(tmp_path / "voice", case, network(flat, CASES[case][0]))
    with tarfile.open(tmp_path / "csmsc.v2.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "voice", "exp/train/csmsc.v2")
    packed, plain = load_checkpoint(tmp_path / "csmsc.v2.tar.gz"), load_checkpoint(tmp_path / "voice")
    assert (packed.config, packed.source.name, packed.name) == (plain.config, "csmsc.v2.tar.gz", "csmsc")
    assert all(np.array_equal(packed.weights[name], value) for name, value in plain.weights.items())
