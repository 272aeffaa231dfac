"""Many voices: loading, memory limit, replacement on disk, closing. The voices are copies of one bundle under other names."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.reference import FP32_MAX_ABS

import melrt.voices
from melrt import Bundle, ClosedError, ConfigError, Edges, Limits, Options, QueueFullError, Residency, Vocoder, Voices
from melrt.bundle import MANIFEST
from melrt.errors import BackendError, BundleError

pytest.importorskip("onnxruntime", reason="needs the extra `cpu`")
RNG = np.random.default_rng(0)
Open = Callable[..., Voices]
# On a busy machine OpenVINO takes longer to load a voice than these tests wait.
QUICK_LOAD = pytest.mark.parametrize("backend", ["onnxruntime"], indirect=True)
MEL = RNG.normal(-2.4, 0.9, (80, 150)).astype(np.float32)


@pytest.fixture
def folder(tiny_bundle_path: Path, tmp_path: Path) -> Path:
    for name in ("anna", "ben", "cleo"):
        shutil.copytree(tiny_bundle_path, tmp_path / f"{name}.melrt")
    return tmp_path


@pytest.fixture
def audio(tiny_bundle_path: Path, backend: str) -> np.ndarray:
    with Vocoder.load(tiny_bundle_path, device="cpu", precision="fp32", backend=backend, threads=2) as vocoder:
        return vocoder(MEL)


@pytest.fixture
def open_voices(backend: str) -> Open:
    def opened(source: object, limits: Limits | None = None, **residency: object) -> Voices:
        options = Options(limits=limits or Limits())
        settings = {"device": "cpu", "precision": "fp32", "backend": backend, "threads": 2}
        return Voices(source, **settings, options=options, residency=Residency(**residency))  # type: ignore[arg-type]

    return opened


def same(audio: np.ndarray, expected: np.ndarray) -> bool:
    """Compare a stream with a call. OpenVINO rounds otherwise in windows of another length."""
    return audio.shape == expected.shape and float(np.abs(audio - expected).max()) < FP32_MAX_ABS


def memory_of_one(voices: Voices) -> int:
    with voices:
        _ = voices["anna"]
        return voices.memory


def replace_manifest(path: Path, **changes: object) -> None:
    """Replace a manifest as another export would, in one step."""
    manifest = Bundle.open(path).manifest
    temporary = path / "new"
    temporary.write_bytes(replace(manifest, **changes).dumps())  # type: ignore[arg-type]
    temporary.replace(path / MANIFEST)


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_voices_are_vocoders_on_the_same_threads(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    with open_voices(folder) as voices:
        assert voices.names == ("anna", "ben", "cleo")
        assert len(voices) == 3
        assert "ben" in voices
        before = threading.active_count()
        for name in voices:
            assert np.array_equal(voices[name](MEL), audio)
            assert np.array_equal(voices[name].submit(MEL).result(20), audio)
            assert same(np.concatenate(list(voices[name].stream(np.split(MEL, 10, axis=1)))), audio)
        assert threading.active_count() <= before + 3, "two workers and the loader serve all voices"
        assert voices["anna"] is voices["anna"]
        stats = voices.stats()
        assert [one.loads for one in stats.values()] == [1, 1, 1]
        assert stats["anna"].queue is not None
        assert voices.memory == sum(one.memory for one in stats.values())


def test_each_voice_has_the_ends_of_its_project_on_request(folder: Path) -> None:
    ends = {"anna": Edges(2, 2), "ben": Edges(0, 10, -5.0), "cleo": Edges()}
    for name, edges in ends.items():
        replace_manifest(folder / f"{name}.melrt", edges=edges)
    for options, expected in ((None, dict.fromkeys(ends, Edges())), (Options(edges="voice"), ends)):
        with Voices(folder, device="cpu", options=options) as voices:
            assert {name: voices[name].edges for name in voices} == expected
    with pytest.raises(ConfigError, match="edges is 'none'; it must be voice"):
        Options(edges="none")  # type: ignore[arg-type]


def test_least_recently_used_voice_makes_room(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    shutil.copytree(folder / "ben.melrt", folder / "dora.melrt")
    memory = 3 * memory_of_one(open_voices(folder))
    with open_voices(folder, memory=memory, pinned=("anna",)) as voices:
        for name in ("anna", "ben", "cleo", "ben", "dora"):
            assert np.array_equal(voices[name](MEL), audio)
            assert voices.memory <= memory
        stats = voices.stats()
        assert {name: one.loads for name, one in stats.items()} == {"anna": 1, "ben": 1, "cleo": 1, "dora": 1}
        assert [name for name, one in stats.items() if one.loaded] == ["anna", "ben", "dora"]
        stream = voices["ben"].open_stream()
        assert np.array_equal(voices["dora"](MEL), audio)
        assert np.array_equal(voices["cleo"](MEL), audio)
        assert [name for name, one in voices.stats().items() if one.loaded] == ["anna", "ben", "cleo"], "ben has work"
        stream.close()


@QUICK_LOAD
def test_voice_in_use_is_not_unloaded_under_its_stream(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    with open_voices(folder, Limits(wait_timeout=0.2), memory=memory_of_one(open_voices(folder))) as voices:
        stream = voices.load("anna").result(20).open_stream()
        first = stream.push(MEL[:, :100])
        with pytest.raises(QueueFullError, match="so ben was not loaded"):
            _ = voices["ben"]
        assert np.array_equal(np.concatenate([first, stream.push(MEL[:, 100:]), stream.flush()]), audio)
        del stream
        assert np.array_equal(voices.load("ben").result(20)(MEL), audio)
        with pytest.raises(QueueFullError), voices["ben"].open_stream():
            _ = voices["cleo"]


def test_memory_that_one_voice_exceeds_is_a_wrong_setting(open_voices: Open, folder: Path) -> None:
    with open_voices(folder, memory=1000) as voices, pytest.raises(ConfigError, match="Residency.memory is 0 MiB"):
        _ = voices["anna"]


def test_changed_bundle_is_loaded_again_and_no_request_fails(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    with open_voices(folder, check_seconds=0.0) as voices, ThreadPoolExecutor(4) as callers:
        stop = threading.Event()

        def calls() -> int:
            count = 0
            while not stop.is_set():
                assert np.array_equal(voices["anna"](MEL), audio)
                count += 1
            return count

        old = voices["anna"].open_stream()
        first = old.push(MEL[:, :70])
        working = [callers.submit(calls) for _ in range(4)]
        try:
            for version in range(5):
                replace_manifest(folder / "anna.melrt", name=f"version {version}")
                until(lambda version=version: voices["anna"].bundle.manifest.name == f"version {version}")
        finally:
            stop.set()
        assert all(caller.result(20) for caller in working)
        assert same(np.concatenate([first, old.push(MEL[:, 70:]), old.flush()]), audio)
        assert voices.stats()["anna"].loads == 6
        del old, working
        until(lambda: voices.memory == voices.stats()["anna"].memory)


def test_damaged_replacement_leaves_the_old_voice(
    open_voices: Open, folder: Path, audio: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with open_voices(folder, check_seconds=0.0) as voices:
        assert np.array_equal(voices["anna"](MEL), audio)
        (folder / "anna.melrt" / MANIFEST).write_text("{}")
        voices.load("anna")
        until(lambda: "the old one is used" in caplog.text)
        for _ in range(3):
            assert np.array_equal(voices["anna"](MEL), audio)
        assert caplog.text.count("the old one is used") == 1
        shutil.copy(folder / "ben.melrt" / MANIFEST, folder / "anna.melrt" / MANIFEST)
        replace_manifest(folder / "anna.melrt", name="repaired")
        until(lambda: voices["anna"].bundle.manifest.name == "repaired")


def test_refused_while_loading_if_the_limits_say_not_to_wait(open_voices: Open, folder: Path) -> None:
    with open_voices(folder, Limits(wait=False)) as voices:
        with pytest.raises(QueueFullError, match="is being loaded; try again"):
            _ = voices["anna"]
        voices.load("anna").result(20)
        assert voices["anna"](MEL).size


def test_folder_is_read_again_for_a_new_bundle_alone(
    open_voices: Open, folder: Path, tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for voices that do not exist cost no listing of the folder."""
    listings: list[Path] = []
    monkeypatch.setattr(Path, "glob", lambda path, pattern, glob=Path.glob: (listings.append(path), glob(path, pattern))[1])
    with open_voices(folder) as voices:
        shutil.rmtree(folder / "cleo.melrt")
        for name in ("dora", "cleo", "", "../anna", f"../{folder.name}/anna", "\0", "\ud800", 1000 * "a"):
            with pytest.raises(BundleError, match=f"no voice {re.escape(repr(name))}; there are: anna, ben\\."):
                _ = voices[name]
        assert len(listings) == 1, "when it was opened"
        for name in ("cleo", "dora"):
            shutil.copytree(tiny_bundle_path, folder / f"{name}.melrt")
            assert voices[name](MEL).size
        assert len(listings) == 2


