"""melgan-neurips (descriptinc): a bare state dict of `Generator`, with or without the training's `args.yml`.

Source: `mel2wav/modules.py` (Generator, Audio2Mel) and `mel2wav/interface.py` of that project. The weights alone tell the shape;
`args.yml` is held against it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import CheckpointError
from melrt.mel import MelSpec
from melrt_export.checkpoints.checkpoint import Checkpoint, fold_weight_norm, named_tensors, sha256_of
from melrt_export.checkpoints.reading import read_state, read_yaml
from melrt_export.config import GeneratorConfig

NAME = "melgan-neurips"
FILES = "best_netG.pt or netG.pt (with or without args.yml), or any *.pt with a bare state dict"
_PREFERRED = ("best_netG.pt", "netG.pt")


def find(path: Path) -> Path | None:
    """The checkpoint file at this path, or None."""
    if path.is_file():
        return path if path.suffix in (".pt", ".pth") else None
    return next((path / name for name in _PREFERRED if (path / name).is_file()), None)


def load(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: Damaged or hostile, tensors of another network, or an `args.yml` that says something else than the weights.
    """
    state = fold_weight_norm(read_state(file))
    config = infer_config(state, file)
    weights = named_tensors(state, names(config), config)
    args = file.parent / "args.yml"
    if args.is_file():
        _compare(config, read_yaml(args), args)
    return Checkpoint(
        name=file.resolve().parent.name if file.name in _PREFERRED else file.stem,
        format=NAME, source=file, sha256=sha256_of(file), config=config, weights=weights,
        spec=MelSpec(n_mels=config.in_channels),
    )  # fmt: skip


def names(config: GeneratorConfig) -> dict[str, str]:
    """Melrt's name of each convolution to this project's: one Sequential, indexed in order."""
    result = {"first": "model.1"}
    index = 3
    for i in range(len(config.upsample_scales)):
        result[f"stages.{i}.upsample"] = f"model.{index}"
        for j in range(config.stacks):
            block = f"model.{index + 1 + j}"
            result[f"stages.{i}.blocks.{j}.dilated"] = f"{block}.block.2"
            result[f"stages.{i}.blocks.{j}.pointwise"] = f"{block}.block.4"
            result[f"stages.{i}.blocks.{j}.shortcut"] = f"{block}.shortcut"
        index += config.stacks + 2
    result["last"] = f"model.{index + 1}"
    return result


def infer_config(state: Mapping[str, np.ndarray], file: Path) -> GeneratorConfig:
    """The generator's shape from its folded weights: plain convolutions are first, upsamplings and last; the rest are blocks."""
    plain: dict[int, np.ndarray] = {}
    dilated: dict[int, np.ndarray] = {}
    for name, value in state.items():
        match = re.fullmatch(r"model\.(\d{1,4})\.(block\.2\.)?weight", name)
        if match and value.ndim == 3:
            (dilated if match[2] else plain)[int(match[1])] = value
    if len(plain) < 3 or not dilated:
        some = ", ".join(list(state)[:4])
        raise CheckpointError(
            f"{file} is not a generator of {NAME}: expected tensors model.1, model.3, model.4.block.2, ...; it has {some}, ..."
        )
    first, *upsamples, last = (plain[i] for i in sorted(plain))
    if len(dilated) % len(upsamples):
        raise CheckpointError(f"{file} has {len(dilated)} residual blocks in {len(upsamples)} stages; expected as many in each.")
    return GeneratorConfig(
        in_channels=first.shape[1],
        out_channels=last.shape[0],
        channels=first.shape[0],
        kernel_size=first.shape[2],
        upsample_scales=tuple(w.shape[2] // 2 for w in upsamples),
        stacks=len(dilated) // len(upsamples),
        stack_kernel_size=next(iter(dilated.values())).shape[2],
        bias=any(name.endswith(".bias") for name in state),
    )


def _compare(config: GeneratorConfig, args: Mapping[str, Any], path: Path) -> None:
    expected = {
        "n_mel_channels": config.in_channels,
        "ngf": config.stage_channels[-1],
        "n_residual_layers": config.stacks,
    }
    for name, value in expected.items():
        if type(args.get(name, value)) is not int:  # never printed: an alias bomb would take for ever
            raise CheckpointError(f"{path}: {name} is no whole number; the weights say {value}.")
        if args.get(name, value) != value:
            raise CheckpointError(f"{path} says {name} is {args[name]}, the weights say {value}. They belong to different trainings.")
