"""The part that the models of a Triton repository share: loading a voice with its `serving.json`, and metrics for Triton."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.checks import check_fields, flag, number, whole
from melrt.errors import ClosedError, ConfigError, MelError, OverdueError, QueueFullError
from melrt.files.audio import SAMPLE_FORMATS, Encoding, SampleFormat
from melrt.files.output import Output
from melrt.planning.edges import ENDS, Ends
from melrt.scheduling.limits import Limits
from melrt.scheduling.policy_tuning import recorded_policy
from melrt.types import Mel
from melrt.vocoder import Options, Vocoder

BUNDLE = "voice.melrt"
SERVING = "serving.json"
# Windows that wait inside a model, in runs of all its workers: enough that no worker idles and that batches are full. Further requests
# wait in Triton's queue, which has a limit, a timeout and metrics.
RUNS_AHEAD = 4
METRICS_INTERVAL = 1.0
"""Seconds between two updates of the metrics."""
_COUNT = whole(1, 10**9)
_SECONDS = number(0, 1e9, above=True)


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """Settings with which a version of a voice is served; the content of its `serving.json`."""

    precision: str = "auto"
    """Precision, see `Vocoder.load`."""
    backend: str = "auto"
    """Backend, see `Vocoder.load`."""
    threads: int = 0
    """CPU threads of an instance; 0 for one per usable core."""
    sample_rate: int | None = None
    """Sample rate of the audio in Hz; None for the voice's own."""
    encoding: Encoding = "float32"
    """Encoding of the audio, see `melrt.Output`."""
    stream_encoding: Encoding | None = None
    """Encoding of the audio of streams; None for the same."""
    max_frames: int = 8192
    """Longest utterance in mel frames."""
    max_streams: int = 64
    """Streams that may be open at once in an instance; a further one is refused."""
    timeout: float = 30.0
    """Seconds that an admitted request may take, and that a stream may wait for its next frames."""
    max_queue: int = 64
    """Whole mels that may wait in Triton's queue; a further one is refused."""
    queue_timeout: float = 5.0
    """Longest wait in Triton's queue in seconds."""
    instances: int = 1
    """Processes that load the voice, on each GPU or on the CPU."""
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs to use; empty for Triton's choice, which is all GPUs, or the CPU if there is none."""
    trust: bool = False
    """Open engines that the server's user did not build, see `Vocoder.load`."""
    edges: Ends = "voice"
    """Ends of an utterance: `voice` as its project synthesizes them, `model` as PyTorch's forward."""

    def __post_init__(self) -> None:
        BackendChoice(precision=self.precision, backend=self.backend, threads=self.threads or None)
        rules = dict.fromkeys(("max_frames", "max_streams", "max_queue", "instances"), _COUNT)
        rules |= {
            "timeout": _SECONDS,
            "queue_timeout": _SECONDS,
            "trust": flag(),
            "edges": ENDS,
        }
        check_fields(self, rules, "Triton model")
        if len(set(self.gpus)) != len(self.gpus) or any(gpu < 0 for gpu in self.gpus):
            raise ConfigError(f"Triton model: gpus is {self.gpus}; it must be different whole numbers from 0 on.")
        for streams in (False, True):
            self.output(streams=streams)

    def output(self, *, streams: bool) -> Output:
        """Return the sample rate and encoding of whole mels or of streams."""
        return Output(self.sample_rate, self.stream_encoding or self.encoding if streams else self.encoding)

    def check_output(self, sample_rate: int) -> None:
        """Check that both models of a voice with this sample rate in Hz can have their outputs.

        Raises:
            ConfigError: The encoding does not support the rate, or cannot be streamed.
        """
        self.output(streams=False).check(sample_rate)
        try:
            self.output(streams=True).check(sample_rate, streamed=True)
        except ConfigError as error:
            raise ConfigError(f"{error} --stream-format gives the model for streams another encoding than --format.") from error

    def dumps(self) -> str:
        """Return the settings as the text of a `serving.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def loads(cls, text: str | bytes) -> ServingConfig:
        """Read the text of a `serving.json`.

        Raises:
            ConfigError: The text is damaged, or holds a value that is not allowed.
        """
        try:
            values = json.loads(text)
            return cls(**values | {"gpus": tuple(values["gpus"])})
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise ConfigError(f"{SERVING} is damaged: {error} Add the voice again with `melrt serve triton`.") from error


def open_voice(args: Mapping[str, str], *, streams: bool) -> tuple[Vocoder, ServingConfig, Output | None]:
    """Load the voice in the version folder of a model.

    Args:
        args: Arguments that Triton gives to `TritonPythonModel.initialize`.
        streams: True in the model for streams.

    Returns:
        The voice, its settings, and the output of each request; None for the voice's own.

    Raises:
        MissingExtraError: A package that encodes the output is not installed in the server's Python.
    """
    version = Path(args["model_repository"]) / args["model_version"]
    config = ServingConfig.loads((version / SERVING).read_bytes())
    on_gpu = args["model_instance_kind"] == "GPU"
    device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
    bundle = Bundle.open(version / BUNDLE)
    output = config.output(streams=streams)
    own = output.sample_rate in (None, bundle.manifest.spec.sample_rate) and output.encoding in SAMPLE_FORMATS
    sample_format = cast(SampleFormat, output.encoding) if own else "float32"  # converted on the GPU if there is one
    choice = BackendChoice(device, config.precision, config.backend, config.threads or None, sample_format, config.trust)
    backend = open_backend(bundle, choice)
    policy = recorded_policy(bundle, backend) or backend.policy
    limits = Limits(
        max_windows=RUNS_AHEAD * policy.workers * policy.batch,
        max_frames=config.max_frames,
        max_streams=config.max_streams,
        timeout=config.timeout,
        wait_timeout=config.timeout,
    )
    options = Options(policy=policy, limits=limits, edges=config.edges, sample_format=sample_format)
    vocoder = Vocoder(bundle, backend, options)
    vocoder(warm_up_mel(bundle), None if own else output)  # a server whose Python lacks a package fails here, not at a request
    return vocoder, config, None if own else output


def warm_up_mel(bundle: Bundle) -> Mel:
    """Return the bundle's probe mel, shape (M, T); it resembles speech, so the level check does not warn about it."""
    return np.ascontiguousarray(bundle.probe()[0][0])


