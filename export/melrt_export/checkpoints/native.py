"""melrt's own checkpoints: `model.safetensors` with folded weights, and `config.json` beside it.

`config.json` may hold `normalisation`, a `mean` and a `scale` for each band that the training took off the mel; it is folded into
the first convolution as the checkpoint is read, so that callers hand over plain log-mels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import BundleError, CheckpointError
from melrt.files import whole_folder
from melrt.mel import MelSpec
from melrt_export.checkpoints.checkpoint import Checkpoint, fold_normalisation, named_tensors, sha256_of
from melrt_export.checkpoints.reading import read_json, read_safetensors
from melrt_export.config import GeneratorConfig

NAME = "melrt"
FILES = "model.safetensors with config.json"
VERSION = 1


def find(path: Path) -> Path | None:
    """The checkpoint file at this path, or None."""
    file = path if path.is_file() else path / "model.safetensors"
    return file if file.suffix == ".safetensors" and file.is_file() else None


def load(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: Damaged, of a newer version, or tensors of another network.
    """
    path = file.parent / "config.json"
    values = read_json(path)
    if values.get("format") != NAME or type(values.get("version")) is not int:
        raise CheckpointError(f'{path} is not the config of a melrt checkpoint: it needs "format": "melrt" and a version.')
    if values["version"] > VERSION:
        raise CheckpointError(f"{path} has version {values['version']}; this melrt reads up to {VERSION}: pip install --upgrade melrt")
    try:
        config = GeneratorConfig.from_dict(values["generator"])
        spec = MelSpec.from_dict(values["mel"])
    except (KeyError, TypeError, AttributeError, BundleError) as error:
        raise CheckpointError(f"{path} lacks a section or has a wrong one: {error}") from error
    if spec.n_mels != config.in_channels:
        raise CheckpointError(f"{path}: the generator takes {config.in_channels} bands, the mel convention has {spec.n_mels}.")
    state = {name: value.astype(np.float32) for name, value in read_safetensors(file).items()}
    weights = named_tensors(state, {name: name for name, _ in config.convolutions()}, config)
    if "normalisation" in values:
        weights = fold_normalisation(weights, config, *_normalisation(values["normalisation"], config.in_channels, path))
    return Checkpoint(
        name=str(values.get("name", file.stem)), format=NAME, source=file, sha256=sha256_of(file), config=config, weights=weights,
        spec=spec,
    )  # fmt: skip


def _normalisation(values: Any, bands: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale per band, that the network was trained to have taken off its input."""
    try:
        mean, scale = (np.array(values[name], np.float64).reshape(bands) for name in ("mean", "scale"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: normalisation is not a mean and a scale for each of {bands} bands ({error}).") from error
    if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise CheckpointError(f"{path}: normalisation has a value that is not finite, or a scale that is not above 0.")
    return mean, scale


def save(folder: Path, checkpoint: Checkpoint, dtype: type[np.floating] = np.float32) -> None:
    """Write a checkpoint; the folder appears whole or not at all.

    Args:
        folder: Made anew; a checkpoint that is there is replaced.
        checkpoint: What to write.
        dtype: Of the stored weights; float16 halves the file.

    Raises:
        CheckpointError: The folder exists and is something else.
    """
    from safetensors.numpy import save as encode

    if folder.exists() and find(folder) is None:
        raise CheckpointError(f"{folder} exists and is no melrt checkpoint; give another name.")
    config = {
        "format": NAME, "version": VERSION, "name": checkpoint.name,
        "generator": checkpoint.config.to_dict(), "mel": checkpoint.spec.to_dict(),
    }  # fmt: skip
    with whole_folder(folder) as temporary:
        weights = {name: np.ascontiguousarray(value, dtype) for name, value in sorted(checkpoint.weights.items())}
        (temporary / "model.safetensors").write_bytes(encode(weights))
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
