"""Soak test: random requests from many threads, some of which fail or are cancelled. No audio is lost, swapped, leaked or stuck.

`MELRT_SOAK=10000 .venv/bin/python -m pytest tests/runtime/test_soak.py -s` runs the long version.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.reference import FP32_MAX_ABS, speech_mel, whole_audio

from melrt import Vocoder
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.errors import BackendError
from melrt.planning.windows import Policy
from melrt.vocoder import Options

ROOT = Path(__file__).parents[2]
REQUESTS = int(os.environ.get("MELRT_SOAK", "208"))
THREADS = 16
LONGEST = 2000
# One run of thirty fails. The windows of a failed batch run again one by one, so most requests still succeed.
FAIL_EVERY = 30
# Allowed for the second half of the run. If each of 10,000 requests leaked the audio of a short utterance, the growth would be gigabytes.
# OpenVINO keeps buffers for every run at the same time, and what it prepared for the last lengths.
ALLOWED_GROWTH_MIB = {"onnxruntime": 32, "openvino": 128}
M_ARENA_MAX = -8  # malloc.h


class Unreliable:
    """The real backend, except that some runs fail."""

    def __init__(self, bundle: Bundle, backend: str) -> None:
        self.real = open_backend(bundle, BackendChoice(device="cpu", precision="fp32", backend=backend))
        self.name, self.device, self.precision = "unreliable", self.real.device, self.real.precision
        self.policy = Policy(96, static=True, batch=4, workers=2)
        self.runs = 0

    def close(self) -> None:
        self.real.close()

    def run(self, graph, mel: np.ndarray) -> np.ndarray:
        self.runs += 1
        if self.runs % FAIL_EVERY == 0:
            raise BackendError("the injected failure")
        return self.real.run(graph, mel)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


@pytest.mark.timeout(3600)
def test_random_requests_all_end_correctly(tiny_bundle_path: Path, backend: str) -> None:
    """In a process of its own, whose memory holds nothing of the other tests."""
    program = f"from pathlib import Path; from tests.runtime.test_soak import soak; soak(Path({str(tiny_bundle_path)!r}), {backend!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def soak(bundle_path: Path, backend: str) -> None:
    """Make the requests and compare what comes back."""
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # one allocator arena: an arena for each thread would keep freed memory and hide a leak
    bundle = Bundle.open(bundle_path)
    noise = np.random.default_rng(0)
    mels = [speech_mel(bundle, frames, seed) for seed, frames in enumerate((4, 5, 11, 40, 96, 97, 300, 777, 1311, LONGEST))]
    references = [whole_audio(bundle, mel) for mel in mels]
    outcomes = {"right": 0, "failed": 0, "cancelled": 0, "wrong": 0}
    lock, memory = threading.Lock(), []

    def work(seed: int, requests: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(requests):
            which = int(random.integers(len(mels)))
            outcome = run_request(vocoder, mels[which], references[which], random)
            with lock:
                outcomes[outcome] += 1
                if sum(outcomes.values()) % max(REQUESTS // 10, 1) == 0:
                    memory.append(resident_mib())

    with Vocoder(bundle, Unreliable(bundle, backend), Options()) as vocoder:
        seeds = noise.integers(1 << 30, size=THREADS)
        threads = [threading.Thread(target=work, args=(int(seed), REQUESTS // THREADS)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = vocoder.stats()
    print(outcomes, stats, [round(m) for m in memory])
    assert sum(outcomes.values()) == REQUESTS // THREADS * THREADS
    assert outcomes["wrong"] == 0
    assert min(outcomes["right"], outcomes["failed"], outcomes["cancelled"]) > 0
    assert (stats.queue_windows, stats.queue_requests) == (0, 0)
    assert memory[-1] - memory[len(memory) // 2] < ALLOWED_GROWTH_MIB[backend]


def run_request(vocoder: Vocoder, mel: np.ndarray, reference: np.ndarray, random: np.random.Generator) -> str:
    """Make a request of a random kind and return its outcome."""
    kind = random.choice(["whole", "stream", "cancel"], p=[0.6, 0.25, 0.15])
    try:
        if kind == "stream":
            step = int(random.integers(1, 400))
            audio = np.concatenate(list(vocoder.stream(mel[:, at : at + step] for at in range(0, mel.shape[1], step))))
        else:
            future = vocoder.submit(mel)
            if kind == "cancel":
                future.cancel()
            audio = future.result()
    except BackendError:
        return "failed"
    except CancelledError:
        return "cancelled"
    return "right" if audio.shape == reference.shape and np.abs(audio - reference).max() < FP32_MAX_ABS else "wrong"
