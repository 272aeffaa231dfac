"""Runs of `melrt train`: the saved state, which holds the weights after the last step, and the checkpoints in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from melrt.errors import CheckpointError, ConfigError
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.checkpoints.checkpoint import Checkpoint, fold_weight_norm, rename_tensors, sha256_of, strip_prefix
from melrt_export.checkpoints.reading import CheckpointFile, read_safetensors
from melrt_export.generator.config import GeneratorConfig

NAME = "melrt training"
STATE = "training.safetensors"
FILES = f"{STATE}, the state of a training"
PATTERNS: tuple[str, ...] = (STATE,)
VERSION = 2


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file has the name of a training's state."""
    return file.path.name == STATE


def load(file: CheckpointFile) -> Checkpoint:
    """Read the weights after the last saved step.

    Raises:
        CheckpointError: The file is damaged, has another version, or belongs to a training in INT8.
    """
    header = read_header(file.path)
    voice = header["voice"]
    try:
        config, spec, edges = GeneratorConfig.from_dict(voice["generator"]), MelSpec.from_dict(voice["mel"]), Edges(**voice["edges"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{file.path} describes no voice: {error}") from error
    if voice.get("int8"):
        raise CheckpointError(f"{file.path} was trained in INT8. Put its `best` folder into a bundle with `melrt requantize`.")
    state = fold_weight_norm(strip_prefix(read_safetensors(file.path), "generator."))
    weights = rename_tensors(state, {name: name for name, _ in config.convolutions()}, config)
    return Checkpoint(str(header["name"]), NAME, file.path, sha256_of(file.path), config, weights, spec, edges)


def read_header(path: Path) -> dict[str, Any]:
    """Return the description of a training's state: `step`, `validations`, `name`, `voice` and `scaler`.

    Raises:
        CheckpointError: The file is not such a state, is damaged, or has another version.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            header = dict(json.loads(file.metadata()["melrt"]))
        if header["version"] == VERSION:
            complete = (
                type(header["step"]) is int and header["step"] >= 0 and all(len(entry) == 3 for entry in header["validations"])
                and isinstance(header["voice"], dict) and isinstance(header["scaler"], dict)
            )  # fmt: skip
            if not complete:
                raise ValueError("its description is malformed")
    except Exception as error:  # a damaged file can raise any exception in the reader
        raise CheckpointError(f"{path} is not the state of a training, or it is damaged ({error}).") from error
    if header["version"] != VERSION:
        raise CheckpointError(f"{path} has version {header['version']}; this melrt reads {VERSION}. Use the melrt that wrote it.")
    return header


def checkpoint_of(run: Path, name: str) -> Path:
    """Return a checkpoint in the folder of a run.

    Args:
        run: Folder of the run.
        name: Name of the checkpoint's folder, such as `best` or `last-average`, or the step N of `step-N`.

    Raises:
        CheckpointError: The run has no such checkpoint. The message lists those that it has.
    """
    found = run / (f"step-{name}" if name[:1].isdigit() else name)
    kept = sorted(path.parent.name for path in run.glob("*/model.safetensors"))
    if found.name not in kept or found.parent != run:
        has = f"; it has {', '.join(kept)}" if kept else ". Give the folder of a run of `melrt train`"
        raise CheckpointError(f"{run} has no checkpoint {found.name}{has}.")
    return found
