"""HiFi-GAN (jik876): `g_<steps>` or `generator_v1` with the state dict under `generator`, and `config.json` beside it.

Source: `models.py` (Generator, ResBlock1, ResBlock2), `meldataset.py` (mel_spectrogram) and `config_v1.json` of that project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from melrt.errors import CheckpointError
from melrt.mel.spec import MelSpec
from melrt_export.checkpoints.checkpoint import Checkpoint, build_mel_spec, fold_weight_norm, rename_tensors, sha256_of
from melrt_export.checkpoints.reading import CheckpointFile, read_json
from melrt_export.checkpoints.torch_files import to_arrays
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig

NAME = "HiFi-GAN"
FILES = "g_<steps> or generator_v1 with config.json"
PATTERNS: tuple[str, ...] = ("g_[0-9]*", "generator_v[0-9]*")
_SHAPE = (
    "resblock", "upsample_rates", "upsample_kernel_sizes", "upsample_initial_channel", "resblock_kernel_sizes", "resblock_dilation_sizes",
    "num_mels",
)  # fmt: skip
_AUDIO = ("sampling_rate", "n_fft", "hop_size", "win_size", "fmin", "fmax")
# Options of the training, on which the generator does not depend. Nothing in the project reads `num_freq`.
_TRAINING = (
    "num_gpus", "batch_size", "learning_rate", "adam_b1", "adam_b2", "lr_decay", "seed", "segment_size", "num_freq", "fmax_for_loss",
    "fmax_loss", "num_workers", "dist_config",
)  # fmt: skip


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file holds tensors of `conv_pre` under `generator`."""
    return file.has_name("conv_pre.", "generator")


def load(file: CheckpointFile) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged, holds the tensors of another network, or its config lacks an option or has an unknown one.
    """
    path = file.path.parent / "config.json"
    values = read_json(path)
    if missing := [name for name in (*_SHAPE, *_AUDIO) if name not in values]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; use the config.json that HiFi-GAN copies beside its checkpoints.")
    if unknown := sorted(set(values) - {*_SHAPE, *_AUDIO, *_TRAINING}):
        raise CheckpointError(
            f"{path} has options that HiFi-GAN's own code does not have: {', '.join(unknown)[:200]}. melrt supports the published "
            "generator; remove the options that do not change it."
        )
    config = _config(values, path)
    state = fold_weight_norm(to_arrays(file.path, file.content["generator"]))
    return Checkpoint(
        name=file.path.resolve().parent.name, format=NAME, source=file.path, sha256=sha256_of(file.path), config=config,
        weights=rename_tensors(state, dict(_names(config)), config), spec=_spec(values, path),
    )  # fmt: skip


def _config(values: Mapping[str, Any], path: Path) -> GeneratorConfig:
    if values["resblock"] not in ("1", "2"):
        raise CheckpointError(f'{path}: resblock is {values["resblock"]!r:.60}; it must be "1" or "2".')
    rates, kernels = values["upsample_rates"], values["upsample_kernel_sizes"]
    config = GeneratorConfig(
        in_channels=values["num_mels"], channels=values["upsample_initial_channel"], upsample_scales=rates,
        mrf=MrfConfig(values["resblock_kernel_sizes"], values["resblock_dilation_sizes"], paired=values["resblock"] == "1"),
        negative_slope=0.1, last_slope=0.01,  # LRELU_SLOPE; before conv_post the project uses PyTorch's default
        padding_mode="zeros",
    )  # fmt: skip
    if kernels != [2 * rate for rate in rates] or any(rate % 2 for rate in rates):
        raise CheckpointError(
            f"{path}: upsample_rates {rates} with upsample_kernel_sizes {str(kernels)[:60]}; "
            "melrt supports even rates with kernels of twice the rate."
        )
    return config


def _names(config: GeneratorConfig) -> Iterator[tuple[str, str]]:
    """Yield melrt's name and the project's name of each convolution."""
    parts = {"dilated": "convs1", "plain": "convs2"} if config.mrf and config.mrf.paired else {"dilated": "convs"}
    branches = len(config.mrf.kernel_sizes) if config.mrf else 0
    for name, _ in config.convolutions():
        match name.split("."):
            case ["stages", stage, "upsample"]:
                yield name, f"ups.{stage}"
            case ["stages", stage, "blocks", branch, block, part]:
                yield name, f"resblocks.{int(stage) * branches + int(branch)}.{parts[part]}.{block}"
            case _:
                yield name, {"first": "conv_pre", "last": "conv_post"}[name]


def _spec(values: Mapping[str, Any], path: Path) -> MelSpec:
    """Return the convention of `mel_spectrogram`: ln of the magnitude, reflection by (n_fft - hop) / 2, 1e-9 added under the root."""
    rate, f_max = values["sampling_rate"], values["fmax"]
    return build_mel_spec(
        {
            "sample_rate": rate, "n_fft": values["n_fft"], "hop": values["hop_size"], "win_length": values["win_size"],
            "n_mels": values["num_mels"], "f_min": values["fmin"], "f_max": rate / 2 if f_max is None and type(rate) is int else f_max,
            "log": "ln", "floor": 1e-5, "epsilon": 1e-9,
        },
        path,
    )  # fmt: skip
