"""Coqui TTS (and Mozilla TTS): melgan, full-band and multi-band generators, with `config.json` and perhaps `scale_stats.npy` beside them.

Source: `vocoder/models/melgan_generator.py`, `multiband_melgan_generator.py`, `vocoder/models/gan.py`
(load_checkpoint), `vocoder/layers/pqmf.py` and `utils/audio/processor.py` of that project. Up to 0.0.14 `model` is the generator alone,
with `model_disc` beside it; later the generator is `model_g` in it.
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
    fold_weight_norm,
    mel_spec,
    named_tensors,
    read_normalization,
    sha256_of,
    sub_state,
    with_normalization,
)
from melrt_export.checkpoints.naming import Naming
from melrt_export.checkpoints.reading import Opened, arrays, check_settings, read_json, read_npy_dict

NAME = "Coqui TTS"
FILES = "best_model.pth or model_file.pth with config.json, and scale_stats.npy if it names one"
PATTERNS: tuple[str, ...] = ("best_model.pth*", "model_file.pth*", "checkpoint_*.pth*")
NAMING = Naming(NAME, prefix="layers", nested=True)
_GENERATORS = ("melgan_generator", "melgan_fb_generator", "fullband_melgan_generator", "multiband_melgan_generator")
# MelganGenerator.inference_padding: replicated on both sides, and never trimmed there.
EDGES = Edges(left=2, right=2)


def recognizes(opened: Opened) -> bool:
    """Whether this file is one of this project's."""
    return opened.has("layers.", "model") or opened.has("model_g.", "model")


def load(opened: Opened) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: Damaged, another class of generator, a config of another network, or tensors of another network.
    """
    file = opened.file
    path, values = _settings(opened)
    kind = str(values.get("generator_model", ""))
    if kind not in _GENERATORS:
        raise CheckpointError(f"{path} names a generator {kind[:60]!r}; of Coqui TTS, melrt reads {', '.join(_GENERATORS)}.")
    whole = arrays(file, opened.content["model"])
    state = fold_weight_norm(sub_state(whole, "model_g.") or whole)
    config = NAMING.infer(state, file)
    filters = state.pop("pqmf_layer.G", None)
    if config.out_channels > 1:
        if filters is None or filters.ndim != 3:
            raise CheckpointError(f"{file} lacks pqmf_layer.G, the filters that join its {config.out_channels} sub-bands.")
        config = replace(config, pqmf_taps=filters.shape[2] - 1)
        state["pqmf.weight"] = filters[0]
    state = {name: value for name, value in state.items() if not name.startswith("pqmf_layer.")}
    weights = named_tensors(state, NAMING.names(config), config)
    _compare(values.get("generator_model_params"), config.upsample_scales, config.stacks, path)
    audio = values.get("audio")
    if not isinstance(audio, dict):
        raise CheckpointError(f"{path} has no audio section; the mel convention stands there.")
    spec = _spec(audio, path)
    normalization = _normalization(audio, spec, path)
    config, weights = with_normalization(config, weights, normalization)
    return Checkpoint(
        name=file.resolve().parent.name, format=NAME, source=file, sha256=sha256_of(file), config=config, weights=weights,
        spec=spec, edges=EDGES, normalization=normalization,
    )  # fmt: skip


def _settings(opened: Opened) -> tuple[Path, Mapping[str, Any]]:
    """`config.json` beside the file, or the config that newer checkpoints hold themselves."""
    path = opened.file.parent / "config.json"
    inside = opened.content.get("config")
    if not path.is_file() and isinstance(inside, dict):
        check_settings(inside, opened.file)
        return opened.file, inside
    return path, read_json(path)


def _compare(params: object, scales: tuple[int, ...], stacks: int, path: Path) -> None:
    if not isinstance(params, dict):
        return
    for name, ours in (("upsample_factors", list(scales)), ("num_res_blocks", stacks)):
        given = params.get(name, ours)
        if (list(given) if isinstance(given, tuple) else given) != ours:
            raise CheckpointError(f"{path} says {name} is {str(given)[:60]}, the weights say {ours}. They belong to different trainings.")


def _spec(audio: Mapping[str, Any], path: Path) -> MelSpec:
    """`AudioProcessor.melspectrogram`: gain · log(max(1e-8, mel)) of the magnitude, centerd; librosa's own filters."""
    base = audio.get("log_func", "np.log10")
    if base not in ("np.log10", "np.log") or audio.get("do_amp_to_db_mel", True) is not True:
        raise CheckpointError(f"{path}: log_func is {str(base)[:40]!r}, do_amp_to_db_mel {audio.get('do_amp_to_db_mel', True)!r}; "
                              "melrt knows np.log10 and np.log, applied.")  # fmt: skip
    rate, gain = audio.get("sample_rate"), audio.get("spec_gain", 20)
    decibels = base == "np.log10" and gain == 20
    hop, window = audio.get("hop_length"), audio.get("win_length")
    if hop is None:
        hop, window = _milliseconds(audio, path)
    f_max = audio.get("mel_fmax")
    return mel_spec(
        {
            "sample_rate": rate, "n_fft": audio.get("fft_size", 1024), "hop": hop, "win_length": window, "n_mels": audio.get("num_mels"),
            "f_min": audio.get("mel_fmin") or 0.0, "f_max": rate / 2 if f_max is None and type(rate) is int else f_max,
            "log": "dB" if decibels else "log10" if base == "np.log10" else "ln", "gain": 1.0 if decibels else gain, "floor": 1e-8,
            "framing": "center", "padding": audio.get("stft_pad_mode", "reflect"), "preemphasis": audio.get("preemphasis") or 0.0,
        },
        path,
    )  # fmt: skip


