"""The vocoder: shapes and types, the choice of backend, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.runtime.echo import ONE, constant, load_echo
from tests.runtime.reference import speech_mel

from melrt import Vocoder, write_wav
from melrt.bundle import Bundle
from melrt.errors import AudioError, BackendError, BundleError, ConfigError, MelError
from melrt.files.audio import to_int16


@pytest.fixture(scope="module")
def vocoder(tiny_bundle_path: Path, backend: str) -> Vocoder:
    return Vocoder.load(tiny_bundle_path, precision="fp32", backend=backend)


def test_batch_equals_single_utterances(vocoder: Vocoder) -> None:
    mels = np.stack([speech_mel(vocoder.bundle, 30, seed) for seed in range(3)])
    batch = vocoder(mels)
    assert batch.shape == (3, 30 * 256)
    assert batch.dtype == np.float32
    assert np.abs(batch).max() > 0.05
    for mel, audio in zip(mels, batch, strict=True):
        alone = vocoder(mel)
        assert alone.shape == (30 * 256,)
        assert np.abs(alone - audio).max() < 1e-5


def test_dtype_and_memory_layout_do_not_matter(vocoder: Vocoder) -> None:
    mel = speech_mel(vocoder.bundle, 12).astype(np.float16)
    expected = vocoder(mel.astype(np.float32))
    for same in (mel, mel.astype(np.float64), np.asfortranarray(mel), mel.tolist(), mel[:, ::-1][:, ::-1]):
        assert np.array_equal(vocoder(same), expected)


@pytest.mark.parametrize(
    ("mel", "message"),
    [
        (np.zeros((40, 9)), r"mel has 40 bands; this voice takes 80 \(0-11025 Hz, log10, 22050 Hz, hop 256\)\. Compute it with `melrt mel"),
        (np.zeros((9, 80)), r"looks transposed: pass mel\.T"),
        (np.zeros((80, 0)), "mel is empty"),
        (np.zeros((0, 80, 9)), "mel is empty"),
        (np.zeros((80, 3)), "3 frames; this network needs at least 4.*silence"),
        (np.full((80, 9), np.nan), r"nan at \(0, 0\)"),
        (np.where(np.arange(9) == 5, np.inf, np.zeros((80, 9))), r"inf at \(0, 5\)"),
        (np.full((80, 9), 1e300), "inf at"),
        (np.zeros(80), r"shape \(80,\)"),
        (np.zeros((80, 9), complex), "dtype complex128"),
        (np.array([["a"]]), "dtype <U1"),
        (np.array([[object()]]), "dtype object"),
    ],
)
def test_wrong_mels_are_refused(vocoder: Vocoder, mel: np.ndarray, message: str) -> None:
    with pytest.raises(MelError, match=message):
        vocoder(mel)


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"precision": "fp8"}, ConfigError, "precision is 'fp8'; it must be one of auto, fp32"),
        ({"device": "tpu"}, ConfigError, "device is 'tpu'"),
        ({"backend": "tvm"}, ConfigError, "backend is 'tvm'"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"precision": "int8"}, BackendError, "has no int8 artifact; it has fp16 onnx, fp32 onnx"),
    ],
)
def test_unavailable_choices_are_refused(tiny_bundle_path: Path, choice: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Vocoder.load(tiny_bundle_path, **choice)


def test_missing_gpu_is_an_error_not_a_fallback(tiny_bundle_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(BackendError, match=r"has no CUDA.*melrt\[gpu\]"):
        Vocoder.load(tiny_bundle_path, device="cuda")


def test_requested_precision_runs(tiny_bundle_path: Path) -> None:
    full, half = (Vocoder.load(tiny_bundle_path, precision=precision, threads=1) for precision in ("fp32", "fp16"))
    assert (full.backend.precision, half.backend.precision) == ("fp32", "fp16")
    mel = speech_mel(full.bundle, 20)
    assert 0 < np.abs(full(mel) - half(mel)).max() < 0.05
    assert Vocoder.load(tiny_bundle_path).backend.precision == "fp32"


def test_altered_model_is_refused(tiny_bundle: Bundle, backend: str) -> None:
    file = tiny_bundle.path / "edge.fp32.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="was altered"):
        Vocoder.load(tiny_bundle, precision="fp32", backend=backend)


def test_batch_reads_its_source_lazily(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)
    read: list[int] = []

    def source():
        for value in range(100):
            read.append(value)
            yield constant(value)

    audio = vocoder.batch(source())
    assert (next(audio) == 0).all()
    assert len(read) <= 4
    audio.close()
    assert vocoder.stats().queue_windows == 0
    vocoder.close()


def test_batch_names_the_utterance_it_refuses(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)
    read: list[int] = []

    def source():
        for index in range(9):
            read.append(index)
            yield constant(index) if index != 4 else np.zeros((40, 20))

    batch = vocoder.batch(source())
    assert [float(next(batch)[0]) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(MelError, match="utterance 4: mel has 40 bands"):
        next(batch)
    assert read == [0, 1, 2, 3, 4]
    vocoder.close()


class TensorLike:
    """An array of another library, like a PyTorch tensor, whose memory numpy shares."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.values


