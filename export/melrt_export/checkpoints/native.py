"""melrt's own checkpoints: `model.safetensors` with folded weights, and `config.json` beside it.

`config.json` may hold `normalization`, a `mean` and a `scale` for each band that the training took off the mel; it is folded into
the first convolution as the checkpoint is read, so that callers hand over plain log-mels.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from melrt.errors import BundleError, CheckpointError
from melrt.files.atomic import atomic_folder
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.checkpoints.checkpoint import Checkpoint, named_tensors, read_normalization, sha256_of, with_normalization
from melrt_export.checkpoints.reading import Opened, read_json, read_safetensors
from melrt_export.generator.config import GeneratorConfig

NAME = "melrt"
FILES = "model.safetensors with config.json"
PATTERNS: tuple[str, ...] = ("model.safetensors",)
VERSION = 1


def recognizes(opened: Opened) -> bool:
    """Whether this file is one of this project's."""
    return opened.file.suffix == ".safetensors"


def load(opened: Opened) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: Damaged, of a newer version, or tensors of another network.
    """
    file = opened.file
    path = file.parent / "config.json"
    values = read_json(path)
    if values.get("format") != NAME or type(values.get("version")) is not int:
        raise CheckpointError(f'{path} is not the config of a melrt checkpoint: it needs "format": "melrt" and a version.')
    if values["version"] > VERSION:
        raise CheckpointError(f"{path} has version {values['version']}; this melrt reads up to {VERSION}: pip install --upgrade melrt")
    try:
        config = GeneratorConfig.from_dict(values["generator"])
        spec = MelSpec.from_dict(values["mel"])
        edges = Edges(**values.get("edges", {}))
    except (KeyError, TypeError, AttributeError, BundleError) as error:
        raise CheckpointError(f"{path} lacks a section or has a wrong one: {error}") from error
    if spec.normalization is not None:
        raise CheckpointError(f"{path}: mel has a normalization; a voice takes plain log-mels. Give it beside generator and mel.")
    if spec.n_mels != config.in_channels:
        raise CheckpointError(f"{path}: the generator takes {config.in_channels} bands, the mel convention has {spec.n_mels}.")
    state = {name: value.astype(np.float32) for name, value in read_safetensors(file).items()}
    weights = named_tensors(state, {name: name for name, _ in config.convolutions()}, config)
    normalization = None
    if "normalization" in values:
        given = values["normalization"] if isinstance(values["normalization"], dict) else {}
        normalization = read_normalization(given.get("mean"), given.get("scale"), path, config.in_channels)
        config, weights = with_normalization(config, weights, normalization)
    return Checkpoint(
        name=str(values.get("name", file.stem)), format=NAME, source=file, sha256=sha256_of(file), config=config, weights=weights,
        spec=spec, edges=edges, normalization=normalization,
    )  # fmt: skip


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

    if folder.exists() and not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder} exists and is no melrt checkpoint; give another name.")
    config = {
        "format": NAME, "version": VERSION, "name": checkpoint.name,
        "generator": checkpoint.config.to_dict(), "mel": checkpoint.spec.to_dict(), "edges": asdict(checkpoint.edges),
    }  # fmt: skip
    with atomic_folder(folder) as temporary:
        weights = {name: np.ascontiguousarray(value, dtype) for name, value in sorted(checkpoint.weights.items())}
        (temporary / "model.safetensors").write_bytes(encode(weights))
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
