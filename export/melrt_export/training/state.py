"""A training on disk: both networks and their optimizers in one safetensors file, which is replaced in one step.

Nothing in it is ever executed, and a process that is killed while it writes leaves the file of before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from melrt.errors import CheckpointError, TrainingError
from melrt.files.atomic import atomic_write
from melrt_export.checkpoints.reading import read_safetensors
from melrt_export.training.step import AdversarialStep

FILE = "training.safetensors"
VERSION = 1
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class History:
    """How far a training is, and how good it was on the way."""

    step: int = 0
    """Steps done."""
    errors: list[tuple[int, float]] = field(default_factory=list)
    """Each validation: after how many steps, and the log-mel error."""

    @property
    def best(self) -> tuple[int, float]:
        """The validation with the smallest error."""
        return min(self.errors, key=lambda entry: entry[1])


def save_state(run: Path, step: AdversarialStep, history: History, voice: Mapping[str, Any]) -> None:
    """Write the training's state in place of the one before.

    Args:
        run: The run's folder.
        step: Networks and optimizers.
        history: How far it is.
        voice: Shape and mel convention, plain values: a run is resumed only with the same.
    """
    from safetensors.torch import save as encode

    header = {
        "format": "melrt training", "version": VERSION, "step": history.step, "errors": history.errors, "voice": voice,
        "scaler": step.scaler.state_dict(),
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(step)}
    with atomic_write(run / FILE) as temporary:
        temporary.write_bytes(encode(tensors, {"melrt": json.dumps(header)}))


def load_state(run: Path, step: AdversarialStep, voice: Mapping[str, Any]) -> History:
    """Put a run's state into these networks and optimizers.

    Raises:
        TrainingError: No state there, a damaged one, or one of another network or voice; what differs is named.
    """
    path = run / FILE
    if not path.is_file():
        raise TrainingError(f"{path} does not exist, so there is nothing to resume. Start without --resume.")
    header = _header(path)
    try:
        tensors = {name: torch.from_numpy(value) for name, value in read_safetensors(path).items()}
    except CheckpointError as error:
        raise TrainingError(f"{error} Start a new run; its best/ can be the start_from.") from error
    if differing := sorted(key for key in set(voice) | set(header["voice"]) if voice.get(key) != header["voice"].get(key)):
        raise TrainingError(f"{path} is of a voice with another {' and '.join(differing)}. Resume with the config it was begun with.")
    for prefix, network, optimizer in _parts(step):
        _load_network(path, prefix, network, tensors)
        _load_optimizer(path, prefix, network, optimizer, tensors)
    if tensors:
        raise TrainingError(f"{path} holds {len(tensors)} tensors of another network, {min(tensors)} among them; use the run's own config.")
    step.scaler.load_state_dict(header["scaler"])
    return History(header["step"], [(int(at), float(error)) for at, error in header["errors"]])


def _parts(step: AdversarialStep) -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]:
    yield "generator", step.generator, step.generator_optimizer
    yield "discriminator", step.discriminator, step.discriminator_optimizer


def _tensors(step: AdversarialStep) -> Iterator[tuple[str, Tensor]]:
    for prefix, network, optimizer in _parts(step):
        for name, tensor in network.state_dict().items():
            yield f"{prefix}.{name}", tensor
        for name, parameter in network.named_parameters():
            for moment, value in optimizer.state.get(parameter, {}).items():
                yield f"{prefix}_optimizer.{name}.{moment}", value


def _header(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            header = json.loads(file.metadata()["melrt"])
        if header["version"] > VERSION:
            raise TrainingError(f"{path} has version {header['version']}; this melrt reads up to {VERSION}: pip install --upgrade melrt")
        if not (type(header["step"]) is int and header["step"] >= 0 and all(len(entry) == 2 for entry in header["errors"])):
            raise ValueError("wrong step or errors")
        if not isinstance(header["voice"], dict) or not isinstance(header["scaler"], dict):
            raise ValueError("no voice or scaler")
    except TrainingError:
        raise
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise TrainingError(
            f"{path} is not a training's state, or damaged ({error}). Start a new run; its best/ can be the start_from."
        ) from error
    return dict(header)


def _load_network(path: Path, prefix: str, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    state = {}
    for name, own in network.state_dict().items():
        state[name] = _taken(path, f"{prefix}.{name}", own, tensors)
    network.load_state_dict(state)


def _load_optimizer(path: Path, prefix: str, network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """An optimizer that has not stepped yet has no state, which is one too."""
    if not any(name.startswith(f"{prefix}_optimizer.") for name in tensors):
        return
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    state = {}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        like = {"step": torch.tensor(0.0), "exp_avg": parameter, "exp_avg_sq": parameter}
        stem = f"{prefix}_optimizer.{names[id(parameter)]}"
        state[i] = {moment: _taken(path, f"{stem}.{moment}", like[moment], tensors) for moment in _MOMENTS}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _taken(path: Path, name: str, like: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    if name not in tensors or tensors[name].shape != like.shape:
        there = f"of shape {tuple(tensors[name].shape)}" if name in tensors else "missing"
        raise TrainingError(f"{path}: {name} is {there}; expected shape {tuple(like.shape)}. Resume with the config it was begun with.")
    value = tensors.pop(name)
    if not np.isfinite(value.numpy()).all():
        raise TrainingError(f"{path}: {name} holds values that are not finite. Start a new run; its best/ can be the start_from.")
    return value
