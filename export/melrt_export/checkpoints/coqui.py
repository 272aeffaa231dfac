"""Coqui TTS (and Mozilla TTS): melgan, full-band and multi-band generators, with `config.json` and optionally `scale_stats.npy`.

Source: `vocoder/models/melgan_generator.py`, `multiband_melgan_generator.py`, `vocoder/models/gan.py`
(load_checkpoint), `vocoder/layers/pqmf.py` and `utils/audio/processor.py` of that project. Up to version 0.0.14 `model` is the generator
alone, with `model_disc` beside it. In later versions the generator is `model_g` inside `model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from melrt.errors import CheckpointError
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.checkpoints.checkpoint import (
    Checkpoint,
    build_mel_spec,
    fold_normalization,
    fold_weight_norm,
    read_normalization,
    rename_tensors,
    sha256_of,
    strip_prefix,
)
from melrt_export.checkpoints.naming import LayerNaming
from melrt_export.checkpoints.reading import CheckpointFile, check_settings_size, read_json, read_npy_dict
from melrt_export.checkpoints.torch_files import to_arrays

NAME = "Coqui TTS"
FILES = "best_model.pth or model_file.pth with config.json, and scale_stats.npy if it names one"
PATTERNS: tuple[str, ...] = ("best_model.pth*", "model_file.pth*", "checkpoint_*.pth*")
NAMING = LayerNaming(NAME, prefix="layers", nested=True)
_GENERATORS = ("melgan_generator", "melgan_fb_generator", "fullband_melgan_generator", "multiband_melgan_generator")
# MelganGenerator.inference_padding: the end frames are repeated on both sides, and the project does not trim their audio.
EDGES = Edges(left=2, right=2)


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file holds tensors of `layers` or of `model_g` under `model`."""
    return file.has_name("layers.", "model") or file.has_name("model_g.", "model")


