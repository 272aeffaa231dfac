"""seungwonpark/melgan: the published shape and another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.checkpoints.reference import Shape, check_export, nested, network, prefixed


@pytest.mark.parametrize("shape", [Shape(scales=(8, 8, 2, 2), stacks=3, channels=64, mels=80), Shape(scales=(4, 3), stacks=4)])
def test_seungwonpark(tmp_path: Path, shape: Shape) -> None:
    net = network(nested, shape)
    hop = shape.hop
    settings = f"data:\n  train: ''\n---\naudio:\n  n_mel_channels: {shape.mels}\n  filter_length: {4 * hop}\n  hop_length: {hop}\n"
    settings += f"  win_length: {4 * hop}\n  sampling_rate: {100 * hop}\n  mel_fmin: 0.0\n  mel_fmax: {50.0 * hop}\n"
    file = tmp_path / "lj_aca5990_6400.pt"
    torch.save({"model_g": prefixed(net, "generator"), "model_d": {}, "epoch": 6400, "hp_str": settings}, file)

    def reference(mel: np.ndarray) -> torch.Tensor:
        return net((torch.from_numpy(mel) + 5.0) / 5.0)

    manifest = check_export(tmp_path, reference, tmp_path, use_edges=True).manifest
    assert (manifest.name, manifest.spec.log, manifest.spec.hop) == ("lj_aca5990_6400", "ln", hop)
