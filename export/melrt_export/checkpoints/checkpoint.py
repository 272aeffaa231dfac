"""What every loader returns, and what they share: folding, comparing tensors, hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import BundleError, CheckpointError
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.generator.config import GeneratorConfig

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
    """The mel convention of the input: plain log-mels, a normalization of the project is part of config and weights."""
    edges: Edges = field(default_factory=Edges)
    """What the project does at the ends of an utterance."""
    normalization: Normalization | None = None
    """What the training took off its mels."""
    lacks_statistics: bool = False
    """The training took something off its mels, and the checkpoint does not say what: the voice takes normalized mels."""


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
    if not v.ndim:
        raise CheckpointError(f"{direction_name} is a single number; a direction has the weight's shape.")
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


def with_normalization(
    config: GeneratorConfig, weights: State, normalization: Normalization | None
) -> tuple[GeneratorConfig, dict[str, np.ndarray]]:
    """The generator that takes plain log-mels: clipping becomes a node, and the affine map part of the first convolution.

    Folding is exact because a per-band affine map commutes with reflection and replication. With zeros it does not, and without a bias
    there is nothing to fold the mean into: then the map is a node too.

    Args:
        config: The generator's shape.
        weights: Folded weights under melrt's names; not changed.
        normalization: What the project does to its log-mels.

    Raises:
        CheckpointError: It is of another number of bands, or the second one.
    """
    if normalization is None:
        return config, dict(weights)
    mean, scale = np.array(normalization.mean), np.array(normalization.scale)
    if len(mean) != config.in_channels:
        raise CheckpointError(f"the normalization is of {len(mean)} bands, the generator takes {config.in_channels}.")
    if config.input_affine:
        raise CheckpointError("the generator normalizes its input already (input_affine), and a second normalization is given.")
    config = replace(config, input_clip=normalization.clip or config.input_clip)
    if config.padding_mode == "zeros" or not config.bias:
        affine = {"input.mean": mean.astype(np.float32), "input.scale": scale.astype(np.float32)}
        return replace(config, input_affine=True), {**weights, **affine}
    first = weights["first.weight"].astype(np.float64) / scale[:, None]
    bias = weights["first.bias"].astype(np.float64) - (first * mean[:, None]).sum(axis=(1, 2))
    folded = {"first.weight": first.astype(np.float32), "first.bias": bias.astype(np.float32)}
    return config, {**weights, **folded}


def read_normalization(mean: Any, scale: Any, path: Path, bands: int) -> Normalization:
    """A mean and a scale per band, from arrays of any shape with that many numbers.

    Raises:
        CheckpointError: Other numbers of values, values that are not finite, or a scale that is not above 0.
    """
    try:
        means, scales = (np.asarray(values, np.float64).reshape(bands).tolist() for values in (mean, scale))
        return Normalization(tuple(means), tuple(scales))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: normalization is not a mean and a scale for each of {bands} bands ({error}).") from error


def mel_spec(values: Mapping[str, Any], path: Path) -> MelSpec:
    """A mel convention from what a project's config says; the rest as in melgan-neurips.

    Raises:
        CheckpointError: A value that cannot be.
    """
    try:
        return MelSpec.from_dict({**MelSpec().to_dict(), **values})
    except (BundleError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def sub_state(state: State, prefix: str) -> dict[str, np.ndarray]:
    """The tensors below this prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def sha256_of(path: Path) -> str:
    """Of the whole file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
