"""melgan-neurips (descriptinc): a bare state dict of `Generator`, with or without the training's `args.yml`.

Source: `mel2wav/modules.py` (Generator, Audio2Mel) and `mel2wav/interface.py` of that project. The weights alone tell the shape;
`args.yml` is held against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from melrt.errors import CheckpointError
from melrt.mel.spec import MelSpec
from melrt_export.checkpoints.checkpoint import Checkpoint, fold_weight_norm, named_tensors, sha256_of
from melrt_export.checkpoints.naming import Naming
from melrt_export.checkpoints.reading import Opened, arrays, read_yaml
from melrt_export.generator.config import GeneratorConfig

NAME = "melgan-neurips"
FILES = "best_netG.pt or netG.pt (with or without args.yml), or any *.pt with a bare state dict"
PATTERNS: tuple[str, ...] = ("best_netG.pt", "netG.pt")
NAMING = Naming(NAME, prefix="model")


def recognizes(opened: Opened) -> bool:
    """Whether this file is one of this project's."""
    return opened.has("model.1.")


def load(opened: Opened) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: Damaged or hostile, tensors of another network, or an `args.yml` that says something else than the weights.
    """
    file = opened.file
    state = fold_weight_norm(arrays(file, opened.content))
    config = NAMING.infer(state, file)
    weights = named_tensors(state, NAMING.names(config), config)
    args = file.parent / "args.yml"
    if args.is_file():
        _compare(config, read_yaml(args), args)
    return Checkpoint(
        name=file.resolve().parent.name if file.name in PATTERNS else file.stem,
        format=NAME, source=file, sha256=sha256_of(file), config=config, weights=weights,
        spec=MelSpec(n_mels=config.in_channels),
    )  # fmt: skip


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