def load(file: CheckpointFile) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged, holds another class of generator, or its config or tensors are those of another network.
    """
    path, values = _settings(file)
    kind = str(values.get("generator_model", ""))
    if kind not in _GENERATORS:
        raise CheckpointError(
            f"{path} names a generator {kind[:60]!r}; the supported generators of Coqui TTS are {', '.join(_GENERATORS)}."
        )
    model = to_arrays(file.path, file.content["model"])
    state = fold_weight_norm(strip_prefix(model, "model_g.") or model)
    config = NAMING.infer_config(state, file.path)
    filters = state.pop("pqmf_layer.G", None)
    if config.out_channels > 1:
        if filters is None or filters.ndim != 3:
            raise CheckpointError(f"{file.path} lacks pqmf_layer.G, the filters that join its {config.out_channels} sub-bands.")
        config = replace(config, pqmf_taps=filters.shape[2] - 1)
        state["pqmf.weight"] = filters[0]
    state = {name: value for name, value in state.items() if not name.startswith("pqmf_layer.")}
    weights = rename_tensors(state, NAMING.names(config), config)
    _compare(values.get("generator_model_params"), config.upsample_scales, config.stacks, path)
    audio = values.get("audio")
    if not isinstance(audio, dict):
        raise CheckpointError(f"{path} has no audio section, which holds the mel convention.")
    spec = _spec(audio, path)
    normalization = _normalization(audio, spec, path)
    config, weights = fold_normalization(config, weights, normalization)
    return Checkpoint(
        name=file.path.resolve().parent.name, format=NAME, source=file.path, sha256=sha256_of(file.path), config=config,
        weights=weights, spec=spec, edges=EDGES, normalization=normalization,
    )  # fmt: skip


def _settings(file: CheckpointFile) -> tuple[Path, Mapping[str, Any]]:
    """Return the config and its file: `config.json` beside the checkpoint, or the config inside it in newer versions."""
    path = file.path.parent / "config.json"
    inside = file.content.get("config")
    if not path.is_file() and isinstance(inside, dict):
        check_settings_size(inside, file.path)
        return file.path, inside
    return path, read_json(path)


def _compare(params: object, scales: tuple[int, ...], stacks: int, path: Path) -> None:
    if not isinstance(params, dict):
        return
    for name, ours in (("upsample_factors", list(scales)), ("num_res_blocks", stacks)):
        given = params.get(name, ours)
        if (list(given) if isinstance(given, tuple) else given) != ours:
            raise CheckpointError(
                f"{path}: {name} is {str(given)[:60]}, but according to the weights it is {ours}. "
                "The two files belong to different trainings."
            )


def _spec(audio: Mapping[str, Any], path: Path) -> MelSpec:
    """Return the convention of `AudioProcessor.melspectrogram`.

    It is gain · log(max(1e-8, mel)) of the magnitude, with centered frames and librosa's filters.
    """
    base = audio.get("log_func", "np.log10")
    applied = audio.get("do_amp_to_db_mel", True)
    if base not in ("np.log10", "np.log") or applied is not True:
        raise CheckpointError(
            f"{path}: log_func is {str(base)[:40]!r} and do_amp_to_db_mel is {applied!r:.40}; log_func must be np.log10 or np.log, "
            "and do_amp_to_db_mel true."
        )
    rate, gain = audio.get("sample_rate"), audio.get("spec_gain", 20)
    decibels = base == "np.log10" and gain == 20
    hop, window = audio.get("hop_length"), audio.get("win_length")
    if hop is None:
        hop, window = _milliseconds(audio, path)
    f_max = audio.get("mel_fmax")
    return build_mel_spec(
        {
            "sample_rate": rate, "n_fft": audio.get("fft_size", 1024), "hop": hop, "win_length": window, "n_mels": audio.get("num_mels"),
            "f_min": audio.get("mel_fmin") or 0.0, "f_max": rate / 2 if f_max is None and type(rate) is int else f_max,
            "log": "dB" if decibels else "log10" if base == "np.log10" else "ln", "gain": 1.0 if decibels else gain, "floor": 1e-8,
            "framing": "center", "padding": audio.get("stft_pad_mode", "reflect"), "preemphasis": audio.get("preemphasis") or 0.0,
        },
        path,
    )  # fmt: skip


def _milliseconds(audio: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Return hop and window in samples from `frame_shift_ms` and `frame_length_ms` (numpy_transforms.millisec_to_length)."""
    length, shift, rate = (_number(audio.get(name)) for name in ("frame_length_ms", "frame_shift_ms", "sample_rate"))
    if not (length > 0 and shift > 0 and rate > 0):
        raise CheckpointError(f"{path} has neither hop_length nor frame_length_ms and frame_shift_ms.")
    window = int(length / 1000 * rate)
    return int(window / (length / shift)), window


def _number(value: object) -> float:
    """Return the value if it is a number below a million, else NaN, which fails every comparison."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e6 else float("nan")


def _normalization(audio: Mapping[str, Any], spec: MelSpec, path: Path) -> Normalization | None:
    """Return the normalization of `AudioProcessor.normalize`.

    It takes mean and deviation from `scale_stats.npy`, or maps a range of decibels to ±max_norm or 0..max_norm.
    """
    if not audio.get("signal_norm"):
        return None
    if named := audio.get("stats_path"):
        # the stored path is that of the training machine; here the file is beside the checkpoint
        file = path.parent / PurePosixPath(str(named)[:1000].replace("\\", "/")).name
        values = read_npy_dict(file)
        return read_normalization(values.get("mel_mean"), values.get("mel_std"), file, spec.n_mels)
    floor, level, largest = (_number(audio.get(name)) for name in ("min_level_db", "ref_level_db", "max_norm"))
    largest = 1.0 if audio.get("max_norm") is None else largest
    if not (floor < 0 < largest and abs(level) < 1e6):
        given = ", ".join(f"{name} {str(audio.get(name))[:40]}" for name in ("min_level_db", "ref_level_db", "max_norm"))
        raise CheckpointError(
            f"{path}: the range normalization has {given}; min_level_db must be below 0, max_norm above 0, and all numbers."
        )
    symmetric = bool(audio.get("symmetric_norm"))
    scale = -floor / (2 * largest if symmetric else largest)
    mean = level + (floor / 2 if symmetric else floor)
    clip = (level + floor, level) if audio.get("clip_norm", True) else None
    return Normalization((mean,) * spec.n_mels, (scale,) * spec.n_mels, clip)
