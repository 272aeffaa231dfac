"""The checkpoint that every project's reader returns, and the steps that the readers share.

These steps fold weight norm, rename and check tensors, fold the mel normalization, and hash files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import CheckpointError, ConfigError
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.generator.config import GeneratorConfig

State = Mapping[str, np.ndarray]

# Magnitude and direction, as named by torch.nn.utils.weight_norm and by torch.nn.utils.parametrizations.weight_norm.
_WEIGHT_NORM = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained generator, with weight norm folded and its tensors renamed."""

    name: str
    """Name of the voice."""
    format: str
    """Project whose file layout the checkpoint has."""
    source: Path
    """File with the weights."""
    sha256: str
    """SHA-256 of `source`, hexadecimal."""
    config: GeneratorConfig
    """Shape of the generator."""
    weights: dict[str, np.ndarray]
    """float32 tensors with weight norm folded, named as in `config.tensors()`."""
    spec: MelSpec
    """Mel convention of the input, a plain log-mel: the project's normalization is part of `config` and `weights`."""
    edges: Edges = field(default_factory=Edges)
    """Frames that the project adds at the ends of an utterance at inference."""
    normalization: Normalization | None = None
    """Per-band mel normalization used in training; None for none."""
    lacks_statistics: bool = False
    """True if the training normalized its mels but the checkpoint lacks the statistics. The voice then takes normalized mels."""


def fold_weight_norm(state: State) -> dict[str, np.ndarray]:
    """Replace each weight-norm pair by its weight g · v / ‖v‖, where the norm runs over all axes but the first.

    The first axis of a transposed convolution (C_in, C_out, K) is the input channel, so there each input channel has its own norm
    (dim=0 is PyTorch's default).

    Args:
        state: A state dict with either naming of the pair, or without weight norm.

    Returns:
        float32 tensors, computed in float64.

    Raises:
        CheckpointError: One half of a pair is missing, a magnitude has a wrong shape, or a direction has length zero.
    """
    folded = {}
    for name, value in state.items():
        stem, part = _split_weight_norm(name)
        if part is None:
            folded[name] = value.astype(np.float32)
        elif part == 1:
            folded[f"{stem}weight"] = _fold_pair(state, stem, name)
        elif not any(f"{stem}{direction}" in state for _, direction in _WEIGHT_NORM):
            raise CheckpointError(f"{name} is a weight-norm magnitude without its direction. The checkpoint needs both.")
    return folded


def _split_weight_norm(name: str) -> tuple[str, int | None]:
    """Split a tensor's name into its stem and its part of a weight-norm pair: 0 magnitude, 1 direction, None neither."""
    for pair in _WEIGHT_NORM:
        for part, suffix in enumerate(pair):
            if name == suffix or name.endswith("." + suffix):
                return name[: -len(suffix)], part
    return name, None


def _fold_pair(state: State, stem: str, direction_name: str) -> np.ndarray:
    v = state[direction_name].astype(np.float64)
    g = next((state[stem + magnitude] for magnitude, _ in _WEIGHT_NORM if stem + magnitude in state), None)
    if g is None:
        raise CheckpointError(f"{direction_name} is a weight-norm direction without its magnitude. The checkpoint needs both.")
    if not v.ndim:
        raise CheckpointError(f"{direction_name} is a single number. A weight-norm direction has the shape of its weight.")
    if g.size != len(v):
        raise CheckpointError(f"{stem}: magnitude of shape {g.shape} for a direction of shape {v.shape}; expected {len(v)} values.")
    norm = np.sqrt((v**2).sum(axis=tuple(range(1, v.ndim))))
    if not (norm > 0).all():
        raise CheckpointError(f"{direction_name} has a direction of length zero at index {int(np.argmin(norm))}; the weight is undefined.")
    factor = (g.reshape(-1).astype(np.float64) / norm).reshape((-1,) + (1,) * (v.ndim - 1))
    return np.asarray(v * factor, np.float32)


def rename_tensors(state: State, names: Mapping[str, str], config: GeneratorConfig) -> dict[str, np.ndarray]:
    """Rename the tensors of a folded state dict to melrt's names, and check them against the generator's shape.

    Args:
        state: Folded tensors under the project's names.
        names: The project's name of each convolution of `config`, by melrt's name.
        config: The generator's shape.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of a wrong shape, or hold values that are not finite. The message names them.
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
        raise CheckpointError(f"the tensors do not match the generator {config}: {'; '.join(problems[:8])}{more}.")
    return {ours: state[name] for name, (ours, _) in expected.items()}


def fold_normalization(
    config: GeneratorConfig, weights: State, normalization: Normalization | None
) -> tuple[GeneratorConfig, dict[str, np.ndarray]]:
    """Return the generator that takes plain log-mels: the normalization becomes part of its config and weights.

    Clipping becomes a node. The per-band affine map is folded into the first convolution, which is exact because it commutes with
    reflection and replication. With zero padding it does not commute, and without a bias there is no place for the mean: then the
    map becomes a node too.

    Args:
        config: The generator's shape.
        weights: Folded weights under melrt's names; not changed.
        normalization: The project's normalization of log-mels.

    Raises:
        CheckpointError: The number of bands differs, or the generator already normalizes its input.
    """
    if normalization is None:
        return config, dict(weights)
    mean, scale = np.array(normalization.mean), np.array(normalization.scale)
    if len(mean) != config.in_channels:
        raise CheckpointError(f"the normalization has {len(mean)} bands, and the generator takes {config.in_channels}.")
    if config.input_affine:
        raise CheckpointError("the generator already normalizes its input (input_affine). Remove the second normalization.")
    config = replace(config, input_clip=normalization.clip or config.input_clip)
    if config.padding_mode == "zeros" or not config.bias:
        affine = {"input.mean": mean.astype(np.float32), "input.scale": scale.astype(np.float32)}
        return replace(config, input_affine=True), {**weights, **affine}
    first = weights["first.weight"].astype(np.float64) / scale[:, None]
    bias = weights["first.bias"].astype(np.float64) - (first * mean[:, None]).sum(axis=(1, 2))
    folded = {"first.weight": first.astype(np.float32), "first.bias": bias.astype(np.float32)}
    return config, {**weights, **folded}


def read_normalization(mean: Any, scale: Any, path: Path, bands: int) -> Normalization:
    """Return the normalization with this mean and scale, each an array of any shape with one number per band.

    Raises:
        CheckpointError: The number of values is wrong, a value is not finite, or a scale is not above 0.
    """
    try:
        means, scales = (np.asarray(values, np.float64).reshape(bands).tolist() for values in (mean, scale))
        return Normalization(tuple(means), tuple(scales))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: normalization is not a mean and a scale for each of {bands} bands ({error}).") from error


def build_mel_spec(values: Mapping[str, Any], path: Path) -> MelSpec:
    """Return the mel convention with these fields; every other field is that of melgan-neurips.

    Raises:
        CheckpointError: A value is not allowed; the message names `path`.
    """
    try:
        return MelSpec.from_dict({**MelSpec().to_dict(), **values})
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def strip_prefix(state: State, prefix: str) -> dict[str, np.ndarray]:
    """Return the tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
