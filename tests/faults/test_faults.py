"""A few of the kills and full disks of `make faults`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="kills processes with Linux's limits")
def test_commands_that_are_killed_leave_whole_results_and_the_next_run_removes_the_rest() -> None:
    pytest.importorskip("torch", reason="the program of the faults needs the extra `export`")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.faults.faults", "8", "add", "synth"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "killed" in run.stdout
    assert "refused" in run.stdout
