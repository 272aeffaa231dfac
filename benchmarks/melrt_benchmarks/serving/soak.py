"""Soak of many voices: calls, streams and cancellations while voices come, go and change. Every result is compared."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import onnx

from melrt import Bundle, BundleError, QueueFullError, Vocoder, Voices
from melrt.bundle import Artifact
from melrt.checks import check_fields, whole
from melrt.errors import MelrtError
from melrt.types import Audio, Mel

# Voices differ in the bias before tanh, in steps of this: ten times the tolerance.
STEP, STEPS, TOLERANCE = 1e-3, 1000, 1e-4
# Longest wait for a result in seconds; a request that takes longer is lost.
LOST = 60.0
# Seconds from an answer of the quiet voice to its next request: long enough that it takes less than its share of a busy machine.
QUIET_INTERVAL = 0.1
# Requests that wait for a flooded voice.
WAITING = 64
# Seconds within which a voice that has changed on disk is used.
CHANGE_SEEN = 10.0
# The voice that is measured, and is not changed.
QUIET = "v0"

_Work = Callable[[Voices, threading.Event, int], None]
_Kind = Callable[[Voices, str, Mel], Audio]


@dataclass(frozen=True, slots=True)
class SoakLoad:
    """Load on many voices."""

    voices: int = 200
    """Number of voices: copies of one bundle with other weights."""
    callers: int = 6
    """Threads that make requests for a random voice, some of them far more often than others."""
    changes_per_second: float = 3.0
    """Voices that appear, disappear or are replaced per second."""

    def __post_init__(self) -> None:
        check_fields(self, {"voices": whole(3, 10_000), "callers": whole(1, 1000)}, "soak")


@dataclass(slots=True)
class SoakResult:
    """Outcomes and times of a soak."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Number of results: right, wrong, stale (an old version), lost, failed, cancelled, refused (limits), gone (a removed voice)."""
    changes: Counter[str] = field(default_factory=Counter)
    """Number of voices that came, went and changed."""
    loads: int = 0
    """Number of times that a voice was loaded."""
    memory: int = 0
    """Largest estimate of the memory of all voices in bytes."""
    resident: int = 0
    """Largest resident memory of the process, in bytes above that at the start."""
    latencies: dict[str, list[float]] = field(default_factory=dict)
    """Seconds from call to audio of the quiet voice, by phase."""

    @property
    def wrong(self) -> int:
        """Number of results that should not be: wrong, stale, lost or failed."""
        return sum(self.outcomes[name] for name in ("wrong", "stale", "lost", "failed"))

    def percentile(self, phase: str, percent: float) -> float:
        """Return a percentile of the quiet voice's latency in seconds."""
        return float(np.percentile(self.latencies[phase], percent, method="higher"))


