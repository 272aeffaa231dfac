"""seungwonpark/melgan: `<name>_<githash>_<epoch>.pt` with `model_g`, the discriminator, the optimizers and the config as text.

Source: `model/generator.py`, `model/res_stack.py`, `utils/stft.py` and `inference.py` of that project. Its forward takes
(mel + 5) / 5, and its inference appends ten frames of silence and cuts their audio off.
"""

from __future__ import annotations

from melrt.errors import CheckpointError
from melrt.planning.edges import Edges
from melrt_export.checkpoints.checkpoint import (
    Checkpoint,
    fold_weight_norm,
    mel_spec,
    named_tensors,
    read_normalization,
    sha256_of,
    with_normalization,
)
from melrt_export.checkpoints.naming import Naming
from melrt_export.checkpoints.reading import Opened, arrays, parse_yaml

NAME = "seungwonpark/melgan"
FILES = "<name>_<githash>_<epoch>.pt"
PATTERNS: tuple[str, ...] = ("*_[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]_*.pt",)
NAMING = Naming(NAME, prefix="generator", nested=True)
# Tacotron 2's silence: ln of 1e-5, as inference.py writes it.
SILENCE = -11.5129


def recognizes(opened: Opened) -> bool:
    """Whether this file is one of this project's."""
    return opened.has("generator.", "model_g")


def load(opened: Opened) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: Damaged, tensors of another network, or a config of another network.
    """
    file = opened.file
    # the project's Generator also registers nothing but its Sequential; `mel_channel` is a plain attribute
    state = fold_weight_norm(arrays(file, opened.content["model_g"]))
    config = NAMING.infer(state, file)
    weights = named_tensors(state, NAMING.names(config), config)
    normalization = read_normalization([-5.0] * config.in_channels, [5.0] * config.in_channels, file, config.in_channels)
    audio = _audio(opened)
    if audio.get("n_mel_channels", config.in_channels) != config.in_channels:
        raise CheckpointError(f"{file}: hp_str says {audio['n_mel_channels']!r} mel channels, the weights take {config.in_channels}.")
    given = {
        ours: audio[theirs]
        for ours, theirs in (
            ("sample_rate", "sampling_rate"), ("n_fft", "filter_length"), ("hop", "hop_length"), ("win_length", "win_length"),
            ("f_min", "mel_fmin"), ("f_max", "mel_fmax"),
        )
        if theirs in audio
    }  # fmt: skip
    spec = mel_spec({"n_mels": config.in_channels, "log": "ln", "f_max": 8000.0, "framing": "center", **given}, file)
    config, weights = with_normalization(config, weights, normalization)
    return Checkpoint(
        name=file.stem, format=NAME, source=file, sha256=sha256_of(file), config=config, weights=weights, spec=spec,
        edges=Edges(right=10, value=SILENCE), normalization=normalization,
    )  # fmt: skip


def _audio(opened: Opened) -> dict[str, object]:
    """The audio section of the config that stands in the checkpoint as text (several YAML documents)."""
    text = opened.content.get("hp_str", "")
    merged: dict[str, object] = {}
    for document in parse_yaml(text if isinstance(text, str) else "", opened.file):
        if isinstance(document, dict) and isinstance(document.get("audio"), dict):
            merged |= document["audio"]
    return merged