def error_code(error: BaseException) -> str:
    """Return the name of Triton's code for an error, an attribute of `pb_utils.TritonError`."""
    if isinstance(error, MelError):
        return "INVALID_ARG"
    if isinstance(error, QueueFullError | OverdueError | ClosedError):
        return "UNAVAILABLE"
    return "INTERNAL"


class MetricsReporter:
    """Copies a vocoder's counters to Triton's metrics page, labeled with model, version and instance."""

    def __init__(self, pb_utils: Any, vocoder: Vocoder, args: Mapping[str, str]) -> None:
        """Register the metrics and start the thread that updates them.

        Args:
            pb_utils: Module `triton_python_backend_utils`, which only a model can import.
            vocoder: Vocoder whose counters are reported.
            args: Arguments that Triton gives to `TritonPythonModel.initialize`.
        """
        labels = {"model": args["model_name"], "version": args["model_version"], "instance": args["model_instance_name"]}
        self._vocoder = vocoder
        self._families = {}
        self._metrics = {}
        for name, text in _METRICS.items():
            kind = pb_utils.MetricFamily.GAUGE if name in _GAUGES else pb_utils.MetricFamily.COUNTER
            # Triton drops a metric when its family is garbage-collected.
            self._families[name] = pb_utils.MetricFamily(name=f"melrt_{name}", description=text, kind=kind)
            self._metrics[name] = self._families[name].Metric(labels=labels)
        self._reported = dict.fromkeys(_METRICS, 0.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="melrt-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Update the metrics a last time and end the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(METRICS_INTERVAL):
            self._report()
        self._report()

    def _report(self) -> None:
        stats = self._vocoder.stats()
        for name, metric in self._metrics.items():
            value = float(self._vocoder.open_streams if name == "open_streams" else getattr(stats, name))
            if name in _GAUGES:
                metric.set(value)
            else:
                metric.increment(value - self._reported[name])
            self._reported[name] = value


_GAUGES = ("queue_windows", "open_streams")
_METRICS = {
    "queue_windows": "Windows that wait in the model now",
    "open_streams": "Streams that are open now",
    "requests": "Admitted work: whole utterances, and pieces pushed to streams",
    "cancelled": "Requests cancelled by their caller",
    "failed": "Requests that ended with an error",
    "windows": "Windows computed",
    "runs": "Engine runs",
    "busy_seconds": "Seconds spent in engine runs, summed over all workers",
    "clipped": "Samples that the encoding clipped to full scale",
    "underruns": "Times that the audio of a stream came after playback had run out",
}
