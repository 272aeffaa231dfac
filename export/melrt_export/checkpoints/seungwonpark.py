"""seungwonpark/melgan: `<name>_<githash>_<epoch>.pt` with `model_g`, the discriminator, the optimizers and the config as text.

Source: `model/generator.py`, `model/res_stack.py`, `utils/stft.py` and `inference.py` of that project. Its forward function takes
(mel + 5) / 5. Its inference appends ten frames of silence and removes their audio.
"""

from __future__ import annotations

from melrt.errors import CheckpointError
from melrt.planning.edges import Edges
from melrt_export.checkpoints.checkpoint import (
    Checkpoint,
    build_mel_spec,
    fold_normalization,
    fold_weight_norm,
    read_normalization,
    rename_tensors,
    sha256_of,
)
from melrt_export.checkpoints.naming import LayerNaming
from melrt_export.checkpoints.reading import CheckpointFile, parse_yaml
from melrt_export.checkpoints.torch_files import to_arrays

NAME = "seungwonpark/melgan"
FILES = "<name>_<githash>_<epoch>.pt"
PATTERNS: tuple[str, ...] = ("*_[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]_*.pt",)
NAMING = LayerNaming(NAME, prefix="generator", nested=True)
# Silence of Tacotron 2: ln of 1e-5, as inference.py writes it.
SILENCE = -11.5129


def recognizes(file: CheckpointFile) -> bool:
    """Return whether the file holds tensors of `generator` under `model_g`."""
    return file.has_name("generator.", "model_g")


def load(file: CheckpointFile) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: The file is damaged, or its tensors or its config are those of another network.
    """
    path = file.path
    # The project's Generator registers only its Sequential; `mel_channel` is a plain attribute.
    state = fold_weight_norm(to_arrays(path, file.content["model_g"]))
    config = NAMING.infer_config(state, path)
    weights = rename_tensors(state, NAMING.names(config), config)
    normalization = read_normalization([-5.0] * config.in_channels, [5.0] * config.in_channels, path, config.in_channels)
    audio = _audio_settings(file)
    if audio.get("n_mel_channels", config.in_channels) != config.in_channels:
        raise CheckpointError(f"{path}: hp_str has {audio['n_mel_channels']!r} mel channels, and the weights take {config.in_channels}.")
    given = {
        ours: audio[theirs]
        for ours, theirs in (
            ("sample_rate", "sampling_rate"), ("n_fft", "filter_length"), ("hop", "hop_length"), ("win_length", "win_length"),
            ("f_min", "mel_fmin"), ("f_max", "mel_fmax"),
        )
        if theirs in audio
    }  # fmt: skip
    spec = build_mel_spec({"n_mels": config.in_channels, "log": "ln", "f_max": 8000.0, "framing": "center", **given}, path)
    config, weights = fold_normalization(config, weights, normalization)
    return Checkpoint(
        name=path.stem, format=NAME, source=path, sha256=sha256_of(path), config=config, weights=weights, spec=spec,
        edges=Edges(right=10, value=SILENCE), normalization=normalization,
    )  # fmt: skip


def _audio_settings(file: CheckpointFile) -> dict[str, object]:
    """Return the audio section of the config, which the checkpoint holds as text of several YAML documents."""
    text = file.content.get("hp_str", "")
    merged: dict[str, object] = {}
    for document in parse_yaml(text if isinstance(text, str) else "", file.path):
        if isinstance(document, dict) and isinstance(document.get("audio"), dict):
            merged |= document["audio"]
    return merged
