"""The table of limits in docs/security.md has the numbers of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from melrt.bundle import folder, graph_check, manifest
from melrt.files import audio, mels
from melrt_export.checkpoints import archives, hdf5, hdf5_reader, limits, load
from melrt_export.training import config

ROOT = Path(__file__).parents[3]
MIB, GIB = 1 << 20, 1 << 30
ROWS = {
    "ONNX graph": f"at most {graph_check.MAX_GRAPH_BYTES // MIB} MiB",
    "probe, INT8 plan, window record": f"at most {manifest.MAX_ARTIFACT_BYTES // GIB} GiB",
    "manifest": f"{folder.MAX_MANIFEST_BYTES // MIB} MiB, plain file names, every field checked, no control characters, "
    f"{manifest.MAX_DEPTH} levels",
    "checkpoint (PyTorch)": f"{limits.MAX_PICKLE_OPERATIONS:,} pickled operations, {limits.MAX_PICKLE_TUPLES:,} tuples, "
    f"{limits.MAX_ZIP_DIRECTORY_BYTES // MIB} MiB of zip directory; a context of at most {load.MAX_CONTEXT} frames",
    "checkpoint (safetensors)": f"{limits.MAX_WEIGHTS_BYTES // GIB} GiB, of which {limits.MAX_SAFETENSORS_HEADER_BYTES // MIB} MiB",
    "checkpoint (HDF5)": f"{hdf5.SECONDS:g} s of processor time for the first {hdf5.BYTES_PER_SECOND // MIB} MiB and each further; "
    f"{hdf5_reader.MAX_NODES:,} groups and arrays; {hdf5_reader.FREE_BYTES // MIB} MiB plus ten times",
    "checkpoint settings (YAML, JSON)": f"{limits.MAX_CONFIG_BYTES >> 10} KiB, {limits.MAX_VALUE_LENGTH} characters a value, "
    f"{limits.MAX_SETTINGS_DEPTH} levels, {limits.MAX_SETTINGS:,} settings",
    "checkpoint statistics (pickled numpy)": f"{limits.MAX_STATISTICS_BYTES // MIB} MiB, {limits.MAX_PICKLE_OPERATIONS:,} pickled",
    "training config (TOML)": f"{config.MAX_CONFIG_BYTES // MIB} MiB",
    "archive (tar, zip)": f"{archives.MAX_MEMBERS} entries; {archives.FREE_BYTES // MIB} MiB plus twenty times the file; "
    f"{archives.MAX_TAR_HEADERS_BYTES // MIB} MiB for headers",
    "mel (`.npy`, `.npz`, `.pt`)": f"{mels.MAX_MEL_BYTES // GIB} GiB",
    "audio": f"{audio.LEAST_RATE} to {audio.MOST_RATE:,} Hz; {audio.MAX_AUDIO_BYTES // GIB} GiB of samples as float32, and "
    f"{audio.FREE_AUDIO_BYTES // MIB} MiB plus {audio.MAX_RATIO} times the file",
}


@pytest.mark.parametrize("kind", ROWS)
def test_documented_limits_are_those_of_the_code(kind: str) -> None:
    (row,) = [line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith(f"| {kind} |")]
    assert ROWS[kind] in row
    assert (hdf5_reader.MAX_RATIO, archives.MAX_RATIO) == (10, 20), "the table says ten and twenty times"
