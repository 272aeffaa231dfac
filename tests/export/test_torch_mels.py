"""Mels are read from PyTorch's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from melrt.errors import CheckpointError, MelError
from melrt.files.mels import read_mel
from melrt.mel.spec import MelSpec

SPEC = MelSpec()


def test_tensors_and_dictionaries_are_read(tmp_path: Path, noise: np.random.Generator) -> None:
    mel = noise.standard_normal((80, 9)).astype(np.float32)
    torch.save(torch.from_numpy(mel)[None], tmp_path / "a.pt")
    torch.save({"mel": torch.from_numpy(mel).requires_grad_()}, tmp_path / "b.pth")
    torch.save({"x": torch.from_numpy(mel)}, tmp_path / "c.pt")
    for file in tmp_path.iterdir():
        assert np.array_equal(read_mel(file, SPEC), mel), file


def test_files_without_a_mel_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(MelError, match="holds no mel"):
        read_mel(tmp_path / "other.pt", SPEC)
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="damaged.pt"):
        read_mel(tmp_path / "damaged.pt", SPEC)


def test_a_tensor_with_gradients_names_detach() -> None:
    with pytest.raises(MelError, match=r"requires grad.*mel.detach\(\)"):
        SPEC.check(torch.zeros(80, 9, requires_grad=True))
