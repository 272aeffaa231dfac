"""Small files that would fill the memory, take minutes, or crash the process."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory with Linux's functions")
def test_every_bomb_is_refused_quickly_and_in_little_memory() -> None:
    pytest.importorskip("torch", reason="reading checkpoints needs the extra `export`")
    run = subprocess.run([sys.executable, "-m", "tests.fuzz.bombs"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("refused: ") >= 50
