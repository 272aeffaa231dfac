"""The recipes in docs/recipes have the numbers of their sources, under the names that they have there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from melrt.mel.spec import MelSpec
from melrt_export.generator.config import GeneratorConfig
from melrt_export.quality import RESOLUTIONS
from melrt_export.training.config import DiscriminatorConfig, LossConfig, OptimizerConfig, read_config
from melrt_export.training.losses import SUBBAND_RESOLUTIONS

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
# github.com/kan-bayashi/ParallelWaveGAN, egs/ljspeech/voc1/conf: melgan.v3.long.yaml (commit 2e13084), multi_band_melgan.v2.yaml
# (7e8f86c) and full_band_melgan.v1.yaml (933b2ce). The defaults of keys that a file lacks are those of bin/train.py (457148f).
SHARED = {
    "sampling_rate": 22050, "fft_size": 1024, "hop_size": 256, "num_mels": 80, "fmin": 80, "fmax": 7600, "global_gain_scale": 1.0,
    "in_channels": 80, "kernel_size": 7, "stack_kernel_size": 3, "use_causal_conv": False,
    "scales": 3, "d_channels": 16, "fft_sizes": [1024, 2048, 512], "hop_sizes": [120, 240, 50], "win_lengths": [600, 1200, 240],
    "remove_short_samples": True, "gamma": 0.5,
}  # fmt: skip
MILESTONES = [100000, 200000, 300000, 400000, 500000, 600000]
SOURCES: dict[str, dict[str, Any]] = {
    "pwg-melgan-stft": SHARED | {
        "out_channels": 1, "channels": 512, "upsample_scales": [8, 8, 2, 2], "stacks": 3,
        "downsample_scales": [4, 4, 4, 4], "max_downsample_channels": 1024, "use_subband_stft_loss": False,
        "use_feat_match_loss": True, "lambda_feat_match": 25.0, "lambda_adv": 4.0, "batch_size": 16, "batch_max_steps": 8192,
        "num_workers": 2, "optimizer_type": "RAdam", "generator_lr": 0.0001, "discriminator_lr": 0.00005, "eps": 1.0e-6, "amsgrad": False,
        "generator_grad_norm": 10, "discriminator_grad_norm": 1, "milestones": [4000000], "discriminator_train_start_steps": 100000,
        "train_max_steps": 4000000, "save_interval_steps": 5000, "eval_interval_steps": 1000, "log_interval_steps": 100,
    },
    "pwg-multi-band": SHARED | {
        "out_channels": 4, "channels": 384, "upsample_scales": [8, 4, 2], "stacks": 4,
        "downsample_scales": [4, 4, 4], "max_downsample_channels": 512, "use_subband_stft_loss": True,
        "sub_fft_sizes": [384, 683, 171], "sub_hop_sizes": [30, 60, 10], "sub_win_lengths": [150, 300, 60],
        "use_feat_match_loss": False, "lambda_adv": 2.5, "batch_size": 64, "batch_max_steps": 16384,
        "num_workers": 4, "optimizer_type": "Adam", "generator_lr": 1.0e-3, "discriminator_lr": 1.0e-3, "eps": 1.0e-7, "amsgrad": True,
        "generator_grad_norm": -1, "discriminator_grad_norm": -1, "milestones": MILESTONES, "discriminator_train_start_steps": 200000,
        "train_max_steps": 1000000, "save_interval_steps": 50000, "eval_interval_steps": 1000, "log_interval_steps": 1000,
    },
    "pwg-full-band": SHARED | {
        "out_channels": 1, "channels": 512, "upsample_scales": [8, 8, 4], "stacks": 4,
        "downsample_scales": [4, 4, 4], "max_downsample_channels": 512, "use_subband_stft_loss": False,
        "use_feat_match_loss": False, "lambda_adv": 2.5, "batch_size": 48, "batch_max_steps": 16384,
        "num_workers": 2, "optimizer_type": "RAdam", "generator_lr": 0.0001, "discriminator_lr": 0.0001, "eps": 1.0e-6, "amsgrad": False,
        "generator_grad_norm": 10, "discriminator_grad_norm": 1, "milestones": MILESTONES, "discriminator_train_start_steps": 200000,
        "train_max_steps": 1000000, "save_interval_steps": 50000, "eval_interval_steps": 1000, "log_interval_steps": 1000,
    },
}  # fmt: skip


def sections(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a config with the source's values. The comments name the file or line of the source behind a rule."""
    taps = 62 if source["out_channels"] > 1 else 0  # layers/pqmf.py
    stft = 0.5 if source["use_subband_stft_loss"] else 1.0  # bin/train.py: "for balancing with subband stft loss"
    matching = source["lambda_adv"] * source["lambda_feat_match"] if source["use_feat_match_loss"] else 0.0  # adv_loss += ...
    begin = source["discriminator_train_start_steps"] + 1  # self.steps > ...
    return {
        "generator": GeneratorConfig(
            in_channels=source["in_channels"], out_channels=source["out_channels"], channels=source["channels"],
            kernel_size=source["kernel_size"], upsample_scales=tuple(source["upsample_scales"]), stacks=source["stacks"],
            stack_kernel_size=source["stack_kernel_size"], causal=source["use_causal_conv"], pqmf_taps=taps,
        ),
        "mel": MelSpec(
            sample_rate=source["sampling_rate"], n_fft=source["fft_size"], hop=source["hop_size"], win_length=source["fft_size"],
            n_mels=source["num_mels"], f_min=source["fmin"], f_max=source["fmax"], floor=1e-10, framing="center",
        ),
        "discriminator": DiscriminatorConfig(
            scales=source["scales"], channels=source["d_channels"], layers=len(source["downsample_scales"]),
            downsampling=source["downsample_scales"][0], max_channels=source["max_downsample_channels"], deviation=0.02,
        ),
        "losses": LossConfig(
            adversarial=source["lambda_adv"], adversarial_form="least_squares", feature_matching=matching,
            feature_scale="mean" if matching else "neurips", stft=stft, stft_sizes=tuple(source["fft_sizes"]),
            subband_stft=0.5 * source["use_subband_stft_loss"], discriminator_from=begin, adversarial_from=begin,
        ),
        "optimizer": OptimizerConfig(
            algorithm=source["optimizer_type"].lower(), learning_rate=source["generator_lr"], betas=(0.9, 0.999),
            discriminator_learning_rate=source["discriminator_lr"], epsilon=source["eps"], amsgrad=source["amsgrad"],
            gradient_limit=max(0.0, source["generator_grad_norm"]),
            discriminator_gradient_limit=max(0.0, source["discriminator_grad_norm"]),
            milestones=tuple(step for step in source["milestones"] if step < source["train_max_steps"]),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_recipe_has_the_numbers_of_its_source(name: str) -> None:
    source, config = SOURCES[name], read_config(RECIPES / f"{name}.toml")
    for section, expected in sections(source).items():
        assert getattr(config, section) == expected
    data, schedule = config.data, config.schedule
    assert (data.batch, data.segment, data.workers) == (source["batch_size"], source["batch_max_steps"], source["num_workers"])
    assert (data.peak, data.gain, data.too_short == "skip") == (0.0, (source["global_gain_scale"],) * 2, source["remove_short_samples"])
    assert (schedule.steps, schedule.keep_every) == (source["train_max_steps"], source["save_interval_steps"])
    assert (schedule.validate_every, schedule.log_every) == (source["eval_interval_steps"], source["log_interval_steps"])
    factors = [config.optimizer.rate_factor(step - 1) / config.optimizer.rate_factor(step) for step in config.optimizer.milestones]
    assert factors == [1 / source["gamma"]] * len(config.optimizer.milestones)


def test_the_stft_losses_have_the_windows_of_the_source() -> None:
    source = SOURCES["pwg-multi-band"]
    for prefix, table in (("", RESOLUTIONS), ("sub_", SUBBAND_RESOLUTIONS)):
        for size, *expected in zip(*(source[prefix + key] for key in ("fft_sizes", "hop_sizes", "win_lengths")), strict=True):
            assert list(table[size]) == expected


def test_every_recipe_is_compared_with_its_source() -> None:
    """`melgan-neurips` has the defaults, which test_training_data compares, and the demo voice has no source."""
    names = {path.stem for path in RECIPES.glob("*.toml") if not path.stem.startswith("lj-demo")}
    assert names == {*SOURCES, "melgan-neurips"}
