"""melgan-neurips (descriptinc): a bare state dict of `Generator`, with or without the training's `args.yml`.

Source: `mel2wav/modules.py` (Generator, Audio2Mel) and `mel2wav/interface.py` of that project. The weights alone determine the
generator's shape; `args.yml` is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from melrt.errors import CheckpointError
from melrt.mel.spec import MelSpec
from melrt_export.checkpoints.checkpoint import Checkpoint, fold_weight_norm, rename_tensors, sha256_of
from melrt_export.checkpoints.naming import LayerNaming
from melrt_export.checkpoints.reading import CheckpointFile, read_yaml
from melrt_export.checkpoints.torch_files import to_arrays
from melrt_export.generator.config import GeneratorConfig

NAME = "melgan-neurips"
FILES = "best_netG.pt or netG.pt (with or without args.yml), or any *.pt with a bare state dict"
PATTERNS: tuple[str, ...] = ("best_netG.pt", "netG.pt")
NAMING = LayerNaming(NAME, prefix="model")


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file is a bare state dict with tensors of `model.1`."""
    return file.has_name("model.1.")


def load(file: CheckpointFile) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged or unsafe, holds the tensors of another network, or contradicts its `args.yml`.
    """
    path = file.path
    state = fold_weight_norm(to_arrays(path, file.content))
    config = NAMING.infer_config(state, path)
    weights = rename_tensors(state, NAMING.names(config), config)
    args = path.parent / "args.yml"
    if args.is_file():
        _compare(config, read_yaml(args), args)
    return Checkpoint(
        name=path.resolve().parent.name if path.name in PATTERNS else path.stem,
        format=NAME, source=path, sha256=sha256_of(path), config=config, weights=weights,
        spec=MelSpec(n_mels=config.in_channels),
    )  # fmt: skip


def _compare(config: GeneratorConfig, args: Mapping[str, Any], path: Path) -> None:
    expected = {
        "n_mel_channels": config.in_channels,
        "ngf": config.stage_channels[-1],
        "n_residual_layers": config.stacks,
    }
    for name, value in expected.items():
        if type(args.get(name, value)) is not int:  # the value is not printed: writing out a YAML alias bomb would never end
            raise CheckpointError(f"{path}: {name} is not a whole number; according to the weights it is {value}.")
        if args.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name} is {args[name]}, but according to the weights it is {value}. The two files belong to different trainings."
            )
