"""A fused engine for the GPU of this machine: it synthesizes as the CPU does, from numpy and from arrays on the GPU."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from melrt import Bundle, Vocoder
from melrt.backends.fused.tuning import Tuning
from melrt.system import find_gpu

pytest.importorskip("torch", reason="building an engine needs the extra `fused-build`")
from melrt_export.fused.build import FusedOptions, build_fused
from melrt_export.fused.candidates import candidates
from melrt_export.parity import FP16_MIN_SNR_DB, Difference, probe_mel

pytestmark = pytest.mark.gpu


@pytest.fixture
def voice(demo_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The demo voice with a fused engine for this GPU."""
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("no NVIDIA GPU: no driver (libcuda.so.1) that finds a device")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed here")
    bundle = Bundle.open(shutil.copytree(demo_bundle.path, tmp_path / "lj.melrt"))
    build_fused(bundle, FusedOptions((gpu.compute_capability,)))
    return Bundle.open(bundle.path)


def test_a_fused_engine_is_the_cpus(voice: Bundle) -> None:
    mels = [probe_mel(voice.manifest.spec, frames, frames) for frames in (4, 86, 255, 256, 700, 2000)]
    with Vocoder.load(voice, device="cpu", precision="fp32") as cpu, Vocoder.load(voice, backend="fused") as vocoder:
        expected = [cpu(mel) for mel in mels]
        for reference, audio, mel in zip(expected, vocoder.batch(mels), mels, strict=True):
            assert Difference.between(reference, audio).reaches(FP16_MIN_SNR_DB)
            assert Difference.between(reference, vocoder(mel)).reaches(FP16_MIN_SNR_DB)
        assert vocoder.backend.failed_captures == 0  # last, because the audio says more about a new GPU


def test_arrays_on_the_gpu_are_the_cpus(voice: Bundle) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    mel = probe_mel(voice.manifest.spec, 700)
    with Vocoder.load(voice, device="cpu", precision="fp32") as cpu, Vocoder.load(voice, backend="fused") as vocoder:
        audio = vocoder(torch.from_numpy(mel).cuda()).cpu().numpy()
        assert Difference.between(cpu(mel), np.ascontiguousarray(audio)).reaches(FP16_MIN_SNR_DB)


def test_tuned_tiles_give_the_same_bits(voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    mel = probe_mel(voice.manifest.spec, 700)
    with Vocoder.load(voice, backend="fused") as vocoder:
        expected = vocoder(mel)
    few = lambda kernel, default: candidates(kernel, default)[:8]  # noqa: E731
    monkeypatch.setattr("melrt_export.fused.tuning.candidates", few)
    gpu = find_gpu()
    assert gpu
    entry, _ = build_fused(voice, FusedOptions((gpu.compute_capability,), tune=True))
    tuning = Tuning.of(entry)
    assert tuning is not None
    assert (tuning.gpu, tuning.different) == (gpu.name, 0)
    assert tuning.timed > len(tuning.kernels)
    with Vocoder.load(Bundle.open(voice.path), backend="fused") as vocoder:
        assert np.array_equal(vocoder(mel), expected)
