"""What every loader returns, and what they share: folding, comparing tensors, hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.errors import CheckpointError
from melrt.mel import MelSpec
from melrt_export.config import GeneratorConfig

State = Mapping[str, np.ndarray]

# The norm's magnitude and direction: torch.nn.utils.weight_norm, and torch.nn.utils.parametrizations.weight_norm.
_WEIGHT_NORM = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A generator as its project trained it, folded and renamed."""

    name: str
    """A name for the voice."""
    format: str
    """The project whose layout it has."""
    source: Path
    """The file with the weights."""
    sha256: str
    """Of that file."""
    config: GeneratorConfig
    """The generator's shape."""
    weights: dict[str, np.ndarray]
    """Folded float32 tensors, named as `config.tensors()` names them."""
    spec: MelSpec
    """The mel convention of the network's input."""


def fold_weight_norm(state: State) -> dict[str, np.ndarray]:
    """Replace each weight-norm pair by the weight that it stands for: g · v / ‖v‖, the norm over all axes but the first.

    That is the first axis of transposed convolutions too, (C_in, C_out, K): a norm per input channel (dim=0 is PyTorch's default).

    Args:
        state: A state dict in either spelling, or without weight norm.

    Returns:
        float32 tensors; computed in float64.

    Raises:
        CheckpointError: Half of a pair, a magnitude that does not fit, or a direction of length zero.
    """
    folded = {}
    for name, value in state.items():
        stem, last = _split(name)
        if last is None:
            folded[name] = value.astype(np.float32)
        elif last == 1:
            folded[f"{stem}weight"] = _folded(state, stem, name)
        elif not any(f"{stem}{direction}" in state for _, direction in _WEIGHT_NORM):
            raise CheckpointError(f"{name} has no direction beside it; a weight-norm pair needs both.")
    return folded


def _split(name: str) -> tuple[str, int | None]:
    for pair in _WEIGHT_NORM:
        for part, suffix in enumerate(pair):
            if name == suffix or name.endswith("." + suffix):
                return name[: -len(suffix)], part
    return name, None


def _folded(state: State, stem: str, direction_name: str) -> np.ndarray:
    v = state[direction_name].astype(np.float64)
    g = next((state[stem + magnitude] for magnitude, _ in _WEIGHT_NORM if stem + magnitude in state), None)
    if g is None:
        raise CheckpointError(f"{direction_name} has no magnitude beside it; a weight-norm pair needs both.")
    if g.size != len(v):
        raise CheckpointError(f"{stem}: magnitude of shape {g.shape} for a direction of shape {v.shape}; expected {len(v)} values.")
    norm = np.sqrt((v**2).sum(axis=tuple(range(1, v.ndim))))
    if not (norm > 0).all():
        raise CheckpointError(f"{direction_name} has a direction of length zero at index {int(np.argmin(norm))}; the weight is undefined.")
    factor = (g.reshape(-1).astype(np.float64) / norm).reshape((-1,) + (1,) * (v.ndim - 1))
    return np.asarray(v * factor, np.float32)


def named_tensors(state: State, names: Mapping[str, str], config: GeneratorConfig) -> dict[str, np.ndarray]:
    """Rename a folded state dict to melrt's names, and hold it against the generator's shape.

    Args:
        state: Folded tensors under their project's names.
        names: For each convolution of `config`, its project's name.
        config: The generator's shape.

    Raises:
        CheckpointError: Missing, extra or wrongly shaped tensors, all of them named, or a value that is not finite.
    """
    expected = {}
    for ours, shape in config.tensors():
        convolution, _, kind = ours.rpartition(".")
        expected[f"{names.get(convolution, convolution)}.{kind}"] = (ours, shape)
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    for name, (_, shape) in expected.items():
        if name in state and state[name].shape != shape:
            problems.append(f"{name} has shape {state[name].shape}, expected {shape}")
        elif name in state and not np.isfinite(state[name]).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(f"the tensors are not those of the generator {config}: {'; '.join(problems[:8])}{more}.")
    return {ours: state[name] for name, (ours, _) in expected.items()}


def fold_normalisation(weights: State, config: GeneratorConfig, mean: np.ndarray, scale: np.ndarray) -> dict[str, np.ndarray]:
    """Fold `(mel - mean) / scale`, per band, into the first convolution.

    Exact because a per-band affine map commutes with reflection and replication; with zeros it does not.

    Args:
        weights: Folded weights under melrt's names; not changed.
        config: The generator's shape.
        mean: Subtracted from each band, shape (M,).
        scale: Divides each band, shape (M,).

    Raises:
        CheckpointError: The generator pads with zeros, or has no bias to fold into.
    """
    if config.padding_mode == "zeros" or not config.bias:
        raise CheckpointError("a normalisation folds only into a first convolution that has a bias and pads by reflection or replication.")
    first = weights["first.weight"].astype(np.float64) / np.asarray(scale, np.float64)[:, None]
    shift = (first * np.asarray(mean, np.float64)[:, None]).sum(axis=(1, 2))
    bias = weights["first.bias"].astype(np.float64) - shift
    return {**weights, "first.weight": first.astype(np.float32), "first.bias": bias.astype(np.float32)}


def sha256_of(path: Path) -> str:
    """Of the whole file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
