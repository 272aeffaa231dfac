"""Fixtures of trainings."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.export.training.runs import write_config, write_recordings


@pytest.fixture(autouse=True)
def one_thread_in_children(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread in the processes of a test, too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a config and three seconds of speech in three files."""
    write_recordings(tmp_path)
    write_config(tmp_path, steps=20)
    return tmp_path
