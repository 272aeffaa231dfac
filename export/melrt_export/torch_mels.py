"""Mels in files that PyTorch wrote (`torch.save`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from melrt.errors import MelError
from melrt.types import Mel


def read_torch_mel(path: Path) -> Mel:
    """Read a mel that `torch.save` wrote: a tensor, or a dict with one tensor or one named `mel`.

    Raises:
        MelError: The file holds something else.
        CheckpointError: The file cannot be read, or holds objects other than tensors and plain values.
    """
    from melrt_export.checkpoints.torch_files import StoredTensor, read_pickle

    value = read_pickle(path)
    if isinstance(value, dict):
        value = value.get("mel", next(iter(value.values())) if len(value) == 1 else None)
    if not isinstance(value, StoredTensor):
        raise MelError(f"{path} holds no mel; expected a tensor, or a dict with one tensor or one named 'mel'.")
    return np.asarray(value.numpy(), np.float32)