def _milliseconds(audio: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Hop and window from `frame_shift_ms` and `frame_length_ms` (numpy_transforms.millisec_to_length)."""
    length, shift, rate = (_number(audio.get(name)) for name in ("frame_length_ms", "frame_shift_ms", "sample_rate"))
    if not (length > 0 and shift > 0 and rate > 0):
        raise CheckpointError(f"{path} has no hop_length, and no frame_length_ms and frame_shift_ms either.")
    window = int(length / 1000 * rate)
    return int(window / (length / shift)), window


def _number(value: object) -> float:
    """A number of a sane size, or NaN, which fails every comparison."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e6 else float("nan")


def _normalization(audio: Mapping[str, Any], spec: MelSpec, path: Path) -> Normalization | None:
    """`AudioProcessor.normalize`: mean and deviation from `scale_stats.npy`, or a range of decibels to ±max_norm or 0..max_norm."""
    if not audio.get("signal_norm"):
        return None
    if named := audio.get("stats_path"):
        # the path is the training machine's: the file stands beside the checkpoint
        file = path.parent / PurePosixPath(str(named)[:1000].replace("\\", "/")).name
        values = read_npy_dict(file)
        return read_normalization(values.get("mel_mean"), values.get("mel_std"), file, spec.n_mels)
    floor, level, largest = (_number(audio.get(name)) for name in ("min_level_db", "ref_level_db", "max_norm"))
    largest = 1.0 if audio.get("max_norm") is None else largest
    if not (floor < 0 < largest and abs(level) < 1e6):
        given = ", ".join(f"{name} {str(audio.get(name))[:40]}" for name in ("min_level_db", "ref_level_db", "max_norm"))
        raise CheckpointError(f"{path}: a range normalization of {given}; min_level_db lies below 0, max_norm above, all are numbers.")
    symmetric = bool(audio.get("symmetric_norm"))
    scale = -floor / (2 * largest if symmetric else largest)
    mean = level + (floor / 2 if symmetric else floor)
    clip = (level + floor, level) if audio.get("clip_norm", True) else None
    return Normalization((mean,) * spec.n_mels, (scale,) * spec.n_mels, clip)
