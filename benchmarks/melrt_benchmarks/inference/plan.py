"""Settings of the inference benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from melrt.backends.base import BACKENDS, PRECISIONS
from melrt.checks import check_fields, list_of, number, one_of, whole

MEASUREMENTS = ("time", "profile", "start-up", "memory", "streams")
# The others take minutes.
DEFAULT_MEASUREMENTS = MEASUREMENTS[:3]
# Limit of the number of values of each setting, far above any useful one.
MANY = 1000


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """Settings of one benchmark run."""

    voice: Path
    """The bundle."""
    checkpoint: Path | None = None
    """Checkpoint the voice was exported from; without it only melrt is measured."""
    precisions: tuple[str, ...] = ("fp32",)
    """Precisions of melrt."""
    backends: tuple[str, ...] = ("onnxruntime",)
    """Backends of melrt."""
    seconds: tuple[float, ...] = (1.0, 4.0, 10.0)
    """Lengths of audio."""
    batches: tuple[int, ...] = (1,)
    """Utterances in one call."""
    concurrency: tuple[int, ...] = ()
    """Numbers of concurrent callers; each requests utterances of the first length."""
    rounds: int = 15
    """Counted rounds; at least 3, because fewer have no spread."""
    threads: int = 1
    """CPU threads of every contender."""
    only: tuple[str, ...] = ()
    """Parts of names; a contender runs if its name contains one of them. Empty: all run."""
    speech: tuple[Path, ...] = ()
    """Recordings of the voice's speech, or folders of them, on which the log-mel error is measured; empty to leave it out."""
    measure: tuple[str, ...] = DEFAULT_MEASUREMENTS
    """`time` of the contenders, `profile` of the deploy graph's operations, `start-up` in fresh processes, peak `memory` by length,
    and real-time `streams` of the first backend and precision."""
    command: str = ""
    """Command line, for the report."""

    def __post_init__(self) -> None:
        check_fields(self, {
            "measure": list_of(one_of(*MEASUREMENTS), 1, MANY),
            "precisions": list_of(one_of(*PRECISIONS), 0, MANY), "backends": list_of(one_of(*BACKENDS), 0, MANY),
            "seconds": list_of(number(0, 7200, above=True), 1, MANY), "batches": list_of(whole(1, 1024), 1, MANY),
            "concurrency": list_of(whole(1, 1024), 0, MANY), "rounds": whole(3, 1_000_000), "threads": whole(1, 4096),
        })  # fmt: skip

    @property
    def steps(self) -> int:
        """Calls of `on_step` in one run."""
        timed = 1 + len(self.seconds) * len(self.batches) + len(self.concurrency) + bool(self.speech)
        return sum(timed if one == "time" else 1 for one in {*self.measure})
