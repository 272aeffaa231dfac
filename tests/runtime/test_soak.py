"""The soak: random requests from many threads, cancellations and failures among them; nothing is lost, swapped, leaked or stuck.

`MELRT_SOAK=10000 .venv/bin/python -m pytest tests/runtime/test_soak.py -s` is the long one.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from melrt import Vocoder
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.errors import BackendError
from melrt.planning.windows import Policy
from melrt.vocoder import Options
from melrt_export.checkpoints import load_checkpoint
from melrt_export.parity import FP32_MAX_ABS, probe_mel, pytorch_audio

REQUESTS = int(os.environ.get("MELRT_SOAK", "400"))
THREADS = 16
LONGEST = 2000
# A thirtieth of the runs fails; a batch that fails runs its windows one by one, so most requests still succeed.
FAIL_EVERY = 30
# From half of the run on, with one allocator arena: 10,000 requests that each leaked one short utterance's audio would be gigabytes.
ALLOWED_GROWTH_MIB = 32
M_ARENA_MAX = -8  # malloc.h


class Unreliable:
    """The real backend, but for the runs that it drops."""

    def __init__(self, bundle: Bundle) -> None:
        self.real = open_backend(bundle, BackendChoice(device="cpu"))
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
def test_soak(tiny_bundle_path: Path, tiny_checkpoint: Path) -> None:
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # each thread's own arena would keep what it once had, and hide a leak
    checkpoint = load_checkpoint(tiny_checkpoint)
    bundle = Bundle.open(tiny_bundle_path)
    noise = np.random.default_rng(0)
    mels = [probe_mel(bundle.manifest.spec, int(n), seed) for seed, n in enumerate((4, 5, 11, 40, 96, 97, 300, 777, 1311, LONGEST))]
    references = [pytorch_audio(checkpoint, mel[None])[0] for mel in mels]
    outcomes = {"right": 0, "failed": 0, "cancelled": 0, "wrong": 0}
    lock, memory = threading.Lock(), []

    def work(seed: int, requests: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(requests):
            which = int(random.integers(len(mels)))
            outcome = one(vocoder, mels[which], references[which], random)
            with lock:
                outcomes[outcome] += 1
                if sum(outcomes.values()) % max(REQUESTS // 10, 1) == 0:
                    memory.append(resident_mib())

    with Vocoder(bundle, Unreliable(bundle), Options()) as vocoder:
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
    assert memory[-1] - memory[len(memory) // 2] < ALLOWED_GROWTH_MIB


def one(vocoder: Vocoder, mel: np.ndarray, reference: np.ndarray, random: np.random.Generator) -> str:
    """A request of a random kind, and what became of it."""
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
