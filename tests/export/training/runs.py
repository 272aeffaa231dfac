"""Configs, commands and states of small trainings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import soundfile
from safetensors import safe_open

from melrt.files.audio import read_audio
from melrt_export.assets import RECORDING
from melrt_export.training.config import TrainingConfig, read_config
from melrt_export.training.state import FILE

CONFIG = """
run = "run"
[generator]
channels = 32
stacks = 1
[data]
train = "wavs"
held_out = 1
batch = 2
segment = 4096
workers = 0
[losses]
stft = 1.0
mel = 5.0
[discriminator]
channels = 4
layers = 2
[schedule]
steps = {steps}
log_every = 5
validate_every = 10
save_every = 10
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
WATCHDOG = 120


def write_config(folder: Path, steps: int, *changes: tuple[str, str], name: str = "x.toml") -> TrainingConfig:
    text = CONFIG.format(steps=steps)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return read_config(folder / name)


def write_recordings(folder: Path, seconds: float = 1.0) -> None:
    """Write three pieces of speech of this length."""
    audio, length = read_audio(RECORDING, 22050), round(22050 * seconds)
    (folder / "wavs").mkdir()
    for i in range(3):
        soundfile.write(folder / "wavs" / f"{i}.wav", audio[length * (i + 1) : length * (i + 2)], 22050)


def header(run: Path) -> dict:
    with safe_open(run / FILE, "np") as file:
        return json.loads(file.metadata()["melrt"])


def command(*arguments: object, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "melrt", "train", *map(str, arguments)]
