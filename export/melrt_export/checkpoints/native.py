"""melrt's own checkpoints: `model.safetensors` with folded weights, and `config.json` beside it.

`config.json` may hold `normalization`, a `mean` and a `scale` per band that the training applied to the mel. It is folded into the
first convolution when the checkpoint is read, so that callers pass plain log-mels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from melrt.errors import CheckpointError, ConfigError
from melrt.files.atomic import atomic_folder
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.checkpoints import training_run
from melrt_export.checkpoints.checkpoint import Checkpoint, fold_normalization, read_normalization, rename_tensors, sha256_of
from melrt_export.checkpoints.reading import CheckpointFile, read_json, read_safetensors
from melrt_export.generator.config import GeneratorConfig

NAME = "melrt"
FILES = "model.safetensors with config.json"
PATTERNS: tuple[str, ...] = ("model.safetensors",)
VERSION = 1


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file is a safetensors file and not the state of a training, by its name."""
    return file.path.suffix == ".safetensors" and file.path.name != training_run.STATE


def load(file: CheckpointFile) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: A file is damaged, has a newer version, or holds the tensors of another network.
    """
    path = file.path.parent / "config.json"
    values = read_json(path)
    if values.get("format") != NAME or type(values.get("version")) is not int:
        raise CheckpointError(f'{path} is not the config of a melrt checkpoint: it needs "format": "melrt" and a version.')
    if values["version"] > VERSION:
        raise CheckpointError(f"{path} has version {values['version']}; this melrt reads up to {VERSION}: pip install --upgrade melrt")
    try:
        config = GeneratorConfig.from_dict(values["generator"])
        spec = MelSpec.from_dict(values["mel"])
        edges = Edges(**values.get("edges", {}))
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} lacks a section or has a wrong one: {error}") from error
    if spec.normalization is not None:
        raise CheckpointError(f"{path}: mel has a normalization, but a voice takes plain log-mels. Move it beside generator and mel.")
    if spec.n_mels != config.in_channels:
        raise CheckpointError(f"{path}: the generator takes {config.in_channels} bands, and the mel convention has {spec.n_mels}.")
    state = {name: value.astype(np.float32) for name, value in read_safetensors(file.path).items()}
    weights = rename_tensors(state, {name: name for name, _ in config.convolutions()}, config)
    normalization = None
    if "normalization" in values:
        given = values["normalization"] if isinstance(values["normalization"], dict) else {}
        normalization = read_normalization(given.get("mean"), given.get("scale"), path, config.in_channels)
        config, weights = fold_normalization(config, weights, normalization)
    return Checkpoint(
        name=str(values.get("name", file.path.stem)), format=NAME, source=file.path, sha256=sha256_of(file.path), config=config,
        weights=weights, spec=spec, edges=edges, normalization=normalization,
    )  # fmt: skip


def save(folder: Path, checkpoint: Checkpoint, dtype: type[np.floating] = np.float32, metadata: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint atomically: the folder appears complete or not at all.

    Args:
        folder: Folder to create; an existing melrt checkpoint is replaced.
        checkpoint: Checkpoint to write.
        dtype: Type of the stored weights; float16 halves the file.
        metadata: Texts to store in the header of the weights' file, which are then replaced together with the weights.

    Raises:
        CheckpointError: The folder exists and is not a melrt checkpoint.
    """
    from safetensors.numpy import save as encode

    if folder.exists() and not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder} exists and is not a melrt checkpoint. Choose another name.")
    config = {
        "format": NAME, "version": VERSION, "name": checkpoint.name,
        "generator": checkpoint.config.to_dict(), "mel": checkpoint.spec.to_dict(), "edges": asdict(checkpoint.edges),
    }  # fmt: skip
    with atomic_folder(folder) as temporary:
        weights = {name: np.ascontiguousarray(value, dtype) for name, value in sorted(checkpoint.weights.items())}
        (temporary / "model.safetensors").write_bytes(encode(weights, dict(metadata) if metadata else None))
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
