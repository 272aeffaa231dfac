"""What a benchmark gives, and its JSON (`docs/benchmarks.md` tells the fields)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from melrt.errors import MelrtError
from melrt.files.atomic import atomic_write

SCHEMA = 2
MAX_REPORT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Latency:
    """One contender on one shape of work."""

    contender: str
    seconds: float
    """Of audio, each utterance."""
    batch: int
    """Utterances in one call."""
    milliseconds: tuple[float, ...]
    """Of each counted round, in order."""
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    worst_ms: float
    real_time_factor: float
    """Median compute time over audio time."""
    times_real_time: float
    """Its inverse."""
    speedup: tuple[float, float, float]
    """Over the first contender: median of the rounds' ratios, and the bounds of its 95 % interval."""
    device_ms: float | None
    """Median by the GPU's own clock; None on a CPU."""
    joules: float | None
    """Of one call, by the GPU's counter; None where there is none."""
    max_abs: float
    """Largest difference of a sample from the reference."""
    snr_db: float
    """Energy of the reference over that of the difference, dB."""
    correct: bool
    """Whether that is within the limit of its precision."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """One contender under so many callers at once."""

    contender: str
    concurrency: int
    seconds: float
    """Of audio, each request."""
    requests: int
    times_real_time: float
    """Seconds of audio per second, all callers together."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class StartUp:
    """From nothing to sound, in a process of its own; medians."""

    contender: str
    import_ms: float
    load_ms: float
    """First load in the process."""
    reload_ms: float
    """Second load in the process."""
    first_audio_ms: float
    """First second of audio after the first load."""
    peak_mib: float
    """Of the process."""
    device_mib: float
    """Taken on the first GPU from before the import to after the first audio; 0 without one."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One operation of the deploy graph in one window."""

    name: str
    kind: str
    microseconds: float
    """Median of the runs."""
    share: float
    """Of all operations' time."""
    mflop: float
    """Two for each multiply-add."""
    kilobytes: float
    """Input, weights and output, each once."""
    limit_microseconds: float
    """The longer of its arithmetic at the measured GEMM rate and its bytes at the measured copy rate; 0 for what is no convolution."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A contender that did not run, and why."""

    contender: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything of one run."""

    voice: str
    command: str
    environment: Mapping[str, Any]
    rounds: int
    latencies: tuple[Latency, ...] = ()
    throughputs: tuple[Throughput, ...] = ()
    start_ups: tuple[StartUp, ...] = ()
    streams: tuple[Mapping[str, Any], ...] = ()
    memory: tuple[Mapping[str, Any], ...] = ()
    artifacts: tuple[Mapping[str, Any], ...] = ()
    layers: tuple[Layer, ...] = ()
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """Of one thread: `gflops` of a matrix product, `gbytes` of a copy within the cache, per second."""
    skipped: tuple[Skipped, ...] = ()
    noise: str = ""
    """What the machine's unrest makes uncertain; empty if it was quiet."""

    def save(self, path: Path) -> None:
        """Write the JSON; it appears whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA} | asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read `save`'s form.

        Raises:
            MelrtError: No such file, or not a report of this schema.
        """
        if not path.is_file() or path.stat().st_size > MAX_REPORT_BYTES:
            raise MelrtError(f"{path} is no file of at most {MAX_REPORT_BYTES >> 20} MiB; give the JSON that `melrt bench --json` wrote.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise MelrtError(f"{path} has schema {str(schema)[:20]}; this melrt reads {SCHEMA}: measure anew.")
            for name, kind in _ROWS.items():
                values[name] = tuple(_row(kind, row) for row in values[name])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise MelrtError(f"{path} is no report of `melrt bench` ({error}).") from error


_ROWS: dict[str, Any] = {
    "latencies": Latency, "throughputs": Throughput, "start_ups": StartUp, "layers": Layer, "skipped": Skipped,
}  # fmt: skip


def _row(kind: Any, values: Mapping[str, Any]) -> Any:
    lists = {f.name for f in fields(kind) if str(f.type).startswith("tuple")}
    return kind(**{name: tuple(value) if name in lists else value for name, value in values.items()})
