"""Fused engines: the kernels in Triton's interpreter against PyTorch, the build, and the launches on a fake GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.fake_arrays import install_cupy
from tests.torch_voices import random_voice

from melrt import Vocoder
from melrt.backends.fused.backend import Fused
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import sign, trust_engines
from melrt.errors import BackendError, EngineBuildError
from melrt.system import Gpu
from melrt.vocoder import Options
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig
from melrt_export.generator.reference import PyTorchReference
from melrt_export.graph.deploy import deploy_graph
from melrt_export.parity import Difference, probe_mel

pytest.importorskip("triton", reason="the kernels need the extra `fused-build`")
from tests.export.fake_fused import FusedDriver, compile_fake, install_fused

from melrt_export.fused.build import FILE, FusedOptions, build_fused
from melrt_export.fused.compile import CAPABILITIES, Compiled, blocks_per_multiprocessor, compile_around, compile_kernel
from melrt_export.fused.interpret import Interpreter
from melrt_export.fused.lower import Kernel, lower
from melrt_export.fused.tiles import default_tile

# The limit of FP16 engines on speech is 45 dB; rounding after each layer in half precision gives 50 to 60 dB.
LEAST_SNR_DB = 50
TINY = GeneratorConfig(in_channels=8, channels=24, kernel_size=5, upsample_scales=(2, 3), stacks=2)
SHAPES = {
    "reflection": TINY,
    "zeros, three blocks of kernel 5": replace(TINY, padding_mode="zeros", stacks=3, stack_kernel_size=5, upsample_scales=(2,)),
    "replication, no bias, no tanh": replace(TINY, padding_mode="replicate", bias=False, final_tanh=False, last_slope=0.01),
    "causal": replace(TINY, causal=True, upsample_scales=(3,)),
    "early crop": replace(TINY, crop="early", upsample_scales=(5,), stacks=1),
    "wide: several chunks and tiles": replace(TINY, in_channels=40, channels=160, upsample_scales=(2,), stacks=1),
    "sub-bands": replace(TINY, out_channels=4, pqmf_taps=14),
    "clipped and normalized": replace(TINY, padding_mode="zeros", input_clip=(-1.0, 1.0), input_affine=True),
}


def random_weights(config: GeneratorConfig) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0)
    weights = {}
    for name, shape in config.tensors():
        fan = 2 * shape[0] if "upsample" in name else int(np.prod(shape[1:]))
        size = 1.0 if name.startswith("input.") else 0.3 if name.endswith("bias") else 1 / np.sqrt(fan)
        weights[name] = (size * noise.standard_normal(shape)).astype(np.float32)
    if config.input_affine:
        weights["input.scale"] = 0.5 + np.abs(weights["input.scale"])
    return weights


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_kernels_compute_the_network(config: GeneratorConfig, noise: np.random.Generator) -> None:
    weights = random_weights(config)
    lowered = lower(config, deploy_graph(config, weights).SerializeToString())
    reference = PyTorchReference(config, weights)
    for batch, frames, rows in ((2, config.smallest_input, None), (1, 16, 16)):  # the second time in many tiles, and whole ones
        mel = noise.standard_normal((batch, config.in_channels, frames)).astype(np.float32)
        difference = Difference.between(reference.audio(mel), Interpreter(lowered, config.in_channels, config.hop, rows).run(mel))
        assert difference.snr_db > LEAST_SNR_DB, difference


@pytest.fixture
def voice(tmp_path: Path) -> Bundle:
    return Bundle.open(random_voice(replace(TINY, channels=16, upsample_scales=(3,)), tmp_path)[0])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FusedDriver:
    monkeypatch.setattr("melrt.backends.fused.backend.WINDOW", 32)
    monkeypatch.setattr("melrt.backends.fused.backend._CONTEXTS", 1)
    monkeypatch.setattr("melrt.backends.fused.backend.BATCH", 2)
    monkeypatch.setattr("melrt.backends.tensorrt.backend.SLOTS", 1)
    monkeypatch.setattr("melrt_export.fused.build.default_tile", lambda kernel, capability: default_tile(kernel, capability, 256))
    return install_fused(monkeypatch)


def load(bundle: Bundle, **options: object) -> Vocoder:
    return Vocoder.load(bundle, backend="fused", options=Options(**options))


def test_a_fused_engine_synthesizes_on_the_fake_gpu(driver: FusedDriver, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("melrt.backends.fused.backend.WINDOW", 56)
    build_fused(voice, FusedOptions(("8.0", "9.0")))
    bundle = Bundle.open(voice.path)
    mels = [probe_mel(bundle.manifest.spec, frames, frames) for frames in (5, 32, 61)]
    with Vocoder.load(bundle, device="cpu", precision="fp32") as cpu, load(bundle) as vocoder:
        assert (vocoder.backend.name, vocoder.backend.precision, vocoder.backend.device) == ("fused", "fp16", "cuda:0")
        assert vocoder.policy.lengths == (32, 56)
        assert driver.gpu.captures == 4, "batches of 1 and 2, for each window"
        assert driver.gpu.compilations == 0, "nothing is compiled where it runs"
        for mel, audio in zip(mels, vocoder.batch(mels), strict=True):
            assert Difference.between(cpu(mel), audio).snr_db > LEAST_SNR_DB
    assert not driver.gpu.memory, "all memory was freed"


def test_launches_cover_the_rows_in_the_network_s_order(driver: FusedDriver, voice: Bundle) -> None:
    _, program = build_fused(voice, FusedOptions(("9.0",)))
    with load(Bundle.open(voice.path)) as vocoder:
        driver.launches.clear()
        vocoder.backend.run("edge", np.zeros((2, 8, 31), np.float32))
        edge, steps = list(driver.launches), (31, 31, 31, 93, 93, 93)
        vocoder.backend.run("edge", np.zeros((2, 8, 31), np.float32))
        captured = len(driver.launches)
        vocoder.backend.run("edge", np.zeros((2, 8, 31), np.float32))
        assert captured == 3 * len(edge), "the second run was launched and captured"
        assert len(driver.launches) == captured, "the third is a CUDA graph"
    layers = [launch.layer for launch in program.launches]
    assert layers == ["first.frames", "first", "stages.0.upsample", "stages.0.blocks.0", "stages.0.blocks.1", "last"]
    for launched, count in zip(edge, steps, strict=True):
        rows = count + launched.kernel.name.startswith("upsample")  # a crop needs one row more
        assert launched.grid == (-(-rows // 256), 1, 2)
        assert launched.integers[0] == count
    dilations = [launched.integers[1:] for launched in edge if launched.kernel.function == "block"]
    assert dilations == [[1, 1], [3, 3]]
    results = [launched.pointers[-1] for launched in edge]
    sources = [launched.pointers[0] for launched in edge]
    assert sources[1:] == results[:-1], "each launch reads what the one before it wrote"
    assert len(set(results)) == 3, "two buffers and the audio"


def test_arrays_on_the_gpu(driver: FusedDriver, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    build_fused(voice, FusedOptions(("9.0",)))
    bundle = Bundle.open(voice.path)
    on_gpu = install_cupy(monkeypatch, driver.gpu)
    mel = probe_mel(bundle.manifest.spec, 61)
    with Vocoder.load(bundle, device="cpu", precision="fp32") as cpu, load(bundle, sample_format="int16") as vocoder:
        audio = vocoder(on_gpu(mel)).get()
        assert audio.dtype == np.int16
        assert Difference.between(cpu(mel), audio / np.float32(32767)).snr_db > LEAST_SNR_DB


def test_auto_chooses_a_fused_engine_where_a_gpu_confirmed_it(driver: FusedDriver, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    build_fused(voice, FusedOptions(("9.0",)))
    for capability, options, name in (
        ("9.0", {}, "fused"), ("9.0", {"precision": "fp32"}, "onnxruntime"), ("9.0", {"device": "cpu"}, "onnxruntime"),
        ("9.0", {"backend": "onnxruntime"}, "onnxruntime"), ("8.9", {}, "onnxruntime"), (None, {}, "onnxruntime"),
    ):  # fmt: skip
        monkeypatch.setattr("melrt.backends.select.find_gpu", lambda found=capability: found and Gpu("a GPU", found, 1))
        with Vocoder.load(Bundle.open(voice.path), **options) as vocoder:
            assert vocoder.backend.name == name, (capability, options)
    with pytest.raises(BackendError, match="has no engines of both graphs"):
        Vocoder.load(Bundle.open(voice.path), backend="tensorrt")


def test_a_fused_engine_is_opened_only_if_it_fits(driver: FusedDriver, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fused, "_warm_up", lambda *_: None)
    with pytest.raises(BackendError, match="has no fused engine.*--engine fused` makes one"):
        load(voice)
    with pytest.raises(BackendError, match="fused engines compute in fp16, not fp32. Leave the precision out"):
        Vocoder.load(voice, backend="fused", precision="fp32")
    entry, _ = build_fused(voice, FusedOptions(("8.0", "12.0")))
    with pytest.raises(BackendError, match=r"for compute capability 8.0, 12.0; Fake GPU has 9.0.*--gpus 9.0"):
        load(Bundle.open(voice.path))
    entry, _ = build_fused(voice, FusedOptions(("9.0",)))
    data = Bundle.open(voice.path).read(entry)
    for damaged, message in (
        (b"ENGINE" + data, "is not a fused engine"),
        (data.replace(b'"format": 1', b'"format": 7'), "has format 7; this melrt runs format 1"),
        (data.replace(b'"buffer", 1', b'"buffer", 9'), r"has buffer 9; it must be below 2"),
        (data.replace(b'"symbol"', b'"symbal"'), "is damaged"),
        (data[:-1], "the kernels for compute capability 9.0 are longer than the file"),
        (data[: len(data) // 2], "weights is .*; it must be a whole number"),
        (data[:200], "is damaged"),
        (data.replace(b'"hop": 3', b'"hop": 7'), "gives 7 samples for each frame; this voice has 8 and 3"),
        (data.replace(b'"rows": 256', b'"rows":   0'), "rows is 0; it must be a whole number"),
    ):
        bad = Artifact.of(FILE, damaged, "engine", graph="both", precision="fp16", target=entry.target)
        Bundle.open(voice.path).add(sign(bad), damaged)
        with pytest.raises(BackendError, match=message):
            load(Bundle.open(voice.path))
        assert not driver.gpu.memory
    with monkeypatch.context() as older:
        older.setattr("melrt_export.fused.build.SOURCE_SHA256", "that of another melrt")
        build_fused(voice, FusedOptions(("9.0",)))
    load(Bundle.open(voice.path)).close()
    assert driver.gpu.compilations == 1, "the kernels around an engine are this melrt's own"
    build_fused(voice, FusedOptions(("9.0",)))
    with monkeypatch.context() as long:
        long.setattr("melrt.backends.fused.engine.MOST_BYTES", 1000)
        with load(Bundle.open(voice.path)) as vocoder, pytest.raises(BackendError, match="a mel of 31 frames makes activations of more"):
            vocoder.backend.run("edge", np.zeros((1, 8, 31), np.float32))
    monkeypatch.setenv("MELRT_KEY", str(voice.path.parent / "other.key"))
    with pytest.raises(BackendError, match="was not built by this user"):
        load(Bundle.open(voice.path))
    trust_engines(Bundle.open(voice.path))
    load(Bundle.open(voice.path)).close()


def test_a_new_engine_is_compared_with_fp32_on_a_gpu_that_it_is_for(
    driver: FusedDriver, voice: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("melrt_export.fused.accuracy_check.WINDOW", 32)
    for capability, compared_on in (("8.9", ""), ("9.0", "a GPU")):
        monkeypatch.setattr("melrt_export.fused.build.find_gpu", lambda found=capability: Gpu("a GPU", found, 1))
        entry, _ = build_fused(voice, FusedOptions(("9.0", "10.0")))
        assert entry.target["compared_on"] == compared_on
    assert entry.quality["snr_db"] > LEAST_SNR_DB
    before = Bundle.open(voice.path).manifest
    with monkeypatch.context() as wrong:
        wrong.setattr(driver, "spoil", lambda launched, tile, result: result.mul_(1.01) if launched.kernel.function == "last" else None)
        with pytest.raises(EngineBuildError, match=r"fused.fp16.engine on Fake GPU .* SNR 39.* The limit is SNR >= 50 dB. The engine was"):
            build_fused(voice, FusedOptions(("9.0",)))
    assert Bundle.open(voice.path).manifest == before
    assert not driver.gpu.memory


def test_memory_is_freed_if_a_fused_engine_cannot_be_opened(driver: FusedDriver, voice: Bundle) -> None:
    build_fused(voice, FusedOptions(("9.0",)))
    for allocations in range(3):  # the staged weights, the weights, the first memory of a slot
        driver.gpu.allocations_left = allocations
        with pytest.raises(BackendError, match="could not be opened"):
            load(Bundle.open(voice.path))
        assert not driver.gpu.memory, allocations


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GeneratorConfig(mrf=MrfConfig(), padding_mode="zeros"), "HiFi-GAN's residual part"),
        (GeneratorConfig(channels=1024), "first stage has 512 channels; a residual block takes at most 256"),
        (GeneratorConfig(out_channels=4), "4 output channels without a filter bank"),
    ],
)
def test_generators_that_the_kernels_cannot_compute_are_refused(config: GeneratorConfig, reason: str) -> None:
    with pytest.raises(EngineBuildError, match=f"cannot become a fused engine.*{reason}.*--engine tensorrt"):
        lower(config, b"")


def test_the_command_builds_whole_engines_or_none(melrt, driver: FusedDriver, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = voice.manifest
    for arguments, message in (
        (["--engine", "fused", "--gpus", "7.5"], "gpus is ('7.5',); it must be a list of 1 to 6 values, each one of 8.0, 8.6"),
        (["--engine", "fused", "--precision", "fp32"], "--engine fused does not take --precision"),
        (["--gpus", "8.0"], "--engine tensorrt does not take --gpus"),
        (["--engine", "cuda"], "engine is 'cuda'; it must be one of tensorrt, fused"),
    ):
        code, _, err = melrt("build", voice.path, *arguments)
        assert code == 2
        assert message in err

    def stop(kernel: Kernel, *others: object) -> Compiled:
        if kernel.function == "last":
            raise EngineBuildError("no more registers")
        return compile_fake(kernel, *others)

    with monkeypatch.context() as broken:
        broken.setattr("melrt_export.fused.build.compile_kernel", stop)
        assert melrt("build", voice.path, "--engine", "fused")[0] == 2
    with monkeypatch.context() as broken:
        broken.setattr(Interpreter, "run", lambda self, mel: np.zeros((1, 60), np.float32))
        code, _, err = melrt("build", voice.path, "--engine", "fused", "--interpret")
        assert (code, "the interpreted kernels differ too much from FP32: SNR 0.0 dB" in err) == (2, True)
    assert Bundle.open(voice.path).manifest == before
    assert {file.name for file in voice.path.iterdir()} == {"manifest.json", *(entry.file for entry in before.artifacts)}
    monkeypatch.setattr(Fused, "_warm_up", lambda *_: None)
    code, out, err = melrt("build", voice.path, "--engine", "fused", "--gpus", "9.0,8.6", "--interpret")
    assert code == 0
    assert "On recorded speech, its signal-to-noise ratio is" in out
    assert "dB (interpreter)." in out
    assert "--backend fused" in out
    (entry,) = Bundle.open(voice.path).find("engine")
    assert entry.quality["snr_db"] > LEAST_SNR_DB
    assert (entry.name, entry.target["compute_capability"]) == (FILE, "9.0, 8.6")
    with load(Bundle.open(voice.path)) as vocoder:
        assert vocoder.backend.name == "fused"
    assert "runs on a GPU only" in melrt("verify", voice.path)[1]


@pytest.mark.parametrize("function", ["block", "last"])
def test_triton_compiles_a_kernel_without_a_gpu(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lowered = lower(TINY, deploy_graph(TINY, random_weights(TINY)).SerializeToString())
    kernel = next(kernel for kernel in lowered.kernels.values() if kernel.function == function)
    made = compile_kernel(kernel, default_tile(kernel), CAPABILITIES["8.0"])
    assert made.cubin.startswith(b"\x7fELF")
    assert made.symbol == function
    assert (made.threads, made.stack) == (128, 0)
    assert 0 < made.shared < 99 << 10
    assert blocks_per_multiprocessor(CAPABILITIES["8.0"], made) >= 2
    assert blocks_per_multiprocessor(CAPABILITIES["10.0"], replace(made, columns=512)) == 1, "all of the tensor memory"
    with monkeypatch.context() as changed:
        changed.setattr("melrt_export.fused.compile.HIDDEN_POINTERS", 1)
        with pytest.raises(EngineBuildError, match="the runtime passes"):
            compile_kernel(kernel, default_tile(kernel), CAPABILITIES["8.0"])
    assert compile_around(CAPABILITIES["8.0"]).startswith(b"\x7fELF")
    with pytest.raises(EngineBuildError, match="does not compile for compute capability 8.0"):
        compile_kernel(kernel, replace(default_tile(kernel), rows=100), CAPABILITIES["8.0"])
    assert str(Path(__file__).parents[2]).encode() not in made.cubin, "no path of the machine that built it"
