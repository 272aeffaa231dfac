"""TensorFlowTTS: Keras weights (.h5) of `TFMelGANGenerator` and `TFMBMelGANGenerator`, with `config.yml` and `stats.npy` beside them.

Source: `tensorflow_tts/models/melgan.py`, `mb_melgan.py`, `utils/weight_norm.py` and `configs/melgan.py`, `mb_melgan.py` of that
project. Keras chooses the names of its layers itself, so the weights are identified by their order, which is that of the layers in the
network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.checkpoints.checkpoint import (
    Checkpoint,
    build_mel_spec,
    fold_normalization,
    fold_weight_norm,
    rename_tensors,
    sha256_of,
)
from melrt_export.checkpoints.hdf5 import read_hdf5
from melrt_export.checkpoints.parallel_wavegan import read_statistics
from melrt_export.checkpoints.reading import CheckpointFile, read_yaml
from melrt_export.generator.config import GeneratorConfig, PaddingMode
from melrt_export.generator.pqmf import FilterDesign

NAME = "TensorFlowTTS"
FILES = "generator-<n>.h5 or model.h5 with config.yml, and stats.npy"
PATTERNS: tuple[str, ...] = ("model*.h5", "generator*.h5")

logger = logging.getLogger(__name__)

_SECTIONS = ("generator_params", "melgan_generator_params", "multiband_melgan_generator_params")
_PADDING: dict[str, PaddingMode] = {"REFLECT": "reflect", "CONSTANT": "zeros"}
# The first versions of the project used the analysis filters for the synthesis too, with another cutoff and phase. Their configs name
# the section `generator_params`.
_FIRST_FILTERS = {"cutoff_ratio": 0.15, "centered": False, "analysis": True}


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file is an HDF5 file and not one of statistics, by its name."""
    return file.path.suffix in (".h5", ".hdf5") and not file.path.name.startswith("stats")


def load(file: CheckpointFile) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged, holds the tensors of another network, or its config has options that are not supported.
    """
    path = file.path.parent / "config.yml"
    values = read_yaml(path)
    section = next((name for name in _SECTIONS if isinstance(values.get(name), dict)), None)
    if section is None:
        raise CheckpointError(f"{path} has none of the sections {', '.join(_SECTIONS)}. Use the config.yml of the TensorFlowTTS training.")
    params = values[section]
    design = _design(params, section, path)
    config = _config(params, path, design.taps)
    state = _assign_names(config, read_hdf5(file.path), file.path)
    if config.pqmf_taps:
        state["pqmf.weight"] = design.filters(config.out_channels)
    weights = rename_tensors(state, {}, config)
    normalization = read_statistics(file.path.parent, config.in_channels)
    rate = values.get("sampling_rate", 22050)
    if "fft_size" not in values:  # the project keeps the settings of its preprocessing in preprocess/*.yaml
        logger.warning(
            "%s lacks fft_size, win_length, fmin and fmax: melrt uses 1024, 1024, 80 and 7600, the values for LJSpeech", path.name
        )
    spec = build_mel_spec(
        {
            "sample_rate": rate, "n_fft": values.get("fft_size", 1024), "hop": values.get("hop_size", config.hop),
            "win_length": values.get("win_length") or values.get("fft_size", 1024), "n_mels": config.in_channels,
            "f_min": values.get("fmin", 80), "f_max": values.get("fmax", 7600), "floor": 1e-10, "framing": "center",
        },
        path,
    )  # fmt: skip
    config, weights = fold_normalization(config, weights, normalization)
    return Checkpoint(
        name=file.path.resolve().parent.name, format=NAME, source=file.path, sha256=sha256_of(file.path), config=config,
        weights=weights, spec=spec, normalization=normalization, lacks_statistics=normalization is None,
    )  # fmt: skip


def _design(params: Mapping[str, Any], section: str, path: Path) -> FilterDesign:
    given = {name: params[name] for name in ("taps", "cutoff_ratio", "beta") if name in params}
    first = _FIRST_FILTERS if section == "generator_params" else {}
    design = FilterDesign(**{**first, **given})
    design.check(path)
    return design


def _config(params: Mapping[str, Any], path: Path, taps: int) -> GeneratorConfig:
    """Return the shape from the generator's section; the defaults are those of `MelGANGeneratorConfig`."""
    padding = str(params.get("padding_type", "REFLECT"))
    options = params.get("nonlinear_activation_params", {"alpha": 0.2})
    if padding not in _PADDING or params.get("nonlinear_activation", "LeakyReLU") != "LeakyReLU" or not isinstance(options, dict):
        activation = str(params.get("nonlinear_activation", "LeakyReLU"))[:40]
        raise CheckpointError(
            f"{path}: the padding is {padding[:40]} and the activation {activation}; the padding must be REFLECT or CONSTANT, "
            "and the activation LeakyReLU."
        )
    outputs = params.get("out_channels", 1)
    return GeneratorConfig(
        out_channels=outputs,
        channels=params.get("filters", 512),
        kernel_size=params.get("kernel_size", 7),
        upsample_scales=params.get("upsample_scales", (8, 8, 2, 2)),
        stacks=params.get("stacks", 3),
        stack_kernel_size=params.get("stack_kernel_size", 3),
        negative_slope=options.get("alpha", 0.3),  # Keras's default
        padding_mode=_PADDING[padding],
        final_tanh=params.get("use_final_nolinear_activation", True),
        pqmf_taps=0 if outputs == 1 else taps,
        crop="early",
    )


