"""The committed bundle is what this version exports from its checkpoint. tests/data/README.md has the command that rebuilds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.conftest import DATA
from tests.runtime import reference

from melrt.bundle import MANIFEST, Bundle, Manifest
from melrt_export.export import ExportOptions, export_voice
from melrt_export.parity import FP32_MAX_ABS


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """The committed bundle and a new export of the same checkpoint."""
    path = tmp_path_factory.mktemp("bundles") / "tiny.melrt"
    return Bundle.open(DATA / "bundles" / "tiny.melrt"), export_voice(DATA / "checkpoints" / "descript", path, ExportOptions(name="tiny"))


def test_manifest_is_current(bundles: tuple[Bundle, Bundle]) -> None:
    committed, new = bundles
    assert facts(committed.manifest) == facts(new.manifest)
    assert (committed.path / MANIFEST).read_bytes() == committed.manifest.dumps()


def facts(manifest: Manifest) -> Manifest:
    """Leave out what depends on the version of melrt or on the rounding of the machine that exported."""
    artifacts = tuple(replace(entry, size=0, sha256="", quality=dict.fromkeys(entry.quality, 0.0)) for entry in manifest.artifacts)
    return replace(manifest, provenance={**manifest.provenance, "tool": ""}, artifacts=artifacts)


def test_graphs_are_equal_byte_for_byte(bundles: tuple[Bundle, Bundle]) -> None:
    """Apart from the version of melrt in their metadata."""
    for entry in bundles[0].manifest.artifacts:
        if entry.kind == "onnx":
            committed, new = (model_bytes(bundle.path / entry.file) for bundle in bundles)
            assert committed == new, entry.file


def model_bytes(path: Path) -> bytes:
    model = onnx.load(path)
    for prop in model.metadata_props:
        if prop.key == "melrt.tool":
            prop.value = ""
    return model.SerializeToString(deterministic=True)


def test_probes_are_equal(bundles: tuple[Bundle, Bundle]) -> None:
    (committed_mel, committed_audio), (new_mel, new_audio) = (bundle.probe() for bundle in bundles)
    assert np.abs(committed_mel - new_mel).max() < 1e-5
    assert np.abs(committed_audio - new_audio).max() < FP32_MAX_ABS


def test_limit_of_the_runtime_tests_is_the_exporters() -> None:
    assert reference.FP32_MAX_ABS == FP32_MAX_ABS
