"""Fixtures of trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
from tests.export.training.runs import write_config

from melrt.files.audio import read_audio
from melrt_export.assets import RECORDING


@pytest.fixture(autouse=True)
def one_thread_in_children(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread in the processes of a test, too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a config and three seconds of speech in three files."""
    audio = read_audio(RECORDING, 22050)
    (tmp_path / "wavs").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / "wavs" / f"{i}.wav", audio[22050 * (i + 1) : 22050 * (i + 2)], 22050)
    write_config(tmp_path, steps=20)
    return tmp_path
