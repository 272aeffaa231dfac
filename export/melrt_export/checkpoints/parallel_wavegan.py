"""ParallelWaveGAN: `checkpoint-<n>steps.pkl` of a `MelGANGenerator`, with `config.yml` and `stats.h5` or `stats.npy` beside it.

Source: `models/melgan.py`, `layers/causal_conv.py`, `layers/pqmf.py`, `utils/utils.py` (load_model) and
`bin/preprocess.py` of that project.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from melrt.errors import CheckpointError
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt_export.checkpoints.checkpoint import (
    Checkpoint,
    fold_weight_norm,
    mel_spec,
    named_tensors,
    read_normalization,
    sha256_of,
    with_normalization,
)
from melrt_export.checkpoints.hdf5 import read_hdf5
from melrt_export.checkpoints.naming import Naming
from melrt_export.checkpoints.reading import Opened, arrays, read_npy, read_yaml
from melrt_export.generator.config import GeneratorConfig, PaddingMode
from melrt_export.generator.pqmf import FilterDesign

NAME = "ParallelWaveGAN"
FILES = "checkpoint-<n>steps.pkl with config.yml, and stats.h5 or stats.npy"
PATTERNS: tuple[str, ...] = ("checkpoint-*steps.pkl",)
logger = logging.getLogger(__name__)

_PADDING: dict[str, PaddingMode] = {
    "ReflectionPad1d": "reflect",
    "ReplicationPad1d": "replicate",
    "ConstantPad1d": "zeros",
    "ZeroPad1d": "zeros",
}
_LOGS = {"10": "log10", "10.0": "log10", "2": "log2", "2.0": "log2", "None": "ln"}


def recognizes(opened: Opened) -> bool:
    """Whether this file is one of this project's."""
    return opened.has("", "model", "generator") or opened.has("melgan.")


