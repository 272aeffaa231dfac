"""Limits for untrusted files, checked before anything is allocated. Each file of this folder says which it uses."""

from __future__ import annotations

from pathlib import Path

from melrt.errors import CheckpointError

# The largest published generator has 13 M weights, 53 MB; with optimizer states and discriminators it has under 1 GB.
MAX_WEIGHTS_BYTES = 4 << 30
# Published configs have below 10 kB. PyYAML reads about 100 kB a second, and libyaml is not everywhere.
MAX_CONFIG_BYTES = 64 << 10
MAX_VALUE_LENGTH = 4096
MAX_SETTINGS = 100_000
MAX_SETTINGS_DEPTH = 50
MAX_STATISTICS_BYTES = 16 << 20
# A tensor takes about 35 operations of a pickle, four of which make tuples. The published checkpoints have up to 6,000 operations.
MAX_PICKLE_OPERATIONS = 500_000
# The hash of a tuple in a tuple in a tuple, and so on, takes a frame of the C stack for each: 8 MiB hold more than 60,000.
MAX_PICKLE_TUPLES = 30_000
# The directory of a zip file takes about 100 bytes for each file in it; that of a checkpoint lists one file for each tensor.
MAX_ZIP_DIRECTORY_BYTES = 1 << 20
# JSON in front of the tensors: about 100 bytes for each, and what a training or a calibration noted about itself.
MAX_SAFETENSORS_HEADER_BYTES = 4 << 20


def check_file_size(path: Path, limit: int) -> None:
    """Raise CheckpointError if the file is missing, or has more than `limit` bytes."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is not a file.")
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read.")
