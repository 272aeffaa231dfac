"""Engines for the GPU at hand: built, opened and audited by the inspector."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from melrt import Bundle
from melrt.doctor import examine
from melrt_export.engine import EngineOptions, build_engine

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_an_engine_for_this_gpu(demo_bundle: Bundle, tmp_path: Path, flavour: str, precision: str) -> None:
    gpu = next(finding for finding in examine() if finding.purpose == "NVIDIA GPU")
    if not gpu.ready:
        pytest.skip(f"NVIDIA GPU: {gpu.found}")
    if importlib.util.find_spec(flavour) is None:
        pytest.skip(f"{flavour} is not installed here")
    bundle = Bundle.open(shutil.copytree(demo_bundle.path, tmp_path / "lj.melrt"))
    entry = build_engine(bundle, EngineOptions(precision=precision, flavour=flavour, portable=False))
    assert entry.target["gpu"] in gpu.found
    # TensorRT's inspector names every layer's type; TensorRT-RTX's says so only of what is compiled ahead
    assert entry.target["audited"] == "engine" or flavour == "tensorrt_rtx"
