"""The wheel in an empty environment: what a user gets who installs melrt without a clone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "tests" / "data" / "bundles" / "tiny.melrt"


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("melrt-0.1.0-*.whl")
    assert (tmp_path / "melrt-0.1.0.tar.gz").is_file()
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    pip = [tmp_path / "empty/bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    installed = subprocess.run(list(map(str, [*pip, f"{wheel}[cpu,cli]"])), cwd=tmp_path, capture_output=True, text=True, timeout=280)
    if installed.returncode and "No matching distribution" in installed.stderr:
        pytest.skip("no package registry is reachable")
    assert installed.returncode == 0, installed.stderr
    melrt = tmp_path / "empty/bin/melrt"
    mel = np.load(BUNDLE / "reference.mel.npy")[0]
    np.save(tmp_path / "mel.npy", mel)
    run(melrt, "synth", BUNDLE, "mel.npy", "-o", "speech.wav", cwd=tmp_path)
    assert (tmp_path / "speech.wav").stat().st_size > mel.shape[1] * 256 * 2
    refused = subprocess.run([melrt, "export", BUNDLE, "-o", "x.melrt"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert 'pip install "melrt[export]"' in refused.stderr
    names = run(tmp_path / "empty/bin/python", "-m", "pip", "list", cwd=tmp_path).lower()
    assert not [heavy for heavy in ("torch", "librosa", "scipy", "onnx ", "matplotlib", "numba") if f"\n{heavy}" in names]