def test_removed_bundle_serves_until_it_is_unloaded(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    with open_voices(folder, check_seconds=0.0) as voices:
        assert np.array_equal(voices["anna"](MEL), audio)
        for name in ("anna", "ben"):
            shutil.rmtree(folder / f"{name}.melrt")
        assert voices.names == ("cleo",)
        assert np.array_equal(voices["anna"](MEL), audio)
        voices.unload("anna")
        for name in ("anna", "ben"):
            with pytest.raises(BundleError, match=f"no voice '{name}'; there are: cleo"):
                _ = voices[name]


def test_bundle_that_is_replaced_while_it_is_loaded_is_loaded_again(
    open_voices: Open, folder: Path, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, opened = melrt.voices.open_backend, []

    def replaced_meanwhile(bundle: Bundle, choice: object) -> object:
        opened.append(bundle.manifest.name)
        if len(opened) == 1:
            replace_manifest(folder / "anna.melrt", name="the new one")
            raise BundleError("a file of the old manifest is gone")
        return original(bundle, choice)

    monkeypatch.setattr(melrt.voices, "open_backend", replaced_meanwhile)
    with open_voices(folder) as voices:
        assert np.array_equal(voices["anna"](MEL), audio)
        assert opened[1:] == ["the new one"]


def test_sources_that_are_not_bundles_are_refused(open_voices: Open, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_voices([folder / "nobody.melrt"])
    with pytest.raises(BundleError, match="the same name 'anna'"):
        open_voices([folder / "anna.melrt", shutil.copytree(folder / "ben.melrt", tmp_path / "other" / "anna.melrt")])
    with pytest.raises(BundleError, match="not a folder"):
        open_voices(tmp_path / "missing")
    with pytest.raises(ConfigError, match="must be a number above 0"):
        Residency(weights={"anna": 0})


def test_closed_voices_refuse_and_leave_no_thread(open_voices: Open, folder: Path) -> None:
    threads = set(threading.enumerate())
    voices = open_voices(folder)
    pending = voices["anna"].submit(MEL)
    voices.close()
    assert pending.result(0).size
    with pytest.raises(ClosedError):
        _ = voices["anna"]
    until(lambda: set(threading.enumerate()) <= threads)
    dropped = open_voices(folder)
    vocoder = dropped["ben"]
    del dropped
    gc.collect()
    assert vocoder(MEL).size, "a voice that is in use outlives the object that loaded it"
    del vocoder
    until(lambda: set(threading.enumerate()) <= threads)


def _in_child(voices: Voices, answers) -> None:
    try:
        _ = voices["ben"]
    except BackendError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_after_a_fork_is_refused(open_voices: Open, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with open_voices(folder) as voices:
        child = context.Process(target=_in_child, args=(voices, answers))
        child.start()
        assert "did not survive the fork" in answers.get(timeout=20)
        child.join(20)


def test_voice_that_its_caller_closed_is_loaded_again(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    with open_voices(folder) as voices:
        with voices["anna"] as closed:
            assert np.array_equal(closed(MEL), audio)
        with pytest.raises(ClosedError):
            closed(MEL)
        assert np.array_equal(voices["anna"](MEL), audio)
        assert voices.memory == voices.stats()["anna"].memory, "the closed one takes none"


def test_voices_are_loaded_without_blocking_the_event_loop(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    async def speech(voices: Voices, name: str) -> np.ndarray:
        return await (await voices.load_async(name)).call_async(MEL)

    async def all_at_once(voices: Voices) -> list[np.ndarray]:
        return await asyncio.gather(*(speech(voices, name) for name in ("anna", "ben", "anna", "cleo")))

    with open_voices(folder) as voices:
        assert all(np.array_equal(one, audio) for one in asyncio.run(all_at_once(voices)))
        assert [one.loads for one in voices.stats().values()] == [1, 1, 1]
    with open_voices(folder, Limits(wait=False)) as voices, pytest.raises(QueueFullError, match="is being loaded"):
        asyncio.run(all_at_once(voices))


@QUICK_LOAD
def test_changed_voice_is_loaded_again_in_memory_for_one(open_voices: Open, folder: Path, audio: np.ndarray) -> None:
    limits, memory = Limits(wait_timeout=0.2), memory_of_one(open_voices(folder))
    with open_voices(folder, limits, memory=memory, pinned=("anna",), check_seconds=0.0) as voices:
        stream = voices.load("anna").result(20).open_stream()
        first = stream.push(MEL)
        replace_manifest(folder / "anna.melrt", name="again")
        for _ in range(20):
            assert np.array_equal(voices["anna"](MEL), audio), "the old one serves until there is room"
            time.sleep(0.02)
        assert np.array_equal(np.concatenate([first, stream.flush()]), audio)
        del stream
        until(lambda: voices.load("anna").result(20).bundle.manifest.name == "again")
        assert np.array_equal(voices["anna"](MEL), audio)
