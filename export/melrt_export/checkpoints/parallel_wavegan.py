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
    build_mel_spec,
    fold_normalization,
    fold_weight_norm,
    read_normalization,
    rename_tensors,
    sha256_of,
)
from melrt_export.checkpoints.hdf5 import read_hdf5
from melrt_export.checkpoints.naming import LayerNaming
from melrt_export.checkpoints.reading import CheckpointFile, read_npy, read_yaml
from melrt_export.checkpoints.torch_files import to_arrays
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


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file holds a dictionary under `model.generator`, or is a bare state dict with tensors of `melgan`."""
    return file.has_name("", "model", "generator") or file.has_name("melgan.")


def load(file: CheckpointFile) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged, holds another class of generator or the tensors of another network, or its config has
            options that are not supported.
    """
    path = file.path.parent / "config.yml"
    values = read_yaml(path)
    kind = values.get("generator_type", "ParallelWaveGANGenerator")
    if kind != "MelGANGenerator":
        raise CheckpointError(f"{path} names a {str(kind)[:60]}; the supported generator of ParallelWaveGAN is MelGANGenerator.")
    params = values.get("generator_params")
    if not isinstance(params, dict):
        raise CheckpointError(f"{path} has no generator_params. Use the config.yml that ParallelWaveGAN writes beside its checkpoints.")
    design = _design(values, path)
    config = _config(params, path, design.taps)
    bare = file.content if "model" not in file.content else file.content["model"]["generator"]
    state = fold_weight_norm(to_arrays(file.path, bare))
    stored = {name: state.pop(name) for name in list(state) if name.startswith("pqmf.") or name in ("mean", "scale")}
    if config.pqmf_taps:
        filters = stored.get("pqmf.synthesis_filter")
        state["pqmf.weight"] = design.filters(config.out_channels) if filters is None else filters.reshape(config.out_channels, -1)
    naming = LayerNaming(NAME, prefix="melgan", block="stack", shortcut="skip_layer", causal=config.causal)
    weights = rename_tensors(state, naming.names(config), config)
    normalization = read_statistics(file.path.parent, config.in_channels, stored)
    config, weights = fold_normalization(config, weights, normalization)
    return Checkpoint(
        name=file.path.resolve().parent.name, format=NAME, source=file.path, sha256=sha256_of(file.path), config=config,
        weights=weights, spec=_spec(values, path), normalization=normalization, lacks_statistics=normalization is None,
    )  # fmt: skip


def _config(params: Mapping[str, Any], path: Path, taps: int) -> GeneratorConfig:
    """Return the shape from `generator_params`; the defaults are those of `MelGANGenerator.__init__`."""
    pad, pad_params = str(params.get("pad", "ReflectionPad1d")), params.get("pad_params") or {}
    constant = pad == "ConstantPad1d" and not (isinstance(pad_params, dict) and pad_params.get("value") == 0)
    if pad not in _PADDING or constant:
        raise CheckpointError(
            f"{path}: the padding is {pad[:40]} with {str(pad_params)[:40]}; it must be one of {', '.join(_PADDING)}, constants only of 0."
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
        raise CheckpointError(f"{path}: the activation is {str(kind)[:40]}; it must be LeakyReLU or ReLU.")
    slope: float = options.get("negative_slope", 0.01)  # PyTorch's default; GeneratorConfig checks the value
    return slope


def _design(values: Mapping[str, Any], path: Path) -> FilterDesign:
    """Return the filter bank. Up to version 0.4.2, and in configs without a version, its cutoff was 0.15 (utils/utils.py, load_model)."""
    old = _version(values.get("version", "0.1.0")) <= (0, 4, 2)
    given = values.get("pqmf_params", {"cutoff_ratio": 0.15} if old else {})
    if not isinstance(given, dict) or not set(given) <= {"taps", "cutoff_ratio", "beta", "subbands"}:
        raise CheckpointError(f"{path}: pqmf_params is {str(given)[:80]}; it must hold only taps, cutoff_ratio and beta.")
    design = FilterDesign(**{name: value for name, value in given.items() if name != "subbands"})
    design.check(path)
    return design


def _version(text: object) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,6}", str(text)[:40])[:3])


def read_statistics(folder: Path, bands: int, stored: Mapping[str, np.ndarray] = MappingProxyType({})) -> Normalization | None:
    """Read mean and scale from `stats.h5`, `stats.npy` or the state dict (register_stats); warn and return None if there are none."""
    hdf5, npy = folder / "stats.h5", folder / "stats.npy"
    if hdf5.is_file():
        data = read_hdf5(hdf5)
        return read_normalization(data.get("mean"), data.get("scale"), hdf5, bands)
    if npy.is_file():
        rows = read_npy(npy)
        if rows.shape != (2, bands):
            raise CheckpointError(f"{npy} has shape {rows.shape}; expected (2, {bands}): means and scales.")
        return read_normalization(rows[0], rows[1], npy, bands)
    if stored.keys() >= {"mean", "scale"}:
        return read_normalization(stored["mean"], stored["scale"], folder, bands)
    logger.warning("%s has no stats.h5 or stats.npy: this voice takes mels that are normalized as in its training", folder.name)
    return None


def _spec(values: Mapping[str, Any], path: Path) -> MelSpec:
    """Return the convention of `logmelfilterbank` in bin/preprocess.py.

    It takes the magnitude of centered frames with reflection, librosa's filters, and a floor of 1e-10.
    """
    rate, n_fft = values.get("sampling_rate"), values.get("fft_size")
    base = str(values.get("log_base", 10))[:40]
    if base not in _LOGS:
        raise CheckpointError(f"{path}: log_base is {base}; it must be 10, 2 or null (natural logarithm).")
    f_max = values.get("fmax")
    return build_mel_spec(
        {
            "sample_rate": rate, "n_fft": n_fft, "hop": values.get("hop_size"), "win_length": values.get("win_length") or n_fft,
            "window": values.get("window", "hann"), "n_mels": values.get("num_mels", 80), "f_min": values.get("fmin") or 0.0,
            "f_max": rate / 2 if f_max is None and type(rate) is int else f_max, "log": _LOGS[base], "floor": 1e-10, "framing": "center",
        },
        path,
    )  # fmt: skip
