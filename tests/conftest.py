"""Fixtures for every test. Nothing here needs PyTorch: tests/runtime runs where only the runtime is installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from melrt.bundle import Bundle

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test, so that no test reads what another test or the user left."""
    monkeypatch.setenv("MELRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MELRT_KEY", str(tmp_path / "engine.key"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder of full-size checkpoints, trained voices and recordings. It is not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the developers' folder ../shared (full-size checkpoints and recordings), which is not in the repository")
    return SHARED


@pytest.fixture(scope="session")
def tiny_bundle_path() -> Path:
    """The committed bundle, which tests must not change. The folders whose tests export replace this fixture (tests/torch_voices.py)."""
    return DATA / "bundles" / "tiny.melrt"


@pytest.fixture
def tiny_bundle(tiny_bundle_path: Path, tmp_path: Path) -> Bundle:
    """A copy of the tiny bundle that a test may change."""
    return Bundle.open(shutil.copytree(tiny_bundle_path, tmp_path / "tiny.melrt"))


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo voice, exported."""
    pytest.importorskip("torch", reason="exporting the demo voice needs the extra `export`")
    from melrt_export.assets import DEMO_VOICE
    from melrt_export.export import export_voice

    return export_voice(DEMO_VOICE, tmp_path_factory.mktemp("demo") / "lj.melrt")


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def melrt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the command line in this process and returns its exit code, stdout and stderr."""
    from melrt.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["melrt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run
