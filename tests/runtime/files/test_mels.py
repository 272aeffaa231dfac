"""Mels are read from numpy files and from audio."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from melrt.errors import MelError, MissingExtraError
from melrt.files.audio import read_audio
from melrt.files.mels import mel_pieces, read_mel
from melrt.mel.features import mel_from_audio
from melrt.mel.spec import MelSpec
from melrt_export.assets import RECORDING

SPEC = MelSpec()


def test_numpy_files_are_read(tmp_path: Path, noise: np.random.Generator) -> None:
    mel = noise.standard_normal((80, 9)).astype(np.float32)
    np.save(tmp_path / "a.npy", mel)
    np.save(tmp_path / "batch of one.npy", mel[None])
    np.savez(tmp_path / "b.npz", mel=mel, other=mel[:1])
    for file in tmp_path.iterdir():
        assert np.array_equal(read_mel(file, SPEC), mel), file
        assert np.array_equal(np.concatenate(list(mel_pieces(file, SPEC, 4)), axis=1), mel), file


def test_the_mel_of_audio_is_computed(tmp_path: Path) -> None:
    audio = read_audio(RECORDING, SPEC.sample_rate)
    soundfile.write(tmp_path / "x.mp3", audio, SPEC.sample_rate)
    assert np.array_equal(read_mel(RECORDING, SPEC), mel_from_audio(audio, SPEC))
    assert read_mel(tmp_path / "x.mp3", SPEC).shape[0] == 80


def test_files_without_a_mel_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "code.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    np.save(tmp_path / "batch.npy", np.zeros((2, 80, 9)))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "mel.txt").write_text("1 2 3")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "code.npy": "cannot be read as a numpy file.*Python objects", "two.npz": "expected one array, or one named 'mel'",
        "batch.npy": "one utterance.*Save each utterance in a file", "broken.npz": "cannot be read", "text.npy": "another kind of file",
        "mel.txt": r"cannot be read as audio.*read from \.npy, \.npz, \.pt, \.pth files", "nowhere.npy": "does not exist. Give",
        ".": r"is a folder. Give its mels as .*\*\.npy, or .*`melrt bulk`", "pipe": "is not a file",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(MelError, match=message) as refused:
            read_mel(tmp_path / name, SPEC)
        assert "unsafely" not in str(refused.value)


def test_torch_files_are_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: np.random.Generator) -> None:
    mel = noise.standard_normal((80, 2)).astype(np.float32)
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\xa0tQ"
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0(KPK\x02t(K\x02K\x01t\x89}tR."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", mel.tobytes())
    for module in ("torch", "h5py", "yaml", "safetensors"):
        monkeypatch.setitem(sys.modules, module, None)
    assert np.array_equal(read_mel(tmp_path / "x.pt", SPEC), mel)
    monkeypatch.setitem(sys.modules, "melrt_export.torch_mels", None)
    with pytest.raises(MissingExtraError, match=r"reading .pt files needs .*melrt\[export\]"):
        read_mel(tmp_path / "x.pt", SPEC)
