"""What the models of a Triton repository share: a voice opened as its `serving.json` says, and its counters on Triton's metrics page."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.errors import BackendError, BundleError, ClosedError, MelError, OverdueError, QueueFullError
from melrt.files.wav import SAMPLE_FORMATS, SampleFormat
from melrt.scheduling.limits import Limits
from melrt.scheduling.policy_tuning import recorded
from melrt.vocoder import Options, Vocoder

BUNDLE = "voice.melrt"
SERVING = "serving.json"
PROBE = "reference.mel.npy"
# Windows that wait inside a model, in runs of all its workers: enough that none idles and that runs are full. What is beyond
# waits in Triton's queue, where its limit, time-out and metrics are.
RUNS_AHEAD = 4
METRICS_EVERY = 1.0
"""Seconds between two looks at the counters."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How a version of a voice is served."""

    precision: str = "auto"
    """As for `Vocoder.load`."""
    backend: str = "auto"
    """As for `Vocoder.load`."""
    threads: int = 0
    """CPU threads of an instance; 0: one per usable core."""
    sample_format: SampleFormat = "float32"
    """Of the audio: `float32` or `int16`."""
    max_frames: int = 8192
    """Longest utterance, mel frames."""
    max_streams: int = 64
    """Streams open at once in an instance; a further one is refused."""
    timeout: float = 30.0
    """Seconds that an accepted request may take, and that a stream may wait for its next frames."""
    max_queue: int = 64
    """Whole mels waiting in Triton's queue; a further one is refused."""
    queue_timeout: float = 5.0
    """Longest wait there, seconds."""
    instances: int = 1
    """Processes with the voice, on each GPU, or on the CPU."""
    gpus: tuple[int, ...] = ()
    """GPUs to use; none: Triton's choice, which is all GPUs, or else the CPU."""

    def __post_init__(self) -> None:
        BackendChoice(precision=self.precision, backend=self.backend, threads=self.threads or None)
        if self.sample_format not in SAMPLE_FORMATS:
            raise BackendError(f"sample format is {self.sample_format!r}; it is one of {', '.join(SAMPLE_FORMATS)}.")
        for name in ("max_frames", "max_streams", "timeout", "max_queue", "queue_timeout", "instances"):
            if not 0 < (value := getattr(self, name)) < 1e9:
                raise BackendError(f"{name} is {value}; it lies above 0 and below 1e9.")
        if len(set(self.gpus)) != len(self.gpus) or any(gpu < 0 for gpu in self.gpus):
            raise BackendError(f"GPUs are {self.gpus}; each is a number from 0 on, and is named once.")

    def dumps(self) -> str:
        """The content of a `serving.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def loads(cls, text: str) -> Serving:
        """Read `dumps`'s form.

        Raises:
            BackendError: Not that, or a value that cannot be.
        """
        try:
            values = json.loads(text)
            return cls(**values | {"gpus": tuple(values["gpus"])})
        except (TypeError, KeyError, ValueError) as error:
            raise BackendError(f"{SERVING} is damaged: {error}") from error


def open_voice(args: Mapping[str, str]) -> tuple[Vocoder, Serving]:
    """The voice that lies beside a model's `model.py`.

    Args:
        args: As `TritonPythonModel.initialize` gets them.
    """
    version = Path(args["model_repository"]) / args["model_version"]
    serving = Serving.loads((version / SERVING).read_text())
    on_gpu = args["model_instance_kind"] == "GPU"
    device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
    bundle = Bundle.open(version / BUNDLE)
    backend = open_backend(
        bundle, BackendChoice(device, serving.precision, serving.backend, serving.threads or None, serving.sample_format)
    )
    policy = recorded(bundle, backend) or backend.policy
    limits = Limits(
        max_windows=RUNS_AHEAD * policy.workers * policy.batch,
        max_frames=serving.max_frames,
        max_streams=serving.max_streams,
        timeout=serving.timeout,
        wait_timeout=serving.timeout,
    )
    return Vocoder(bundle, backend, Options(policy=policy, limits=limits, sample_format=serving.sample_format)), serving


def probe_mel(bundle: Bundle) -> NDArray[np.float32]:
    """The bundle's probe mel (M, T), for a warm-up: speech-like, so that it is not taken for a mel of another convention."""
    for artifact in bundle.find("reference"):
        if artifact.file == PROBE:
            mel = np.load(io.BytesIO(bundle.read(artifact)), allow_pickle=False).astype(np.float32)
            return np.ascontiguousarray(mel.reshape(mel.shape[-2:]))
    raise BundleError(f"{bundle.path} has no {PROBE} to warm up with. Export it anew.")


def error_code(error: BaseException) -> str:
    """Triton's code for an error, by its name in `pb_utils.TritonError`."""
    if isinstance(error, MelError):
        return "INVALID_ARG"
    if isinstance(error, QueueFullError | OverdueError | ClosedError):
        return "UNAVAILABLE"
    return "INTERNAL"


class Meter:
    """Keeps a vocoder's counters on Triton's metrics page, labelled with model, version and instance."""

    def __init__(self, pb_utils: Any, vocoder: Vocoder, args: Mapping[str, str]) -> None:
        """Begin.

        Args:
            pb_utils: `triton_python_backend_utils`, which only a model can import.
            vocoder: Whose counters.
            args: As `TritonPythonModel.initialize` gets them.
        """
        labels = {"model": args["model_name"], "version": args["model_version"], "instance": args["model_instance_name"]}
        self._vocoder = vocoder
        self._families = {}
        self._metrics = {}
        for name, text in _METRICS.items():
            kind = pb_utils.MetricFamily.GAUGE if name in _GAUGES else pb_utils.MetricFamily.COUNTER
            # Triton keeps a metric only as long as its family is held
            self._families[name] = pb_utils.MetricFamily(name=f"melrt_{name}", description=text, kind=kind)
            self._metrics[name] = self._families[name].Metric(labels=labels)
        self._seen = dict.fromkeys(_METRICS, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="melrt-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Report a last time."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(METRICS_EVERY):
            self._report()
        self._report()

    def _report(self) -> None:
        stats = self._vocoder.stats()
        for name, metric in self._metrics.items():
            value = float(self._vocoder.open_streams if name == "open_streams" else getattr(stats, name))
            if name in _GAUGES:
                metric.set(value)
            else:
                metric.increment(value - self._seen[name])
            self._seen[name] = value


_GAUGES = ("queue_windows", "open_streams")
_METRICS = {
    "queue_windows": "Windows waiting in the model now",
    "open_streams": "Streams open now",
    "requests": "Utterances and pushes of streams let in",
    "cancelled": "Requests ended by their caller",
    "failed": "Requests ended by an error",
    "windows": "Windows computed",
    "runs": "Engine runs they took",
    "busy_seconds": "Time spent in engine runs, over all workers",
    "underruns": "Times that a stream's audio came after its listener had run out",
}