def test_array_may_be_refilled_during_a_batch(tiny_bundle_path: Path) -> None:
    vocoder, _ = load_echo(tiny_bundle_path, ONE)
    buffer = constant(0)

    def source():
        for value in range(5):
            buffer[:] = value
            yield buffer

    assert [float(audio[0]) for audio in vocoder.batch(source())] == [0, 1, 2, 3, 4]
    assert [float(audio[0]) for audio in vocoder.batch(TensorLike(one) for one in source())] == [0, 1, 2, 3, 4]
    vocoder.close()


def test_wav_files_have_the_right_samples(tmp_path: Path) -> None:
    audio = np.array([0.0, 0.5, -1.0, 1.0, 1.5, -2.0], np.float32)
    write_wav(tmp_path / "deep" / "a.wav", audio, 22050)
    samples, rate = soundfile.read(tmp_path / "deep" / "a.wav", dtype="int16")
    assert rate == 22050
    assert samples.tolist() == [0, 16384, -32767, 32767, 32767, -32767] == to_int16(audio).tolist()
    write_wav(tmp_path / "b.wav", audio, 22050, "float32")
    assert np.array_equal(soundfile.read(tmp_path / "b.wav", dtype="float32")[0], audio)
    with pytest.raises(AudioError, match="one utterance"):
        write_wav(tmp_path / "c.wav", audio[None], 22050)
    with pytest.raises(ConfigError, match="int24"):
        write_wav(tmp_path / "c.wav", audio, 22050, "int24")  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.wav", "deep"]


def test_runtime_needs_no_training_packages(tiny_bundle_path: Path) -> None:
    """Every module of the runtime imports, and a voice synthesizes, where PyTorch and the exporter cannot be imported."""
    code = f"""
import importlib, pkgutil, sys
for name in ("torch", "onnx", "librosa", "safetensors", "melrt_export"):
    sys.modules[name] = None
import melrt, numpy
for module in pkgutil.walk_packages(melrt.__path__, "melrt."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        extras = "tritonclient", "fastapi", "uvicorn", "h11", "websockets", "prometheus_client", "starlette"  # of `triton` and `http`
        assert error.name in extras, error
audio = melrt.Vocoder.load({str(tiny_bundle_path)!r})(numpy.zeros((80, 9), numpy.float32))
assert audio.shape == (9 * 256,) and abs(audio).max() > 0.01
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_import_loads_no_large_package() -> None:
    """Inference engines, audio and command-line libraries are imported when they are first needed."""
    heavy = "onnxruntime", "soundfile", "typer", "rich", "torch"
    code = f"import sys, melrt; loaded = [n for n in {heavy} if n in sys.modules]; assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
