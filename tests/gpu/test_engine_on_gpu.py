"""Engines for the GPU at hand: built, audited, and synthesizing as the CPU does, from numpy and from arrays that are on the GPU."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from melrt import Bundle, Vocoder
from melrt.files.audio import to_int16
from melrt.system import RTX_UNSUPPORTED, find_gpu
from melrt.vocoder import Options
from melrt_export.parity import FP16_MIN_SNR_DB, Difference, probe_mel
from melrt_export.tensorrt.accuracy_check import FP32_MAX_ABS
from melrt_export.tensorrt.build import EngineOptions, build_engine
from melrt_export.tensorrt.variant_search import find_fastest_engine

pytestmark = pytest.mark.gpu
FLAVORS = ("tensorrt", "tensorrt_rtx")


@pytest.fixture(scope="module", params=[(f, p) for f in FLAVORS for p in ("fp32", "tf32", "fp16")], ids="-".join)
def voice(request: pytest.FixtureRequest, demo_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str, str]:
    """The demo voice with both engines of a flavor and precision."""
    flavor, precision = request.param
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("no NVIDIA GPU: no driver (libcuda.so.1) that finds a device")
    if flavor == "tensorrt_rtx" and gpu.compute_capability in RTX_UNSUPPORTED:
        pytest.skip(f"TensorRT-RTX does not run on compute capability {gpu.compute_capability}")
    if importlib.util.find_spec(flavor) is None:
        pytest.skip(f"{flavor} is not installed here")
    if any(other in sys.modules for other in FLAVORS if other != flavor):
        pytest.skip(f"Polygraphy builds for one flavor per process, and another was imported; run this file with `-k {flavor}-`")
    bundle = Bundle.open(shutil.copytree(demo_bundle.path, tmp_path_factory.mktemp("gpu") / "lj.melrt"))
    for graph in ("edge", "interior"):
        entry = build_engine(bundle, EngineOptions(precision=precision, flavor=flavor, portable=False, graph=graph))
        assert gpu.name == entry.target["gpu"]
        # TensorRT's inspector names every layer's type; TensorRT-RTX's only says so of what is compiled ahead
        assert entry.target["audited"] == "engine" or flavor == "tensorrt_rtx"
        assert entry.quality["snr_db"] > FP16_MIN_SNR_DB
    return Bundle.open(bundle.path), flavor, precision


def load(voice: tuple[Bundle, str, str], **options: object) -> Vocoder:
    return Vocoder.load(voice[0], device="cuda", backend="tensorrt", precision=voice[2], options=Options(**options))


def agree(reference: np.ndarray, audio: np.ndarray, precision: str) -> None:
    difference = Difference.between(reference, audio)
    print(f"{precision}: max abs {difference.max_abs:.2e}, SNR {difference.snr_db:.1f} dB")
    assert difference.max_abs <= FP32_MAX_ABS if precision == "fp32" else difference.snr_db >= FP16_MIN_SNR_DB


def test_every_way_is_the_cpus(voice: tuple[Bundle, str, str]) -> None:
    mels = [probe_mel(voice[0].manifest.spec, frames, frames) for frames in (4, 86, 255, 256, 700, 2000)]
    with Vocoder.load(voice[0], device="cpu", precision="fp32") as cpu, load(voice) as vocoder:
        expected = [cpu(mel) for mel in mels]
        for reference, audio, mel in zip(expected, vocoder.batch(mels), mels, strict=True):
            agree(reference, audio, voice[2])
            agree(reference, vocoder(mel), voice[2])
            agree(reference, np.concatenate(list(vocoder.stream(np.array_split(mel, 3, axis=1)))), voice[2])
        found: dict[int, np.ndarray] = {}
        threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, vocoder(mels[i % 6]))) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, audio in found.items():
            agree(expected[index % 6], audio, voice[2])
        assert len(found) == 24


def test_sixteen_bits(voice: tuple[Bundle, str, str]) -> None:
    mel = probe_mel(voice[0].manifest.spec, 400)
    with load(voice) as floating, load(voice, sample_format="int16") as vocoder:
        assert np.abs(vocoder(mel).astype(int) - to_int16(floating(mel))).max() <= 1


@pytest.mark.parametrize("library", ["torch", "cupy", "pycuda"])
def test_arrays_that_are_on_the_gpu(voice: tuple[Bundle, str, str], library: str) -> None:
    mel = np.stack([probe_mel(voice[0].manifest.spec, 400, seed) for seed in range(3)])
    on_gpu, on_host = _library(library)
    with load(voice) as vocoder:
        for given in (mel, mel[0]):
            array = on_gpu(given)
            audio = vocoder(array)
            assert type(audio) is type(array)
            agree(vocoder(given), on_host(audio), voice[2])


def _library(name: str):
    """How a library brings an array to the GPU and back."""
    if name == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")
        return lambda array: torch.from_numpy(array).cuda(), lambda array: array.cpu().numpy()
    if name == "cupy":
        cupy = pytest.importorskip("cupy")
        return cupy.asarray, cupy.asnumpy
    pytest.importorskip("pycuda")
    from pycuda import gpuarray

    return gpuarray.to_gpu, lambda array: array.get()


def test_the_second_start_finds_compiled_kernels(voice: tuple[Bundle, str, str]) -> None:
    if voice[1] != "tensorrt_rtx":
        pytest.skip("only TensorRT-RTX compiles at run time")
    from melrt.files.atomic import user_cache

    load(voice).close()
    kept = {artifact.sha256[:16] for artifact in voice[0].find("engine")}
    assert kept <= {file.name[:16] for file in Path(user_cache()).glob("*.runtime-cache")}


def test_every_rewrite_of_the_graph_is_right_and_the_fastest_is_kept(voice: tuple[Bundle, str, str]) -> None:
    bundle, flavor, precision = voice
    if precision != "fp16":
        pytest.skip("tuned in one precision; a tune builds eight engines")
    built, trials = find_fastest_engine(bundle, EngineOptions(precision=precision, flavor=flavor, portable=False))
    for trial in trials:
        print(trial.to_dict())
    assert [trial.verdict for trial in trials if trial.verdict not in ("fastest", "slower")] == []
    assert len(trials) == 7, "the bundle's graph, four others, two other windows"
    assert built.entry.target["trials"] == [trial.to_dict() for trial in trials]
    assert built.entry.quality["snr_db"] > FP16_MIN_SNR_DB
