"""A backend for tests of the queue: its audio shows which frame it came from."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from melrt import Vocoder
from melrt.bundle import Bundle
from melrt.planning.windows import Policy
from melrt.scheduling.limits import Limits
from melrt.vocoder import Options

ONE = Policy(64, static=False, batch=1, workers=1)
BATCHED = Policy(64, static=True, batch=4, workers=1)


class Echo:
    """A backend whose samples equal the frame's first value. It waits while `go` is cleared, and fails on frames of 99."""

    name, device, precision = "echo", "cpu", "fp32"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.go = threading.Event()
        self.go.set()
        self.runs: list[tuple[int, int]] = []
        self.first: list[float] = []
        self.started = threading.Semaphore(0)

    def close(self) -> None:
        pass

    def run(self, graph: str, mel: np.ndarray) -> np.ndarray:
        self.runs.append((len(mel), mel.shape[2]))
        self.first.append(float(mel[0, 0, 0]))
        self.started.release()
        assert self.go.wait(10)
        if (mel == 99).any():
            raise RuntimeError("the planted failure")
        return np.repeat(mel[:, 0], 256, axis=1)


def load_echo(bundle: Path, policy: Policy, **limits: object) -> tuple[Vocoder, Echo]:
    echo = Echo(policy)
    return Vocoder(Bundle.open(bundle), echo, Options(limits=Limits(**limits))), echo


def constant(value: float, frames: int = 20) -> np.ndarray:
    return np.full((80, frames), value, np.float32)
