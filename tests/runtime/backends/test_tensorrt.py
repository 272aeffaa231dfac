"""Engines at run time, on a fake GPU that enforces the rules of a real one."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.fake_arrays import GpuArray, install_cupy
from tests.runtime.fake_gpu import Gpu
from tests.runtime.fake_tensorrt import BATCH, VERSION, WINDOW, add_engines, install, plain_tensorrt_module
from tests.runtime.reference import FP32_MAX_ABS, speech_mel

from melrt import Vocoder
from melrt.backends.base import DeviceUtterance
from melrt.backends.tensorrt.slot import CAPTURE_LAZY_AFTER
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import sign, unseal
from melrt.errors import BackendError, BundleError, MelError, MelrtError, MissingExtraError
from melrt.files.audio import to_int16
from melrt.mel.level_check import LevelCheck
from melrt.planning.edges import Edges
from melrt.planning.windows import Policy, Window
from melrt.scheduling.stream import StreamPace
from melrt.vocoder import Options


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return install(monkeypatch)


@pytest.fixture
def voice(tiny_bundle: Bundle) -> Bundle:
    return add_engines(tiny_bundle)


def load(voice: Bundle, **options: object) -> Vocoder:
    return Vocoder.load(voice, backend="tensorrt", precision="fp32", options=Options(**options))


def test_engines_give_the_audio_of_the_cpu(gpu: Gpu, voice: Bundle) -> None:
    mels = [speech_mel(voice, frames, frames) for frames in (4, 30, 47, 48, 100, 211, 100, 211)]
    with Vocoder.load(voice, device="cpu") as cpu:
        expected = [cpu(mel) for mel in mels]
    with load(voice) as vocoder:
        assert (vocoder.backend.name, vocoder.backend.device, vocoder.backend.machine) == ("tensorrt", "cuda:0", "Fake GPU")
        assert (vocoder.policy.frames, vocoder.policy.static, vocoder.policy.batch) == (WINDOW, True, BATCH)
        for audio, reference in zip([*vocoder.batch(mels), *map(vocoder, mels)], expected * 2, strict=True):
            assert np.abs(audio - reference).max() < FP32_MAX_ABS
        assert np.abs(vocoder(np.stack(mels[4:8:2])) - np.stack(expected[4:8:2])).max() < FP32_MAX_ABS
        assert np.abs(np.concatenate(list(vocoder.stream([mels[5][:, :70], mels[5][:, 70:]]))) - expected[5]).max() < FP32_MAX_ABS
    assert not gpu.memory, "all memory was freed"


def test_windows_and_recurring_shapes_run_as_cuda_graphs(gpu: Gpu, voice: Bundle) -> None:
    with load(voice) as vocoder:
        slots, warm = vocoder.backend.policy.workers, gpu.captures
        assert warm == 3 * slots, "batches of 1, 2 and 4 in each slot"
        mel = speech_mel(vocoder.bundle, WINDOW + 40)
        vocoder(mel)
        launches = gpu.graph_launches
        allocated = dict(gpu.memory)
        for _ in range(200):
            vocoder(mel)
        assert gpu.captures <= warm + 3 * slots, "the two ends, once for each slot and batch"
        plain = CAPTURE_LAZY_AFTER * 3 * slots
        assert gpu.graph_launches >= launches + 400 - plain, "two runs a call, except the first ones of an end's shape in a slot"
        assert gpu.captured_fallbacks == 0, "no graph holds the kernels that run while a shape's own are compiled"
        assert gpu.memory.keys() == allocated.keys(), "nothing is allocated in the steady state"
        for _ in range(5):
            vocoder(speech_mel(vocoder.bundle, 21))
        assert sum(("edge", (1, 80, 21)) in slot._prepared for slot in vocoder.backend._slots) == 1, "a lone caller keeps to one slot"
        before = gpu.syncs
        vocoder.backend.run("interior", np.zeros((3, 80, WINDOW), np.float32))
        assert gpu.syncs == before + 1


def test_the_tensorrt_flavor(gpu: Gpu, tiny_bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", plain_tensorrt_module(gpu))  # type: ignore[arg-type]
    voice = add_engines(tiny_bundle, flavor="tensorrt")
    mel = speech_mel(voice, WINDOW + 40)
    with load(voice) as vocoder, Vocoder.load(voice, device="cpu") as cpu:
        for _ in range(4 * vocoder.policy.workers):
            assert np.abs(vocoder(mel) - cpu(mel)).max() < FP32_MAX_ABS
        assert gpu.captures > 3 * vocoder.policy.workers, "the ends are captured at once: no kernels are compiled in the background"
    assert not list(cache.glob("*.runtime-cache")), "only TensorRT-RTX has compiled kernels to keep"


def test_failed_capture_leaves_the_slot_usable(gpu: Gpu, tiny_bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    voice = add_engines(tiny_bundle, uncapturable=True)
    mel = speech_mel(voice, WINDOW + 100)
    with Vocoder.load(voice, device="cpu") as cpu, load(voice) as vocoder:
        for _ in range(3):
            assert np.abs(vocoder(mel) - cpu(mel)).max() < FP32_MAX_ABS
        assert gpu.captures == gpu.graph_launches == 0
        assert vocoder.backend.failed_captures == 3 * vocoder.backend.policy.workers, "each shape is tried once"
    assert "launched one by one" in caplog.text
    assert not gpu.memory


def test_int16_is_computed_on_the_device(gpu: Gpu, voice: Bundle) -> None:
    mel = speech_mel(voice, 150)
    with load(voice, sample_format="int16") as vocoder, load(voice) as floating:
        assert vocoder.backend.run("interior", mel[None, :, :WINDOW]).dtype == np.int16
        audio = vocoder(mel)
        assert audio.dtype == np.int16
        assert (audio == to_int16(floating(mel))).all()
    with Vocoder.load(voice, device="cpu", options=Options(sample_format="int16")) as cpu:
        assert np.abs(cpu(mel).astype(int) - audio).max() <= 1


@pytest.mark.parametrize("sample_format", ["float32", "int16"])
def test_the_device_finds_samples_that_are_not_finite(
    gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sample_format: str
) -> None:
    mels = [speech_mel(voice, frames, frames) for frames in (20, 20, 20)]
    mels[1][0, 0] = 1.25
    on_gpu = install_cupy(monkeypatch, gpu)
    with load(voice, sample_format=sample_format) as vocoder:
        good = vocoder(mels[0])
        model = vocoder.backend.engines["edge"]._engine.model
        run = model.run

        def fails_for_one(mel: np.ndarray) -> np.ndarray:
            audio = run(mel)
            audio[(mel == 1.25).any(axis=(1, 2)), -1] = np.inf
            return audio

        monkeypatch.setattr(model, "run", fails_for_one)
        with vocoder.queue._lock:  # all three share a run
            futures = [vocoder.submit(mel) for mel in mels]
        assert (futures[0].result() == good).all()
        with pytest.raises(BackendError, match="not finite"):
            futures[1].result()
        assert futures[2].result().any()
        audio = vocoder(on_gpu(mels[1]))
        vocoder(on_gpu(mels[0])).get()
        assert not caplog.messages, "nothing is waited for"
        audio.get()
        assert (vocoder(mels[0]) == good).all(), "the flag of a run is not the next run's"
    assert "made for arrays on the GPU has samples that are not finite" in caplog.text


def test_audio_is_copied_once(gpu: Gpu, voice: Bundle) -> None:
    windows = [speech_mel(voice, WINDOW + 9, seed)[:, 5 : WINDOW + 5] for seed in range(3)]
    with load(voice) as vocoder:
        expected = vocoder.backend.run("interior", np.stack(windows))
        lent: list[np.ndarray] = []
        vocoder.backend.run_windows("interior", windows, lambda: None, lent.append)
        assert any(np.shares_memory(lent[0], slot.host_result.array) for slot in vocoder.backend._slots)
        assert (lent[0] == expected).all()
        audio = vocoder(windows[0])
        before = audio.copy()
        vocoder(windows[1])
        assert (audio == before).all(), "the caller's array is its own"


def test_levels_are_looked_at_once_while_the_device_computes(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    with load(voice) as vocoder:

        def observe(mel: np.ndarray) -> None:
            queued = sum(len(slot.stream.queue) for slot in vocoder.backend._slots)
            seen.append((mel.shape[1], queued, gpu.syncs))

        monkeypatch.setattr(LevelCheck, "observe", lambda self, mel: observe(mel))
        for frames in (WINDOW, 3 * WINDOW):
            mel, before = speech_mel(voice, frames), gpu.syncs
            vocoder(mel)
            assert len(seen) == 1, "once for an utterance, however many its windows"
            assert seen[0][0] == frames
            assert seen[0][1] > 0, "the device has work"
            assert before <= seen.pop()[2] < gpu.syncs


def test_kernels_are_compiled_once_and_launched_once_for_a_run(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = install_cupy(monkeypatch, gpu)
    with load(voice) as vocoder, load(voice):
        assert gpu.compilations == 1
        utterances = np.stack([speech_mel(voice, WINDOW, seed) for seed in range(BATCH)])
        view = vocoder.backend.view_mel(on_gpu(utterances))
        array, audio = vocoder.backend.make_audio(view, WINDOW * 256)
        gpu.launches.clear()
        windows = [(DeviceUtterance(view, audio, index, Edges()), Window("interior", 0, WINDOW, 0, WINDOW)) for index in range(BATCH)]
        vocoder.backend.run_on_device(windows)
        assert [name for name in gpu.launches if name != "finish"] == ["cut", "keep_float32"]
        assert np.abs(array.get() - vocoder.backend.run("interior", utterances)).max() < FP32_MAX_ABS


def test_a_shape_outlives_its_queued_work(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("melrt.backends.tensorrt.slot.MOST_SHAPES", 2)
    on_gpu = install_cupy(monkeypatch, gpu)
    mels = [speech_mel(voice, frames, frames) for frames in range(10, 22)]
    with load(voice) as vocoder, Vocoder.load(voice, device="cpu") as cpu:
        before = gpu.syncs
        audio = [vocoder(on_gpu(mel)) for mel in mels]
        assert gpu.syncs == before
        for given, mel in zip(audio, mels, strict=True):
            assert np.abs(given.get() - cpu(mel)).max() < FP32_MAX_ABS
        vocoder(mels[0])
        vocoder(mels[1])
        assert all(len(slot._retired) <= len(mels) for slot in vocoder.backend._slots)
        assert any(not slot._retired for slot in vocoder.backend._slots), "they are released once their work is done"


def test_the_callers_context_stays_current(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.set_context(7)
    on_gpu = install_cupy(monkeypatch, gpu)
    with load(voice) as vocoder:
        assert gpu.current_context == 7
        mel = speech_mel(voice, WINDOW + 30)
        vocoder(mel)
        vocoder(on_gpu(mel))
        with pytest.raises(MelError):
            vocoder(on_gpu(mel[:5]))
    assert gpu.current_context == 7
    with pytest.raises(BackendError, match="no CUDA device 3"):
        Vocoder.load(voice, backend="tensorrt", precision="fp32", device="cuda:3")
    assert gpu.current_context == 7


def test_a_full_gpu_falls_back_and_keeps_no_memory(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("melrt.backends.select.find_gpu", lambda: "a GPU")
    gpu.allocations_left = 12  # two slots
    with Vocoder.load(voice, precision="fp32") as vocoder:
        assert vocoder.backend.name == "onnxruntime"
        assert not gpu.memory
    with pytest.raises(BackendError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        load(voice)
    gpu.allocations_left = 1 << 30
    with load(voice) as vocoder:
        assert vocoder(speech_mel(voice, 30)).any()


def test_each_batch_runs_in_its_static_profile(gpu: Gpu, tiny_bundle: Bundle) -> None:
    dynamic = [(1, 80, WINDOW), (1, 80, WINDOW), (BATCH, 80, WINDOW)]
    profiles = [dynamic, *([(batch, 80, WINDOW)] * 3 for batch in (1, 2, BATCH))]
    voice = add_engines(tiny_bundle, interior_profiles=profiles)
    mels = np.stack([speech_mel(voice, WINDOW, seed) for seed in range(BATCH)])
    with load(voice) as vocoder, Vocoder.load(voice, device="cpu") as cpu:
        assert vocoder.policy.batch == BATCH
        for batch in (1, 2, 3, 4):
            audio, expected = vocoder.backend.run("interior", mels[:batch]), cpu.backend.run("interior", mels[:batch])
            assert np.abs(audio - expected).max() < FP32_MAX_ABS
        contexts = vocoder.backend.engines["interior"]._engine.contexts
        assert {(context.profile, context.shape[0]) for context in contexts} == {(1, 1), (2, 2), (3, 4)}


def test_streams_share_runs_of_short_windows(gpu: Gpu, tiny_bundle: Bundle) -> None:
    shapes = [*((batch, WINDOW) for batch in (1, 2, BATCH)), (1, 24), (BATCH, 24), (1, 32), (2, 32)]
    voice = add_engines(tiny_bundle, interior_profiles=[[(batch, 80, frames)] * 3 for batch, frames in shapes])
    mels = [speech_mel(voice, 100, seed) for seed in range(3)]
    runs: list[tuple[str, int, int]] = []
    with load(voice) as vocoder, Vocoder.load(voice, device="cpu") as cpu:
        assert vocoder.policy == Policy(WINDOW, static=True, batch=BATCH, workers=3, short=(24,)), "32 frames have no profile for 4 windows"
        captured = gpu.captures
        assert captured == 3 * len(shapes)
        backend = vocoder.backend
        run = backend.run_windows

        def run_windows(graph: str, windows: list[np.ndarray], *rest: object) -> None:
            runs.append((graph, len(windows), windows[0].shape[1]))
            run(graph, windows, *rest)

        backend.run_windows = run_windows
        streams = [vocoder.open_stream(StreamPace(first=8, growth=1)) for _ in mels]
        pieces: list[list[np.ndarray]] = [[] for _ in mels]
        for start in range(0, 100, 10):
            with vocoder.queue._lock:  # so that all of them wait before the first run
                futures = [stream.submit(mel[:, start : start + 10]) for stream, mel in zip(streams, mels, strict=True)]
            for kept, future in zip(pieces, futures, strict=True):
                kept.append(future.result())
        for mel, stream, kept in zip(mels, streams, pieces, strict=True):
            assert np.abs(np.concatenate([*kept, stream.flush()]) - cpu(mel)).max() < FP32_MAX_ABS
        interior = [run for run in runs if run[0] == "interior"]
        assert {frames for _, _, frames in interior} == {24}, "no push runs a full window"
        assert ("interior", 3, 24) in interior, "windows of several streams share a run"
        assert backend.run("interior", np.zeros((3, 80, 24), np.float32)).shape == (3, 24 * 256), "in the profile for 4 windows"
        contexts = backend.engines["interior"]._engine.contexts
        assert {(context.profile, context.shape) for context in contexts} == {(at, (b, 80, t)) for at, (b, t) in enumerate(shapes)}


def test_a_run_that_is_refused_is_an_error_and_the_next_works(gpu: Gpu, voice: Bundle) -> None:
    mel = speech_mel(voice, 30)
    with load(voice) as vocoder:
        good = vocoder(mel)
        gpu.refused_runs = 1
        with pytest.raises(BackendError, match="could not queue the run"):
            vocoder(mel)
        assert (vocoder(mel) == good).all()


def test_contexts_that_cannot_be_captured_are_not(gpu: Gpu, tiny_bundle: Bundle) -> None:
    voice = add_engines(tiny_bundle, not_capturable=True)
    mel = speech_mel(voice, WINDOW + 30)
    with load(voice) as vocoder, Vocoder.load(voice, device="cpu") as cpu:
        for _ in range(4):
            assert np.abs(vocoder(mel) - cpu(mel)).max() < FP32_MAX_ABS
        assert gpu.captures == vocoder.backend.failed_captures == 0


@pytest.mark.parametrize("edges", [Edges(), Edges(2, 2), Edges(0, 10, -5.0)])
@pytest.mark.parametrize("sample_format", ["float32", "int16"])
def test_gpu_arrays_give_gpu_audio(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch, edges: Edges, sample_format: str) -> None:
    on_gpu = install_cupy(monkeypatch, gpu)
    options = Options(edges=edges, sample_format=sample_format)
    with (
        Vocoder.load(voice, backend="tensorrt", precision="fp32", options=options) as vocoder,
        Vocoder.load(voice, device="cpu", options=options) as cpu,
    ):
        for frames in (20, WINDOW + 100):
            mel = np.stack([speech_mel(voice, frames, seed) for seed in range(3)])
            for given, expected in ((mel[0], cpu(mel[0])), (mel, cpu(mel)), (mel[::2, :, ::-1], cpu(mel[::2, :, ::-1].copy()))):
                array = on_gpu(given)
                before = gpu.syncs
                audio = vocoder(array)
                assert gpu.syncs == before, "the caller does not wait for the GPU"
                assert type(audio) is type(array)
                assert audio.shape == expected.shape
                assert np.abs(audio.get().astype(float) - expected).max() <= (1 if sample_format == "int16" else FP32_MAX_ABS)


@pytest.mark.parametrize("protocol", ["dlpack", "cuda_array_interface"])
def test_arrays_on_the_default_stream_are_ordered(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    if protocol == "cuda_array_interface":
        monkeypatch.delattr(GpuArray, "__dlpack__")
        monkeypatch.delattr(GpuArray, "__dlpack_device__")
    on_gpu, mel = install_cupy(monkeypatch, gpu, default_stream=True), speech_mel(voice, 60)
    with load(voice) as vocoder, Vocoder.load(voice, device="cpu") as cpu:
        for given in (mel, mel[:, ::-1]):
            assert np.abs(vocoder(on_gpu(given)).get() - cpu(given.copy())).max() <= FP32_MAX_ABS


def test_wrong_gpu_arrays_are_refused(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = install_cupy(monkeypatch, gpu)
    mel = speech_mel(voice, 60)
    with load(voice) as vocoder:
        foreign = on_gpu(mel)
        gpu.foreign_contexts.add(foreign.pointer)
        for array, message in (
            (on_gpu(mel[:40]), "40 bands"), (on_gpu(mel[:, :3].copy()), "3 frames; this network needs at least 4"),
            (on_gpu(mel.astype(np.float16)), "dtype float16; in GPU memory it must be float32"), (on_gpu(mel[0].copy()), "expected"),
            (on_gpu(mel, device_index=1), "mel is on cuda:1, this voice on cuda:0"), (foreign, "autoprimaryctx"),
        ):  # fmt: skip
            with pytest.raises(MelError, match=message):
                vocoder(array)
        for call in (vocoder.submit, vocoder.open_stream().push, lambda array: next(vocoder.batch([array]))):
            with pytest.raises(MelError, match="on a GPU"):
                call(on_gpu(mel))
        array = on_gpu(mel)
        monkeypatch.setattr(type(array), "__module__", "unknown.arrays")
        with pytest.raises(MelError, match="cannot make GPU arrays of unknown"):
            vocoder(array)
    with Vocoder.load(voice, device="cpu") as cpu, pytest.raises(MelError, match="this call reads arrays in host memory"):
        cpu(on_gpu(mel))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": "1.0"}, f"built by tensorrt_rtx 1.0; here is {VERSION}. Rebuild it: melrt build .* --precision fp32"),
        ({"compute_capability": "8.6"}, "for compute capability 8.6; Fake GPU has 9.0.*--this-gpu"),
        ({"flavor": "tensorrt_8"}, "engines are built by one of tensorrt, tensorrt_rtx"),
        ({"names": ["mel", "sound"]}, r"has tensors \['mel', 'sound'\]"),
    ],
)
def test_engines_of_another_system_are_refused(
    gpu: Gpu, tiny_bundle: Bundle, facts: dict, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    voice = add_engines(tiny_bundle, **facts)
    with pytest.raises(BackendError, match=message):
        load(voice)
    with caplog.at_level(logging.WARNING), Vocoder.load(voice, precision="fp32", device="auto") as vocoder:
        assert vocoder.backend.name == "onnxruntime"


def test_engine_that_cannot_be_opened_is_refused(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.validity = "INVALID"
    with pytest.raises(BackendError, match="does not fit this runtime or GPU .the fake's diagnostics.*melrt build"):
        load(voice)
    gpu.validity = "VALID"
    with pytest.raises(BackendError, match="no CUDA device 3 can be used here"):
        Vocoder.load(voice, backend="tensorrt", precision="fp32", device="cuda:3")
    (entry,) = voice.find("engine", graph="interior")
    broken = b"no plan" + voice.read(entry)
    changed = replace(Artifact.of(entry.name, broken, "engine", graph="interior", precision="fp32"), target=entry.target)
    entry = voice.add(sign(changed), broken)
    with pytest.raises(BackendError, match="cannot be opened by tensorrt_rtx"):
        load(Bundle.open(voice.path))
    (voice.path / entry.file).write_bytes(b"altered")
    with pytest.raises(BundleError, match="has 7 bytes"):
        load(Bundle.open(voice.path))
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r'tensorrt-rtx.*"melrt\[rtx\]"'):
        load(voice)


def test_bundle_without_engines_names_the_build_command(gpu: Gpu, tiny_bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="no fp32 engines of both graphs.*melrt build"):
        load(tiny_bundle)


def test_compiled_kernels_are_cached_on_disk(gpu: Gpu, voice: Bundle, cache: Path) -> None:
    load(voice).close()
    files = sorted(cache.iterdir())
    assert [unseal(file.name, file.read_bytes()) for file in files] == [b"kernels", b"kernels"]
    assert gpu.cache_blob == b""
    load(voice).close()
    assert gpu.cache_blob == b"kernels"
    gpu.cache_blob = b""
    for file in files:
        file.write_bytes(b"kernels of another user")
    load(voice).close()
    assert gpu.cache_blob == b"", "only what this user sealed is used"


def test_failed_run_does_not_affect_the_next(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(voice) as vocoder:
        mel = speech_mel(vocoder.bundle, 30)
        good = vocoder(mel)
        with pytest.raises(MelrtError, match=r"outside this engine's profile, \(1, 80, 4\) to \(4, 80, 48\)"):
            vocoder.backend.run("edge", np.zeros((1, 80, 3), np.float32))
        assert (vocoder(mel) == good).all()


@pytest.mark.parametrize("error", [MemoryError("out of memory"), RuntimeError("infer_shapes"), OSError("libnvrtc.so")])
def test_any_error_of_the_driver_falls_back(gpu: Gpu, voice: Bundle, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("melrt.backends.tensorrt.backend.ExecutionSlot", fails)
    monkeypatch.setattr("melrt.backends.select.find_gpu", lambda: "a GPU")
    with Vocoder.load(voice, precision="fp32") as vocoder:
        assert vocoder.backend.name == "onnxruntime"
    with pytest.raises(BackendError, match=rf"the engine could not be opened \({type(error).__name__}: {error}\)"):
        load(voice)
