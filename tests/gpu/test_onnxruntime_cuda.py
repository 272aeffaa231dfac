"""ONNX Runtime on a GPU, held against the CPU; run with `make test` on a GPU host that has onnxruntime-gpu."""

from __future__ import annotations

import numpy as np
import pytest

from melrt import Bundle, Vocoder
from melrt.system import examine
from melrt_export.parity import FP16_MIN_SNR_DB, Difference, probe_mel

pytestmark = pytest.mark.gpu
# Exact up to the order of summation: melrt switches TF32 off, which ONNX Runtime uses by default.
FP32_MIN_SNR_DB = 90.0


@pytest.fixture(autouse=True)
def gpu() -> None:
    missing = [
        f"{f.purpose}: {f.found}" for f in examine() if f.purpose in ("NVIDIA GPU", "synthesis on a GPU, ONNX Runtime") and not f.ready
    ]
    if missing:
        pytest.skip("; ".join(missing))


@pytest.mark.parametrize(("precision", "limit"), [("fp32", FP32_MIN_SNR_DB), ("tf32", FP16_MIN_SNR_DB), ("fp16", FP16_MIN_SNR_DB)])
def test_audio_equals_the_cpus(demo_bundle: Bundle, precision: str, limit: float) -> None:
    gpu = Vocoder.load(demo_bundle, device="cuda", precision=precision)
    assert (gpu.backend.device, gpu.backend.precision) == ("cuda:0", precision)
    mel = np.stack([probe_mel(gpu.spec, 200, seed) for seed in range(2)])
    assert Difference.between(Vocoder.load(demo_bundle, device="cpu", precision="fp32")(mel), gpu(mel)).snr_db > limit


def test_auto_takes_the_gpu(demo_bundle: Bundle) -> None:
    assert Vocoder.load(demo_bundle).backend.device == "cuda:0"
