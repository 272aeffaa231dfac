"""Saved state of a training: both networks and their optimizers in one safetensors file.

The file is replaced in one step, so a process that is killed while it writes leaves the previous state. Reading it executes no code.
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
from melrt_export.checkpoints import training_run
from melrt_export.checkpoints.reading import read_safetensors
from melrt_export.training.step import AdversarialStep

FILE = training_run.STATE
_MOMENTS = ("exp_avg", "exp_avg_sq")
_AMSGRAD = ("max_exp_avg_sq",)
_SAME_CONFIG = "Resume with the config that the run was started with."
_RESTART = "Start a new run; it can take this run's best/ folder as start_from."


@dataclass(slots=True)
class History:
    """Steps done, and the validations so far."""

    step: int = 0
    """Number of steps done."""
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    """Step, log-mel error, and error that chooses the best (`[schedule] best`) of each validation, of the better of weights and average."""
    begin: int = 0
    """Step at which the discriminators' terms begin. Once a later validation exists, those up to this step do not compete with it."""

    @property
    def errors(self) -> list[tuple[int, float]]:
        """Step and log-mel error of each validation."""
        return [(step, log_mel) for step, log_mel, _ in self.validations]

    @property
    def best(self) -> tuple[int, float]:
        """Step and log-mel error of the validation with the smallest error."""
        rivals = [entry for entry in self.validations if entry[0] > self.begin] if self.begin else []
        step, log_mel, _ = min(rivals or self.validations, key=lambda entry: entry[2])
        return step, log_mel


def save_state(run: Path, train_step: AdversarialStep, history: History, name: str, voice: Mapping[str, Any]) -> None:
    """Write the state of a training, in place of the previous one.

    Args:
        run: Folder of the run.
        train_step: Networks and optimizers.
        history: Steps done and validations.
        name: Name of the voice.
        voice: Description of the voice as plain values. A run can only be resumed with the same one.
    """
    from safetensors.torch import save as encode

    header = {
        "format": training_run.NAME, "version": training_run.VERSION, "step": history.step, "validations": history.validations,
        "name": name, "voice": voice, "scaler": train_step.scaler.state_dict(),
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(train_step)}
    with atomic_write(run / FILE) as temporary:
        temporary.write_bytes(encode(tensors, {"melrt": json.dumps(header)}))


def load_state(run: Path, train_step: AdversarialStep, voice: Mapping[str, Any]) -> History:
    """Load the state of a run into networks and optimizers.

    Args:
        run: Folder of the run.
        train_step: Networks and optimizers, which are overwritten.
        voice: Description of the voice in the config.

    Returns:
        The history of the run.

    Raises:
        TrainingError: The state does not exist, is damaged, or belongs to another network or voice. The message names the difference.
    """
    path = run / FILE
    if not path.is_file():
        raise TrainingError(f"{path} does not exist, so there is nothing to resume. Start without --resume.")
    try:
        header = training_run.read_header(path)
        tensors = {name: torch.from_numpy(value) for name, value in read_safetensors(path).items()}
    except CheckpointError as error:
        raise TrainingError(f"{error} {_RESTART}") from error
    if differing := sorted(key for key in set(voice) | set(header["voice"]) if voice.get(key) != header["voice"].get(key)):
        raise TrainingError(f"{path} belongs to a voice with another {' and '.join(differing)}. {_SAME_CONFIG}")
    for prefix, network, optimizer in _networks(train_step):
        _load_network(path, prefix, network, tensors)
        _load_optimizer(path, prefix, network, optimizer, tensors)
    if train_step.average is not None:
        _load_network(path, "average", train_step.average, tensors)
    if tensors:
        raise TrainingError(f"{path} has {len(tensors)} tensors that this network lacks, {min(tensors)} among them. {_SAME_CONFIG}")
    try:
        train_step.scaler.load_state_dict(header["scaler"])
    except (KeyError, RuntimeError) as error:
        raise TrainingError(f"{path} has no complete state of the loss scale ({error}). {_SAME_CONFIG}") from error
    return History(header["step"], [(int(at), float(log_mel), float(error)) for at, log_mel, error in header["validations"]])


def _networks(train_step: AdversarialStep) -> Iterator[tuple[str, nn.Module, torch.optim.Optimizer]]:
    yield "generator", train_step.generator, train_step.generator_optimizer
    yield "discriminator", train_step.discriminator, train_step.discriminator_optimizer


def _tensors(train_step: AdversarialStep) -> Iterator[tuple[str, Tensor]]:
    for prefix, network, optimizer in _networks(train_step):
        for name, tensor in network.state_dict().items():
            yield f"{prefix}.{name}", tensor
        for name, parameter in network.named_parameters():
            for moment, value in optimizer.state.get(parameter, {}).items():
                yield f"{prefix}_optimizer.{name}.{moment}", value
    if train_step.average is not None:
        yield from ((f"average.{name}", tensor) for name, tensor in train_step.average.state_dict().items())


def _load_network(path: Path, prefix: str, network: nn.Module, tensors: dict[str, Tensor]) -> None:
    state = {}
    for name, own in network.state_dict().items():
        state[name] = _take(path, f"{prefix}.{name}", own, tensors)
    network.load_state_dict(state)


def _load_optimizer(path: Path, prefix: str, network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the optimizer's moments, if the file has any: an optimizer that has made no step has none."""
    if not any(name.startswith(f"{prefix}_optimizer.") for name in tensors):
        return
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    moments = _MOMENTS + _AMSGRAD if optimizer.param_groups[0].get("amsgrad") else _MOMENTS
    state = {}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):
        like = {"step": torch.tensor(0.0), **dict.fromkeys(moments, parameter)}
        stem = f"{prefix}_optimizer.{names[id(parameter)]}"
        state[i] = {moment: _take(path, f"{stem}.{moment}", like[moment], tensors) for moment in like}
        if any((state[i][moment] < 0).any() for moment in like if moment != "exp_avg"):
            raise TrainingError(f"{path}: {stem} has a negative number of steps or second moment. {_RESTART}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _take(path: Path, name: str, like: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Remove a tensor from `tensors` and return it, after a check of its shape, type and values."""
    if name not in tensors or (tensors[name].shape, tensors[name].dtype) != (like.shape, like.dtype):
        found = f"has shape {tuple(tensors[name].shape)} and type {tensors[name].dtype}" if name in tensors else "is missing"
        raise TrainingError(f"{path}: {name} {found}; expected shape {tuple(like.shape)} and type {like.dtype}. {_SAME_CONFIG}")
    value = tensors.pop(name)
    if not np.isfinite(value.numpy()).all():
        raise TrainingError(f"{path}: {name} has values that are not finite. {_RESTART}")
    return value
