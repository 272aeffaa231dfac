"""Results of a benchmark and their JSON form (described in `docs/benchmarks.md`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from melrt.errors import MelrtError
from melrt.files.atomic import atomic_write

SCHEMA = 1
MAX_REPORT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Latency:
    """Times and accuracy of one contender at one length and batch."""

    contender: str
    """Name of the contender."""
    seconds: float
    """Seconds of audio in each utterance."""
    batch: int
    """Utterances in one call."""
    milliseconds: tuple[float, ...]
    """Time of each counted round, in order."""
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    worst_ms: float
    real_time_factor: float
    """Median compute time divided by audio time."""
    times_real_time: float
    """Inverse of the real-time factor."""
    speedup: tuple[float, float, float]
    """Speedup over the baseline, which is the first contender: median of the rounds' ratios and the bounds of its 95 % interval."""
    device_ms: float | None
    """Median time by the GPU's clock, from mels on the GPU to audio there; None on a CPU, or if the contender takes host arrays only."""
    joules: float | None
    """Energy of one call by the GPU's counter; None where there is no counter."""
    max_abs: float
    """Largest difference of a sample from the reference."""
    snr_db: float
    """Energy of the reference divided by the energy of the difference, in dB."""
    correct: bool
    """True if the difference is within the limit of the contender's precision."""
    device_p90_ms: float | None = None
    """90th percentile of the time by the GPU's clock."""
    loop_ms: float | None = None
    """Time of a call in a loop without pauses, from mels to audio on the host; median of the rounds. None on a CPU."""
    loop_p90_ms: float | None = None
    """90th percentile of the rounds' time of a call in that loop."""
    first_ms: float | None = None
    """Time of the first call of this shape, in which many contenders compile, search for kernels or capture a graph."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of one contender on recorded speech."""

    contender: str
    """Name of the contender."""
    log_mel_error: float
    """Mean absolute difference of the log-mels of synthesis and recording, in the voice's logarithm; mean over recordings."""
    above_reference: float
    """Relative increase over the error of the reference, which is PyTorch or the FP32 graph; 0.02 is 2 %."""
    recordings: int
    """Number of recordings."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """Throughput and latency of one contender with several concurrent callers."""

    contender: str
    """Name of the contender."""
    concurrency: int
    """Concurrent callers."""
    seconds: float
    """Seconds of audio in each request."""
    requests: int
    """Requests of all callers together."""
    times_real_time: float
    """Seconds of audio per second, all callers together."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class StartUp:
    """Start-up times in fresh processes; medians."""

    contender: str
    """Name of the contender."""
    import_ms: float
    """Import of melrt, numpy included."""
    load_ms: float
    """First load in the process."""
    reload_ms: float
    """Second load in the process."""
    first_audio_ms: float
    """First second of audio after the first load."""
    peak_mib: float
    """Peak resident memory of the process."""
    device_mib: float
    """Memory taken on the first GPU between the start of the import and the end of the first audio; 0 without a GPU."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One operation of the deploy graph in one window."""

    name: str
    """Name that ONNX Runtime gives it."""
    kind: str
    """ONNX operator."""
    microseconds: float
    """Median of the runs."""
    share: float
    """Share of the time of all operations, 0 to 1."""
    mflop: float
    """Millions of operations; a multiply-add counts as two."""
    kilobytes: float
    """Size of input, weights and output, each counted once."""
    limit_microseconds: float
    """Shortest time the machine allows: the longer of the arithmetic at the measured GEMM rate and the bytes at the measured copy rate.

    0 for operations other than convolutions.
    """


@dataclass(frozen=True, slots=True)
class Skipped:
    """A contender that did not run."""

    contender: str
    """Name of the contender."""
    reason: str
    """Why it did not run, with the command that installs what it needs."""
    failed: bool = False
    """True if it was there and raised an exception."""

    @classmethod
    def failure(cls, contender: str, when: str, error: Exception) -> Skipped:
        """Describe a contender that raised an exception, by the first line of its text."""
        message = (str(error).strip().splitlines() or [repr(error)])[0][:200]
        return cls(contender, f"failed {when}: {type(error).__name__}: {message}", failed=True)


@dataclass(frozen=True, slots=True)
class Report:
    """All results of one run."""

    voice: str
    """Name of the voice."""
    command: str
    """Command line of the run."""
    environment: Mapping[str, Any]
    """Machine, versions and settings (`measure/environment.py`)."""
    rounds: int
    """Counted rounds."""
    latencies: tuple[Latency, ...] = ()
    throughputs: tuple[Throughput, ...] = ()
    qualities: tuple[Quality, ...] = ()
    """Quality on the recordings of `--speech`; empty without them."""
    start_ups: tuple[StartUp, ...] = ()
    streams: tuple[Mapping[str, Any], ...] = ()
    """`StreamRun` as a dictionary, one per number of streams (`inference/streams.py`)."""
    memory: tuple[Mapping[str, Any], ...] = ()
    """Peak memory of a synthesis: `seconds`, `kind` (`windows` or `whole`), `peak_mib`."""
    artifacts: tuple[Mapping[str, Any], ...] = ()
    """Files of the bundle: `file`, `kind`, `precision`, `bytes`."""
    layers: tuple[Layer, ...] = ()
    ceilings: Mapping[str, float] = field(default_factory=dict)
    """Limits of one thread, per second: `gflops` of a matrix product, `gbytes` of a copy within the cache."""
    skipped: tuple[Skipped, ...] = ()
    noise: str = ""
    """Figures that a busy machine made unreliable; empty if the machine was quiet."""

    def log_mel_of(self, contender: str) -> str:
        """Return the increase of a contender's log-mel error as text; empty if it was not measured."""
        return next((f"{100 * row.above_reference:+z.2f} %" for row in self.qualities if row.contender == contender), "")

    def save(self, path: Path) -> None:
        """Write the JSON file atomically."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA} | asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file that `save` wrote.

        Raises:
            MelrtError: The file is missing, or is not a report of this schema.
        """
        if not path.is_file() or path.stat().st_size > MAX_REPORT_BYTES:
            limit = MAX_REPORT_BYTES >> 20
            raise MelrtError(f"{path} is missing or larger than {limit} MiB; give the JSON file that `melrt bench --json` wrote.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            schema = values.pop("schema")
            if schema != SCHEMA:
                raise MelrtError(f"{path} has schema {str(schema)[:20]}; this melrt reads schema {SCHEMA}. Run `melrt bench --json` again.")
            for name, kind in _ROWS.items():
                values[name] = tuple(_row(kind, row) for row in values.get(name, ()))
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise MelrtError(f"{path} does not hold a report of `melrt bench` ({error}); give the file that its --json wrote.") from error


_ROWS: dict[str, Any] = {
    "latencies": Latency, "throughputs": Throughput, "qualities": Quality, "start_ups": StartUp, "layers": Layer, "skipped": Skipped,
}  # fmt: skip


def _row(kind: Any, values: Mapping[str, Any]) -> Any:
    lists = {f.name for f in fields(kind) if str(f.type).startswith("tuple")}
    return kind(**{name: tuple(value) if name in lists else value for name, value in values.items()})


def milliseconds(value: float | None) -> str:
    """Return a time as text, with three decimals below 10 ms; empty for None."""
    return "" if value is None else f"{value:.{1 if value >= 10 else 3}f}"


def speed(row: Latency, value: float | None) -> str:
    """Return how many times faster than real time a call of this row is if it takes so many milliseconds, as text; empty for None."""
    return f"{1000 * row.seconds * row.batch / value:,.0f}" if value else ""
