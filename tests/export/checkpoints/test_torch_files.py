"""Files of `torch.save`, read without PyTorch: the same tensors as PyTorch reads."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from melrt.errors import CheckpointError
from melrt_export.checkpoints.torch_files import StoredTensor, read_pickle, to_arrays
from melrt_export.torch_mels import read_torch_mel


def _content() -> dict:
    noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    state = OrderedDict((str(kind), (noise * 50).to(kind)) for kind in (*kinds, torch.bool))
    views = {"transposed": noise.T, "part": noise[1:, ::3], "same": noise, "scalar": noise[2, 3], "empty": noise[:0], "row": noise[5]}
    network = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.BatchNorm1d(3))
    return {
        "state": state, "views": views, "network": network.state_dict(), "parameter": torch.nn.Parameter(noise), "size": noise.shape,
        "milestones": Counter({200: 1}), "steps": [1, 2.5, -3, None, True, "text", b"bytes", (1,)], "seen": {3, 4},
    }  # fmt: skip


@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (False, 2), (True, 4)])
def test_every_tensor_is_that_of_pytorch(tmp_path: Path, zipped: bool, protocol: int) -> None:
    file = tmp_path / "x.pt"
    torch.save(_content(), file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found, expected = read_pickle(file), torch.load(file, weights_only=False)
    assert list(found) == list(expected)
    assert (found["milestones"], found["steps"], sorted(found["seen"])) == (expected["milestones"], expected["steps"], [3, 4])
    for part in ("state", "views", "network"):
        assert list(found[part]) == list(expected[part])
        for name, tensor in expected[part].items():
            assert found[part][name].kind == str(tensor.dtype).removeprefix("torch.")
            assert found[part][name].is_real == tensor.is_floating_point()
            values = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy()
            assert found[part][name].numpy().dtype == values.dtype
            np.testing.assert_array_equal(found[part][name].numpy(), values, err_msg=name)
    assert np.array_equal(found["parameter"].numpy(), expected["parameter"].detach().numpy())
    arrays = to_arrays(file, {"w": found["state"]["torch.float32"]})
    with pytest.raises(ValueError, match="read-only"):
        arrays["w"][0, 0] = 1


def test_damaged_weights_are_found(tmp_path: Path) -> None:
    """PyTorch does not compare the checksums of the zip file."""
    file = tmp_path / "x.pt"
    torch.save({"w": torch.full((1000,), 0.5)}, file)
    data = bytearray(file.read_bytes())
    data[data.index(np.float32(0.5).tobytes() * 4) + 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read.*CRC"):
        read_pickle(file)


def test_mels_of_pytorch_do_not_expand(tmp_path: Path) -> None:
    file = tmp_path / "mel.pt"
    torch.save({"mel": torch.zeros(1).expand(80, 1 << 30)}, file)
    with pytest.raises(CheckpointError, match="tensors of 343597383680 bytes"):
        read_torch_mel(file)
    torch.save(torch.arange(12.0, dtype=torch.bfloat16).reshape(3, 4), file)
    assert np.array_equal(read_torch_mel(file), np.arange(12, dtype=np.float32).reshape(3, 4))
    assert isinstance(read_pickle(file), StoredTensor)