def load(opened: Opened) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: Damaged, another class of generator, options that this family does not have, or tensors of another network.
    """
    file = opened.file
    path = file.parent / "config.yml"
    values = read_yaml(path)
    kind = values.get("generator_type", "ParallelWaveGANGenerator")
    if kind != "MelGANGenerator":
        raise CheckpointError(f"{path} names a {str(kind)[:60]}; of ParallelWaveGAN, melrt reads MelGANGenerator.")
    params = values.get("generator_params")
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} has no generator_params; it is the config.yml of another program.")
    design = _design(values, path)
    config = _config(params, path, design.taps)
    bare = opened.content if "model" not in opened.content else opened.content["model"]["generator"]
    state = fold_weight_norm(arrays(file, bare))
    stored = {name: state.pop(name) for name in list(state) if name.startswith("pqmf.") or name in ("mean", "scale")}
    if config.pqmf_taps:
        filters = stored.get("pqmf.synthesis_filter")
        state["pqmf.weight"] = design.filters(config.out_channels) if filters is None else filters.reshape(config.out_channels, -1)
    naming = Naming(NAME, prefix="melgan", block="stack", shortcut="skip_layer", causal=config.causal)
    weights = named_tensors(state, naming.names(config), config)
    normalization = statistics(file.parent, config.in_channels, stored)
    config, weights = with_normalization(config, weights, normalization)
    return Checkpoint(
        name=file.resolve().parent.name, format=NAME, source=file, sha256=sha256_of(file), config=config, weights=weights,
        spec=_spec(values, path), normalization=normalization, lacks_statistics=normalization is None,
    )  # fmt: skip


def _config(params: Mapping[str, Any], path: Path, taps: int) -> GeneratorConfig:
    """The shape from `generator_params`; what is left out is the default of `MelGANGenerator.__init__`."""
    pad, pad_params = str(params.get("pad", "ReflectionPad1d")), params.get("pad_params") or {}
    constant = pad == "ConstantPad1d" and not (isinstance(pad_params, dict) and pad_params.get("value") == 0)
    if pad not in _PADDING or constant:
        raise CheckpointError(
            f"{path}: padding by {pad[:40]} of {str(pad_params)[:40]}; melrt knows {', '.join(_PADDING)}, constants of 0."
        )
    shape = {
        ours: params[theirs]
        for ours, theirs in (
            ("in_channels", "in_channels"), ("out_channels", "out_channels"), ("channels", "channels"), ("kernel_size", "kernel_size"),
            ("upsample_scales", "upsample_scales"), ("stacks", "stacks"), ("stack_kernel_size", "stack_kernel_size"), ("bias", "bias"),
            ("final_tanh", "use_final_nonlinear_activation"), ("causal", "use_causal_conv"),
        )
        if theirs in params
    }  # fmt: skip
    taps = 0 if shape.get("out_channels", 1) == 1 else taps
    return GeneratorConfig(**shape, padding_mode=_PADDING[pad], negative_slope=_slope(params, path), pqmf_taps=taps)


def _slope(params: Mapping[str, Any], path: Path) -> float:
    kind = params.get("nonlinear_activation", "LeakyReLU")
    options = params.get("nonlinear_activation_params", {"negative_slope": 0.2})
    if kind == "ReLU":
        return 0.0
    if kind != "LeakyReLU" or not isinstance(options, dict):
        raise CheckpointError(f"{path}: the activation is {str(kind)[:40]}; this family has LeakyReLU or ReLU.")
    slope: float = options.get("negative_slope", 0.01)  # PyTorch's own default; checked by GeneratorConfig
    return slope


def _design(values: Mapping[str, Any], path: Path) -> FilterDesign:
    """Up to version 0.4.2 the cutoff was 0.15 (utils/utils.py, load_model; a config without a version is older)."""
    old = _version(values.get("version", "0.1.0")) <= (0, 4, 2)
    given = values.get("pqmf_params", {"cutoff_ratio": 0.15} if old else {})
    if not isinstance(given, dict) or not set(given) <= {"taps", "cutoff_ratio", "beta", "subbands"}:
        raise CheckpointError(f"{path}: pqmf_params is {str(given)[:80]}; it holds taps, cutoff_ratio and beta.")
    design = FilterDesign(**{name: value for name, value in given.items() if name != "subbands"})
    design.check(path)
    return design


def _version(text: object) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,6}", str(text)[:40])[:3])


def statistics(folder: Path, bands: int, stored: Mapping[str, np.ndarray] = MappingProxyType({})) -> Normalization | None:
    """Mean and scale from `stats.h5`, `stats.npy` or the state dict (register_stats); None, and a warning, if they are nowhere."""
    hdf5, npy = folder / "stats.h5", folder / "stats.npy"
    if hdf5.is_file():
        data = read_hdf5(hdf5)
        return read_normalization(data.get("mean"), data.get("scale"), hdf5, bands)
    if npy.is_file():
        rows = read_npy(npy)
        if rows.shape != (2, bands):
            raise CheckpointError(f"{npy} has shape {rows.shape}; expected (2, {bands}), means and scales.")
        return read_normalization(rows[0], rows[1], npy, bands)
    if stored.keys() >= {"mean", "scale"}:
        return read_normalization(stored["mean"], stored["scale"], folder, bands)
    logger.warning("%s has no stats.h5 or stats.npy: this voice takes mels that are normalized as its training's were", folder.name)
    return None


def _spec(values: Mapping[str, Any], path: Path) -> MelSpec:
    """`logmelfilterbank` of bin/preprocess.py: magnitude, librosa's own filters, centerd and mirrored, floor 1e-10."""
    rate, n_fft = values.get("sampling_rate"), values.get("fft_size")
    base = str(values.get("log_base", 10))[:40]
    if base not in _LOGS:
        raise CheckpointError(f"{path}: log_base is {base}; melrt knows 10, 2 and null (natural).")
    f_max = values.get("fmax")
    return mel_spec(
        {
            "sample_rate": rate, "n_fft": n_fft, "hop": values.get("hop_size"), "win_length": values.get("win_length") or n_fft,
            "window": values.get("window", "hann"), "n_mels": values.get("num_mels", 80), "f_min": values.get("fmin") or 0.0,
            "f_max": rate / 2 if f_max is None and type(rate) is int else f_max, "log": _LOGS[base], "floor": 1e-10, "framing": "center",
        },
        path,
    )  # fmt: skip
