"""Runs of `melrt train`: the saved state, which holds the weights after the last step, and the checkpoints in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from melrt.checks import number, whole
from melrt.errors import CheckpointError, ConfigError
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.checkpoints.checkpoint import Checkpoint, fold_weight_norm, rename_tensors, sha256_of, strip_prefix
from melrt_export.checkpoints.reading import CheckpointFile, read_metadata, read_safetensors
from melrt_export.generator.config import GeneratorConfig

NAME = "melrt training"
STATE = "training.safetensors"
FILES = f"{STATE}, the state of a training"
PATTERNS: tuple[str, ...] = (STATE,)
VERSION = 2
_MOST = 1 << 53
_STEP = whole(0, _MOST)


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
    metadata = read_metadata(path)
    try:
        header = dict(json.loads(metadata["melrt"]))
        if header["version"] == VERSION:
            complete = (
                _STEP.accepts(header["step"]) and all(_is_validation(*entry) for entry in header["validations"])
                and isinstance(header["voice"], dict) and all(map(number().accepts, header["scaler"].values()))
            )  # fmt: skip
            if not complete:
                raise ValueError("its description is malformed")
    except Exception as error:  # a damaged description can raise any exception
        raise CheckpointError(f"{path} is not the state of a training, or it is damaged ({error}).") from error
    if header["version"] != VERSION:
        raise CheckpointError(f"{path} has version {header['version']}; this melrt reads {VERSION}. Use the melrt that wrote it.")
    return header


def _is_validation(step: Any, log_mel: Any, error: Any) -> bool:
    return _STEP.accepts(step) and all(type(value) in (int, float) and abs(value) < _MOST for value in (log_mel, error))


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