class Soak:
    """Voices in a folder, and the audio that each should give."""

    def __init__(self, bundle: Bundle, folder: Path, load: SoakLoad) -> None:
        """Write the voices."""
        self.load, self.result = load, SoakResult()
        self._bundle, self._folder = bundle, folder
        self._random = np.random.default_rng(0)
        self._lock = threading.Lock()
        self._versions: dict[str, list[int]] = {}
        self._number = 0
        probe = bundle.probe()[0][0]
        self._mels: list[Mel] = [np.tile(probe, (1, 8))[:, :frames] for frames in (12, 40, 97, 300)]
        with Vocoder.load(bundle, device="cpu", precision="fp32", backend="onnxruntime") as vocoder:
            plain = [np.arctanh(vocoder(mel).astype(np.float64)) for mel in self._mels]
        # the comparison must not take time from the voices
        self._expected = lru_cache(64)(lambda which, version: np.tanh(plain[which] + _shift(version)).astype(np.float32))
        for number in range(load.voices):
            self._write(f"v{number}")

    def run(self, voices: Voices, seconds: float, rounds: int, on_step: Callable[[str], None] = lambda _: None) -> SoakResult:
        """Alternate the quiet voice alone, with mixed neighbors, alone, and with a flooded neighbor; compare all audio."""
        start = _resident()
        mixed: list[_Work] = [self._calls] * self.load.callers
        phases: dict[str, list[_Work]] = {"alone": [], "mixed": [*mixed, self._changes], "overload": [self._flood]}
        share = {"alone": 0.15, "mixed": 0.55, "overload": 0.15}
        for turn in range(rounds):
            for phase in ("alone", "mixed", "alone", "overload"):
                on_step(f"round {turn + 1} of {rounds}: {phase}")
                self._phase(voices, phase, phases[phase], seconds * share[phase] / rounds, start)
        self._compare_all(voices)
        return self.result

    def _phase(self, voices: Voices, phase: str, work: list[_Work], seconds: float, start: int) -> None:
        stop, latencies = threading.Event(), self.result.latencies.setdefault(phase, [])
        threads = [threading.Thread(target=one, args=(voices, stop, index)) for index, one in enumerate(work)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            audio = voices[QUIET](self._mels[2])
            latencies.append(time.monotonic() - begin)
            self._count("right" if self._matches(audio, 2, self._versions[QUIET][-1]) else "wrong")
            self.result.memory = max(self.result.memory, voices.memory)
            self.result.resident = max(self.result.resident, _resident() - start)
            time.sleep(QUIET_INTERVAL)
        stop.set()
        for thread in threads:
            thread.join()

    def _calls(self, voices: Voices, stop: threading.Event, seed: int) -> None:
        """Call, stream and cancel until the stop: low numbers far more often than high ones, and never the voice that is measured."""
        random = np.random.default_rng([seed, len(self.result.latencies["alone"])])
        kinds: tuple[_Kind, ...] = (self._call, self._stream, self._cancel)
        while not stop.is_set():
            name, which = f"v{1 + int((self.load.voices - 1) * random.random() ** 3)}", int(random.integers(len(self._mels)))
            kind = kinds[int(random.choice(3, p=[0.6, 0.25, 0.15]))]
            self._count(self._outcome(name, which, partial(kind, voices, name, self._mels[which])))

    def _call(self, voices: Voices, name: str, mel: Mel) -> Audio:
        audio: Audio = voices[name].submit(mel).result(LOST)
        return audio

    def _stream(self, voices: Voices, name: str, mel: Mel) -> Audio:
        pieces = (mel[:, at : at + 13] for at in range(0, mel.shape[1], 13))
        return np.concatenate(list(voices[name].stream(pieces)))

    def _cancel(self, voices: Voices, name: str, mel: Mel) -> Audio:
        future = voices[name].submit(mel)
        future.cancel()
        audio: Audio = future.result(LOST)
        return audio

    def _flood(self, voices: Voices, stop: threading.Event, _: int) -> None:
        """Keep many requests of one voice waiting."""
        waiting: deque[Future[Audio]] = deque()
        while not stop.is_set() or waiting:
            if not stop.is_set():
                waiting.append(voices["v1"].submit(self._mels[2]))
            if len(waiting) >= WAITING or stop.is_set():
                self._count(self._outcome("v1", 2, partial(waiting.popleft().result, LOST)))

    def _changes(self, voices: Voices, stop: threading.Event, _: int) -> None:
        """Replace, remove and add voices until the stop."""
        while not stop.wait(1 / self.load.changes_per_second):
            name = f"v{int(self._random.integers(2, self.load.voices))}"
            kind = "changed" if self._random.random() < 0.7 else "went"
            if not (self._folder / f"{name}.melrt").exists():
                kind = "came"
            if kind == "went":
                shutil.rmtree(self._folder / f"{name}.melrt")
                voices.unload(name)
            else:
                self._write(name)
            self.result.changes[kind] += 1

    def _write(self, name: str) -> None:
        """Write a voice with other weights, or replace it in one step."""
        self._number += 1
        with self._lock:
            self._versions.setdefault(name, []).append(self._number)
        path, files = self._folder / f"{name}.melrt", []
        for entry in self._bundle.find("onnx", precision="fp32"):
            data = _shifted(self._bundle.read(entry), _shift(self._number))
            files.append((Artifact.of(entry.name, data, "onnx", graph=entry.graph, precision="fp32"), data))
        if path.exists():
            Bundle.open(path).add_all(files)
        else:
            Bundle.create(path, replace(self._bundle.manifest, name=name), files)

    def _outcome(self, name: str, which: int, run: Callable[[], Audio]) -> str:
        try:
            audio = run()
        except (CancelledError, QueueFullError, TimeoutError) as error:
            return {"CancelledError": "cancelled", "QueueFullError": "refused"}.get(type(error).__name__, "lost")
        except BundleError:
            return "gone" if name not in (QUIET, "v1") else "failed"
        except MelrtError:
            return "failed"
        with self._lock:
            versions = list(self._versions[name])
        return "right" if any(self._matches(audio, which, version) for version in reversed(versions)) else "wrong"

    def _matches(self, audio: Audio, which: int, version: int) -> bool:
        expected = self._expected(which, version)
        return audio.shape == expected.shape and bool(np.abs(audio - expected).max() < TOLERANCE)

    def _compare_all(self, voices: Voices) -> None:
        """Compare each voice with its last version; a change must be seen within seconds."""
        for name in voices.names:
            until = time.monotonic() + CHANGE_SEEN
            while not (right := self._matches(voices[name](self._mels[0]), 0, self._versions[name][-1])) and time.monotonic() < until:
                time.sleep(0.1)
            self._count("right" if right else "stale")
        self.result.loads = sum(one.loads for one in voices.stats().values())

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.result.outcomes[outcome] += 1


def _shift(version: int) -> float:
    return STEP * (version % STEPS - STEPS / 2)


def _shifted(data: bytes, shift: float) -> bytes:
    """Return a graph with another bias before tanh."""
    model = onnx.load_model_from_string(data)
    (bias,) = (one for one in model.graph.initializer if one.name == "last.bias")
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.float32(shift)).tobytes()
    graph: bytes = model.SerializeToString()
    return graph


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