def _assign_names(config: GeneratorConfig, data: Mapping[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    """Return the weights under melrt's names, in PyTorch's axes, with weight norm folded. A missing bias (`use_bias: false`) is zeros."""
    layers = list(_layers(data, file))
    expected = list(config.convolutions())
    if len(layers) != len(expected):
        raise CheckpointError(f"{file} has {len(layers)} convolutions; the generator of its config.yml has {len(expected)}.")
    state = {}
    for (name, _), layer in zip(expected, layers, strict=True):
        kernel = layer["kernel"]
        # (K, C_in, C_out) to (C_out, C_in, K); transposed (K, 1, C_out, C_in) to (C_in, C_out, K)
        weight = np.ascontiguousarray((kernel[:, 0] if kernel.ndim == 4 else kernel).transpose(2, 1, 0))
        outputs = 1 if kernel.ndim == 4 else 0
        if "g" in layer:
            # the norm runs over all axes but the output channels, also in transposed convolutions (filter_axis)
            turned = {"weight_v": weight.swapaxes(0, outputs), "weight_g": layer["g"]}
            weight = fold_weight_norm(turned)["weight"].swapaxes(0, outputs)
        state[f"{name}.weight"] = weight.astype(np.float32)
        state[f"{name}.bias"] = layer.get("bias", np.zeros(weight.shape[outputs])).astype(np.float32)
    return state


def _layers(data: Mapping[str, np.ndarray], file: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield kernel, bias and weight norm's g of each convolution, in order.

    The weights of one layer are consecutive. Their order is the same for all layers, so a layer ends where a kind of weight repeats.
    """
    layer: dict[str, np.ndarray] = {}
    for path, value in data.items():
        kind = path.rsplit("/", 1)[-1].partition(":")[0]
        if kind in ("initialized", "_initialized"):
            continue
        if kind not in ("kernel", "bias", "g") or (kind == "kernel" and value.ndim not in (3, 4)):
            raise CheckpointError(f"{file} holds {path} of shape {value.shape}, which is not a weight of a MelGAN generator.")
        if kind in layer:
            yield _check_kernel(layer, file)
            layer = {}
        layer[kind] = value
    if layer:
        yield _check_kernel(layer, file)


def _check_kernel(layer: dict[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    if "kernel" not in layer:
        raise CheckpointError(f"{file} holds a {' and a '.join(layer)} without a kernel.")
    return layer
